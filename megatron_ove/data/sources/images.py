"""Images: a random window of the picture, resized to a square or at its own aspect, mirrored half of the time."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_ove.config.data import ImageSourceConfig
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.sampler import draw_choice, draw_uniform
from megatron_ove.data.sources.pictures import PictureSource
from megatron_ove.data.windows import Windows

_DRAW_AREA, _DRAW_ASPECT, _DRAW_Y, _DRAW_X, _DRAW_MIRROR, _DRAW_SIZE = range(6)


class ImageSource(PictureSource):
    """Cluster-labelled images of at most (image_size / p) ** 2 patches each."""

    noun = "picture"

    def __init__(self, name: str, config: ImageSourceConfig, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, config.weight, **common)
        self._config = config

    def grid_sizes(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        if self._config.aspect == "keep":
            return super().grid_sizes(rows, seeds)
        sides = draw_sides(seeds, self._config, self.patch_size) // self.patch_size
        return np.stack([sides, sides], axis=1)

    def windows(self, rows: np.ndarray, seeds: np.ndarray) -> Windows:
        heights, widths = (side[rows].astype(np.int64) for side in (self.shards.height, self.shards.width))
        return draw_windows(heights, widths, seeds, self._config, self.patch_size)


def draw_sides(seeds: np.ndarray, config: ImageSourceConfig, patch_size: int) -> np.ndarray:
    """Draws the `image_size` of each image, [n] int64 pixels, from its seed, [n] int64."""
    return draw_choice(config.list_sizes(patch_size), seeds, _DRAW_SIZE)


def draw_windows(
    heights: np.ndarray, widths: np.ndarray, seeds: np.ndarray, config: ImageSourceConfig, patch_size: int
) -> Windows:
    """Draws the crop window, size and mirroring of each image from its seed.

    The window's area is uniform in `crop_area` of the picture; its aspect relative to the picture's is log-uniform in
    the part of `crop_aspect` with which such an area fits into the picture (so nothing has to be drawn again); its
    place is uniform.

    Args:
        heights: [n] int64 pixels.
        widths: [n] int64 pixels.
        seeds: [n] int64 sample seeds.
        config: ranges and output sizes.
        patch_size: p; output sizes are multiples of it.
    """
    low_area, high_area = config.crop_area
    area = low_area + (high_area - low_area) * draw_uniform(seeds, _DRAW_AREA)
    low, high = (np.clip(aspect, area, 1 / area) for aspect in config.crop_aspect)
    aspect = low * (high / low) ** draw_uniform(seeds, _DRAW_ASPECT)
    height = np.clip(np.rint(heights * np.sqrt(area / aspect)), 1, heights).astype(np.int32)
    width = np.clip(np.rint(widths * np.sqrt(area * aspect)), 1, widths).astype(np.int32)
    top = (draw_uniform(seeds, _DRAW_Y) * (heights - height + 1)).astype(np.int32)
    left = (draw_uniform(seeds, _DRAW_X) * (widths - width + 1)).astype(np.int32)
    sides = draw_sides(seeds, config, patch_size)
    size = np.stack([sides, sides], axis=1)
    if config.aspect == "keep":
        size = native_grids(height, width, patch_size, (sides // patch_size) ** 2, config.max_upscale) * patch_size
    return Windows(
        corner=np.stack([top, left], axis=1),
        extent=np.stack([height, width], axis=1),
        size=size.astype(np.int32),
        mirror=(draw_uniform(seeds, _DRAW_MIRROR) < config.flip_probability).astype(np.int32),
    )
