"""What a step's microbatches hold: packed by the same planner that a run uses.

Of the worst step, for memory: every page and clip counts with its `max_patches`. Of a usual one, for time: samples
count as they are stored, where there is a shard set. A test gives the plan of a real step instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.planner import MicrobatchPlan, planner_of
from megatron_ove.planning.layout import Layout
from megatron_ove.planning.stored_samples import StoredSamples, largest_samples

_PADDING_SEGMENT = 128


@dataclass(frozen=True)
class Workload:
    """One step.

    Attributes:
        num_microbatches: n, of one replica.
        tokens_per_microbatch: P.
        sample_counts: source -> [n, replicas] int64, samples in each microbatch.
        real_tokens: [n, replicas] int64, tokens without padding.
        sample_squares: [n, replicas] int64, sum of the samples' squared lengths.
        squared_lengths: the same with the segments that padding is cut into: what attention runs over.
    """

    num_microbatches: int
    tokens_per_microbatch: int
    sample_counts: dict[str, np.ndarray]
    real_tokens: np.ndarray
    sample_squares: np.ndarray
    squared_lengths: np.ndarray

    @property
    def num_samples(self) -> np.ndarray:
        """[n, replicas] int64, samples of all sources in each microbatch."""
        return sum(self.sample_counts.values(), np.zeros_like(self.real_tokens))

    def samples_of(self, objective: ObjectiveConfig) -> np.ndarray:
        """Returns [n, replicas] int64, samples that an objective sees in each microbatch."""
        return sum((self.sample_counts[source] for source in objective.sources), np.zeros_like(self.real_tokens))

    def items_of(self, objective: ObjectiveConfig) -> np.ndarray:
        """Returns [n, replicas] int64, embeddings of an objective's samples that meet its table."""
        return self.samples_of(objective) * objective.items_per_sample

    @property
    def padding_share(self) -> float:
        return 1 - float(self.real_tokens.sum()) / (self.real_tokens.size * self.tokens_per_microbatch)


def workload_of(plan: MicrobatchPlan, source_names: tuple[str, ...], data_size: int) -> Workload:
    """Counts what a planner's step holds.

    Args:
        plan: of the step.
        source_names: in the order of the configuration.
        data_size: replicas.
    """
    total = plan.num_microbatches
    shape = (total // data_size, data_size)

    def by_microbatch(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
        sums = np.bincount(places, weights=weights, minlength=total)
        return np.rint(sums).astype(np.int64).reshape(shape)  # microbatch j is the (j // replicas)-th of its replica

    bins, tokens = plan.microbatch_index, plan.num_tokens
    real = by_microbatch(bins, tokens)
    whole, rest = np.divmod(plan.tokens_per_microbatch - real, _PADDING_SEGMENT)
    counts = {
        name: by_microbatch(bins, (plan.source_index == index).astype(float)) for index, name in enumerate(source_names)
    }
    squares = by_microbatch(bins, tokens.astype(float) ** 2)
    padding = whole * _PADDING_SEGMENT**2 + rest**2
    return Workload(shape[0], plan.tokens_per_microbatch, counts, real, squares, squares + padding)


def assumed_workload(config: TrainConfig, layout: Layout) -> Workload:
    """Packs the first step of a run whose samples all are as large as they may be; sizes of a list or range are drawn.

    Raises:
        ConfigError: the global batch is too small for its sources.
    """
    planner = planner_of(config, largest_samples(config), data_size=layout.data)
    return workload_of(planner.plan(0), tuple(config.data.sources), layout.data)


def usual_workload(config: TrainConfig, layout: Layout, samples: StoredSamples) -> Workload:
    """Packs a step of usual size of the samples that are stored.

    Raises:
        ConfigError: a sample has more patches than a microbatch.
    """
    planner = planner_of(config, samples.sources, data_size=layout.data)
    return workload_of(planner.plan(samples.step), tuple(config.data.sources), layout.data)
