"""`PictureSource`: samples that are one picture each, or a window of one, resized to whole patches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from megatron_ove.data.patchify import write_patches
from megatron_ove.data.picture_decoder import PictureDecoder
from megatron_ove.data.read_ahead import MemberReader
from megatron_ove.data.sources.base import DataSource, Segments
from megatron_ove.data.windows import Windows
from megatron_ove.shards.format import PICTURE_MEMBER


class PictureSource(DataSource):
    """Pictures; a subclass says which window of each is seen, and how large.

    Attributes:
        noun: what messages call a picture of this kind.
    """

    noun: ClassVar[str]

    def __init__(self, name: str, weight: float, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, weight, **common)
        self._decoder = PictureDecoder(device=self.device, num_threads=self.num_threads, resizes=True)

    @abstractmethod
    def windows(self, rows: np.ndarray, seeds: np.ndarray) -> Windows:
        """Returns the window, size and mirroring of samples."""

    def grid_sizes(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Returns (height, width) of samples in patches, [n, 2] int64."""
        return self.windows(rows, seeds).size.astype(np.int64) // self.patch_size

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        return Segments.of_pictures(self.grid_sizes(rows, seeds))

    def picture_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        return [(row, PICTURE_MEMBER) for row in rows.tolist()]

    def decode_into(
        self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor], read: MemberReader | None = None
    ) -> dict[int, str]:
        shards, problems, read = self.shards, {}, read or self.shards.read
        pictures = self._decoder.decode(
            shards.height[rows].astype(np.int64) * shards.width[rows],
            lambda i: read(int(rows[i]), PICTURE_MEMBER),
            lambda i: f"the {self.noun} of {shards.describe(int(rows[i]))}",
            problems.__setitem__,
            self.windows(rows, seeds),
        )
        for i, picture in pictures:
            write_patches(picture, targets[i], self.patch_size)
        return problems
