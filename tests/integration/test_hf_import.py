"""HuggingFace folder -> checkpoint -> HuggingFace folder, bit for bit; runs that start from it; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ove.checkpoint.initialize import find_start
from megatron_ove.cli.main import main
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint
from megatron_ove.convert.class_centers import load_class_head
from megatron_ove.convert.encoder_inference import load_encoder_for_inference
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.convert.hf_export import export_checkpoint
from megatron_ove.convert.hf_folder import write_hf_folder
from megatron_ove.convert.hf_import import import_pretrained
from megatron_ove.errors import CheckpointError
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.build_model import build_model_chunks, parameter_names
from megatron_ove.training.start_weights import StartWeights
from tests.support.distributed import run_distributed
from tests.support.hf_models import reference_with_busy_weights
from tests.support.run_checkpoints import load_in_layout
from tests.support.tiny import tiny_encoder_config
from tests.support.tiny_run import NUM_CLASSES, check, tiny_config, write_config, write_tiny_sources

CONFIG = tiny_encoder_config(patch_size=14, rope_temporal_size=16)


def write_pretrained(folder: Path, config: EncoderConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Path:
    state = {name: tensor.to(dtype) for name, tensor in reference_with_busy_weights(config).state_dict().items()}
    return write_hf_folder(folder, state, to_hf_config(config, image_size=140, dtype=dtype), model_card="# test\n")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pretrained(tmp_path_factory.mktemp("pretrained") / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_head", [True, False])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, use_head: bool) -> None:
    config = tiny_encoder_config(use_head=use_head, layer_norm_epsilon=1e-5, rope_theta=5000.0)
    source = write_pretrained(tmp_path / "source", config, dtype)
    result = export_checkpoint(import_pretrained(source, tmp_path / "checkpoint"), tmp_path / "result")
    assert (result / "config.json").read_text() == (source / "config.json").read_text()
    before, after = load_file(source / "model.safetensors"), load_file(result / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype == dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    assert f"Imported from {source}" in (result / "README.md").read_text()


def test_command(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "checkpoint"
    assert main(["convert", "import", "--source", str(pretrained), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with pytest.raises(
        CheckpointError, match="no class centers of an objective 'a'; its objectives are none: it holds"
    ):
        load_class_head(output, "a")


def test_sharded_safetensors(pretrained: Path, tmp_path: Path) -> None:
    state = load_file(pretrained / "model.safetensors")
    folder, names = tmp_path / "sharded", sorted(state)
    folder.mkdir()
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text((pretrained / "config.json").read_text())
    one = encoder_state_from_checkpoint(import_pretrained(pretrained, tmp_path / "one"))[0]
    two = encoder_state_from_checkpoint(import_pretrained(folder, tmp_path / "two"))[0]
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("world_size", "pipeline", "dtype"),
    [
        pytest.param(
            4,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            torch.float32,
            marks=pytest.mark.full,
        ),
        (2, {}, torch.bfloat16),
    ],
)
def test_every_layout_can_start_from_it(
    pretrained: Path, tmp_path: Path, world_size: int, pipeline: dict[str, int], dtype: torch.dtype
) -> None:
    checkpoint = import_pretrained(pretrained, tmp_path / "checkpoint")
    layout = {"tensor_model_parallel_size": 2, **pipeline}
    wrong = run_distributed(load_in_layout, world_size, str(checkpoint), CONFIG, layout, dtype)
    assert wrong == [[]] * world_size


def test_a_run_starts_with_it(pretrained: Path, tmp_path: Path) -> None:
    checkpoint = import_pretrained(pretrained, tmp_path / "checkpoint")
    sources = write_tiny_sources(tmp_path / "sources")
    data = tiny_config(sources, tmp_path / "run", init_from=str(checkpoint), checkpoint={"save_initial": True})
    data["train"] |= {"num_steps": 1}
    data["optim"]["schedule"]["warmup_steps"] = 0
    assert main(["train", str(write_config(data, tmp_path / "config.yaml"))]) == 0
    expected, _ = encoder_state_from_checkpoint(checkpoint)
    first, _ = encoder_state_from_checkpoint(tmp_path / "run/checkpoints/step_00000000")
    last, _ = encoder_state_from_checkpoint(tmp_path / "run/checkpoints/step_00000001")
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    # One step moves weights by about its learning rate: it started from these, not from random ones.
    changes = [(last[name] - expected[name]).abs().max().item() for name in expected]
    assert 0 < max(changes) < 0.05


def test_another_architecture_is_refused_as_a_start(
    pretrained: Path, topology: ParallelTopology, tmp_path: Path
) -> None:
    checkpoint = import_pretrained(pretrained, tmp_path / "checkpoint")
    data = tiny_config(dict.fromkeys(NUM_CLASSES, "unused"), tmp_path / "run", init_from=str(checkpoint))
    data["encoder"] = {**CONFIG.model_dump(mode="json"), "num_layers": 2}
    config = check(data)
    chunks = build_model_chunks(config, topology, None)
    start = StartWeights(config, topology, chunks, None, parameter_names(chunks))
    with pytest.raises(CheckpointError, match=r"holds another encoder: encoder\.num_layers is 4 there and 2 here; set"):
        start.take()
    with pytest.raises(CheckpointError, match=r"init_from = \S+ cannot be used: it has no manifest\.json"):
        find_start(tmp_path, verify="full")
    assert find_start(checkpoint, verify="full") == checkpoint


@torch.no_grad()
def test_an_imported_encoder_can_be_used(pretrained: Path, topology: ParallelTopology, tmp_path: Path) -> None:
    checkpoint = import_pretrained(pretrained, tmp_path / "checkpoint")
    encoder, config = load_encoder_for_inference(checkpoint, topology=topology)
    assert config.hidden_size == CONFIG.hidden_size and not encoder.training
    state, _ = encoder_state_from_checkpoint(checkpoint)
    assert all(torch.equal(parameter, state[name]) for name, parameter in encoder.named_parameters())


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_FOLDERS = {
    "another model": (
        edit_config(model_type="clip"),
        r"describes a model of type 'clip', but only 'onevision_encoder' c",
    ),
    "rms norm": (
        edit_config(layer_norm_type="rms_norm"),
        r"has layer_norm_type = 'rms_norm', but this encoder has 'lay",
    ),
    "dropout": (
        edit_config(attention_dropout=0.1),
        r"has attention_dropout = 0\.1, but this encoder has 0\.0 only, so",
    ),
    "another activation": (
        edit_config(hidden_act="relu"),
        r"has hidden_act = 'relu', but this encoder has 'gelu' only",
    ),
    "impossible sizes": (
        edit_config(num_attention_heads=3),
        r"describes an encoder that cannot be built \(.*= 64 is not",
    ),
    "no temporal grid": (
        edit_config(rope_temporal_size=None),
        r"that cannot be built \(rope_temporal_size: Input should",
    ),
    "a misfit": (
        edit_config(intermediate_size=128),
        r"has encoder\.layers\.0\.mlp\.fc1\.weight of shape \[96, 64\] instead",
    ),
    "a missing tensor": (
        edit_weights(lambda state: state.pop("layernorm_pre.bias")),
        r"it misses layernorm_pre\.bias; use",
    ),
    "an unknown tensor": (
        edit_weights(lambda state: state.update(extra=torch.zeros(1))),
        r"the HuggingFace state does not fit this encoder configuration: it has unknown extra; use",
    ),
    "a damaged file": (cut_weights, r"model\.safetensors is damaged \(.*\); get the file again"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"holds no model\.safetensors, so its weights",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"holds no config\.json, so it is not a HuggingFace",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read \(Expecting"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_what_cannot_be_imported_gets_a_sentence(tmp_path: Path, case: str) -> None:
    damage, message = BAD_FOLDERS[case]
    source = write_pretrained(tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        import_pretrained(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
