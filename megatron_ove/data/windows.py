"""Which part of each picture is seen, how large, and whether mirrored; which patches of it boxes touch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """What to make of each picture.

    Attributes:
        corner: [n, 2] int32, (y, x) of the window's upper left pixel.
        extent: [n, 2] int32, (height, width) of the window in pixels.
        size: [n, 2] int32, (height, width) after resizing.
        mirror: [n] int32, 1 = mirrored from left to right.
    """

    corner: np.ndarray
    extent: np.ndarray
    size: np.ndarray
    mirror: np.ndarray

    def move_boxes(self, i: int, corners: np.ndarray) -> np.ndarray:
        """Returns where boxes of picture i are in what is made of it.

        Args:
            i: number of the picture.
            corners: [k, 4] float, (left, top, right, bottom) in pixels of the picture; right and bottom exclusive.

        Returns:
            [k, 4] float64, likewise, in pixels of the window after resizing and mirroring. Not cut at its edges: what
            lies outside of 0 .. size is not seen, see `visible_share`.
        """
        top, left = self.corner[i].tolist()
        height, width = self.extent[i].tolist()
        new_height, new_width = self.size[i].tolist()
        moved = (np.asarray(corners, dtype=np.float64).reshape(-1, 4) - [left, top, left, top]) * np.array(
            [new_width / width, new_height / height] * 2
        )
        if self.mirror[i]:
            moved[:, [0, 2]] = new_width - moved[:, [2, 0]]
        return moved


def visible_share(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns which part of the area of each box lies in a picture, [k] float64 in 0..1.

    Args:
        corners: [k, 4] float, (left, top, right, bottom) in pixels.
        size: (height, width) of the picture.
    """
    edges = np.array([size[1], size[0]], dtype=np.float64)
    inside = np.clip(corners[:, 2:], 0, edges) - np.clip(corners[:, :2], 0, edges)
    whole = corners[:, 2:] - corners[:, :2]
    return inside.prod(axis=1) / np.maximum(whole.prod(axis=1), np.finfo(np.float64).tiny)


def boxes_to_patches(corners: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Returns which patches of a picture are touched by a box, [rows, columns] bool.

    The grid divides the picture evenly, so a picture that is stretched to whole patches keeps its patches. A box
    touches a patch if they share some area; what of a box lies outside the picture touches nothing.

    Args:
        corners: [k, 4], (left, top, right, bottom) in pixels of the picture; right and bottom exclusive.
        size: (height, width) of the picture in pixels; of a picture whose last patches are filled up, with the filling.
        grid: (rows, columns) of patches.
    """
    rows, columns = grid
    left, top, right, bottom = corners.astype(np.float64).reshape(-1, 4).T
    first_row, last_row = _touched(top, bottom, rows, size[0])
    first_column, last_column = _touched(left, right, columns, size[1])
    is_there = (first_row < last_row) & (first_column < last_column)
    # Each box adds 1 from its first corner on and takes it away behind the others, so sums count boxes, however many.
    steps = np.zeros((rows + 1, columns + 1), dtype=np.int64)
    for row, column, step in (
        (first_row, first_column, 1),
        (first_row, last_column, -1),
        (last_row, first_column, -1),
        (last_row, last_column, 1),
    ):
        np.add.at(steps, (row[is_there], column[is_there]), step)
    return steps.cumsum(axis=0).cumsum(axis=1)[:rows, :columns] > 0


def _touched(start: np.ndarray, stop: np.ndarray, count: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first patch of a row or column that each piece [start, stop) touches, and the one behind the last."""
    first = np.clip(np.floor(start * count / pixels), 0, count).astype(np.int64)
    last = np.clip(np.ceil(stop * count / pixels), 0, count).astype(np.int64)
    return first, np.where(start < stop, last, first)
