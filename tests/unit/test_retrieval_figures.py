"""Figures of a shard set: families, hand-computed overlaps, sentences for wrong input."""

from __future__ import annotations

import pytest
import torch

from megatron_ove.convert.class_centers import ClassHead
from megatron_ove.errors import ConfigError
from megatron_ove.evaluation.embedding import EmbeddedSet
from megatron_ove.evaluation.evaluate_shards import (
    evaluate_embeddings,
    format_figures,
    group_names,
    neighbour_label_overlap,
)

EMBEDDED = EmbeddedSet(
    keys=("cat_1", "cat_2", "dog_1"),
    embeddings=torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0]]),
    labels=torch.tensor([[0, 1], [1, 2], [2, -1]], dtype=torch.int32),
)


def test_neighbour_overlap_is_the_jaccard_of_the_nearest() -> None:
    figures = neighbour_label_overlap(EMBEDDED, k=1)
    # Nearest of 0 is 1 ({1} of {0, 1, 2}), of 1 is 0 (the same), of 2 is 1 ({2} of {1, 2}).
    assert figures["label_overlap_at_1"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    # Pairs: (0, 1) 1/3, (0, 2) 0, (1, 2) 1/2, each counted twice.
    assert figures["chance_label_overlap"] == pytest.approx((1 / 3 + 0 + 1 / 2) / 3)


def test_families_depend_on_what_is_given() -> None:
    assert set(evaluate_embeddings(EMBEDDED, k=1)) == {"neighbours"}
    figures = evaluate_embeddings(EMBEDDED, k=1, head=ClassHead(torch.randn(3, 2)), group_pattern="^([a-z]+)_")
    assert set(figures) == {"neighbours", "labels", "samples", "groups"}
    assert figures["groups"]["recall_at_1"] == 1.0
    assert figures["groups"]["queries"] == 2
    lines = format_figures(figures).splitlines()
    assert len(lines) == sum(len(values) for values in figures.values())
    assert lines[-1].split() == ["groups", "queries", "2"]


def test_labels_beyond_the_class_centers_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="has label 2, but the objective has only 2 class centers; give the objective"
    ):
        evaluate_embeddings(EMBEDDED, k=1, head=ClassHead(torch.randn(2, 2)))


def test_group_names_and_their_errors() -> None:
    assert group_names(["a-1", "b"], "^(.)-") == ["a", "b"]
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        group_names(["a"], "(")
    with pytest.raises(ConfigError, match=r"has no \(...\) group to name what belongs together"):
        group_names(["a"], "a")
    with pytest.raises(ConfigError, match="fits none of the 1 keys, the first of which is 'a'"):
        group_names(["a"], "(b)")
