"""Patches put together again, to compare them with the pictures they were cut from."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_ove.preprocess.codec.mosaic import MOSAIC_COLUMNS


def read_patches(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Puts patches together again: the inverse of `write_patches`.

    Args:
        patches: [rows * columns, 3 * p * p] uint8.
        rows: patches from top to bottom, hp.
        columns: patches from left to right, wp.

    Returns:
        [hp * p, wp * p, 3] uint8.
    """
    side = round((patches.shape[1] // 3) ** 0.5)
    grid = patches.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)  # [hp, p, wp, p, 3]
    return grid.reshape(rows * side, columns * side, 3)


def read_mosaic(mosaic: np.ndarray, num_patches: int, patch_size: int, columns: int = MOSAIC_COLUMNS) -> np.ndarray:
    """Returns the first `num_patches` patches of a mosaic as [num_patches, patch_size, patch_size, 3] uint8."""
    num_rows = mosaic.shape[0] // patch_size
    tiles = mosaic.reshape(num_rows, patch_size, columns, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(num_rows * columns, patch_size, patch_size, 3)[:num_patches]
