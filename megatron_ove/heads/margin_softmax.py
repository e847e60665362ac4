"""Margins, the filter for suspicious negatives, and the loss of a label slot: plain differentiable functions.

Everything here works on cosines that are already complete, so it is replicated and tiny; what is sharded and large is
in `sampled_softmax`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

# arccos has an infinite slope at +-1. Within this distance the margin is taken at the edge, with gradient 0.
_ARCCOS_EDGE = 1e-6
_NO_LOGIT = -1e30
LARGEST_FP32_SCALE = 72.0


@dataclass(frozen=True)
class MarginSoftmax:
    """The rule that turns cosines into a loss.

    Attributes:
        margin_type: cosface: cos - margin; arcface: cos(angle + margin); combined: cos(m1 * angle + m2) - m3; with the
            true gradient of arccos.
        margin: a cosine for cosface, radians for arcface; not used by combined.
        logit_scale: factor between cosine and logit.
        interclass_filter: negatives with a larger cosine are taken for unlabelled positives; >= 1 = no filter.
        interclass_filter_mode: zero: such a negative gets the logit 0, a constant; mask: it leaves the softmax.
        co_positives: what a sample's other labels of the step are to a label: negatives, or left out.
        combined_margin: (m1, m2, m3).

    Source: Wang et al., "CosFace", CVPR 2018; Deng et al., "ArcFace", CVPR 2019; the filter as in An et al.,
    "Unicom", ICLR 2023.
    """

    margin_type: Literal["cosface", "arcface", "combined"]
    margin: float
    logit_scale: float
    interclass_filter: float
    interclass_filter_mode: Literal["zero", "mask"]
    co_positives: Literal["negative", "masked"]
    combined_margin: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def target_logits(self, cosine: Tensor) -> Tensor:
        """Returns the target's logit after the margin, for cosines of any shape."""
        if self.margin_type == "cosface":
            return self.logit_scale * (cosine - self.margin)
        cosine = cosine.clamp(-1 + _ARCCOS_EDGE, 1 - _ARCCOS_EDGE)
        if self.margin_type == "combined":
            multiplier, added, subtracted = self.combined_margin
            return self.logit_scale * (torch.cos(multiplier * torch.arccos(cosine) + added) - subtracted)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        return self.logit_scale * (cosine * math.cos(self.margin) - sine * math.sin(self.margin))

    def suspicious(self, cosine: Tensor) -> Tensor | None:
        """Returns which negatives the filter takes out, bool; None when there is no filter."""
        return cosine > self.interclass_filter if self.interclass_filter < 1 else None

    @property
    def filtered_exponential(self) -> float:
        """e to the logit of a negative that the filter took out."""
        return 1.0 if self.interclass_filter_mode == "zero" else 0.0

    def negative_logits(self, cosine: Tensor) -> Tensor:
        """Returns the logits of negatives, for cosines of any shape."""
        logits = self.logit_scale * cosine
        suspicious = self.suspicious(cosine)
        filtered = 0.0 if self.interclass_filter_mode == "zero" else -math.inf
        return logits if suspicious is None else logits.masked_fill(suspicious, filtered)

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type in which e^logit and its sums are exact enough without subtracting the largest logit first.

        No cosine exceeds 1, so no logit exceeds the scale: e^72 times millions of classes still fits fp32.
        """
        return torch.float32 if self.logit_scale <= LARGEST_FP32_SCALE else torch.float64

    def sample_losses(
        self, negatives: Tensor, target_cosine: Tensor, labels: Tensor, co_weights: Tensor | None
    ) -> Tensor:
        """Returns each sample's loss: the mean over its valid slots, 0 without one.

        Slot j with label y has the loss log(e^negatives_j + sum over co-positives + e^target) - target.

        Args:
            negatives: [b, k], log-sum-exp of the logits of slot j's classes that are no label of the sample.
            target_cosine: [b, k], cosine with each label's center.
            labels: [b, k] int64, -1 = none.
            co_weights: [b, k, k] fp32, factor of label l's exponential as a class of slot j, 0 = it is none; None = 1.

        Returns:
            [b].
        """
        targets = self.target_logits(target_cosine)  # [b, k]
        others = [negatives[..., None]]
        if self.co_positives == "negative" and labels.shape[1] > 1:
            logits = self.negative_logits(target_cosine)[:, None, :].expand(-1, labels.shape[1], -1)  # [b, k, k]
            if co_weights is not None:
                logits = logits + co_weights.log()
            others.append(logits.masked_fill(~_is_other_class(labels), -math.inf))
        # Softplus of a difference, since log(e^others + e^target) - target has no digits left once the loss is small.
        # A finite floor, since the gradient of a log-sum-exp of nothing is not a number.
        others = torch.cat(others, dim=2).clamp(min=_NO_LOGIT).logsumexp(dim=2)
        losses = softplus(others - targets)
        is_valid = labels >= 0
        # Not a number shows also without a label: it would spoil the rows' gradient, and a loss names its samples.
        return losses.masked_fill(~is_valid & ~losses.isnan(), 0.0).sum(1) / is_valid.sum(1).clamp(min=1)


def _is_other_class(labels: Tensor) -> Tensor:
    """[b, k, k] bool: label l is a class other than that of slot j, and l its first slot, so that it counts once."""
    same = labels[:, :, None] == labels[:, None, :]
    is_first = ~torch.tril(same, diagonal=-1).any(2)
    return ~same & (is_first & (labels >= 0))[:, None, :]
