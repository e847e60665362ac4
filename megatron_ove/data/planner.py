"""What fills each microbatch of a step: the same plan on every rank, computed from (seed, step) without history.

A step takes exactly `global_batch_size` samples, whatever the number of ranks. Its samples are packed into token
budgets (packing.py); only the number of microbatches is rounded up to a multiple of the replicas, and then they are cut
to the fullest one. So the set of samples of a step, and every draw that belongs to one, is independent of how a run is
laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm
from typing import Protocol

import numpy as np

from megatron_ove.config.data import BlockOrder
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.packing import Budget, pack_samples
from megatron_ove.data.sampler import SourceSampler
from megatron_ove.data.sources.base import Segments
from megatron_ove.errors import ConfigError, DataError


class PlannedSource(Protocol):
    """What planning needs to know of a source."""

    @property
    def name(self) -> str:
        """Name in the configuration."""
        ...

    @property
    def weight(self) -> float:
        """Share of a step's samples, relative to the other sources."""
        ...

    @property
    def size(self) -> int:
        """Number of samples."""
        ...

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Returns the patches, [n] int64, of samples `rows` drawn with `seeds`, both [n] int64; decodes nothing."""
        ...

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        """Returns the segments of samples; not asked of a source that is only assumed."""
        ...


@dataclass(frozen=True)
class PlannedBudget:
    """Something besides patches that every microbatch has limited room for.

    Attributes:
        name: of the setting that limits it.
        capacity: of a microbatch.
        measure: (source, rows [n], seeds [n]) -> what each sample takes of it, [n] int64; decodes nothing.
        largest: name of a source -> the most that a sample can take of it, for plans of samples that are not there.
    """

    name: str
    capacity: int
    measure: Callable[[PlannedSource, np.ndarray, np.ndarray], np.ndarray]
    largest: Callable[[str], int]

    def sizes(self, source: PlannedSource, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Returns what samples of a source take, [n] int64; the most that they can of a source that is only assumed."""
        if getattr(source, "is_assumed", False):
            return np.full(len(rows), self.largest(source.name), dtype=np.int64)
        return self.measure(source, rows, seeds)


@dataclass(frozen=True)
class MicrobatchPlan:
    """One step: B samples, ordered by source and then ordinal, and the microbatch of each.

    Attributes:
        step: number of the step, from 0.
        tokens_per_microbatch: P, patches of every microbatch of the step, padding included; at most the budget.
        num_microbatches: M, over all replicas; microbatch j belongs to replica j % data_parallel_size.
        source_index: [B] int64.
        ordinals: [B] int64, how many samples of its source came before.
        rows: [B] int64, row in the source's index.
        seeds: [B] int64, seed of the sample's draws.
        num_tokens: [B] int64.
        microbatch_index: [B] int64 in 0 .. M - 1.
    """

    step: int
    tokens_per_microbatch: int
    num_microbatches: int
    source_index: np.ndarray
    ordinals: np.ndarray
    rows: np.ndarray
    seeds: np.ndarray
    num_tokens: np.ndarray
    microbatch_index: np.ndarray

    def samples_of(self, microbatch: int) -> np.ndarray:
        """Returns the samples, [b] int64 places in this plan's arrays, of a microbatch, in their order there."""
        return np.flatnonzero(self.microbatch_index == microbatch)

    def microbatches_of(self, data_rank: int, data_size: int) -> range:
        """Returns the microbatches of a replica."""
        return range(data_rank, self.num_microbatches, data_size)

    @property
    def padding_share(self) -> float:
        """Part of the step's patches that is padding."""
        return 1 - int(self.num_tokens.sum()) / (self.num_microbatches * self.tokens_per_microbatch)


_LENGTH_MULTIPLE = 64
"""A step's microbatches are cut to a multiple of this many patches: few different shapes, each good for kernels."""


def planner_of(config: TrainConfig, sources: Sequence[PlannedSource], *, data_size: int) -> MicrobatchPlanner:
    """Returns the planner of a run.

    Args:
        config: the run.
        sources: in the order of the configuration.
        data_size: replicas.

    Raises:
        ConfigError: a step is too small to hold every source's share.
    """
    parallel = config.parallel
    # megatron-core's interleaved schedule takes a replica's microbatches in groups of the number of stages.
    group = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1
    return MicrobatchPlanner(
        sources,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        microbatch_multiple=data_size * group,
        length_multiple=length_multiple_of(config),
        budgets=budgets_of(config),
        orders={name: source.order for name, source in config.data.sources.items()},
    )


def budgets_of(config: TrainConfig) -> list[PlannedBudget]:
    """Returns what microbatches of a run have limited room for besides patches."""
    return [
        budget
        for name, objective in config.objectives.items()
        for budget in config.kinds.objectives[objective.kind].budgets(config, name)
    ]


def length_multiple_of(config: TrainConfig) -> int | None:
    """Returns what the patches of microbatches are rounded up to; None = they always have as many as the budget."""
    return lcm(_LENGTH_MULTIPLE, config.token_multiple) if config.data.trim_padding else None


class MicrobatchPlanner:
    """Makes the plan of any step."""

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        *,
        seed: int,
        global_batch_size: int,
        tokens_per_microbatch: int,
        microbatch_multiple: int,
        length_multiple: int | None = None,
        budgets: Sequence[PlannedBudget] = (),
        orders: Mapping[str, BlockOrder | None] | None = None,
    ) -> None:
        """Prepares planning.

        Args:
            sources: in the order of the configuration.
            seed: of order and draws.
            global_batch_size: B, samples of a step.
            tokens_per_microbatch: budget, most patches of a microbatch.
            microbatch_multiple: the number of microbatches of a step is rounded up to a multiple of this; at least the
                number of replicas.
            length_multiple: a step's microbatches are cut to the fullest one, rounded up to a multiple of this but
                within the budget; None = they always have as many patches as the budget.
            budgets: what else microbatches have limited room for.
            orders: source -> order of its samples; fully random where there is none.

        Raises:
            ConfigError: a step is too small to hold every source's share.
        """
        self._sources = tuple(sources)
        self._samplers = [
            SourceSampler(seed, source.name, source.size, (orders or {}).get(source.name)) for source in self._sources
        ]
        self._batch_size = global_batch_size
        self._tokens = tokens_per_microbatch
        self._multiple = microbatch_multiple
        self._length_multiple = length_multiple or tokens_per_microbatch
        self._budgets = tuple(budgets)
        total = sum(Fraction(source.weight) for source in self._sources)
        self._shares = [Fraction(source.weight) / total for source in self._sources]
        self._largest = self._shares.index(max(self._shares))
        others = sum(ceil(s * global_batch_size) for i, s in enumerate(self._shares) if i != self._largest)
        if others > global_batch_size:
            raise ConfigError(
                f"train.global_batch_size = {global_batch_size} is too small for {len(self._sources)} sources, because "
                f"a step may hold {others} samples of all but the largest source; use at least {others}"
            )

    def plan(self, step: int) -> MicrobatchPlan:
        """Returns the plan of a step, counted from 0.

        Raises:
            ConfigError: a sample has more patches than a microbatch.
            DataError: a sample has none, because its index is damaged.
        """
        before, after = self.samples_before(step), self.samples_before(step + 1)
        parts = [np.arange(first, last, dtype=np.int64) for first, last in zip(before, after, strict=True)]
        rows = [sampler.rows(part) for sampler, part in zip(self._samplers, parts, strict=True)]
        seeds = [sampler.seeds(part) for sampler, part in zip(self._samplers, parts, strict=True)]
        tokens = [s.count_tokens(r, d) for s, r, d in zip(self._sources, rows, seeds, strict=True)]
        for source, chosen, count in zip(self._sources, rows, tokens, strict=True):
            if count.size and count.min() < 1:
                row = int(chosen[count.argmin()])
                raise DataError(
                    f"sample {row} of data.sources.{source.name} has {max(0, count.min())} patches by its index, so "
                    "the index is damaged; copy it again or write the shard set again"
                )
            if count.size and count.max() > self._tokens:
                raise ConfigError(
                    f"a sample of data.sources.{source.name} has {count.max()} patches, more than "
                    f"data.tokens_per_microbatch = {self._tokens}; raise the budget or make samples smaller"
                )
        num_tokens = np.concatenate(tokens).astype(np.int64)
        others = [self._measure(budget, rows, seeds) for budget in self._budgets]
        packing = pack_samples(num_tokens, capacity=self._tokens, multiple=self._multiple, others=others)
        length = -(-packing.longest // self._length_multiple) * self._length_multiple
        return MicrobatchPlan(
            step=step,
            tokens_per_microbatch=min(length, self._tokens),
            num_microbatches=packing.num_microbatches,
            source_index=np.repeat(np.arange(len(parts)), [part.size for part in parts]),
            ordinals=np.concatenate(parts),
            rows=np.concatenate(rows),
            seeds=np.concatenate(seeds),
            num_tokens=num_tokens,
            microbatch_index=packing.microbatch_index,
        )

    def _measure(self, budget: PlannedBudget, rows: Sequence[np.ndarray], seeds: Sequence[np.ndarray]) -> Budget:
        """Returns what a step's samples take of a budget.

        Raises:
            ConfigError: a sample takes more than a microbatch has.
        """
        parts = [budget.sizes(s, r, d) for s, r, d in zip(self._sources, rows, seeds, strict=True)]
        for source, part in zip(self._sources, parts, strict=True):
            if part.size and part.max() > budget.capacity:
                raise ConfigError(
                    f"a sample of data.sources.{source.name} takes {part.max()} of {budget.name}, more than its "
                    f"{budget.capacity} of a microbatch; raise it or make samples smaller"
                )
        return Budget(np.concatenate(parts).astype(np.int64), budget.capacity)

    def samples_before(self, step: int) -> list[int]:
        """Returns how many samples of each source all steps before `step` take; the sum is step * B.

        Every source but the largest has the floor of its exact share; the largest takes the rest, so counts never
        fall from one step to the next and stay within (number of sources) of the exact shares for ever.
        """
        total = step * self._batch_size
        counts = [floor(share * total) for share in self._shares]
        counts[self._largest] += total - sum(counts)
        return counts
