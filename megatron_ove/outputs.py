"""What the encoder hands to objectives, what an objective returns, and what a model chunk returns to the schedule.

Dataclasses, not tuples: megatron-core's `Float16Module` flattens tuples, and a varying tuple length hides mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisionFeatures:
    """Encoder output on the last pipeline stage; replicated over tensor-parallel ranks.

    Boundaries and grids are those of the tokens: an encoder that merges patches has fewer tokens than patches.

    Attributes:
        tokens: [T, 1, h], after the final norm; rows `cu_seqlens[-1]..T` are padding.
        cu_seqlens: [n + 1] int32 on the CPU, boundaries of the segments in the token dim.
        grids: [n, 3] int32 on the CPU, (t, h, w) tokens of a segment that is a full grid, else 0.
        sample: [n] int32 on the CPU, ascending: the sample of each segment.
        pooled: [n, h], attention-pooled, not normalized; None of an encoder without a pooling head.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    grids: Tensor
    sample: Tensor
    pooled: Tensor | None = None

    def sample_embeddings(self, num_samples: int) -> Tensor:
        """Returns [b, h], the pooled embedding of every sample: the mean over its segments.

        Raises:
            ValueError: the encoder has no pooling head.
        """
        if self.pooled is None:
            raise ValueError("the encoder has no pooling head, so its features have no embedding of a sample")
        return mean_of_segments(self.pooled, self.sample, num_samples)

    def anchor(self) -> Tensor:
        """Returns a 0 that depends on the encoder's output: a loss that starts from it is differentiable in every
        microbatch, also in one without any sample."""
        output = self.tokens if self.pooled is None else self.pooled
        return output[:0].sum(dtype=torch.float32)


def mean_of_segments(pooled: Tensor, sample: Tensor, num_samples: int) -> Tensor:
    """Returns the mean over the segments of each sample.

    Args:
        pooled: [n, h], one row a segment.
        sample: [n] int32 on the CPU, ascending: the sample of each.
        num_samples: b.

    Returns:
        [b, h]; `pooled` itself where every sample is one segment.
    """
    if len(sample) == num_samples and bool((sample == torch.arange(num_samples)).all()):
        return pooled
    places = sample.long()
    sums = pooled.new_zeros(num_samples, pooled.shape[1]).index_add(0, places.to(pooled.device), pooled)
    counts = torch.bincount(places, minlength=num_samples).clamp(min=1)
    return sums / counts.to(sums.device, sums.dtype)[:, None]


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
class Observed:
    """What an objective observed in a microbatch of held-out samples; not a tensor, which a schedule would empty.

    Attributes:
        value: anything.
    """

    value: Any


@dataclass(frozen=True)
class StepOutput:
    """Weighted loss of one microbatch over all objectives.

    Attributes:
        loss: scalar fp32, sum over objectives of scale * loss_sum; differentiable.
        metrics: "<objective>/<metric>" -> (sum, count), detached; "<objective>/loss" is always there.
    """

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]
