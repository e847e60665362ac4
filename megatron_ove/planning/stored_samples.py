"""What the samples of a run really hold: from the index of the shard sets that exist, for a plan's time and messages.

Memory does not follow from it: that is of the worst step. A bounded number of rows of the index is read, whatever the
size of a set, and no picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_ove.config.data import SourceConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.planner import MicrobatchPlan, PlannedSource, planner_of
from megatron_ove.data.sampler import draw_choice
from megatron_ove.data.sources.base import Segments
from megatron_ove.errors import DataError
from megatron_ove.kinds import Kinds

_ANY_SIZE = 2**20
"""Samples of an assumed source; only their number of patches matters."""
_MOST_STEPS, _MOST_SAMPLES = 15, 1 << 14
"""First steps of a run of which the middle one is planned with, and the samples that these may have together: reading
their rows from a cold network disk takes up to half a minute."""


@dataclass(frozen=True)
class LargestSamples:
    """A source whose samples all are as large as the configuration allows; sizes of a list or range are drawn."""

    name: str
    weight: float
    budgets: tuple[int, ...]
    size: int = _ANY_SIZE
    is_assumed: ClassVar[bool] = True

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return draw_choice(self.budgets, seeds, 0)

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        raise NotImplementedError("samples that are only assumed have no segments")


def largest_samples(config: TrainConfig) -> list[LargestSamples]:
    """Returns every source of a run with its samples at their largest size."""
    patch = config.encoder.patch_size
    return [
        LargestSamples(name, source.weight, source.list_budgets(patch)) for name, source in config.data.sources.items()
    ]


class _Remembering:
    """A source that counts the same samples once only: every layout of `plan --suggest` asks for the same step."""

    def __init__(self, source: PlannedSource) -> None:
        self.name, self.weight, self.size = source.name, source.weight, source.size
        self.is_assumed = getattr(source, "is_assumed", False)
        self._source = source
        self._counts: dict[bytes, np.ndarray] = {}

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        key = seeds.tobytes()  # two samples of a source never have the same
        if key not in self._counts:
            self._counts[key] = self._source.count_tokens(rows, seeds)
        return self._counts[key]

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        return self._source.segments(rows, seeds)


@dataclass(frozen=True)
class StoredSamples:
    """The sources of a run, and a step of usual size.

    Attributes:
        sources: in the order of the configuration.
        step: of the run's first ones that with the median number of patches.
        mean_patches: source -> patches of a sample, on average over the steps looked at.
        missing: source -> why its samples count at their largest size.
    """

    sources: Sequence[PlannedSource]
    step: int
    mean_patches: dict[str, float]
    missing: dict[str, str]


def look_at_samples(config: TrainConfig) -> StoredSamples:
    """Reads from the shard sets that are there how many patches samples have.

    Raises:
        ConfigError: a sample has more patches than a microbatch, or the global batch is too small for its sources.
    """
    sources: list[PlannedSource] = []
    missing: dict[str, str] = {}
    for one in largest_samples(config):
        source = config.data.sources[one.name]
        try:
            sources.append(_Remembering(_open(one.name, source, config.encoder.patch_size, config.kinds)))
        except DataError as error:
            sources.append(_Remembering(one))
            missing[one.name] = str(error).split("\n")[0]
    num_steps = max(1, min(_MOST_STEPS, _MOST_SAMPLES // config.train.global_batch_size, config.train.num_steps))
    planner = planner_of(config, sources, data_size=1)
    plans = [planner.plan(step) for step in range(num_steps)]
    order = np.argsort([int(plan.num_tokens.sum()) for plan in plans], kind="stable")
    return StoredSamples(sources, int(order[len(order) // 2]), _mean_patches(config, plans), missing)


def _open(name: str, source: SourceConfig, patch_size: int, kinds: Kinds) -> PlannedSource:
    import torch

    from megatron_ove.data.build import build_source
    from megatron_ove.shards.shard_set import ShardSet

    shards = ShardSet.open_all(source.paths)
    wanted = kinds.sources[source.kind].shard_kind
    if shards.info.kind != wanted:
        raise DataError(f"{source.where} holds samples of kind {shards.info.kind}, not {wanted}")
    return build_source(
        name, source, shards, kinds=kinds, patch_size=patch_size, device=torch.device("cpu"), num_threads=1
    )


def _mean_patches(config: TrainConfig, plans: Sequence[MicrobatchPlan]) -> dict[str, float]:
    index = np.concatenate([plan.source_index for plan in plans])
    tokens = np.concatenate([plan.num_tokens for plan in plans])
    return {name: float(tokens[index == i].mean()) for i, name in enumerate(config.data.sources) if (index == i).any()}
