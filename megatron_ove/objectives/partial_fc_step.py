"""What a Partial-FC head knows about a step: found out on the host ahead of it, finished on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import Samples
from megatron_ove.heads.active_classes import ActiveRows, ChosenRows, NegativeDraw, find


@dataclass(frozen=True)
class CoPositives:
    """Decides what a sample's labels count in one another's class sets; tensors on the host.

    Attributes:
        is_drawn: [n, k] bool, whether a label is a negative of the step too.
        keys: [p] int64, ascending: row of the table * s + class set, for every label of the step.
        drawn_weight: what a drawn negative counts.
    """

    is_drawn: Tensor
    keys: Tensor
    drawn_weight: float


@dataclass(frozen=True)
class StepPlan:
    """A step, with tensors on the host; n counts the samples that meet the table, microbatch after microbatch.

    Attributes:
        draw: the step's negatives.
        chosen: this rank's active rows.
        active_share: of the whole table's rows.
        set_of_slot: [k] int64, class set that serves each slot.
        labels: [n, k] int64, table rows of the drawn labels, -1 = none.
        co_positives: None = a sample's other labels always count 1.
        rows: [n_own] int64, places of this replica's samples of its sources within their microbatches.
        counts: [replicas, microbatches] int64, samples of every replica.
        samples: of each microbatch, how many meet the table.
        own: of each microbatch, which of these are this replica's.
        samples_of: each microbatch's `samples`, by which `forward` knows it: its copy on a device has the same object.
    """

    draw: NegativeDraw
    chosen: ChosenRows
    active_share: float
    set_of_slot: Tensor
    labels: Tensor
    co_positives: CoPositives | None
    rows: Tensor
    counts: np.ndarray
    samples: list[int]
    own: list[slice]
    samples_of: Sequence[Samples]


@dataclass(frozen=True)
class MicrobatchPlan:
    """What `forward` needs to know about one microbatch; b counts the samples that meet the table.

    Attributes:
        rows: [b_own] int64, this replica's samples of the source within the microbatch.
        labels: [b, k] int64, table rows of the drawn labels, -1 = none.
        targets: [k, b] int64, place of each label among this rank's active rows, -1 = elsewhere.
        set_of_slot: [k] int64, class set that serves each slot.
        co_weights: [b, k, k] fp32, what label l counts in the class set of slot j; None = always 1.
        row_counts: [replicas] int64, samples of each replica.
        own: this replica's samples within the b.
        samples: of the microbatch; kept so that no other object gets their id.
    """

    rows: Tensor
    labels: Tensor
    targets: Tensor
    set_of_slot: Tensor
    co_weights: Tensor | None
    row_counts: np.ndarray
    own: slice
    samples: Samples


def plan_microbatches(
    plan: StepPlan, active: ActiveRows, first_row: int, device: torch.device
) -> dict[int, MicrobatchPlan]:
    """Brings a step to the device and cuts it into microbatches; waits for nothing.

    Args:
        plan: of the step.
        active: this rank's active rows, on the device.
        first_row: of this rank in the whole table.
        device: of the result.

    Returns:
        id of a microbatch's `samples` -> its plan.
    """
    labels, set_of_slot, rows = (
        tensor.to(device, non_blocking=True) for tensor in (plan.labels, plan.set_of_slot, plan.rows)
    )
    targets = active.positions_of(labels - first_row)
    co_weights: Sequence[Tensor | None] = [None] * len(plan.samples)
    if plan.co_positives is not None:
        co_weights = _co_weights(plan.draw, labels, set_of_slot, plan.co_positives).split(plan.samples)
    rows_of_batches = rows.split([own.stop - own.start for own in plan.own])
    labels_of_batches, targets_of_batches = labels.split(plan.samples), targets.split(plan.samples)
    return {
        id(samples): MicrobatchPlan(
            rows=rows_of_batches[index],
            labels=labels_of_batches[index],
            targets=targets_of_batches[index].T.contiguous(),
            set_of_slot=set_of_slot,
            co_weights=co_weights[index],
            row_counts=plan.counts[:, index],
            own=plan.own[index],
            samples=samples,
        )
        for index, samples in enumerate(plan.samples_of)
    }


def _co_weights(draw: NegativeDraw, labels: Tensor, set_of_slot: Tensor, co_positives: CoPositives) -> Tensor:
    """Returns [n, k, k] fp32: what label l of a sample counts in the class set of its slot j, as any other row does."""
    is_drawn, keys = (
        tensor.to(labels.device, non_blocking=True) for tensor in (co_positives.is_drawn, co_positives.keys)
    )
    drawn = is_drawn[..., None] & draw.membership(labels)  # [n, k, s]
    in_sets = labels[..., None] * draw.num_sets + torch.arange(draw.num_sets, device=labels.device)
    weights = (drawn * co_positives.drawn_weight).masked_fill_(find(keys, in_sets) >= 0, 1.0)
    return weights[..., set_of_slot].transpose(1, 2)
