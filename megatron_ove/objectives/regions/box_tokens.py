"""Which tokens of a picture belong to a box."""

from __future__ import annotations

import numpy as np


def tokens_in_boxes(corners: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> list[np.ndarray]:
    """Returns the tokens of each box, ascending, as places in the picture's row-major grid.

    A token belongs to a box that covers at least half of it along either axis; of two neighbours that cover half each,
    to the one that ends there, so that they share none. A box that is too small or too thin for that has the token
    that its middle lies in.

    Args:
        corners: [k, 4], (left, top, right, bottom) in pixels of the picture; what lies outside is cut off.
        size: (height, width) of the picture in pixels.
        grid: (rows, columns) of tokens.
    """
    (height, width), (rows, columns) = size, grid
    left, top, right, bottom = np.asarray(corners, dtype=np.float64).reshape(-1, 4).T
    first_row, last_row = _covered(top * rows / height, bottom * rows / height, rows)
    first_column, last_column = _covered(left * columns / width, right * columns / width, columns)
    return [
        (np.arange(a, b)[:, None] * columns + np.arange(c, d)).ravel()
        for a, b, c, d in zip(first_row, last_row, first_column, last_column, strict=True)
    ]


def _covered(start: np.ndarray, stop: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first token along an axis that pieces [start, stop), in tokens, cover half of, and the one behind
    the last."""
    start, stop = np.clip(start, 0, count), np.clip(stop, 0, count)
    first, last = np.floor(start + 0.5).astype(np.int64), np.floor(stop + 0.5).astype(np.int64)
    middle = np.clip(np.floor((start + stop) / 2), 0, count - 1).astype(np.int64)
    is_none = last <= first
    return np.where(is_none, middle, first), np.where(is_none, middle + 1, last)
