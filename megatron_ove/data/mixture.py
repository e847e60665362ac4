"""What fills each microbatch of a step: the same plan on every rank, computed from (seed, step) without history.

A step takes exactly `global_batch_size` samples, whatever the number of ranks. Its samples are packed first-fit
decreasing into token budgets; only the number of microbatches is rounded up to a multiple of the replicas. So the set
of samples of a step, and every draw that belongs to one, is independent of how a run is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Protocol

import numpy as np

from megatron_ove.data.sampler import SourceSampler
from megatron_ove.errors import ConfigError


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


@dataclass(frozen=True)
class MicrobatchPlan:
    """One step: B samples, ordered by source and then ordinal, and the microbatch of each.

    Attributes:
        step: number of the step, from 0.
        tokens_per_microbatch: budget P.
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
    ) -> None:
        """Prepares planning.

        Args:
            sources: in the order of the configuration.
            seed: of order and draws.
            global_batch_size: B, samples of a step.
            tokens_per_microbatch: budget P.
            microbatch_multiple: the number of microbatches of a step is rounded up to a multiple of this; at least the
                number of replicas. Microbatches that this adds are empty.

        Raises:
            ConfigError: a step is too small to hold every source's share.
        """
        self._sources = tuple(sources)
        self._samplers = [SourceSampler(seed, source.name, source.size) for source in self._sources]
        self._batch_size = global_batch_size
        self._tokens = tokens_per_microbatch
        self._multiple = microbatch_multiple
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
        """
        before, after = self.samples_before(step), self.samples_before(step + 1)
        parts = [np.arange(first, last, dtype=np.int64) for first, last in zip(before, after, strict=True)]
        rows = [sampler.rows(part) for sampler, part in zip(self._samplers, parts, strict=True)]
        seeds = [sampler.seeds(part) for sampler, part in zip(self._samplers, parts, strict=True)]
        tokens = [s.count_tokens(r, d) for s, r, d in zip(self._sources, rows, seeds, strict=True)]
        for source, count in zip(self._sources, tokens, strict=True):
            if count.size and count.max() > self._tokens:
                raise ConfigError(
                    f"a sample of data.sources.{source.name} has {count.max()} patches, more than "
                    f"data.tokens_per_microbatch = {self._tokens}; raise the budget or make samples smaller"
                )
        num_tokens = np.concatenate(tokens).astype(np.int64)
        bins = pack_first_fit_decreasing(num_tokens, self._tokens)
        used = int(bins.max()) + 1
        return MicrobatchPlan(
            step=step,
            tokens_per_microbatch=self._tokens,
            num_microbatches=-(-used // self._multiple) * self._multiple,
            source_index=np.repeat(np.arange(len(parts)), [part.size for part in parts]),
            ordinals=np.concatenate(parts),
            rows=np.concatenate(rows),
            seeds=np.concatenate(seeds),
            num_tokens=num_tokens,
            microbatch_index=bins,
        )

    def samples_before(self, step: int) -> list[int]:
        """Returns how many samples of each source all steps before `step` take; the sum is step * B.

        Every source but the largest has the floor of its exact share; the largest takes the rest, so counts never
        fall from one step to the next and stay within (number of sources) of the exact shares for ever.
        """
        total = step * self._batch_size
        counts = [floor(share * total) for share in self._shares]
        counts[self._largest] += total - sum(counts)
        return counts


def pack_first_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Packs items into bins: largest first, each into the first bin with room, a new bin when there is none.

    Items of one size fill the bins in order, so a whole size is placed at once: the cost follows the number of
    different sizes, not of items.

    Args:
        sizes: [n] int64, each 1 .. capacity.
        capacity: room of a bin.

    Returns:
        [n] int64, bin of each item; items of equal size keep their order.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the best number of bins, plus one.
    """
    result = np.empty(sizes.size, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    free = np.empty(0, dtype=np.int64)
    placed = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        room = free // size
        missing = count - int(room.sum())
        if missing > 0:
            new_bins = -(-missing // (capacity // size))
            free = np.concatenate([free, np.full(new_bins, capacity, dtype=np.int64)])
            room = free // size
        taken = np.diff(np.minimum(np.cumsum(room), count), prepend=0)
        result[order[placed : placed + count]] = np.repeat(np.arange(free.size), taken)
        free -= taken * size
        placed += count
    return result
