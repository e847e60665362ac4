"""The encoder's sharded state: written under one layout, read under another, bit-equal; keys are layout-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.model.encoder import VisionEncoder, build_encoder_chunks
from megatron_ove.model.parameter_names import global_name
from megatron_ove.parallel.topology import initialize_topology
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_encoder_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp2_uneven": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_last_stage": 1}),
    "pp3_uneven": (3, {"pipeline_model_parallel_size": 3, "num_layers_in_first_stage": 2}),
}
SAVED_SEED, OTHER_SEED = 1, 2


def build(parallel: dict[str, Any], *seeds: int) -> list[list[VisionEncoder]]:
    topology = initialize_topology(ParallelConfig(**parallel), seed=0)
    return [build_encoder_chunks(tiny_encoder_config(), topology, dtype=torch.float32, seed=seed) for seed in seeds]


def sharded(chunks: list[VisionEncoder]) -> dict[str, Any]:
    # Chunks of one rank share key names (layers are stacked over the whole model), so each is a sub-dict.
    return {f"chunk{index}": chunk.sharded_state_dict("model.") for index, chunk in enumerate(chunks)}


def save(rank: int, world_size: int, folder: str, parallel: dict[str, Any]) -> set[str]:
    state = sharded(*build(parallel, SAVED_SEED))
    CheckpointManager(folder, keep=1, verify="sizes").save(1, {**state, "step": 1})
    return {tensor.key for chunk in state.values() for tensor in chunk.values()}


def load(rank: int, world_size: int, folder: str, parallel: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (loaded, as initialised with the saved seed) of every parameter of this rank."""
    chunks, fresh = build(parallel, OTHER_SEED, SAVED_SEED)
    manager = CheckpointManager(folder, keep=1, verify="sizes")
    path = manager.latest()
    assert path is not None
    loaded = manager.load(path, {**sharded(chunks), "step": 0})
    result = {}
    for index, (chunk, wanted) in enumerate(zip(chunks, fresh, strict=True)):
        state = {name.removeprefix("model."): value for name, value in loaded[f"chunk{index}"].items()}
        chunk.load_state_dict(state)
        for (name, got), (_, expected) in zip(chunk.named_parameters(), wanted.named_parameters(), strict=True):
            result[global_name(name, chunk.layer_offset)] = (got.detach(), expected.detach())
    return result


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        *[("tp2_sp", "one"), ("one", "tp2_pp2"), ("tp2_sp", "pp2_vpp2"), ("pp2", "tp2_sp")],
        *[("pp2_uneven", "one"), ("pp2_vpp2", "pp2_uneven"), ("pp2_uneven", "pp3_uneven"), ("pp3_uneven", "pp2")],
    ],
)
def test_state_is_read_under_another_layout(tmp_path: Path, writer: str, reader: str) -> None:
    keys = set().union(*run_distributed(save, LAYOUTS[writer][0], str(tmp_path), LAYOUTS[writer][1]))
    assert keys == EXPECTED_KEYS
    names: set[str] = set()
    for result in run_distributed(load, LAYOUTS[reader][0], str(tmp_path), LAYOUTS[reader][1]):
        for name, (got, expected) in result.items():
            assert torch.equal(got, expected), name
            names.add(name)
    assert "decoder.layers.3.mlp.linear_fc2.weight" in names and "head.probe" in names


_LAYER_KEYS = [
    *(f"self_attention.linear_qkv.{kind}" for kind in ("weight", "bias", "layer_norm_weight", "layer_norm_bias")),
    *(f"self_attention.linear_proj.{kind}" for kind in ("weight", "bias")),
    *(f"mlp.linear_fc1.{kind}" for kind in ("weight", "bias", "layer_norm_weight", "layer_norm_bias")),
    *(f"mlp.linear_fc2.{kind}" for kind in ("weight", "bias")),
]
_HEAD_KEYS = [
    *("probe", "norm.weight", "attention.in_proj_weight", "attention.in_proj_bias"),
    *(f"{module}.{kind}" for module in ("attention.out_proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
]
# Layers are one stacked tensor per parameter, named as Transformer Engine's layers name them.
EXPECTED_KEYS = {
    "model.patch_embed.weight",
    *(f"model.{norm}.{kind}" for norm in ("layernorm_pre", "decoder.final_layernorm") for kind in ("weight", "bias")),
    *(f"model.decoder.layers.{name}" for name in _LAYER_KEYS),
    *(f"model.head.{name}" for name in _HEAD_KEYS),
}
