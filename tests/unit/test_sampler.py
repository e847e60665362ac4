"""The stateless order and draws: permutations, independence of names, known values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.data.sampler import SourceSampler, draw_uniform, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    result = permute(np.arange(size), size, seed)
    assert np.array_equal(np.sort(result), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2**33, 2**40), start=st.integers(0, 2**32))
def test_permute_of_a_huge_source_stays_inside_and_collides_nowhere(size: int, start: int) -> None:
    result = permute(np.arange(start, start + 2000), size, 3)
    assert result.min() >= 0
    assert result.max() < size
    assert np.unique(result).size == 2000


def test_permute_refuses_sizes_it_cannot_hold() -> None:
    for size in (0, 2**40 + 1):
        with pytest.raises(ValueError, match=r"outside 1..2\*\*40"):
            permute(np.arange(1), size, 0)


def test_permutation_looks_random() -> None:
    size = 20_000
    result = permute(np.arange(size), size, 0)
    assert abs(np.corrcoef(np.arange(size), result)[0, 1]) < 0.03
    # neighbours of a shuffled sequence are (n - 1) / 3 apart on average only if they are n / 3 apart as any pair is
    assert abs(np.abs(np.diff(result)).mean() / (size / 3) - 1) < 0.03


def test_every_epoch_has_each_sample_once_in_another_order() -> None:
    sampler = SourceSampler(seed=7, source="laion", size=101)
    epochs = [sampler.rows(np.arange(e * 101, (e + 1) * 101)) for e in range(3)]
    for rows in epochs:
        assert np.array_equal(np.sort(rows), np.arange(101))
    assert not np.array_equal(epochs[0], epochs[1])
    across = sampler.rows(np.arange(50, 150))
    assert np.array_equal(across, np.concatenate([epochs[0][50:], epochs[1][:49]]))


def test_order_depends_on_seed_and_source() -> None:
    rows = {
        (seed, name): tuple(SourceSampler(seed, name, 64).rows(np.arange(64)))
        for seed in (0, 1)
        for name in ("image", "video")
    }
    assert len(set(rows.values())) == 4


def test_sample_seeds_differ_between_epochs_and_draws_are_uniform() -> None:
    sampler = SourceSampler(seed=7, source="laion", size=10)
    seeds = sampler.seeds(np.arange(20_000))
    assert seeds.dtype == np.int64
    assert np.unique(seeds).size == 20_000
    first, second = draw_uniform(seeds, 0), draw_uniform(seeds, 1)
    for values in (first, second):
        counts = np.histogram(values, bins=10, range=(0, 1))[0]
        assert np.all(np.abs(counts - 2000) < 6 * np.sqrt(2000 * 0.9))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_order_is_the_same_for_ever() -> None:
    """Pins the arithmetic: a change here would silently reorder the data of every run that resumes."""
    sampler = SourceSampler(seed=1, source="pages", size=1000)
    assert sampler.rows(np.arange(6)).tolist() == PINNED_ROWS
    assert sampler.seeds(np.arange(2)).tolist() == PINNED_SEEDS


PINNED_ROWS = [257, 134, 844, 176, 738, 791]
PINNED_SEEDS = [-8719231201443475870, -5444108366640713066]
