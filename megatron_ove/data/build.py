"""From a configuration to a running `StepLoader`, after checking that data and configuration fit each other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron_ove.config.data import SourceConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.assembly import Collate
from megatron_ove.data.bad_samples import KnownBad
from megatron_ove.data.planner import planner_of
from megatron_ove.data.shard_fit import find_doubts, open_shard_sets
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.step_loader import PrepareStep, StepLoader
from megatron_ove.kinds import Kinds
from megatron_ove.shards.files import raise_file_limit
from megatron_ove.shards.shard_set import ShardSet

if TYPE_CHECKING:
    import torch

    from megatron_ove.parallel.topology import ParallelTopology

__all__ = ["build_loader", "build_source", "open_shard_sets"]

logger = logging.getLogger(__name__)


def build_loader(
    config: TrainConfig,
    topology: ParallelTopology,
    *,
    start_step: int,
    known_bad: KnownBad | None = None,
    collate: Collate | None = None,
    prepare: PrepareStep | None = None,
    last_stage_has_pixels: bool = False,
) -> StepLoader:
    """Opens every source and starts loading.

    Args:
        config: the run.
        topology: this process's place in it.
        start_step: first step that will be asked for.
        known_bad: samples that count as unreadable without being tried.
        collate, prepare, last_stage_has_pixels: see `StepLoader`.

    Raises:
        DataError: shard sets that cannot be used; one sentence a line.
        ConfigError: shard sets that do not fit the configuration; every mistake, one sentence a line.
    """
    raise_file_limit()
    shard_sets = open_shard_sets(config)
    if topology.is_first_stage and topology.tensor_rank == topology.data_rank == 0:  # rank 0
        for sentence in find_doubts(config, shard_sets, counts_samples=False):
            logger.warning("%s", sentence)
    sources = [
        build_source(
            name,
            source,
            shard_sets[name],
            kinds=config.kinds,
            patch_size=config.encoder.patch_size,
            device=topology.device,
            num_threads=config.data.num_threads,
        )
        for name, source in config.data.sources.items()
    ]
    planner = planner_of(config, sources, data_size=topology.data_size)
    return StepLoader(
        planner,
        sources,
        topology,
        patch_size=config.encoder.patch_size,
        prefetch_steps=config.data.prefetch_steps,
        read_threads=config.data.read_threads,
        run_dir=config.run_dir,
        start_step=start_step,
        end_step=config.train.num_steps,
        known_bad=known_bad,
        collate=collate,
        prepare=prepare,
        last_stage_has_pixels=last_stage_has_pixels,
    )


def build_source(
    name: str,
    config: SourceConfig,
    shards: ShardSet,
    *,
    kinds: Kinds,
    patch_size: int,
    device: torch.device,
    num_threads: int,
) -> DataSource:
    """Returns the source that turns `shards` into patches as `config` says.

    Args:
        name: name in the configuration.
        config: its section.
        shards: opened shard set of the kind that it reads.
        kinds: of the run.
        patch_size: p.
        device: where pictures are decoded.
        num_threads: decoding threads.
    """
    return kinds.sources[config.kind].build(
        name, config, shards=shards, patch_size=patch_size, device=device, num_threads=num_threads
    )
