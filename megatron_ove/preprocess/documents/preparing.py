"""One document on its way into a shard set: pictures of any form and what is known of them -> members of a sample.

This part runs in worker processes, so inputs are small values that can be sent, or hold the bytes themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.known_text import Known, KnownText, document_of, document_of_texts
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.pictures import JpegPreparer, PreparedPicture
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.format import DOCUMENT_MEMBER, MAX_PAGES, page_member

_LEAST_EXTENT = 0.2
"""Pixels that a box keeps of a piece too small to be seen after scaling: tenths are stored."""


@dataclass(frozen=True)
class PageBytes:
    """A picture that lies inside another file.

    Attributes:
        content: the encoded picture.
        name: as shown in sentences.
    """

    content: bytes = field(repr=False)
    name: str


@dataclass(frozen=True)
class DocumentInput:
    """One document to be made.

    Attributes:
        key: of its sample.
        name: what stands in the rejects as its file.
        pages: its pictures in order.
        known: what is known of them: a document whose boxes are in pixels of `pages`, a record, or files.
        labels: [label_width] int32; None = there are none.
        clips: whether boxes are cut at the page's edge and dropped beyond it. Otherwise such a document is refused.
        problem: why it cannot be used, if that is known already.
    """

    key: str
    name: str
    pages: tuple[PageBytes | InputFile, ...] = ()
    known: Document | Mapping[str, Any] | tuple[KnownText, ...] = ()
    labels: np.ndarray | None = None
    clips: bool = False
    problem: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PreparedDocument:
    """Members of a sample without its labels, and the names of entries that were not read."""

    members: dict[str, bytes]
    ignored: tuple[str, ...] = ()


class DocumentPreparer:
    """Makes the members of documents; called once per document, in a worker."""

    def __init__(self, *, longest_side: int, quality: int) -> None:
        """`longest_side` in pixels; larger pictures are scaled down, and boxes with them."""
        self._pictures = JpegPreparer(longest_side=longest_side, quality=quality)

    def __call__(self, item: DocumentInput) -> PreparedDocument:
        """Raises `DataError` with the reject's reason when the document cannot be used."""
        if item.problem:
            raise DataError(item.problem)
        if not 1 <= len(item.pages) <= MAX_PAGES:
            raise DataError(f"{item.name} has {len(item.pages)} pictures, but a document has 1 to {MAX_PAGES}")
        known = _read(item.known)
        pages = [self._prepare(page) for page in item.pages]
        document = fit_boxes(known.document, pages, clips=item.clips)
        members = {DOCUMENT_MEMBER: document.encode()}
        members |= {page_member(number): page.jpeg for number, page in enumerate(pages)}
        return PreparedDocument(members, known.ignored)

    def _prepare(self, page: PageBytes | InputFile) -> PreparedPicture:
        if isinstance(page, InputFile):
            return self._pictures.prepare_file(page)
        return self._pictures.prepare_bytes(page.content, name=page.name)


def _read(known: Document | Mapping[str, Any] | tuple[KnownText, ...]) -> Known:
    if isinstance(known, Document):
        return Known(known)
    return document_of(known) if isinstance(known, Mapping) else document_of_texts(known)


def fit_boxes(document: Document, pages: Sequence[PreparedPicture], *, clips: bool) -> Document:
    """Takes boxes from the pixels of the original pictures to those of the stored ones.

    Args:
        document: boxes on a page that is not there, or turned around, stay as they are for the writer to refuse.
        pages: its pictures.
        clips: whether what leaves a page is cut off.
    """
    units = {unit: _fit(boxes, pages, clips=clips) for unit, boxes in document.boxes.items() if len(boxes)}
    return dataclasses.replace(document, **units)


def _fit(boxes: Boxes, pages: Sequence[PreparedPicture], *, clips: bool) -> Boxes:
    is_known = (boxes.page >= 0) & (boxes.page < len(pages))
    page = np.where(is_known, boxes.page, 0)
    stored = np.array([one.stored[::-1] * 2 for one in pages], np.float64)[page]  # [k, 4] width, height, width, height
    original = np.array([one.original[::-1] * 2 for one in pages], np.float64)[page]
    corners = boxes.corners.astype(np.float64) * stored / original
    if clips:
        corners = np.clip(corners, 0.0, stored)
        is_seen = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        boxes, corners, is_known = _chosen(boxes, is_seen), corners[is_seen], is_known[is_seen]
    low, high = corners[:, :2], corners[:, 2:]
    corners[:, 2:] = np.where((high > low) & (high < low + _LEAST_EXTENT), low + _LEAST_EXTENT, high)
    corners = np.where(is_known[:, None], corners, boxes.corners)
    return Boxes(boxes.page, corners.astype(np.float32), boxes.spans)


def _chosen(boxes: Boxes, which: np.ndarray) -> Boxes:
    return Boxes(boxes.page[which], boxes.corners[which], boxes.spans[which])
