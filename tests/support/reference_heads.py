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
    weights: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Loss of every sample: the mean over its valid label slots; 0 without one.

    Args:
        embeddings: [n, e] float64, not normalized.
        centers: [c, e] float64, the whole table, not normalized.
        labels: [n, k] drawn class ids, -1 = none.
        config: margin, scale, filter and treatment of co-positives.
        weights: [k, c] factor of each class's exponential in the softmax of each slot, 0 = not in it; or for each slot
            the class ids that count 1; None = all 1.

    Returns:
        [n] float64.
    """
    cosines = normalize(embeddings, dim=1) @ normalize(centers, dim=1).T
    if weights is None:
        weights = torch.ones(labels.shape[1], len(centers))
    elif not isinstance(weights, Tensor):
        weights = torch.stack([torch.zeros(len(centers)).index_fill_(0, classes, 1) for classes in weights])
    weights = weights.double()
    return torch.stack([_sample_loss(cosines[i], labels[i].tolist(), config, weights) for i in range(len(labels))])


def center_dense(x: Tensor, groups: Sequence[Sequence[int]], is_labelled: Tensor) -> Tensor:
    """Takes from every labelled row of x [n, e] the mean of those of its group; rows of no group stay as they are."""
    rows = list(x)
    for group in groups:
        labelled = [index for index in group if is_labelled[index]]
        for index in labelled:
            rows[index] = x[index] - torch.stack([x[other] for other in labelled]).mean(0)
    return torch.stack(rows)


def _sample_loss(cosine: Tensor, labels: list[int], config: PartialFCConfig, weights: Tensor) -> Tensor:
    losses = []
    for slot, label in enumerate(labels):
        if label < 0:
            continue
        factors = weights[slot].clone()
        assert factors[label] == 1, "the target must be among the active classes of its slot, and count once"
        factors[label] = 0
        if config.co_positives == "masked":
            factors[[other for other in labels if other >= 0]] = 0
        losses.append(_margin_loss(cosine[label], cosine[factors > 0], factors[factors > 0], config))
    return torch.stack(losses).mean() if losses else cosine.sum() * 0


def _margin_loss(target: Tensor, negatives: Tensor, factors: Tensor, config: PartialFCConfig) -> Tensor:
    """-log of the target's share; negatives and their factors are [m]."""
    if config.margin_type == "cosface":
        target = target - config.margin
    elif config.margin_type == "arcface":
        target = torch.cos(torch.arccos(target.clamp(-1 + 1e-6, 1 - 1e-6)) + config.margin)
    else:
        assert config.combined_margin is not None
        multiplier, added, subtracted = config.combined_margin
        target = torch.cos(multiplier * torch.arccos(target.clamp(-1 + 1e-6, 1 - 1e-6)) + added) - subtracted
    if config.interclass_filter < 1:
        suspicious = negatives > config.interclass_filter
        if config.interclass_filter_mode == "zero":
            negatives = torch.where(suspicious, 0.0, negatives)
        else:
            negatives, factors = negatives[~suspicious], factors[~suspicious]
    logits = torch.cat([config.logit_scale * target[None], config.logit_scale * negatives + factors.log()])
    return torch.logsumexp(logits, 0) - logits[0]


def dense_label_ranks(embeddings: Tensor, centers: Tensor, labels: Tensor) -> list[dict[int, int]]:
    """Rank of every label of every sample among all classes, counted from 1; ties as `heads/label_ranks.py` says.

    Args:
        embeddings: [n, e] float64, not normalized.
        centers: [c, e] float64, the whole table, not normalized.
        labels: [n, L] class ids, -1 = none; a class may be there twice.

    Returns:
        n times label -> rank.
    """
    cosines = normalize(embeddings, dim=1) @ normalize(centers, dim=1).T
    ranks = []
    for cosine, row in zip(cosines, labels.tolist(), strict=True):
        own = sorted({label for label in row if label >= 0}, key=lambda label: -float(cosine[label]))
        others = torch.ones(len(centers), dtype=torch.bool).index_fill_(0, torch.tensor(own, dtype=torch.int64), False)
        ranks.append(
            {label: place + int((cosine[others] > cosine[label]).sum()) for place, label in enumerate(own, start=1)}
        )
    return ranks


def dense_average_precision(ranks: Sequence[int], num_classes: int) -> float:
    """Average precision of one sample, from going through the whole ranking place by place."""
    right, found, total = set(ranks), 0, 0.0
    for place in range(1, num_classes + 1):
        if place in right:
            found += 1
            total += found / place
    return total / len(right)
