"""What the encoder hands to objectives, what an objective returns, and what a model chunk returns to the schedule.

Dataclasses, not tuples: megatron-core's `Float16Module` flattens tuples, and a varying tuple length hides mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VisionFeatures:
    """Encoder output on the last pipeline stage; replicated over tensor-parallel ranks.

    Attributes:
        tokens: [P, 1, h], after the final norm; rows `cu_seqlens[-1]..P` are padding.
        pooled: [b, h], attention-pooled, not normalized.
        cu_seqlens: [b + 1] int32, on the CPU.
    """

    tokens: Tensor
    pooled: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class LossTerms:
    """What one objective makes of one microbatch.

    Attributes:
        loss_sum: scalar fp32, sum over this replica's items; differentiable.
        metrics: name -> (sum, count), both detached scalars.
    """

    loss_sum: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepOutput:
    """Weighted loss of one microbatch over all objectives.

    Attributes:
        loss: scalar fp32, sum over objectives of scale * loss_sum; differentiable.
        metrics: "<objective>/<metric>" -> (sum, count), detached; "<objective>/loss" is always there.
    """

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]
