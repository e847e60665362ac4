"""Retrieval measures against cases worked out by hand, and against a slow restatement on random input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.convert.class_centers import ClassHead
from megatron_ove.evaluation.retrieval import (
    average_precision,
    cosine_scores,
    first_right,
    group_retrieval,
    label_retrieval,
    labels_to_relevant,
    mean_over_queries,
    other_samples,
    recall_at_k,
    reciprocal_rank,
    same_group,
    sample_retrieval,
    without_self,
)

# Order by score of query 0: items 2, 0, 3, 1; of query 1: items 1, 2, 0, 3.
SCORES = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.0]])
RELEVANT = torch.tensor([[True, True, False, False], [False, True, True, False]])


def test_recall_at_k() -> None:
    assert recall_at_k(SCORES, RELEVANT, 1).tolist() == [0.0, 0.5]
    assert recall_at_k(SCORES, RELEVANT, 2).tolist() == [0.5, 1.0]
    assert recall_at_k(SCORES, RELEVANT, 99).tolist() == [1.0, 1.0]


def test_reciprocal_rank() -> None:
    assert reciprocal_rank(SCORES, RELEVANT).tolist() == [0.5, 1.0]


def test_average_precision() -> None:
    # Query 0: relevant at ranks 2 and 4: (1/2 + 2/4) / 2. Query 1: ranks 1 and 2: (1 + 1) / 2.
    assert average_precision(SCORES, RELEVANT).tolist() == pytest.approx([0.5, 1.0])


def test_query_without_relevant_items_is_nan_and_left_out_of_means() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    nothing[1, 1] = True
    for measure in (
        recall_at_k(SCORES, nothing, 1),
        reciprocal_rank(SCORES, nothing),
        average_precision(SCORES, nothing),
    ):
        assert math.isnan(measure[0])
        assert mean_over_queries(measure) == 1.0
    assert math.isnan(mean_over_queries(torch.tensor([torch.nan])))


def test_cosine_ignores_length_and_integer_types_are_fine() -> None:
    scores = cosine_scores(torch.tensor([[3, 4]]), torch.tensor([[30.0, 40.0], [-4.0, 3.0], [1.0, 0.0]]))
    assert scores.tolist()[0] == pytest.approx([1.0, 0.0, 0.6])


def test_labels_to_relevant_ignores_minus_one_and_repeats() -> None:
    relevant = labels_to_relevant(torch.tensor([[0, 2, 2], [-1, -1, -1], [3, -1, 0]]), 4)
    assert relevant.tolist() == [[True, False, True, False], [False] * 4, [True, False, False, True]]


def test_label_retrieval_by_class_centers() -> None:
    head = ClassHead(torch.eye(4) * 5)
    embeddings = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.0, 0.1, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]])
    labels = torch.tensor([[0, 2], [3, -1], [-1, -1]])
    figures = label_retrieval(embeddings, head, labels, k=1)
    assert figures["queries"] == 2
    assert figures["recall_at_1"] == pytest.approx((0.5 + 1.0) / 2)
    assert figures["mean_average_precision"] == pytest.approx(((1.0 + 2 / 3) / 2 + 1.0) / 2)
    assert figures["first_right"] == 1.0
    chance = label_retrieval(embeddings[other_samples(3)], head, labels, k=1)
    for name in ("recall_at_1", "mean_average_precision", "first_right"):
        assert figures[f"chance_{name}"] == chance[name]


def test_sample_retrieval_by_class_centers() -> None:
    embeddings = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.0, 0.1, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]])
    labels = torch.tensor([[0, 2], [3, -1], [-1, -1]], dtype=torch.int32)
    figures = sample_retrieval(embeddings, ClassHead(torch.eye(4) * 5), labels, k=1)
    # Classes 0 and 3 find their only sample first, class 2 finds it last; nothing carries class 1.
    assert figures["queries"] == 3
    assert figures["recall_at_1"] == pytest.approx(2 / 3)
    assert figures["mean_average_precision"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    chance = sample_retrieval(embeddings[other_samples(3)], ClassHead(torch.eye(4) * 5), labels, k=1)
    for name in ("recall_at_1", "mean_average_precision"):
        assert figures[f"chance_{name}"] == chance[name]
    nothing = sample_retrieval(embeddings, ClassHead(torch.eye(4)), torch.full((3, 2), -1), k=1)
    assert nothing["queries"] == 0 and math.isnan(nothing["recall_at_1"])


def test_a_head_takes_its_mean_from_embeddings_first() -> None:
    """As one trained with `centering: embeddings`: all embeddings lie far from the origin, and near one another."""
    mean = torch.tensor([30.0, 40.0, 50.0])
    head, embeddings = ClassHead(torch.eye(3) * 5, mean), mean + torch.eye(3)
    torch.testing.assert_close(head.cosines(embeddings), torch.eye(3))
    torch.testing.assert_close(head.of_classes(torch.tensor([2, 0])).cosines(embeddings), torch.eye(3)[:, [2, 0]])
    labels = torch.tensor([[0], [1], [2]])
    for measure in (label_retrieval, sample_retrieval):
        assert measure(embeddings, head, labels, k=1)["mean_average_precision"] == 1.0
    assert label_retrieval(embeddings, ClassHead(head.centers), labels, k=1)["first_right"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", [2, 3, 24, 1000])
def test_chance_looks_at_another_sample_each(count: int) -> None:
    others = other_samples(count)
    assert sorted(others.tolist()) == list(range(count))
    assert (others != torch.arange(count)).all()


def test_first_right() -> None:
    assert first_right(SCORES, RELEVANT).tolist() == [0.0, 1.0]
    assert math.isnan(first_right(SCORES, torch.zeros_like(RELEVANT))[0])


def test_knowing_which_classes_are_frequent_is_chance() -> None:
    """An encoder that gives every page the same embedding finds the frequent words: as often as chance does."""
    labels = torch.tensor([[0], [0], [0], [1]])
    head = ClassHead(torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0]]))
    figures = label_retrieval(torch.ones(4, 3), head, labels, k=1)
    assert figures["first_right"] == figures["chance_first_right"] == 0.75


def test_group_retrieval_never_finds_itself() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])
    figures = group_retrieval(embeddings, ["a", "a", "b", "b"], k=2)
    # Nearest others: 0 -> 1 (a, right), 1 -> 0 (a, right), 2 -> 3 (b, right), 3 -> 1 (a, wrong; its partner 2 is last).
    assert figures["recall_at_1"] == pytest.approx(3 / 4)
    assert figures["mean_reciprocal_rank"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4)
    assert figures["precision_at_2"] == pytest.approx(3 / 4)
    assert figures["queries"] == 4


def test_group_of_one_is_no_query() -> None:
    figures = group_retrieval(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), ["a", "b", "a"], k=1)
    assert figures["queries"] == 2
    assert figures["recall_at_1"] == 1.0


def test_same_group_and_without_self() -> None:
    assert same_group(["x", "y"], ["y", "z", "x"]).tolist() == [[False, False, True], [True, False, False]]
    assert without_self(torch.zeros(2, 2)).tolist() == [[-torch.inf, 0.0], [0.0, -torch.inf]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 1000), st.integers(1, 9))
def test_measures_equal_a_slow_restatement(queries: int, gallery: int, seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(queries, gallery, generator=generator)
    relevant = torch.rand(queries, gallery, generator=generator) < 0.4
    relevant[:, 0] = True
    recalls, precisions = recall_at_k(scores, relevant, k), average_precision(scores, relevant)
    for row in range(queries):
        order = sorted(range(gallery), key=lambda item: -float(scores[row, item]))
        right = [bool(relevant[row, item]) for item in order]
        assert float(recalls[row]) == pytest.approx(sum(right[:k]) / sum(right))
        at_hits = [sum(right[: rank + 1]) / (rank + 1) for rank in range(gallery) if right[rank]]
        assert float(precisions[row]) == pytest.approx(sum(at_hits) / len(at_hits))
