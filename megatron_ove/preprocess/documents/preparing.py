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
from megatron_ove.preprocess.pictures import JpegPreparer, PreparedPicture, sheets_of, sheets_of_bytes
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.format import DOCUMENT_MEMBER, MAX_PAGES, page_member

_LEAST_EXTENT = 0.2
"""Pixels that a box keeps of a piece too small to be seen after scaling: tenths are stored."""


@dataclass(frozen=True)
class PageBytes:
    """A picture that lies inside another file; each sheet of a TIFF is a page.

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
        whole_files: whether each sheet of a TIFF among `pages` is a page; else those that are named.
        clips: whether boxes are cut at the page's edge and dropped beyond it. Otherwise such a document is refused.
        problem: why it cannot be used, if that is known already.
    """

    key: str
    name: str
    pages: tuple[PageBytes | InputFile, ...] = ()
    known: Document | Mapping[str, Any] | tuple[KnownText, ...] = ()
    labels: np.ndarray | None = None
    whole_files: bool = False
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
        _check_count(item, len(item.pages))
        known = _read(item)
        sheets = [(page, sheet) for page in item.pages for sheet in _sheets(page, whole_files=item.whole_files)]
        _check_count(item, len(sheets))
        pages = [self._prepare(page, sheet) for page, sheet in sheets]
        document = fit_boxes(known.document, pages, clips=item.clips)
        members = {DOCUMENT_MEMBER: document.encode()}
        members |= {page_member(number): page.jpeg for number, page in enumerate(pages)}
        return PreparedDocument(members, known.ignored)

    def _prepare(self, page: PageBytes | InputFile, sheet: int) -> PreparedPicture:
        if isinstance(page, InputFile):
            return self._pictures.prepare_file(dataclasses.replace(page, sheet=sheet))
        return self._pictures.prepare_bytes(page.content, name=page.name, sheet=sheet)


def _check_count(item: DocumentInput, count: int) -> None:
    if not 1 <= count <= MAX_PAGES:
        raise DataError(f"{item.name} has {count} pictures, but a document has 1 to {MAX_PAGES}")


def _sheets(page: PageBytes | InputFile, *, whole_files: bool) -> tuple[int, ...]:
    if isinstance(page, PageBytes):
        return sheets_of_bytes(page.content)
    return sheets_of(page.path, suffix=page.suffix) if whole_files else (page.sheet,)


def _read(item: DocumentInput) -> Known:
    if isinstance(item.known, Document):
        return Known(item.known)
    if not isinstance(item.known, Mapping):
        return document_of_texts(item.known)
    try:
        return document_of(item.known)
    except DataError as error:
        raise DataError(f"{item.name}: {error}") from error


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
