"""A pseudo-random permutation of any number of rows that is computed for single rows, in either direction."""

from __future__ import annotations

import math

import numpy as np

from megatron_ove.parallel.random import mix64, stateless_seed

# Luby and Rackoff: four rounds of a random function make a pseudo-random permutation.
_FEISTEL_ROUNDS = 4


class KeyedPermutation:
    """Feistel network with modular additions on the (column, row) coordinates of a grid.

    The grid is the smallest one of nearly equal sides that holds all points asked for; it has less than one row of
    points more, which are permuted with the others. A round adds to one coordinate a random function of the other, of
    which there are only about sqrt(n) values: the functions are tables, and a point costs a few additions.

    Attributes:
        num_points: of the whole grid; at least as many as were asked for.
    """

    def __init__(self, num_points: int, key: int) -> None:
        """
        Args:
            num_points: points that are needed.
            key: decides the permutation.
        """
        self._width = math.isqrt(num_points - 1) + 1
        self._height = -(-num_points // self._width)
        self.num_points = self._width * self._height
        self._shifts = [self._shifts_of_round(index, stateless_seed(key, index)) for index in range(_FEISTEL_ROUNDS)]

    def points_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns the points at places of the permuted order, int64 of the shape of the argument."""
        return self._run(positions, range(_FEISTEL_ROUNDS), forward=True)

    def positions_of(self, points: np.ndarray) -> np.ndarray:
        """Returns the places of points in the permuted order: the inverse of `points_at`."""
        return self._run(points, range(_FEISTEL_ROUNDS)[::-1], forward=False)

    def _shifts_of_round(self, index: int, key: int) -> np.ndarray:
        """Returns what a round adds to one coordinate for each value of the other; even rounds add to columns."""
        others, extent = (self._height, self._width) if index % 2 == 0 else (self._width, self._height)
        return mix64(np.arange(others, dtype=np.int64) ^ key).view(np.int64) % extent

    def _run(self, points: np.ndarray, rounds: range, *, forward: bool) -> np.ndarray:
        row = points // self._width
        column = points - row * self._width
        for index in rounds:
            if index % 2 == 0:
                _shift(column, self._shifts[index][row], self._width, forward=forward)
            else:
                _shift(row, self._shifts[index][column], self._height, forward=forward)
        return row * self._width + column


def _shift(coordinate: np.ndarray, shift: np.ndarray, extent: int, *, forward: bool) -> None:
    """Adds or subtracts modulo `extent`, in place; both are below it. A division would cost several times this."""
    if forward:
        coordinate += shift
        coordinate -= (coordinate >= extent) * extent
    else:
        coordinate -= shift
        coordinate += (coordinate < 0) * extent
