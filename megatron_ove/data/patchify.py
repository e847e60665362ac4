"""Pictures as rows of patches: the one place that fixes the order of pixels inside a patch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def write_patches(picture: Tensor, target: Tensor, patch_size: int, chosen: np.ndarray | None = None) -> None:
    """Cuts a picture into patches, row by row, into `target`.

    Pixels inside a patch are channel-major (c, y, x), the order of a flattened Conv2d weight [D, 3, p, p].

    Args:
        picture: [hp * p, wp * p, 3] uint8.
        target: [n, 3 * p * p] uint8, n <= hp * wp; receives the patches. Same device as the picture.
        patch_size: p.
        chosen: [n] int64, which patches; None = the first n.
    """
    rows, columns = picture.shape[0] // patch_size, picture.shape[1] // patch_size
    grid = picture.view(rows, patch_size, columns, patch_size, 3).permute(0, 2, 4, 1, 3)  # [hp, wp, 3, p, p]
    if target.shape[0] == rows * columns:
        target.view(rows, columns, 3, patch_size, patch_size).copy_(grid)
    else:
        places = slice(target.shape[0]) if chosen is None else torch.from_numpy(chosen).to(picture.device)
        target.copy_(grid.reshape(rows * columns, -1)[places])


def grid_positions(rows: int, columns: int, *, frame: int = 0) -> np.ndarray:
    """Returns the (t, h, w), [rows * columns, 3] int32, of a full grid in row-major order.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        frame: t of every patch.
    """
    result = np.empty((rows, columns, 3), dtype=np.int32)
    result[..., 0] = frame
    result[..., 1] = np.arange(rows)[:, None]
    result[..., 2] = np.arange(columns)
    return result.reshape(-1, 3)


def empty_patches(num_microbatches: int, num_patches: int, patch_size: int, device: torch.device) -> Tensor:
    """Returns zeros, [num_microbatches, num_patches, 3 * p * p] uint8: what padding holds."""
    return torch.zeros(num_microbatches, num_patches, 3 * patch_size * patch_size, dtype=torch.uint8, device=device)
