"""From a configuration to a running `StepLoader`, after checking that data and configuration fit each other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_ove.config.data import SourceConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.assembly import Collate
from megatron_ove.data.bad_samples import KnownBad
from megatron_ove.data.planner import planner_of
from megatron_ove.data.shard_fit import find_doubts, open_shard_sets
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.step_loader import PrepareStep, StepLoader
from megatron_ove.errors import MegatronOveError
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
    is_main = topology.is_first_stage and topology.tensor_rank == topology.data_rank == 0  # rank 0
    shard_sets = _open_for_all(config, is_main=is_main)
    if is_main:
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


def _open_for_all(config: TrainConfig, *, is_main: bool) -> dict[str, ShardSet]:
    """Opens every source; only rank 0 looks at the shard files, and its error is everybody's. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return open_shard_sets(config)
    found: list[Any] = [None, {}]
    if is_main:
        try:
            found[1] = open_shard_sets(config)
        except MegatronOveError as error:
            found[0] = error
    shared = [found[0]]
    dist.broadcast_object_list(shared, src=0)
    if shared[0] is not None:
        raise type(shared[0])(str(shared[0]), on_every_rank=True)
    return found[1] if is_main else open_shard_sets(config, looks_at_shards=False)


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
