"""Pages: the whole page at its own aspect, scaled down to a patch budget; never cropped, mirrored or blown up.

Words are the labels of a page, so cutting some of it off or mirroring it would make its labels wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from megatron_ove.config.data import OcrSourceConfig
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.patchify import grid_positions, write_patches
from megatron_ove.data.picture_decoder import PictureDecoder, Windows
from megatron_ove.data.read_ahead import MemberReader
from megatron_ove.data.sampler import draw_choice
from megatron_ove.data.shard_format import PICTURE_MEMBER
from megatron_ove.data.source import DataSource

_DRAW_BUDGET = 0


class OcrSource(DataSource):
    """Word-labelled pages of at most `max_patches` patches."""

    def __init__(self, name: str, config: OcrSourceConfig, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, config.weight, **common)
        self._budgets = config.list_budgets(self.patch_size)
        self._decoder = PictureDecoder(device=self.device, num_threads=self.num_threads, resizes=True)

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return self._grids(rows, seeds).prod(axis=1)

    def picture_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        return [(row, PICTURE_MEMBER) for row in rows.tolist()]

    def positions(self, row: int, seed: int, read: MemberReader | None = None) -> np.ndarray:
        ((grid_height, grid_width),) = self._grids(np.array([row]), np.array([seed])).tolist()
        return grid_positions(grid_height, grid_width)

    def decode_into(
        self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor], read: MemberReader | None = None
    ) -> dict[int, str]:
        shards, problems, read = self.shards, {}, read or self.shards.read
        extent = np.stack([shards.height[rows], shards.width[rows]], axis=1).astype(np.int64)
        windows = Windows(
            corner=np.zeros_like(extent),
            extent=extent,
            size=self._grids(rows, seeds) * self.patch_size,
            mirror=np.zeros(len(rows), dtype=np.int32),
        )
        pictures = self._decoder.decode(
            extent.prod(axis=1),
            lambda i: read(int(rows[i]), PICTURE_MEMBER),
            lambda i: f"the page of {shards.describe(int(rows[i]))}",
            problems.__setitem__,
            windows,
        )
        for i, picture in pictures:
            write_patches(picture, targets[i], self.patch_size)
        return problems

    def _grids(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        budgets = draw_choice(self._budgets, seeds, _DRAW_BUDGET)
        return native_grids(self.shards.height[rows], self.shards.width[rows], self.patch_size, budgets)
