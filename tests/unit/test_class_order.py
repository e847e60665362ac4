"""Where classes lie in a table: a bijection that gives every rank its share of frequent and of rare classes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ove.parallel.class_order import classes_of_rows, rows_of_classes
from megatron_ove.parallel.shard_range import shard_range


@settings(max_examples=300, deadline=None)
@given(num_classes=st.integers(1, 3000))
@example(num_classes=1)
@example(num_classes=2)
@example(num_classes=6)
@example(num_classes=2310)  # 2 x 3 x 5 x 7 x 11: few numbers have no common divisor with it
def test_classes_and_rows_are_one_to_one(num_classes):
    classes = torch.arange(num_classes)
    rows = rows_of_classes(classes, num_classes)
    assert torch.equal(rows.sort().values, classes)
    assert torch.equal(classes_of_rows(rows, num_classes), classes)


@settings(max_examples=100, deadline=None)
@given(num_classes=st.integers(1, 2**31), data=st.data())
def test_every_id_of_a_large_table_comes_back(num_classes, data):
    """Also where id * multiplier passes 2^61."""
    ids = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=5))
    rows = rows_of_classes(torch.tensor(ids), num_classes)
    assert ((rows >= 0) & (rows < num_classes)).all()
    assert classes_of_rows(rows, num_classes).tolist() == ids


def test_no_label_stays_no_label_and_shapes_stay():
    labels = torch.tensor([[-1, 3], [0, -1]], dtype=torch.int32)
    rows = rows_of_classes(labels, 37)
    assert rows.dtype == torch.int64 and rows.shape == (2, 2)
    assert rows[0, 0] == rows[1, 1] == -1 and rows[1, 0] == 0
    assert rows_of_classes(torch.empty(0, 4, dtype=torch.int64), 5).shape == (0, 4)


def load_of_ranks(load_of_rows: Tensor, num_ranks: int) -> Tensor:
    """Each rank's load over the mean."""
    num_rows = len(load_of_rows)
    ranges = [shard_range(num_rows, num_ranks, rank) for rank in range(num_ranks)]
    load = torch.stack([load_of_rows[start:stop].sum() for start, stop in ranges])
    return load / load.mean()


def active_chance(num_classes: int, num_labels: int) -> Tensor:
    """Chance of each class, by its rank in frequency, to be among so many labels from Zipf's law."""
    frequency = 1 / torch.arange(1, num_classes + 1, dtype=torch.float64)
    frequency /= frequency.sum()
    return -torch.expm1(num_labels * torch.log1p(-frequency))


@pytest.mark.parametrize("num_classes", [20_000, 365_187, 400_000, 2_000_000])
@pytest.mark.parametrize("num_labels", [512, 32_768])
def test_a_vocabulary_sorted_by_frequency_loads_ranks_evenly(num_classes, num_labels):
    """Load = rows that a step activates: what a rank reads, multiplies and updates."""
    by_class = active_chance(num_classes, num_labels)
    by_row = torch.zeros_like(by_class)
    by_row[rows_of_classes(torch.arange(num_classes), num_classes)] = by_class
    for num_ranks in (2, 3, 8, 64):
        # A class cannot be split: ranks differ by a few classes at least.
        indivisible = 3 * num_ranks / float(by_class.sum())
        assert (load_of_ranks(by_row, num_ranks) - 1).abs().max() < 0.01 + indivisible
        assert load_of_ranks(by_class, num_ranks).max() > 1.3  # what ranges of ids would have done


@pytest.mark.parametrize("num_classes", [20_000, 365_187, 2_000_000])
def test_any_run_of_ids_is_spread(num_classes):
    """Not only frequent classes: ids may also be sorted by language, or by data set."""
    num_ranks = 8
    starts = [shard_range(num_classes, num_ranks, rank)[0] for rank in range(num_ranks)]
    for first, length in itertools.product([0, num_classes // 3, num_classes - 1000], [64, 1000]):
        rows = rows_of_classes(torch.arange(first, min(first + length, num_classes)), num_classes)
        counts = torch.bincount(torch.bucketize(rows, torch.tensor(starts), right=True) - 1, minlength=num_ranks)
        assert (counts - len(rows) / num_ranks).abs().max() <= 3
