"""Drawing a step's classes: positives always, negatives by chance in every set on its own, the same on every rank."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ove.heads.active_classes import (
    ActiveRows,
    NegativeDraw,
    choose_active_rows,
    collect_positives,
    draw_negatives,
    weigh_active_rows,
)
from megatron_ove.heads.keyed_permutation import KeyedPermutation
from megatron_ove.parallel.shard_range import shard_range

PROBABILITIES = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1e-6, 0.05, 0.5, 0.999999, 1.0]))


CPU = torch.device("cpu")


def union_of(draw: NegativeDraw) -> np.ndarray:
    return draw.rows_between(0, draw.num_rows)


def active_rows(
    draw: NegativeDraw,
    labels: Tensor,
    set_of_slot: Tensor,
    *,
    first_row: int,
    num_rows: int,
    corrects_sampling: bool = False,
) -> ActiveRows:
    positives = collect_positives(labels.numpy(), set_of_slot.numpy(), draw.num_sets)
    chosen = choose_active_rows(draw, positives, first_row=first_row, num_rows=num_rows, device=CPU)
    return weigh_active_rows(chosen, draw, device=CPU, corrects_sampling=corrects_sampling)


def union_share(probability: float, num_sets: int) -> float:
    """Chance of a row to be in any of the sets."""
    return 1 - (1 - probability) ** num_sets


@pytest.mark.parametrize("num_points", [1, 2, 3, 4, 5, 12, 37, 100, 101, 1023, 4096, 10_007])
def test_a_permutation_meets_every_point_once_and_knows_the_way_back(num_points):
    permutation = KeyedPermutation(num_points, 5)
    places = np.arange(permutation.num_points)
    assert num_points <= permutation.num_points < num_points + math.isqrt(num_points) + 1
    points = permutation.points_at(places)
    assert sorted(points.tolist()) == places.tolist()
    assert (permutation.positions_of(points) == places).all()
    assert (permutation.points_at(places[:, None])[:, 0] == points).all()
    assert (KeyedPermutation(num_points, 6).points_at(places) != points).any() or num_points < 5


@pytest.mark.parametrize(
    ("num_rows", "probability", "num_sets", "key", "size", "digest"),
    [
        (1009, 0.05, 8, 7, 340, "67eaaffc3653"),
        (1000, 0.3, 1, 3, 300, "b5792ef802b1"),
        (365_187, 0.02, 8, 12345, 54_499, "32b9c2859413"),
        (37, 0.4, 4, 2**62 + 11, 32, "d122dd04eb2a"),
        (101, 0.95, 2, 5, 101, "619c2119fbea"),
        (2, 0.5, 1, 9, 1, "9e5b31ac44c2"),
        (400_000, 0.1, 8, 0, 227_813, "5a5a5a3ef0d9"),
    ],
)
def test_a_resumed_run_draws_what_it_drew_before(num_rows, probability, num_sets, key, size, digest):
    """Digests of unions and sets as the first release drew them, by sorting."""
    draw = draw_negatives(num_rows, probability=probability, num_sets=num_sets, key=key)
    union = union_of(draw)
    members = draw.membership(torch.from_numpy(union)).numpy()
    assert len(union) == draw.size == size
    assert hashlib.blake2b(union.tobytes() + members.tobytes(), digest_size=6).hexdigest() == digest


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(2, 400), probability=PROBABILITIES, num_sets=st.integers(1, 8), key=st.integers(0, 2**63 - 1)
)
@example(num_rows=2, probability=1e-6, num_sets=8, key=0)
def test_a_union_has_a_fixed_size_and_every_row_of_it_is_in_a_set(num_rows, probability, num_sets, key):
    draw = draw_negatives(num_rows, probability=probability, num_sets=num_sets, key=key)
    rows = union_of(draw).tolist()
    assert rows == sorted(set(rows)) and set(rows) <= set(range(num_rows))
    assert abs(len(rows) - num_rows * union_share(probability, num_sets)) <= 0.5 + 1e-6
    assert draw.num_sets == (num_sets if probability < 1 else 1)
    members = draw.membership(torch.from_numpy(union_of(draw)))
    assert members.shape == (len(rows), draw.num_sets) and members.dtype == torch.bool
    assert members.any(1).all()
    everything = np.arange(-1, num_rows + 1)
    assert draw.contains(everything).tolist() == [row in set(rows) for row in everything.tolist()]
    assert draw.contains(everything[:, None, None]).shape == (num_rows + 2, 1, 1)


def members_of_all_rows(num_rows: int, probability: float, num_sets: int, key: int) -> Tensor:
    draw = draw_negatives(num_rows, probability=probability, num_sets=num_sets, key=key)
    rows = torch.arange(num_rows)
    return draw.membership(rows) & torch.from_numpy(draw.contains(rows.numpy()))[:, None]


@pytest.mark.parametrize(("probability", "num_sets"), [(0.05, 8), (0.3, 3), (0.6, 2), (0.2, 1)])
def test_every_row_is_in_every_set_with_its_probability_and_sets_are_independent(probability, num_sets):
    num_rows, num_keys = 101, 2000
    counts = torch.zeros(num_rows, num_sets)
    together = torch.zeros(num_sets, num_sets)
    neighbours = torch.zeros(3)
    for key in range(num_keys):
        members = members_of_all_rows(num_rows, probability, num_sets, key).float()
        counts += members
        together += members.T @ members
        neighbours += torch.stack([(members[:-gap, 0] * members[gap:, 0]).mean() for gap in (1, 2, 10)])
    # 5 standard deviations of a binomial for each cell, and 6 for the many cells of the first check.
    deviation = math.sqrt(probability * (1 - probability) / num_keys)
    share = union_share(probability, num_sets)
    exact = probability * round(num_rows * share) / num_rows / share  # the union's size is a whole number
    assert (counts / num_keys - exact).abs().max() < 6 * deviation
    assert abs(float(counts.mean()) / num_keys - exact) < 5 * deviation / math.sqrt(num_rows * num_sets)
    pairs = (together / num_keys / num_rows)[~torch.eye(num_sets, dtype=torch.bool)]
    assert ((pairs - probability * exact).abs() < 5 * probability / math.sqrt(num_keys * num_rows)).all()
    # Rows next to each other meet in a set as often as any two rows do.
    assert ((neighbours / num_keys - exact**2).abs() < 0.02 * probability + 2 * probability / num_rows).all()


def test_draws_of_other_keys_and_sets_are_unrelated():
    first, second = (members_of_all_rows(5000, 0.2, 3, key).float() for key in (7, 8))
    for one in range(3):
        for other in range(3):
            assert abs(float((first[:, one] * second[:, other]).mean()) - 0.04) < 0.014
    assert torch.equal(members_of_all_rows(5000, 0.2, 3, 7).float(), first)


def test_a_large_table_is_drawn_without_looking_at_it():
    """Two billion rows, of which a thousand are drawn: only the union is ever in memory."""
    draw = draw_negatives(2_000_000_000, probability=1e-7, num_sets=5, key=3)
    union = union_of(draw)
    assert len(union) == 1000
    assert int(union[0]) >= 0 and int(union[-1]) < 2_000_000_000
    quarters = np.bincount(union // 500_000_000, minlength=4)
    assert abs(quarters - 250).max() < 75  # standard deviation 14
    assert draw.contains(union).all() and not draw.contains(union[np.diff(union, append=0) != 1] + 1).any()


def plain_weights(
    draw: NegativeDraw, labels: Tensor, set_of_slot: Tensor, *, corrects_sampling: bool
) -> dict[int, list[float]]:
    """Row of the table -> what it counts in each set, by the definition, row by row."""
    drawn_weight = 1 / draw.probability if corrects_sampling else 1.0
    table: dict[int, list[float]] = {}
    union = union_of(draw)
    for row, members in zip(union.tolist(), draw.membership(torch.from_numpy(union)).tolist(), strict=True):
        table[row] = [drawn_weight * member for member in members]
    for sample in labels.tolist():
        for slot, row in enumerate(sample):
            if row >= 0:
                table.setdefault(row, [0.0] * draw.num_sets)[int(set_of_slot[slot])] = 1.0
    return table


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    num_rows=st.integers(2, 60),
    num_ranks=st.integers(1, 5),
    probability=PROBABILITIES,
    num_sets=st.integers(1, 4),
    corrects_sampling=st.booleans(),
)
def test_ranks_split_what_one_rank_would_hold(data, num_rows, num_ranks, probability, num_sets, corrects_sampling):
    width = data.draw(st.integers(num_sets, 5))
    labels = data.draw(st.lists(st.lists(st.integers(-1, num_rows - 1), min_size=width, max_size=width), max_size=6))
    labels = torch.tensor(labels, dtype=torch.int64).view(-1, width)
    draw = draw_negatives(num_rows, probability=probability, num_sets=num_sets, key=data.draw(st.integers(0, 99)))
    set_of_slot = torch.tensor([slot * draw.num_sets // width for slot in range(width)])
    expected = plain_weights(draw, labels, set_of_slot, corrects_sampling=corrects_sampling)
    found: dict[int, list[float]] = {}
    for rank in range(num_ranks):
        start, stop = shard_range(num_rows, num_ranks, rank)
        active = active_rows(
            draw, labels, set_of_slot, first_row=start, num_rows=stop - start, corrects_sampling=corrects_sampling
        )
        rows = active.rows.tolist()
        assert rows == sorted(set(rows)) and all(0 <= row < stop - start for row in rows)
        assert active.weights.shape == (len(rows), draw.num_sets) and active.weights.dtype == torch.float32
        found |= zip((row + start for row in rows), active.weights.tolist(), strict=True)
        asked = torch.arange(-2 - num_rows, 2 * num_rows)
        places = [rows.index(row) if row in rows else -1 for row in asked.tolist()]
        assert active.positions_of(asked).tolist() == places
        assert active.positions_of(asked[None, :, None]).shape == (1, len(asked), 1)
    assert found.keys() == expected.keys()
    for row, weights in expected.items():
        assert found[row] == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize("num_sets", [1, 8])
@pytest.mark.parametrize("probability", [1e-4, 0.02, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("num_classes", [2, 7, 64, 1009])
def test_every_rank_finds_exactly_its_part_of_the_brute_force_set(num_classes, probability, num_sets):
    """Whichever way round the permutation is asked, for any number of ranks, more ranks than classes included."""
    generator = torch.Generator().manual_seed(num_classes)
    set_of_slot = torch.arange(8) * num_sets // 8 if probability < 1 else torch.zeros(8, dtype=torch.int64)
    draw = draw_negatives(num_classes, probability=probability, num_sets=num_sets, key=4)
    permutation = KeyedPermutation(num_classes, 4)
    in_order = permutation.points_at(np.arange(permutation.num_points))
    union = set(in_order[in_order < num_classes][: draw.size].tolist())
    for num_samples in (0, 3, 50):
        labels = torch.randint(-1, num_classes, (num_samples, 8), generator=generator)
        expected = union | set(labels[labels >= 0].tolist())
        for num_ranks in (1, 2, 3, 8, 70):
            found: list[int] = []
            for rank in range(num_ranks):
                start, stop = shard_range(num_classes, num_ranks, rank)
                active = active_rows(draw, labels, set_of_slot, first_row=start, num_rows=stop - start)
                found += (active.rows + start).tolist()
                if draw.size not in (0, num_classes):
                    assert (draw._by_row(start, stop) == draw._by_position(start, stop)).all()
            assert found == sorted(expected)


@pytest.mark.parametrize("count", [1, 7, 99, 100])
def test_one_set_of_a_given_number_of_rows_has_that_number(count):
    for num_rows in (100, 1009):
        draw = draw_negatives(num_rows, probability=count / num_rows, num_sets=1, key=5)
        assert len(union_of(draw)) == count


def test_labels_alone_make_up_a_step_whose_draw_is_empty():
    draw = draw_negatives(50, probability=1e-4, num_sets=2, key=1)
    assert draw.size == 0 and not len(union_of(draw))
    active = active_rows(draw, torch.tensor([[7, 7], [-1, 3]]), torch.tensor([0, 1]), first_row=0, num_rows=50)
    assert active.rows.tolist() == [3, 7] and active.weights.tolist() == [[0, 1], [1, 1]]
