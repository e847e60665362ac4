"""The patch grid of a picture that keeps its aspect: at its own size, or scaled to a number of patches."""

from __future__ import annotations

import numpy as np


def native_grids(
    heights: np.ndarray,
    widths: np.ndarray,
    patch_size: int,
    max_patches: int | np.ndarray,
    max_upscale: float = 1.0,
) -> np.ndarray:
    """Returns the patch grids of pictures, [n, 2] int64 (hp, wp), with hp * wp <= max_patches.

    A picture that fits is enlarged by at most `max_upscale`; a larger one is scaled down by one factor for both sides.
    Either side is then rounded to whole patches (at least one), which stretches it by less than one patch. If rounding
    up exceeds the budget, the side whose shortening leaves the aspect closer to the picture's gives way.

    Args:
        heights: [n] pixels.
        widths: [n] pixels.
        patch_size: p.
        max_patches: most patches of a picture, one for all or [n].
        max_upscale: most by which a side is multiplied, 1 = never enlarged.
    """
    rows, columns = np.asarray(heights) / patch_size, np.asarray(widths) / patch_size
    scale = np.minimum(max_upscale, np.sqrt(max_patches / (rows * columns)))
    grid_height = np.clip(np.rint(rows * scale), 1, max_patches).astype(np.int64)
    grid_width = np.clip(np.rint(columns * scale), 1, max_patches).astype(np.int64)
    shorter, narrower = max_patches // grid_width, max_patches // grid_height
    aspect = rows / columns

    def distortion(ratio: np.ndarray) -> np.ndarray:
        return np.maximum(ratio / aspect, aspect / ratio)

    too_large = grid_height * grid_width > max_patches
    cut_height = distortion(shorter / grid_width) <= distortion(grid_height / narrower)
    return np.stack(
        [
            np.where(too_large & cut_height, shorter, grid_height),
            np.where(too_large & ~cut_height, narrower, grid_width),
        ],
        axis=1,
    )
