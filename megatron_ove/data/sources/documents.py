"""Documents: all pages of each, whole and at their own aspect, every page a segment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_ove.config.data import DocumentSourceConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.patchify import write_patches
from megatron_ove.data.picture_decoder import PictureDecoder
from megatron_ove.data.read_ahead import MemberReader
from megatron_ove.data.sampler import draw_choice
from megatron_ove.data.sources.base import DataSource, Segments
from megatron_ove.data.windows import Windows
from megatron_ove.shards.format import DatasetInfo, page_member

_DRAW_BUDGET = 0


class DocumentSource(DataSource):
    """Documents of one or more pages, each page of at most `max_patches` patches.

    A page is never cropped or mirrored: its text would no longer be what is stored. Its patches attend to one another,
    not to those of other pages.
    """

    def __init__(self, name: str, config: DocumentSourceConfig, **common: Any) -> None:
        """Prepares a source; `common` are the arguments of `DataSource` other than name and weight."""
        super().__init__(name, config.weight, **common)
        self._page_budgets = config.list_page_budgets()
        self._decoder = PictureDecoder(device=self.device, num_threads=self.num_threads, resizes=True)

    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        counts, _, grids = self._pages(rows, seeds)
        pages = Segments.of_pictures(grids)
        return Segments(counts, pages.lengths, pages.grids)

    def windows(self, rows: np.ndarray, seeds: np.ndarray) -> Windows:
        """Returns the whole of every page, one document's after the other's."""
        _, sizes, grids = self._pages(rows, seeds)
        return Windows(
            corner=np.zeros_like(sizes),
            extent=sizes,
            size=grids * self.patch_size,
            mirror=np.zeros(len(sizes), dtype=np.int32),
        )

    def _pages(self, rows: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns pages of each document, [n], and of all pages (height, width) in pixels and in patches, [k, 2]."""
        counts, sizes = self.shards.page_sizes(rows)
        budgets = np.repeat(draw_choice(self._page_budgets, seeds, _DRAW_BUDGET), counts)
        return counts, sizes, native_grids(sizes[:, 0], sizes[:, 1], self.patch_size, budgets)

    def picture_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        counts = self.shards.page_sizes(rows)[0].tolist()
        return [
            (row, page_member(page)) for row, count in zip(rows.tolist(), counts, strict=True) for page in range(count)
        ]

    def decode_into(
        self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor], read: MemberReader | None = None
    ) -> dict[int, str]:
        problems: dict[int, str] = {}
        read = read or self.shards.read
        counts, sizes, grids = self._pages(rows, seeds)
        document = np.repeat(np.arange(len(rows)), counts)  # of each page
        members = self.picture_members(rows, seeds)
        lengths = grids.prod(axis=1)
        divided = zip(targets, _divided(lengths, counts), strict=True)
        parts = [part for target, own in divided for part in target.split(own)]

        def reject(i: int, reason: str) -> None:
            problems.setdefault(int(document[i]), reason)

        pictures = self._decoder.decode(
            sizes.prod(axis=1),
            lambda i: read(*members[i]),
            lambda i: f"{members[i][1]} of {self.shards.describe(members[i][0])}",
            reject,
            self.windows(rows, seeds),
        )
        for i, picture in pictures:
            write_patches(picture, parts[i], self.patch_size)
        return problems


def _divided(values: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """Returns the values of each document's pages."""
    return [part.tolist() for part in np.split(values, np.cumsum(counts)[:-1])]


def find_mismatches(config: TrainConfig, name: str, info: DatasetInfo) -> list[str]:
    """Returns a sentence if stored documents have more pages than a run takes.

    Args:
        config: the run.
        name: of the source.
        info: description of its shard set.
    """
    source = config.data.sources[name]
    assert isinstance(source, DocumentSourceConfig)
    if info.most_pages <= source.max_pages:
        return []
    return [
        f"data.sources.{name}.max_pages = {source.max_pages}, but {source.where} holds documents of up to "
        f"{info.most_pages} pages, and no page is left out in silence; raise it, or write the set with fewer pages a "
        "document"
    ]


def whole_samples(path: str, image_size: int, max_patches: int) -> DocumentSourceConfig:
    """Returns a section that shows all documents of a set with no chance in it."""
    del image_size
    most = DatasetInfo.read(Path(path)).most_pages
    return DocumentSourceConfig(kind="document", path=path, max_patches=max_patches, max_pages=max(1, most))
