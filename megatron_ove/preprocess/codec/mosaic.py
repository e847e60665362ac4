"""Selected patches as one picture (for shards) and as a contact sheet (for people)."""

from __future__ import annotations

import cv2
import numpy as np

MOSAIC_COLUMNS = 16
_GREY = 128
_DIMMED = 0.25


def make_mosaic(
    frames: np.ndarray, positions: np.ndarray, patch_size: int, columns: int = MOSAIC_COLUMNS
) -> np.ndarray:
    """Lays the patches at `positions` row by row into one picture, the last row filled with grey.

    Args:
        frames: [t, height, width, 3] uint8 RGB.
        positions: [k, 3] int32 (t, h, w) in patch units.
        patch_size: side of a patch in pixels.
        columns: patches per row of the mosaic.

    Returns:
        [ceil(k / columns) * patch_size, columns * patch_size, 3] uint8; patch i is at row i // columns, column
        i % columns.
    """
    num_rows = max(1, -(-len(positions) // columns))
    tiles = np.full((num_rows * columns, patch_size, patch_size, 3), _GREY, np.uint8)
    tiles[: len(positions)] = _as_patches(frames, patch_size)[positions[:, 0], positions[:, 1], positions[:, 2]]
    rows = tiles.reshape(num_rows, columns, patch_size, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows.reshape(num_rows * patch_size, columns * patch_size, 3))


def contact_sheet(
    frames: np.ndarray, positions: np.ndarray, patch_size: int, columns: int = 8, *, frame_width: int | None = None
) -> np.ndarray:
    """Draws all frames side by side: selected patches as they are, the others dark and grey.

    Args:
        frames: [t, height, width, 3] uint8 RGB.
        positions: [k, 3] int32 (t, h, w) in patch units.
        patch_size: side of a patch in pixels.
        columns: frames per row.
        frame_width: width to draw a frame with, in pixels; None draws it as it is.

    Returns:
        uint8 RGB picture with a thin border between frames.
    """
    num_frames, height, width = frames.shape[:3]
    lit = np.zeros((num_frames, height // patch_size, width // patch_size), bool)
    lit[positions[:, 0], positions[:, 1], positions[:, 2]] = True
    lit = lit.repeat(patch_size, axis=1).repeat(patch_size, axis=2)[..., None]
    dimmed = (frames.mean(axis=-1, keepdims=True) * _DIMMED).astype(np.uint8)
    shown = np.where(lit, frames, dimmed)
    if frame_width is not None and frame_width != width:
        size = (frame_width, max(1, round(height * frame_width / width)))
        shown = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in shown])
    num_rows = -(-num_frames // columns)
    bordered = np.pad(shown, ((0, num_rows * columns - num_frames), (1, 1), (1, 1), (0, 0)), constant_values=_GREY)
    tile_height, tile_width = bordered.shape[1:3]
    grid = bordered.reshape(num_rows, columns, tile_height, tile_width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(num_rows * tile_height, columns * tile_width, 3))


def _as_patches(frames: np.ndarray, patch_size: int) -> np.ndarray:
    """[t, height, width, 3] -> view [t, grid_height, grid_width, patch, patch, 3]."""
    num_frames, height, width = frames.shape[:3]
    cells = frames.reshape(num_frames, height // patch_size, patch_size, width // patch_size, patch_size, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5)
