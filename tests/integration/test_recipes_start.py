"""Every shipped recipe that starts with the encoder of another run does so; and what `init_from` may name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megatron_ove.checkpoint.initialize import find_start
from megatron_ove.checkpoint.manager import read_common_state
from megatron_ove.cli.main import main
from megatron_ove.config.data import SizeRange
from megatron_ove.config.loader import load_config
from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint
from megatron_ove.errors import CheckpointError
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.distributed import repository_root, run_distributed
from tests.support.run_checkpoints import write_in_layout
from tests.support.tiny_run import NUM_CLASSES, write_tiny_sources

EXAMPLES = repository_root() / "examples"
RECIPES = {path: load_config(path) for path in sorted(EXAMPLES.glob("*/config*.yaml"))}
STARTED = [
    path
    for path, config in RECIPES.items()
    # Those that write have sets and tokenizers of their own, and tests of their own.
    if config.init_from is not None and {one.kind for one in config.objectives.values()} == {"partial_fc"}
]

SMALL = (
    *("encoder.hidden_size=64", "encoder.num_layers=2", "encoder.num_attention_heads=2", "encoder.ffn_hidden_size=96"),
    *("encoder.rope_temporal_size=16", "encoder.fp8='off'", "data.tokens_per_microbatch=48", "data.num_threads=1"),
    *("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1"),
    *("parallel.virtual_pipeline_model_parallel_size=null", "parallel.sequence_parallel=false"),
    *("train.num_steps=1", "train.global_batch_size=8", "optim.schedule.warmup_steps=0"),
    *("checkpoint.save_initial=true", "tracking.tensorboard=false"),
)


def train_small(path: Path, sources: dict[str, str]) -> None:
    """Trains one step of a recipe with a small encoder and small sets; everything else is as shipped."""
    config, settings = RECIPES[path], list(SMALL)
    for name, source in config.data.sources.items():
        settings.append(f"data.sources.{name}.path={sources[source.kind]}")
        if source.kind == "image":
            is_range = isinstance(source.image_size, SizeRange)
            settings.append(f"data.sources.{name}.image_size={'{min: 28, max: 42}' if is_range else 28}")
        else:
            settings.append(f"data.sources.{name}.max_patches=16")
        if source.kind == "video":
            settings.append(f"data.sources.{name}.num_frames=4")
    for name, objective in config.objectives.items():
        num_classes = NUM_CLASSES[config.data.sources[objective.source].kind]
        settings += [f"objectives.{name}.{setting}" for setting in (f"num_classes={num_classes}", "labels_per_step=4")]
        settings.append(f"objectives.{name}.sample_rate=1.0")
    assert main(["train", str(path), *(word for setting in settings for word in ("--set", setting))]) == 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("recipes")
    return folder, write_tiny_sources(folder / "sources")


def test_some_recipe_starts_with_another_run() -> None:
    assert len(STARTED) >= 3


@pytest.mark.parametrize("path", STARTED, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_a_recipe_starts_with_the_run_it_names(
    path: Path, workplace: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sources = workplace
    monkeypatch.chdir(folder)  # recipes name runs by relative paths
    config = RECIPES[path]
    assert config.init_from is not None
    before = Path(config.starts[0].path)
    if not before.exists():
        (first,) = (other for other, its in RECIPES.items() if its.run_dir == str(before))
        train_small(first, sources)
    train_small(path, sources)
    start, own = before / "checkpoints/step_00000001", Path(config.run_dir) / "checkpoints"
    assert read_common_state(own / "step_00000001")["initialized_from"] == str(start)
    left = ", ".join(f"objectives.{name}" for name in read_common_state(start)["config"]["objectives"])
    assert f"init_from = {before}: taken from {start}: encoder; left there: {left}." in (
        Path(config.run_dir) / "console.log"
    ).read_text().replace("\n", " ")
    expected, _ = encoder_state_from_checkpoint(start)
    found, _ = encoder_state_from_checkpoint(own / "step_00000000")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with a whole checkpoint and remains of others."""
    (path,) = run_distributed(write_in_layout, 1, str(tmp_path), {})
    for name in ("step_00000030", "step_00000040.tmp", "step_00000010.discarded"):
        (Path(path).with_name(name)).mkdir()
    return tmp_path


def test_a_run_its_checkpoints_folder_and_a_checkpoint_can_be_named(
    run_folder: Path, topology: ParallelTopology, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_folder / "checkpoints/step_00000020"
    for given in (run_folder, run_folder / "checkpoints", whole):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="megatron_ove"):
            assert find_start(given, verify="full") == whole
        warnings = [record.getMessage() for record in caplog.records]
        expected = [] if given == whole else [f"init_from = {given}: skipping step_00000040.tmp: it was not finished"]
        expected += [] if given == whole else [f"init_from = {given}: skipping step_00000030: it has no manifest.json"]
        assert len(warnings) == len(expected)
        assert all(line.startswith(start) for line, start in zip(warnings, expected, strict=True))


def test_what_holds_no_usable_checkpoint_gets_a_sentence(
    run_folder: Path, topology: ParallelTopology, tmp_path: Path
) -> None:
    advice = "name a run that has saved one, a finished checkpoint folder, or one made by megatron-ove convert import"
    (run_folder / "checkpoints/step_00000020/common.pt").write_text("damaged")
    with pytest.raises(CheckpointError) as error:
        find_start(run_folder, verify="full")
    assert error.value.on_every_rank and str(error.value).endswith(advice)
    assert str(error.value).startswith(
        f"init_from = {run_folder} cannot be used: step_00000040.tmp: it was not finished"
    )
    assert "; step_00000030: it has no manifest.json" in str(error.value)
    assert "; step_00000020: its file common.pt has 7 bytes instead of " in str(error.value)

    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for given, problem in {
        tmp_path / "empty": "it holds no checkpoint",
        tmp_path / "missing": "there is no such folder",
        tmp_path / "empty/checkpoints": "it has no manifest.json, which is written last and deleted first",
    }.items():
        with pytest.raises(CheckpointError) as error:
            find_start(given, verify="full")
        assert str(error.value) == f"init_from = {given} cannot be used: {problem}; {advice}"
