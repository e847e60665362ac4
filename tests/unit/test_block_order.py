"""The order for slow disks: exact, stateless, local."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.config.data import BlockOrder, ImageSourceConfig
from megatron_ove.data.sampler import SourceSampler, permute_blocks

BEFORE = [2, 9, 1, 17, 11]


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), block=st.integers(2, 50), blocks=st.integers(1, 12), key=st.integers(0, 2**62))
def test_it_is_a_permutation(size: int, block: int, blocks: int, key: int) -> None:
    found = permute_blocks(np.arange(size), size, key, block=block, window=block * blocks)
    assert sorted(found.tolist()) == list(range(size))


def test_any_place_is_computed_by_itself() -> None:
    whole = permute_blocks(np.arange(5000), 5000, 9, block=64, window=640)
    some = np.array([4999, 0, 17, 640, 641, 3000])
    assert permute_blocks(some, 5000, 9, block=64, window=640).tolist() == whole[some].tolist()


def test_a_window_reads_few_blocks_and_mixes_them() -> None:
    size, block, window = 100_000, 100, 2000
    order = permute_blocks(np.arange(size), size, 3, block=block, window=window)
    for start in range(0, 20_000, window):
        rows = np.sort(order[start : start + window])
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        assert len(runs) <= window // block + 1, "a window is made of whole blocks"
        # Not in the order of the disk: neighbours in time are rarely neighbours on it.
        assert (np.abs(np.diff(order[start : start + window])) == 1).mean() < 0.05


def test_blocks_lie_elsewhere_in_each_epoch() -> None:
    sampler = SourceSampler(5, "images", 1000, BlockOrder(block=50, window=200))
    epochs = sampler.rows(np.arange(3000)).reshape(3, 1000)
    assert all(sorted(epoch.tolist()) == list(range(1000)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    groups = [{frozenset(np.sort(epoch[i : i + 200]).tolist()) for i in range(0, 1000, 200)} for epoch in epochs]
    assert not groups[0] & groups[1], "the same samples must not always come together"


def test_without_it_the_order_is_the_one_that_it_always_was() -> None:
    # Figures of the version before there was a choice.
    assert SourceSampler(3, "image", 23).rows(np.arange(5)).tolist() == BEFORE


def test_a_window_of_broken_blocks_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"window = 1000 is no multiple of block = 300, but a window mixes whole .*"):
        ImageSourceConfig(kind="image", path="DIR", order=BlockOrder(block=300, window=1000))
