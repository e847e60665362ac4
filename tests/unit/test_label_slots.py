"""Label slots: without replacement, absent labels last, a function of the sample alone."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.objectives.label_slots import draw_label_slots

ROWS = st.lists(st.integers(-1, 20), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(row=ROWS, seed=st.integers(-(2**63), 2**63 - 1), num_slots=st.integers(1, 15))
def test_a_draw_takes_stored_labels_once_each(row, seed, num_slots):
    (drawn,) = draw_label_slots(torch.tensor([row], dtype=torch.int32), torch.tensor([seed]), num_slots).tolist()
    stored = [label for label in row if label >= 0]
    valid = [label for label in drawn if label >= 0]
    assert len(drawn) == num_slots
    assert len(valid) == min(num_slots, len(stored))
    assert drawn == valid + [-1] * (num_slots - len(valid))
    assert not Counter(valid) - Counter(stored)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-1, 9), min_size=5, max_size=5), min_size=1, max_size=6), data=st.data())
def test_a_draw_does_not_depend_on_the_other_samples(rows, data):
    labels = torch.tensor(rows)
    seeds = torch.tensor(data.draw(st.lists(st.integers(0, 2**62), min_size=len(rows), max_size=len(rows))))
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    together = draw_label_slots(labels, seeds, 3)
    assert torch.equal(draw_label_slots(labels[order], seeds[order], 3), together[order])


def test_every_stored_label_is_drawn_equally_often():
    labels = torch.arange(10).expand(20_000, 10)
    drawn = draw_label_slots(labels, torch.arange(20_000) * 7919, 4)
    shares = torch.bincount(drawn.flatten(), minlength=10) / 20_000
    assert (shares - 0.4).abs().max() < 0.015  # four standard deviations
    first = torch.bincount(drawn[:, 0], minlength=10) / 20_000
    assert (first - 0.1).abs().max() < 0.009


def test_no_samples_and_more_slots_than_labels():
    assert draw_label_slots(torch.empty(0, 3, dtype=torch.int32), torch.empty(0, dtype=torch.int64), 5).shape == (0, 5)
