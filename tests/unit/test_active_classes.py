"""Drawing a step's classes: positives always, the rest without replacement and evenly, the same on every rank."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.heads.active_classes import draw_class_set, select_active_rows
from megatron_ove.parallel.shard_range import shard_range


@settings(max_examples=150, deadline=None)
@given(data=st.data(), num_classes=st.integers(2, 300), key=st.integers(0, 2**63 - 1))
def test_a_set_has_the_size_asked_for_and_all_positives(data, num_classes, key):
    positives = data.draw(st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=20))
    num_active = data.draw(st.integers(1, num_classes))
    chosen = draw_class_set(torch.tensor(sorted(positives)), num_classes=num_classes, num_active=num_active, key=key)
    classes = chosen.tolist()
    assert classes == sorted(set(classes))
    assert len(classes) == max(num_active, len(positives))
    assert positives <= set(classes) <= set(range(num_classes))


def test_negatives_are_drawn_evenly_and_anew_for_every_key():
    positives, counts, pairs = torch.tensor([3, 50]), torch.zeros(97), 0
    for key in range(3000):
        chosen = draw_class_set(positives, num_classes=97, num_active=21, key=key)
        counts[chosen] += 1
        pairs += int({10, 11} <= set(chosen.tolist()))
    assert counts[positives].tolist() == [3000, 3000]
    counts[positives] = 600
    assert (counts - 600).abs().max() < 95  # 19 of 95 negatives: 600 each, standard deviation 22
    assert abs(pairs / 3000 - 0.2 * 18 / 94) < 0.014  # two neighbours together as often as any two


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_classes=st.integers(2, 60), num_ranks=st.integers(1, 5), chunk_size=st.integers(1, 9))
def test_ranks_split_the_sets_between_them(data, num_classes, num_ranks, chunk_size):
    sets = [
        torch.tensor(sorted(data.draw(st.sets(st.integers(0, num_classes - 1), max_size=15))), dtype=torch.int64)
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    joined: list[list[int]] = [[] for _ in sets]
    for rank in range(num_ranks):
        start, stop = shard_range(num_classes, num_ranks, rank)
        active = select_active_rows(sets, first_class=start, num_rows=stop - start, chunk_size=chunk_size)
        union = sorted({c for classes in sets for c in classes.tolist() if start <= c < stop})
        assert (active.rows + start).tolist() == union
        classes = torch.arange(-1, num_classes)
        places = active.positions_of(classes, start)
        expected = [union.index(c) if c in union else -1 for c in classes.tolist()]
        assert places.tolist() == expected
        for index, (members, splits) in enumerate(zip(active.members, active.member_splits, strict=True)):
            joined[index] += (active.rows[members] + start).tolist()
            assert splits[0] == 0 and splits[-1] == len(members)
            for chunk, (begin, end) in enumerate(itertools.pairwise(splits)):
                assert all(chunk * chunk_size <= m < (chunk + 1) * chunk_size for m in members[begin:end].tolist())
    assert joined == [classes.tolist() for classes in sets]
