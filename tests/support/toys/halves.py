"""A source of pictures that are seen as two segments: their left and their right half."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from megatron_ove.config.data import ImageSourceConfig
from megatron_ove.data.sources.base import Segments
from megatron_ove.data.sources.images import ImageSource
from megatron_ove.kinds import SourceKind


class HalvesConfig(ImageSourceConfig):
    """Squares with an even number of patches a side."""

    kind: Literal["halves"]


class HalvesSource(ImageSource):
    """Patches of the left half, then those of the right one; each half counts its places from 0."""

    def __init__(self, name: str, config: HalvesConfig, **common: Any) -> None:
        super().__init__(name, config, **common)

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        sizes = self.grid_sizes(rows, seeds) // np.array([1, 2])
        whole = Segments.of_pictures(np.repeat(sizes, 2, axis=0))
        return Segments(np.full(len(rows), 2), whole.lengths, whole.grids)

    def decode_into(self, rows, seeds, targets, read=None):
        problems = super().decode_into(rows, seeds, targets, read)
        for (height, width), target in zip(self.grid_sizes(rows, seeds).tolist(), targets, strict=True):
            grid = target.clone().view(height, 2, width // 2, -1)
            target.copy_(grid.transpose(0, 1).reshape(target.shape))
        return problems


SOURCES = {"halves": SourceKind(config=HalvesConfig, build=HalvesSource, shard_kind="image")}
