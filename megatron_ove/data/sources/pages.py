"""Pages: the whole page at its own aspect, scaled down to a patch budget; never cropped, mirrored or blown up.

Words are the labels of a page, so cutting some of it off or mirroring it would make its labels wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_ove.config.data import OcrSourceConfig
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.sampler import draw_choice
from megatron_ove.data.sources.pictures import PictureSource
from megatron_ove.data.windows import Windows

_DRAW_BUDGET = 0


class OcrSource(PictureSource):
    """Word-labelled pages of at most `max_patches` patches."""

    noun = "page"

    def __init__(self, name: str, config: OcrSourceConfig, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, config.weight, **common)
        self._budgets = config.list_budgets(self.patch_size)

    def grid_sizes(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        budgets = draw_choice(self._budgets, seeds, _DRAW_BUDGET)
        return native_grids(self.shards.height[rows], self.shards.width[rows], self.patch_size, budgets)

    def windows(self, rows: np.ndarray, seeds: np.ndarray) -> Windows:
        extent = np.stack([self.shards.height[rows], self.shards.width[rows]], axis=1).astype(np.int64)
        return Windows(
            corner=np.zeros_like(extent),
            extent=extent,
            size=self.grid_sizes(rows, seeds) * self.patch_size,
            mirror=np.zeros(len(rows), dtype=np.int32),
        )
