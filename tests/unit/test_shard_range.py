"""Ranges cover everything once, in order, evenly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ove.parallel.shard_range import shard_range


@given(total=st.integers(0, 10_000), size=st.integers(1, 64))
def test_ranges_partition_the_total(total: int, size: int) -> None:
    ranges = [shard_range(total, size, rank) for rank in range(size)]
    assert ranges[0][0] == 0 and ranges[-1][1] == total
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("total", "size", "rank"), [(-1, 2, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)])
def test_arguments_are_checked(total: int, size: int, rank: int) -> None:
    with pytest.raises(ValueError, match=rf"shard_range\(total={total}, size={size}, rank={rank}\): need total"):
        shard_range(total, size, rank)
