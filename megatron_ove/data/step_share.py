"""`StepShare`: one replica's part of a step, in numbers only: which samples, in which microbatch, at which patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.data.planner import MicrobatchPlan


@dataclass(frozen=True)
class StepShare:
    """n samples of a replica, microbatch by microbatch and inside one in plan order.

    Attributes:
        plan: of the whole step.
        num_microbatches: of this replica.
        places: [n] int64, the samples' places in the plan's arrays.
        microbatch: [n] int64, microbatch of each, counted on this replica.
        first_patch: [n] int64, where each begins in its microbatch.
    """

    plan: MicrobatchPlan
    num_microbatches: int
    places: np.ndarray
    microbatch: np.ndarray
    first_patch: np.ndarray

    @property
    def source_index(self) -> np.ndarray:
        return self.plan.source_index[self.places]

    @property
    def rows(self) -> np.ndarray:
        return self.plan.rows[self.places]

    @property
    def seeds(self) -> np.ndarray:
        return self.plan.seeds[self.places]

    @property
    def ordinals(self) -> np.ndarray:
        return self.plan.ordinals[self.places]

    @property
    def num_patches(self) -> np.ndarray:
        return self.plan.num_tokens[self.places]

    def of_microbatch(self, microbatch: int) -> np.ndarray:
        """Returns the samples, [b] int64 places among the n, of one of this replica's microbatches."""
        return np.flatnonzero(self.microbatch == microbatch)


def share_of(plan: MicrobatchPlan, data_rank: int, data_size: int) -> StepShare:
    """Returns a replica's part; microbatch j of the plan is the (j // data_size)-th of replica j % data_size."""
    mine = np.flatnonzero(plan.microbatch_index % data_size == data_rank)
    microbatch = plan.microbatch_index[mine] // data_size
    order = np.argsort(microbatch, kind="stable")
    places, microbatch = mine[order], microbatch[order]
    lengths = plan.num_tokens[places]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    is_first = np.diff(microbatch, prepend=-1) != 0
    base = np.repeat(begins[is_first], np.diff(np.append(np.flatnonzero(is_first), len(places))))
    return StepShare(plan, plan.num_microbatches // data_size, places, microbatch, begins - base)


def count_samples(plan: MicrobatchPlan, names: Sequence[str], data_size: int) -> dict[str, np.ndarray]:
    """Returns source -> [replicas, microbatches of a replica] int64: how many samples of it each microbatch has.

    Args:
        plan: of the step.
        names: of the sources, in the planner's order.
        data_size: replicas.
    """
    shape = (plan.num_microbatches // data_size, data_size)
    return {
        name: np.bincount(plan.microbatch_index[plan.source_index == index], minlength=plan.num_microbatches)
        .reshape(shape)
        .T
        for index, name in enumerate(names)
    }
