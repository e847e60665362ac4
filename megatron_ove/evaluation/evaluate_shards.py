"""Retrieval figures of one encoder on one shard set, and the words they are reported in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_ove.convert.class_centers import ClassHead
from megatron_ove.errors import ConfigError
from megatron_ove.evaluation.embedding import EmbeddedSet
from megatron_ove.evaluation.retrieval import (
    cosine_scores,
    group_retrieval,
    label_retrieval,
    labels_to_relevant,
    mean_over_queries,
    sample_retrieval,
    without_self,
)


def evaluate_embeddings(
    embedded: EmbeddedSet,
    *,
    k: int,
    head: ClassHead | None = None,
    group_pattern: str | None = None,
) -> dict[str, dict[str, float]]:
    """Computes every figure that the data at hand allows.

    Args:
        embedded: embeddings, labels and keys of the samples.
        k: cut-off of rankings.
        head: adds "labels": sample -> its own labels by nearest class centers, and "samples": label -> the samples that
            carry it by nearness to its class center.
        group_pattern: regular expression whose first group, found in a sample's key, names what belongs together; adds
            "groups": sample -> the other samples of its group.

    Returns:
        Measure family -> figure -> value. "neighbours" is always there: labels shared with the nearest other samples.

    Raises:
        ConfigError: a pattern that fits no key, or labels beyond the class centers.
    """
    figures = {"neighbours": neighbour_label_overlap(embedded, k)}
    if head is not None:
        largest = int(embedded.labels.max())
        if largest >= len(head):
            raise ConfigError(
                f"the shard set has label {largest}, but the objective has only {len(head)} class centers; give the "
                "objective that was trained with these labels"
            )
        figures["labels"] = label_retrieval(embedded.embeddings, head, embedded.labels, k)
        figures["samples"] = sample_retrieval(embedded.embeddings, head, embedded.labels, k)
    if group_pattern is not None:
        figures["groups"] = group_retrieval(embedded.embeddings, group_names(embedded.keys, group_pattern), k)
    return figures


def neighbour_label_overlap(embedded: EmbeddedSet, k: int) -> dict[str, float]:
    """How many labels a sample shares with its `k` nearest others, as a share of the labels of both (Jaccard).

    "chance" is the same for all others instead of the nearest.
    """
    labels = embedded.labels
    relevant = labels_to_relevant(labels, max(1, int(labels.max()) + 1)).float()
    shared = relevant @ relevant.T
    size = relevant.sum(dim=1)
    overlap = shared / (size[:, None] + size[None, :] - shared)  # nan where both have no label
    scores = without_self(cosine_scores(embedded.embeddings, embedded.embeddings))
    count = len(embedded.keys)
    nearest = scores.argsort(dim=1, descending=True, stable=True)[:, : min(k, count - 1)]
    everyone = without_self(overlap)
    others = everyone[everyone != -float("inf")]
    return {
        f"label_overlap_at_{k}": mean_over_queries(overlap.gather(1, nearest)),
        "chance_label_overlap": mean_over_queries(others),
        "queries": count,
    }


def group_names(keys: Sequence[str], pattern: str) -> list[str]:
    """Returns the part of each key that `pattern`'s first group matches; a key without a match is its own group.

    Raises:
        ConfigError: not a regular expression, without a group, or fitting no key at all.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"group pattern {pattern!r} is not a regular expression ({error}); correct it") from error
    if expression.groups < 1:
        raise ConfigError(
            f"group pattern {pattern!r} has no (...) group to name what belongs together; write for example '^(.+)-'"
        )
    matches = [expression.search(key) for key in keys]
    if not any(matches):
        raise ConfigError(
            f"group pattern {pattern!r} fits none of the {len(keys)} keys, the first of which is '{keys[0]}'; "
            "correct it"
        )
    return [match.group(1) if match else key for match, key in zip(matches, keys, strict=True)]


def format_figures(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the figures as aligned lines of text."""
    rows = [
        (family, name.replace("_", " "), f"{value:.0f}" if name == "queries" else f"{value:.4f}")
        for family, values in figures.items()
        for name, value in values.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{family:<{widths[0]}}  {name:<{widths[1]}}  {value:>8}" for family, name, value in rows)
