"""From pages of PDFs to samples of kind `document`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.preprocess.documents.pdf_pages import PageText
from megatron_ove.preprocess.documents.pdf_process import PagePlace, StoredPage
from megatron_ove.shards.documents import BOX_UNITS, MAX_DOCUMENT_BYTES, Boxes, Document
from megatron_ove.shards.format import DOCUMENT_MEMBER, page_member

PAGE_SEPARATOR = "\f"
"""Stands between the texts of two pages of a sample, and nowhere else in it."""
MAX_PAGES_PER_DOCUMENT = 256
"""Of a sample, whose pages are in memory together."""
_GROWTH = 1.25
"""Places in the text of all pages have more digits than those of one."""


@dataclass(frozen=True)
class PdfSample:
    """What one sample is made of: its key, the file that it is from, and its members but labels."""

    key: str
    source: str
    members: Mapping[str, bytes]


def samples_of(pages: Iterable[tuple[PagePlace, StoredPage]], pages_per_document: int) -> Iterator[PdfSample]:
    """Makes samples of neighbouring pages of a file.

    Args:
        pages: those that have a text, in the order of their files and numbers; those that cannot be used are not among
            them, and a sample goes on behind such a gap.
        pages_per_document: pages 1 to N of a file may be together, N + 1 to 2 N, and so on; a sample ends earlier if
            its json would become too large to be stored.
    """
    together: list[tuple[PagePlace, StoredPage]] = []
    size = 0.0
    for place, page in pages:
        own_size = _GROWTH * len(document_of([page]).encode())
        if together and (
            together[0][0].file.key != place.file.key
            or together[0][0].page // pages_per_document != place.page // pages_per_document
            or size + own_size > MAX_DOCUMENT_BYTES
        ):
            yield _sample(together)
            together, size = [], 0.0
        together.append((place, page))
        size += own_size
    if together:
        yield _sample(together)


def _sample(pages: Sequence[tuple[PagePlace, StoredPage]]) -> PdfSample:
    place = pages[0][0]
    members = {DOCUMENT_MEMBER: document_of([page for _, page in pages]).encode()}
    members |= {page_member(number): page.jpeg for number, (_, page) in enumerate(pages)}
    return PdfSample(place.key, str(place), members)


def document_of(pages: Sequence[StoredPage]) -> Document:
    """Returns what pages with a text say together, with `PAGE_SEPARATOR` between them."""
    texts = [_text_of(page) for page in pages]
    starts = np.cumsum([0, *(len(text.text) + len(PAGE_SEPARATOR) for text in texts)])
    boxes = {}
    for unit in BOX_UNITS:
        rows = [getattr(text, unit) for text in texts]
        number = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        together = np.concatenate(rows)
        together[:, 4:] += starts[number, None]
        boxes[unit] = Boxes.of(np.column_stack([number, together]))  # type: ignore[arg-type]
    return Document(PAGE_SEPARATOR.join(text.text for text in texts), **boxes)


def _text_of(page: StoredPage) -> PageText:
    assert page.text is not None
    return page.text
