"""Which sample comes when, and its random draws: pure functions of (seed, source, ordinal), with no state to save.

Ordinals count the samples a run takes from a source: 0, 1, 2, ... Ordinal // size is the epoch, and within an epoch a
keyed permutation of 0 .. size - 1 gives the sample, so every sample of an epoch comes exactly once and any position is
computed directly. All arithmetic is uint64 modulo 2**64, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.config.data import BlockOrder
from megatron_ove.parallel.random import mix64, stateless_seed, unit_interval

MAX_SOURCE_SIZE = 1 << 40
"""Samples of a source."""

_ROUNDS = 6
"""Feistel rounds; 4 make a pseudo-random permutation of a strong round function, 2 more for our simple one."""


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps positions through a keyed permutation of 0 .. size - 1.

    A balanced Feistel network permutes the smallest power of four >= size; results outside the range are permuted again
    until they fall inside ("cycle walking"), which keeps it a permutation. Fewer than four rounds on average.

    Args:
        positions: [n] integers in 0 .. size - 1.
        size: number of items, at most 2**40.
        key: which of the permutations; any integer.

    Returns:
        [n] int64.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3.
    """
    if not 1 <= size <= MAX_SOURCE_SIZE:
        raise ValueError(f"size = {size} is outside 1..2**40")
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix64(key, np.arange(_ROUNDS))
    result = np.array(positions, dtype=np.uint64)
    outside = np.arange(result.size)
    while outside.size:
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)


def draw_uniform(seeds: np.ndarray, draw: int) -> np.ndarray:
    """Returns the `draw`-th uniform number of each sample's stream.

    Args:
        seeds: [n] int64 sample seeds.
        draw: number of the draw; each use of randomness has its own.

    Returns:
        [n] float64 in [0, 1).
    """
    return unit_interval(mix64(np.asarray(seeds, dtype=np.int64), draw))


def draw_choice(choices: Sequence[int], seeds: np.ndarray, draw: int) -> np.ndarray:
    """Returns one of `choices` for each sample, [n] int64, equally likely, by the `draw`-th number of its stream."""
    values = np.asarray(choices, dtype=np.int64)
    return values[(draw_uniform(seeds, draw) * len(values)).astype(np.int64)]


def permute_blocks(positions: np.ndarray, size: int, key: int, *, block: int, window: int) -> np.ndarray:
    """Maps positions through a keyed permutation of 0 .. size - 1 that keeps neighbours near one another.

    Blocks of `block` neighbours are put in random order; then positions are mixed within windows of `window`. The
    blocks begin somewhere else under each key, so that not always the same samples are neighbours. What is left over
    behind the last whole block makes a shorter one, which comes last and is mixed with its window.

    Args:
        positions: [n] integers in 0 .. size - 1.
        size: number of items.
        key: which of the permutations; any integer.
        block: items that stay together.
        window: items that are mixed, a multiple of `block`.

    Returns:
        [n] int64.
    """
    positions = np.asarray(positions, dtype=np.int64)
    windows, places = np.divmod(positions, window)
    mixed = np.empty_like(positions)
    for number in np.unique(windows).tolist():
        chosen = windows == number
        length = min(window, size - number * window)
        mixed[chosen] = number * window + permute(places[chosen], length, int(mix64(key, 2 + number)))
    whole = size // block
    blocks, inside = np.divmod(mixed, block)
    is_whole = blocks < whole
    if whole:
        blocks[is_whole] = permute(blocks[is_whole], whole, int(mix64(key, 0)))
    shift = int(mix64(key, 1)) % size
    return (blocks * block + inside + shift) % size


@dataclass(frozen=True)
class SourceSampler:
    """Order and sample seeds of one source.

    Attributes:
        seed: the run's seed.
        source: the source's name.
        size: samples of the source.
        order: of its samples; None = fully random.
    """

    seed: int
    source: str
    size: int
    order: BlockOrder | None = None

    def rows(self, ordinals: np.ndarray) -> np.ndarray:
        """Returns the sample, [n] int64 in 0 .. size - 1, at each ordinal, [n] int64."""
        epochs, places = np.divmod(np.asarray(ordinals, dtype=np.int64), self.size)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = stateless_seed(self.seed, self.source, "order", int(epoch))
            if self.order is not None:
                block, window = self.order.block, self.order.window
                rows[chosen] = permute_blocks(places[chosen], self.size, key, block=block, window=window)
            else:
                rows[chosen] = permute(places[chosen], self.size, key)
        return rows

    def seeds(self, ordinals: np.ndarray) -> np.ndarray:
        """Returns the seed of each ordinal's own random stream, [n] int64."""
        key = stateless_seed(self.seed, self.source, "sample")
        return mix64(key, np.asarray(ordinals, dtype=np.int64)).astype(np.int64)
