"""Checkpoints with the content of a run's, written without training it, and read in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_ove.checkpoint.initialize import load_start
from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint
from megatron_ove.model.encoder import VisionEncoder, build_encoder_chunks
from megatron_ove.model.parameter_names import global_name
from megatron_ove.optim.optimizer import sharding_metadata
from megatron_ove.parallel.class_order import classes_of_rows
from megatron_ove.parallel.shard_range import shard_range
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology
from tests.support.tiny_run import NUM_CLASSES, check, tiny_config

SEED = 31
STEP = 20
PATCH = 14


def run_config(run_dir: Path | str, **sections: Any) -> dict:
    """A checked configuration as plain values, as checkpoints store it."""
    sources = {kind: f"shards/{kind}" for kind in NUM_CLASSES}
    # Weights large enough for attention and positions to matter.
    sections["encoder"] = {"initializer_range": 0.1, **sections.get("encoder", {})}
    return check(tiny_config(sources, run_dir, **sections)).model_dump(mode="json")


def class_table(num_classes: int) -> Tensor:
    """Returns the centers in the order of class ids."""
    return torch.randn(num_classes, 64, generator=torch.Generator().manual_seed(num_classes))


def encoder_sharded_state(chunks: list[VisionEncoder]) -> dict[str, Any]:
    return {
        f"chunk{index}": chunk.sharded_state_dict(prefix="model.", metadata=sharding_metadata())
        for index, chunk in enumerate(chunks)
    }


def move_off_the_start(chunks: list[VisionEncoder]) -> None:
    """Biases and norms get values that depend on nothing but their names' kind, so every layout agrees."""
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.dim() == 1:
                    parameter += 0.125 if name.endswith("weight") else 0.0625


def write_run_checkpoint(
    topology: ParallelTopology, run_dir: Path | str, *, dtype: torch.dtype = torch.float32, **sections: Any
) -> Path:
    """Writes step 20 of a tiny run whose encoder is that of SEED; collective over the topology.

    Args:
        topology: any layout.
        run_dir: folder of the run.
        dtype: of the weights.
        sections: of the configuration, merged one level deep.
    """
    config = run_config(run_dir, **sections)
    chunks = build_encoder_chunks(check(config).encoder, topology, dtype=dtype, seed=SEED)
    move_off_the_start(chunks)
    state: dict[str, Any] = {"model": encoder_sharded_state(chunks)}
    if topology.is_last_stage:
        size, rank = topology.tensor_size * topology.data_size, topology.class_group.rank()
        for kind, num_classes in NUM_CLASSES.items():
            start, stop = shard_range(num_classes, size, rank)
            classes = classes_of_rows(torch.arange(start, stop), num_classes)
            rows, key = class_table(num_classes)[classes], f"objectives.{kind}_labels.weight"
            shape = (num_classes, rows.shape[1])
            state[key] = ShardedTensor(key, rows, rows.dtype, tuple(rows.shape), shape, (start, 0), None)
    state |= {"step": STEP, "config": config, "train_state": {"step": STEP, "samples_seen": 8 * STEP}}
    manager = CheckpointManager(Path(run_dir) / "checkpoints", keep=3, verify="full")
    return manager.save(STEP, state)


def write_in_layout(rank: int, world_size: int, run_dir: str, layout: dict[str, Any]) -> str:
    """For `run_distributed`."""
    return str(write_run_checkpoint(initialize_topology(ParallelConfig(**layout), seed=0), run_dir))


def load_in_layout(
    rank: int, world_size: int, path: str, config: EncoderConfig, layout: dict[str, Any], dtype: torch.dtype
) -> list[str]:
    """For `run_distributed`: starts an encoder with the weights of a checkpoint.

    Returns the names of this rank's parameters that are not their part of the stored tensors.
    """
    topology = initialize_topology(ParallelConfig(**layout), seed=0)
    chunks = build_encoder_chunks(config, topology, dtype=dtype, seed=99)
    loaded = load_start(path, encoder_sharded_state(chunks), given=path)
    expected, _ = encoder_state_from_checkpoint(path)
    wrong = []
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict({name.removeprefix("model."): part for name, part in loaded[f"chunk{index}"].items()})
        for name, parameter in chunk.named_parameters():
            whole = expected[global_name(name, chunk.layer_offset)].to(dtype)
            if parameter.shape != whole.shape:
                whole = whole.chunk(topology.tensor_size, parameter.partition_dim)[topology.tensor_rank]
            if not torch.equal(parameter, whole):
                wrong.append(name)
    return wrong
