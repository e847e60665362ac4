"""Stateless randomness: same arguments, same stream; numpy and torch agree; bits are well mixed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ove.parallel.random import mix64, stateless_generator, stateless_seed, unit_interval

# splitmix64 from state 0, first output; published with the reference implementation (prng.di.unimi.it/splitmix64.c).
SPLITMIX64_FIRST_OUTPUT = 0xE220A8397B1DCDAF


def test_generator_depends_on_every_name_in_order() -> None:
    draws = [
        torch.randint(0, 1 << 62, (4,), generator=stateless_generator(*names)).tolist()
        for names in [(1, "a", 2), (1, "a", 2), (1, 2, "a"), (1, "a", 3), (2, "a", 2), (1, "a", "2")]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 5


def test_seed_fits_a_signed_integer() -> None:
    assert all(0 <= stateless_seed(seed, "x") < 1 << 63 for seed in range(100))


def test_mix64_is_splitmix64() -> None:
    assert int(mix64(0)) == SPLITMIX64_FIRST_OUTPUT


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_numpy_and_torch_give_the_same_bits(values: list[int]) -> None:
    on_numpy = mix64(*[np.array([value], np.int64) for value in values])
    on_torch = mix64(*[torch.tensor([value]) for value in values])
    assert on_numpy.view(np.int64).tolist() == on_torch.tolist() == [_as_signed(int(mix64(*values)))]
    assert unit_interval(on_numpy).tolist() == unit_interval(on_torch).tolist()


def _as_signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def test_broadcasting_and_order() -> None:
    table = mix64(7, np.arange(3)[:, None], np.arange(5)[None])
    assert table.shape == (3, 5) and len(np.unique(table)) == 15
    assert int(table[2, 4]) == int(mix64(7, 2, 4)) != int(mix64(7, 4, 2))


def test_unit_interval_is_uniform() -> None:
    u = np.sort(unit_interval(mix64(3, np.arange(20_000))))
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % point; the stream is fixed, so this cannot flicker.
    assert u[0] >= 0 and u[-1] < 1
    assert np.abs(u - np.linspace(0, 1, u.size)).max() < 1.95 / np.sqrt(u.size)
