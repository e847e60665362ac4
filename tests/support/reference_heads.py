"""The definition of right for class-center heads: float64, dense, one sample and one label at a time.

Nothing here is shared with the package except the configuration object. Slow on purpose; autograd gives the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ove.config.objectives import PartialFCConfig


def dense_sample_losses(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    config: PartialFCConfig,
    classes_per_slot: Sequence[Tensor] | None = None,
) -> Tensor:
    """Loss of every sample: the mean over its valid label slots; 0 without one.

    Args:
        embeddings: [n, e] float64, not normalized.
        centers: [c, e] float64, the whole table, not normalized.
        labels: [n, k] drawn class ids, -1 = none.
        config: margin, scale, filter and treatment of co-positives.
        classes_per_slot: for each slot the class ids its softmax runs over; None = all classes.

    Returns:
        [n] float64.
    """
    cosines = normalize(embeddings, dim=1) @ normalize(centers, dim=1).T
    return torch.stack(
        [_sample_loss(cosines[i], labels[i].tolist(), config, classes_per_slot) for i in range(len(labels))]
    )


def _sample_loss(
    cosine: Tensor, labels: list[int], config: PartialFCConfig, classes_per_slot: Sequence[Tensor] | None
) -> Tensor:
    losses = []
    for slot, label in enumerate(labels):
        if label < 0:
            continue
        keep = torch.ones(len(cosine), dtype=torch.bool)
        if classes_per_slot is not None:
            keep = torch.zeros_like(keep).index_fill_(0, classes_per_slot[slot], True)
            assert keep[label], "the target must be among the active classes of its slot"
        keep[label] = False
        if config.co_positives == "masked":
            keep[[other for other in labels if other >= 0]] = False
        losses.append(_margin_loss(cosine[label], cosine[keep], config))
    return torch.stack(losses).mean() if losses else cosine.sum() * 0


def _margin_loss(target: Tensor, negatives: Tensor, config: PartialFCConfig) -> Tensor:
    if config.margin_type == "cosface":
        target = target - config.margin
    else:
        target = torch.cos(torch.arccos(target.clamp(-1 + 1e-6, 1 - 1e-6)) + config.margin)
    if config.interclass_filter < 1:
        suspicious = negatives > config.interclass_filter
        if config.interclass_filter_mode == "zero":
            negatives = torch.where(suspicious, 0.0, negatives)
        else:
            negatives = negatives[~suspicious]
    logits = config.logit_scale * torch.cat([target[None], negatives])
    return torch.logsumexp(logits, 0) - logits[0]
