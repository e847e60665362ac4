"""Randomness without state: every draw is a function of (seed, names), so order and rank count cannot change it.

`stateless_generator` is for tensors of noise; `mix64` hashes whole arrays of counters at once. `mix64` gives the same
64 bits on numpy and torch; torch has no unsigned 64-bit arithmetic, so there the bits are read as int64.
"""

from __future__ import annotations

import hashlib
from typing import overload

import numpy as np
import torch
from torch import Tensor

# splitmix64: increment and the two multipliers of the finalizer. Source: Steele, Lea, Flood, "Fast splittable
# pseudorandom number generators", OOPSLA 2014 (variant 13 of the murmur3 finalizer).
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def stateless_seed(seed: int, *names: int | str) -> int:
    """Returns a 63-bit seed that depends on `seed` and every name, in order."""
    text = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stateless_generator(seed: int, *names: int | str) -> torch.Generator:
    """Returns a fresh CPU generator seeded by (seed, *names); the same arguments always give the same stream."""
    return torch.Generator().manual_seed(stateless_seed(seed, *names))


@overload
def mix64(*values: int | np.ndarray) -> np.ndarray: ...
@overload
def mix64(*values: int | Tensor) -> Tensor: ...
def mix64(*values: int | np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Hashes integers to 64 well-mixed bits, elementwise, with broadcasting.

    Args:
        values: integers or integer arrays; order matters. If any is a Tensor all arrays must be Tensors.

    Returns:
        uint64 array (0-d for plain integers), or an int64 Tensor with the same bits on the Tensor's device.
    """
    if any(isinstance(value, Tensor) for value in values):
        return _mix64_torch(values)
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            bits = value & _MASK if isinstance(value, int) else np.asarray(value)
            state = _finalize_numpy(state + np.uint64(_INCREMENT) + np.asarray(bits).astype(np.uint64))
    return state


@overload
def unit_interval(bits: np.ndarray) -> np.ndarray: ...
@overload
def unit_interval(bits: Tensor) -> Tensor: ...
def unit_interval(bits: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Maps 64 mixed bits to float64 in [0, 1), uniformly, from the upper 53 bits."""
    if isinstance(bits, Tensor):
        return _shift_right(bits, 11).double() * 2.0**-53
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalize_numpy(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return z ^ (z >> np.uint64(31))


def _mix64_torch(values: tuple[int | np.ndarray | Tensor, ...]) -> Tensor:
    device = next(value.device for value in values if isinstance(value, Tensor))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for value in values:
        bits = value.to(torch.int64) if isinstance(value, Tensor) else _signed(int(value))
        z = state + _signed(_INCREMENT) + bits  # int64 addition and multiplication wrap, as unsigned ones do
        z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLIER_1)
        z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLIER_2)
        state = z ^ _shift_right(z, 31)
    return state


def _shift_right(z: Tensor, count: int) -> Tensor:
    """Logical shift: int64's own shift would copy the sign bit in."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(bits: int) -> int:
    """The int64 with the same lowest 64 bits."""
    bits &= _MASK
    return bits - (1 << 64) if bits >> 63 else bits
