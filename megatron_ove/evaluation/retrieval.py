"""Retrieval measures on plain tensors: recall, reciprocal rank, average precision, labels by class centers.

Everything ranks a gallery by a score matrix [q, g] against a boolean matrix of what is right. Ties keep gallery order.
A query with nothing right in the gallery has no score: it is `nan` per query and left out of means.

Shape letters: q queries, g gallery items, e embedding, c classes, L stored labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ove.convert.class_centers import ClassHead


def cosine_scores(queries: Tensor, gallery: Tensor) -> Tensor:
    """Returns [q, g] fp32: cosine of every query [q, e] with every gallery item [g, e]."""
    return F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T


def recall_at_k(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Share of a query's relevant items among its `k` best scored ones.

    Args:
        scores: [q, g], higher is nearer.
        relevant: [q, g] bool.
        k: how many of the best to look at; more than g means all.

    Returns:
        [q] fp32 in [0, 1]; nan where nothing is relevant.
    """
    hits = _ranked(scores, relevant)[:, :k].sum(dim=1)
    return hits / relevant.sum(dim=1)  # 0 / 0 = nan


def reciprocal_rank(scores: Tensor, relevant: Tensor) -> Tensor:
    """Returns [q] fp32: 1 / rank of the best scored relevant item; nan where nothing is relevant."""
    ranked = _ranked(scores, relevant)
    first = ranked.float().argmax(dim=1)  # argmax gives the first maximum
    return torch.where(ranked.any(dim=1), 1.0 / (first + 1), torch.nan)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Returns [q] fp32: mean over relevant items of the precision at their rank; nan where nothing is relevant.

    Source: Manning, Raghavan, Schuetze, Introduction to Information Retrieval, section 8.4.
    """
    ranked = _ranked(scores, relevant).float()
    ranks = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    precision = ranked.cumsum(dim=1) / ranks
    return (precision * ranked).sum(dim=1) / relevant.sum(dim=1)


def first_right(scores: Tensor, relevant: Tensor) -> Tensor:
    """Returns [q] fp32: 1 where the best scored item is relevant, else 0; nan where nothing is relevant."""
    best = relevant.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0].float()
    return torch.where(relevant.any(dim=1), best, torch.nan)


def other_samples(count: int) -> Tensor:
    """Returns [count] int64: for every sample another one, always the same; each is taken once."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def labels_to_relevant(labels: Tensor, num_classes: int) -> Tensor:
    """Returns [q, num_classes] bool: which classes are among a query's labels [q, L] int (-1 = none)."""
    relevant = torch.zeros(labels.shape[0], num_classes + 1, dtype=torch.bool, device=labels.device)
    # -1 goes to an extra column that is cut off again.
    relevant.scatter_(1, torch.where(labels < 0, num_classes, labels).long(), True)
    return relevant[:, :num_classes]


def same_group(query_groups: Sequence[str], gallery_groups: Sequence[str]) -> Tensor:
    """Returns [q, g] bool: whether a query and a gallery item carry the same group name."""
    index = {name: number for number, name in enumerate(dict.fromkeys([*query_groups, *gallery_groups]))}
    queries = torch.tensor([index[name] for name in query_groups])
    gallery = torch.tensor([index[name] for name in gallery_groups])
    return queries[:, None] == gallery[None, :]


def without_self(scores: Tensor) -> Tensor:
    """Returns scores [n, n] of a set with itself, the diagonal at -inf so that no item finds itself."""
    return scores.masked_fill(torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device), -torch.inf)


def label_retrieval(embeddings: Tensor, head: ClassHead, labels: Tensor, k: int) -> dict[str, float]:
    """How well the class centers nearest to an embedding are the sample's labels.

    Args:
        embeddings: [q, e], as the encoder puts them out.
        head: of c classes.
        labels: [q, L] int, -1 = none.
        k: cut-off of the recall.

    Returns:
        "recall_at_<k>", "mean_average_precision" and "first_right" (how often the nearest class is a label) over the
        queries with a label; each as "chance_..." for scores that belong to another sample, so that knowing which
        classes are frequent counts as chance; and "queries", how many there were.
    """
    scores = head.cosines(embeddings)
    relevant = labels_to_relevant(labels, len(head))

    def measure(scores: Tensor) -> dict[str, float]:
        return {
            f"recall_at_{k}": mean_over_queries(recall_at_k(scores, relevant, k)),
            "mean_average_precision": mean_over_queries(average_precision(scores, relevant)),
            "first_right": mean_over_queries(first_right(scores, relevant)),
        }

    return _with_chance(measure, scores, scores[other_samples(len(scores))], int(relevant.any(dim=1).sum()))


def sample_retrieval(embeddings: Tensor, head: ClassHead, labels: Tensor, k: int) -> dict[str, float]:
    """How well the samples nearest to a class center are those that carry the class: a word and its pages.

    Args:
        embeddings: [n, e], as the encoder puts them out.
        head: of c classes.
        labels: [n, L] int, -1 = none.
        k: cut-off of the recall.

    Returns:
        "recall_at_<k>" and "mean_average_precision" over the classes that some sample carries, each as "chance_..." for
        scores that belong to another sample, and "queries", how many such classes there are.
    """
    classes = labels[labels >= 0].unique()  # [q], sorted
    places = torch.searchsorted(classes, labels.contiguous()).where(labels >= 0, -1)
    relevant = labels_to_relevant(places, len(classes)).T  # [q, n]
    scores = head.of_classes(classes.long()).cosines(embeddings).T

    def measure(scores: Tensor) -> dict[str, float]:
        return {
            f"recall_at_{k}": mean_over_queries(recall_at_k(scores, relevant, k)),
            "mean_average_precision": mean_over_queries(average_precision(scores, relevant)),
        }

    return _with_chance(measure, scores, scores[:, other_samples(len(embeddings))], len(classes))


def group_retrieval(embeddings: Tensor, groups: Sequence[str], k: int) -> dict[str, float]:
    """How well a sample finds the other samples of its group (the same photograph, another cut of the same clip).

    Args:
        embeddings: [n, e], any length.
        groups: n group names.
        k: cut-off of "precision_at_<k>", the share of the k nearest that are of the same group.

    Returns:
        "recall_at_1" (share of samples whose nearest other sample is of the group), "mean_reciprocal_rank",
        "precision_at_<k>" (relative to what the group's size allows) and "queries", samples with a partner.
    """
    scores = without_self(cosine_scores(embeddings, embeddings))
    relevant = same_group(groups, groups) & ~torch.eye(len(groups), dtype=torch.bool)
    partners = relevant.sum(dim=1)
    precision = _ranked(scores, relevant)[:, :k].sum(dim=1) / partners.clamp(max=k)
    return {
        "recall_at_1": mean_over_queries(first_right(scores, relevant)),
        "mean_reciprocal_rank": mean_over_queries(reciprocal_rank(scores, relevant)),
        f"precision_at_{k}": mean_over_queries(precision),
        "queries": int((partners > 0).sum()),
    }


def mean_over_queries(values: Tensor) -> float:
    """Returns the mean of the values that are not nan; nan when there is none."""
    return float(values.nanmean())


def _with_chance(
    measure: Callable[[Tensor], dict[str, float]], scores: Tensor, others: Tensor, queries: int
) -> dict[str, float]:
    """Returns the figures of scores, those of scores that say nothing of their sample, and the number of queries."""
    chance = {f"chance_{name}": value for name, value in measure(others).items()}
    return {**measure(scores), **chance, "queries": queries}


def _ranked(scores: Tensor, relevant: Tensor) -> Tensor:
    """Returns [q, g] bool: `relevant` in order of falling score."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return relevant.gather(1, order)
