"""What earlier versions stored is read by this one: runs go on, are exported and start others, shard sets open.

The files were made by `tests/golden/make_golden.py` with the version that its docstring names.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ove.checkpoint.compatibility import exactness_warnings
from megatron_ove.checkpoint.manager import read_common_state
from megatron_ove.config.upgrade import CONFIG_VERSION, upgrade_config
from megatron_ove.convert.exchange import exchange_of
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from tests.golden.make_golden import CLASSES, LAYOUTS, SAVED_STEP, SHAPES, config_of, losses_after, train
from tests.support.distributed import run_distributed
from tests.support.tiny_run import check

ARCHIVE = Path(__file__).parents[1] / "golden" / "golden.tar.xz"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "golden", filter="data")
    return tmp_path / "golden"


def saved(golden: Path, layout: str) -> Path:
    return golden / "runs" / layout / "checkpoints" / f"step_{SAVED_STEP:08d}"


def test_the_archive_is_small() -> None:
    assert ARCHIVE.stat().st_size < 1_000_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_as_it_did(layout: str, golden: Path) -> None:
    run_dir = golden / "runs" / layout
    run_distributed(train, 2, config_of(layout, golden / "shards", run_dir))
    expected = json.loads((golden / "figures.json").read_text())[layout]
    found = losses_after(run_dir)
    assert len(found) == len(expected) == 2
    for row, reference in zip(found, expected, strict=True):
        assert row == pytest.approx(reference, rel=1e-5)


def test_exports_of_a_run_and_of_what_was_imported_from_it_are_equal(golden: Path, tmp_path: Path) -> None:
    exported = []
    for number, checkpoint in enumerate((saved(golden, "dp2_distributed_optimizer"), golden / "imported")):
        folder = exchange_of(checkpoint).export(checkpoint, tmp_path / str(number), with_class_centers=number == 0)
        exported.append(load_file(folder / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys() and len(exported[0]) > 20
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    assert {file.stem for file in (tmp_path / "0" / "class_centers").iterdir()} == {
        f"{kind}_labels" for kind in CLASSES
    }


def start_from(rank: int, world_size: int, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the encoder's weights at the start of a run."""
    from megatron_ove.config.loader import config_from_dict
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.build_model import model_of
    from megatron_ove.training.trainer import Trainer

    config = config_from_dict(data, "golden")
    trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    trainer.loader.close()
    return {name: value.clone() for name, value in model_of(trainer.chunks[0]).encoder.named_parameters()}


def test_a_new_run_starts_from_each_of_them(golden: Path, tmp_path: Path) -> None:
    layout = "dp2_distributed_optimizer"
    data = {**config_of(layout, golden / "shards", tmp_path / "run"), "parallel": {"timeout_s": 60}}
    starts = (
        golden / "runs" / layout,
        golden / "imported",
        exchange_of(golden / "imported").export(golden / "imported", tmp_path / "export", with_class_centers=False),
    )
    found = [run_distributed(start_from, 1, {**data, "init_from": str(start)})[0] for start in starts]
    fresh = run_distributed(start_from, 1, data)[0]
    for weights in found:
        assert all(torch.equal(weights[name], found[0][name]) for name in fresh)
        assert not torch.equal(weights["patch_embed.weight"], fresh["patch_embed.weight"])


@pytest.mark.parametrize("kind", SHAPES)
def test_shard_sets_open(kind: str, golden: Path) -> None:
    path = golden / "shards" / kind
    assert validate_shard_set(path, deep=True) == []
    shards = ShardSet.open(path)
    assert len(shards) == SHAPES[kind]["num_samples"] and shards.info.num_classes == CLASSES[kind]


def test_stored_configurations_are_brought_to_the_present_form(golden: Path) -> None:
    stored = torch.load(saved(golden, "tp2") / "common.pt", weights_only=True)["config"]
    assert "config_version" not in stored and "kind" not in stored["encoder"]
    config = read_common_state(saved(golden, "tp2"))["config"]
    assert config["config_version"] == CONFIG_VERSION and config["encoder"]["kind"] == "onevision"
    assert upgrade_config(config, CONFIG_VERSION) == config
    now = check(config_of("tp2", golden / "shards", "run")).model_dump(mode="json")
    assert all(".path was " in warning for warning in exactness_warnings(config, now)), "only the place is another one"
