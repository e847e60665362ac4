"""`RegionItems`: boxes of documents as items of a Partial-FC head, each embedded by the tokens that lie in it.

Source: RICE (Xie et al., ICCV 2025), which draws as many regions of every picture and lets them share one softmax with
all others. Words of a page have as many classes as page tags have, so page and region heads may use one vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.regions import RegionConfig
from megatron_ove.data.windows import Windows, visible_share
from megatron_ove.model.pooling import heads_of_width
from megatron_ove.objectives.base import ObjectiveContext
from megatron_ove.objectives.regions.box_tokens import tokens_in_boxes
from megatron_ove.objectives.regions.documents import documents_of
from megatron_ove.objectives.regions.region_labels import LabelBoxes, labels_of_section
from megatron_ove.objectives.regions.region_pool import RegionPool, mean_of_regions
from megatron_ove.outputs import VisionFeatures
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.random import mix64
from megatron_ove.shards.documents import Document

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader

LEAST_VISIBLE = 0.5
"""Share of a box's area that must lie in the window for it to be looked at: what is cut through reads as other text."""
_PURPOSE = 0x726567696F6E73  # "regions": keeps this use of a sample's seed apart from others
_LABEL_PURPOSE = 0x726C6162656C


@dataclass(frozen=True)
class RegionInputs:
    """Regions of a microbatch, q of each sample, one sample's after the other's; tensors on the host.

    Attributes:
        labels: [m * q, L] int32, class ids, -1 = none.
        token_rows: [M] int64, tokens in the pack, region after region.
        regions: [M] int64, ascending: the region that each lies in. A region without tokens has no label.
        num_boxes: boxes that the documents have, of the section's unit.
        num_known: those that are visible and have a label, of which regions are drawn.
    """

    labels: Tensor
    token_rows: Tensor
    regions: Tensor
    num_boxes: int
    num_known: int


class RegionItems:
    """Regions drawn from the boxes of documents."""

    def __init__(self, sources: tuple[str, ...], section: RegionConfig, context: ObjectiveContext) -> None:
        self.per_sample = section.per_sample
        self._sources, self._section = sources, section
        self._device = context.topology.device
        self._find_labels: LabelBoxes | None = None
        self._pool: RegionPool | None = None
        if section.pooling == "attention":
            width = context.embedding_size
            self._pool = RegionPool(width, heads_of_width(width), device=self._device, dtype=context.dtype)

    def modules(self) -> Mapping[str, nn.Module]:
        return {} if self._pool is None else {"region_pool": self._pool}

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> RegionInputs:
        if self._find_labels is None:  # a vocabulary takes a while and some memory, and not every stage needs it
            first = next(name for name in self._sources if name in samples.source_names)
            self._find_labels = labels_of_section(self._section, Path(reader.shards(first).directory))
        chosen = samples.of(*self._sources).tolist()
        place_of = {sample: place for place, sample in enumerate(chosen)}
        bounds = pack.cu_seqlens.numpy().astype(np.int64)
        first_segment = np.searchsorted(pack.sample.numpy(), np.arange(len(samples) + 1)).tolist()
        labels: list[list[int]] = [[] for _ in range(len(chosen) * self.per_sample)]
        tokens: dict[int, np.ndarray] = {}  # of each region that has some
        num_boxes = num_known = 0
        for sample, document, windows, first_page in documents_of(samples, self._sources, first_segment, reader):
            known = self._known_boxes(document, windows, first_page, first_segment[sample + 1] - first_segment[sample])
            num_boxes, num_known = num_boxes + len(document.boxes[self._section.unit]), num_known + len(known)
            first_region = place_of[sample] * self.per_sample
            for number, drawn in enumerate(self._draw(len(known), int(samples.seed[sample]))):
                page, corners, ids = known[drawn]
                segment = first_segment[sample] + page
                rows, columns = pack.grids[segment, 1:].tolist()
                size = windows.size[first_page + page].tolist()
                (inside,) = tokens_in_boxes(corners, (size[0], size[1]), (rows, columns))
                labels[first_region + number] = ids
                tokens[first_region + number] = bounds[segment] + inside
        empty = np.zeros(0, dtype=np.int64)
        regions = np.repeat(np.array(list(tokens), dtype=np.int64), [len(rows) for rows in tokens.values()])
        return RegionInputs(
            labels=_filled_up(labels),
            token_rows=host_tensor(np.concatenate([empty, *tokens.values()]), self._device),
            regions=host_tensor(regions, self._device),
            num_boxes=num_boxes,
            num_known=num_known,
        )

    def _known_boxes(
        self, document: Document, windows: Windows, first_page: int, num_pages: int
    ) -> list[tuple[int, np.ndarray, list[int]]]:
        """Returns (page, corners [4] in pixels of its window, class ids) of the boxes that can be learned."""
        assert self._find_labels is not None
        boxes, known = document.boxes[self._section.unit], []
        ids = self._find_labels(document, boxes)
        for page in range(num_pages):
            here = np.flatnonzero(boxes.page == page)
            corners = windows.move_boxes(first_page + page, boxes.corners[here])
            height, width = windows.size[first_page + page].tolist()
            is_visible = visible_share(corners, (height, width)) >= LEAST_VISIBLE
            known += [(page, corners[i], ids[here[i]]) for i in np.flatnonzero(is_visible) if ids[here[i]]]
        return known

    def _draw(self, count: int, seed: int) -> list[int]:
        """Returns the boxes of a sample that are drawn, a function of its seed; fewer than `per_sample` where there are
        fewer and none is repeated."""
        order = np.argsort(mix64(np.array([seed]), _PURPOSE, np.arange(count)), kind="stable")
        if count and self._section.fill == "repeat":
            order = np.resize(order, self.per_sample)
        return order[: self.per_sample].tolist()

    def labels_of(self, inputs: RegionInputs) -> Tensor:
        return inputs.labels

    def seeds(self, batch: Batch) -> Tensor:
        seeds = batch.samples.seed[batch.samples.of(*self._sources)]
        return mix64(seeds[:, None], _LABEL_PURPOSE, torch.arange(self.per_sample)[None]).flatten()

    def rows(self, batch: Batch) -> Tensor:
        return torch.arange(len(batch.samples.of(*self._sources)) * self.per_sample)

    def embeddings(self, features: VisionFeatures, batch: Batch, inputs: RegionInputs) -> Tensor:
        tokens = features.tokens.squeeze(1)
        token_rows, regions = (x.to(self._device, non_blocking=True) for x in (inputs.token_rows, inputs.regions))
        pool = mean_of_regions if self._pool is None else self._pool
        return pool(tokens, token_rows, regions, len(inputs.labels))

    def metrics(self, inputs: RegionInputs) -> Mapping[str, tuple[float, float]]:
        count = len(inputs.labels) / self.per_sample
        used = float((inputs.labels >= 0).any(1).sum())
        return {
            "regions": (used, count),
            "boxes_known": (float(inputs.num_known), float(inputs.num_boxes)),
        }


def _filled_up(labels: list[list[int]]) -> Tensor:
    """Returns [n, L] int32, lists of different lengths filled up with -1."""
    width = max([1, *map(len, labels)])
    filled = np.full((len(labels), width), -1, dtype=np.int32)
    for row, ids in enumerate(labels):
        filled[row, : len(ids)] = ids
    return torch.from_numpy(filled)
