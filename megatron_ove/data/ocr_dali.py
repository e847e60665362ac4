"""Pages: the whole page at its own aspect, scaled down to a patch budget; never cropped, mirrored or blown up.

Words are the labels of a page, so cutting some of it off or mirroring it would make its labels wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from megatron_ove.config.data import OcrSourceConfig
from megatron_ove.data.patchify import grid_positions, write_patches
from megatron_ove.data.picture_decoder import PictureDecoder, Windows
from megatron_ove.data.shard_format import PICTURE_MEMBER
from megatron_ove.data.source import DataSource


class OcrSource(DataSource):
    """Word-labelled pages of at most `max_patches` patches."""

    def __init__(self, name: str, config: OcrSourceConfig, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, config.weight, **common)
        self._max_patches = config.max_patches
        self._decoder = PictureDecoder(device=self.device, num_threads=self.num_threads, resizes=True)

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return self._grids(rows).prod(axis=1)

    def positions(self, row: int, seed: int) -> np.ndarray:
        ((grid_height, grid_width),) = self._grids(np.array([row])).tolist()
        return grid_positions(grid_height, grid_width)

    def decode_into(self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor]) -> None:
        shards = self.shards
        extent = np.stack([shards.height[rows], shards.width[rows]], axis=1).astype(np.int64)
        windows = Windows(
            corner=np.zeros_like(extent),
            extent=extent,
            size=self._grids(rows) * self.patch_size,
            mirror=np.zeros(len(rows), dtype=np.int32),
        )
        pictures = self._decoder.decode(
            extent.prod(axis=1),
            lambda i: shards.read(int(rows[i]), PICTURE_MEMBER),
            lambda i: f"the page of {shards.describe(int(rows[i]))}",
            windows,
        )
        for i, picture in pictures:
            write_patches(picture, targets[i], self.patch_size)

    def _grids(self, rows: np.ndarray) -> np.ndarray:
        shards = self.shards
        return page_grids(shards.height[rows], shards.width[rows], self.patch_size, self._max_patches)


def page_grids(heights: np.ndarray, widths: np.ndarray, patch_size: int, max_patches: int) -> np.ndarray:
    """Returns the patch grid of pages, [n, 2] int64 (hp, wp), with hp * wp <= max_patches.

    A page that fits keeps its size; a larger one is scaled down by one factor for both sides. Either side is then
    rounded to whole patches (at least one), which stretches it by less than one patch. If rounding up exceeds the
    budget, the side whose shortening leaves the aspect closer to the page's gives way.

    Args:
        heights: [n] pixels.
        widths: [n] pixels.
        patch_size: p.
        max_patches: budget of a page.
    """
    rows, columns = np.asarray(heights) / patch_size, np.asarray(widths) / patch_size
    scale = np.minimum(1.0, np.sqrt(max_patches / (rows * columns)))
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
