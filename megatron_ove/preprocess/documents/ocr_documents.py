"""Pages that were read by OCR -> documents with the believed lines as text, their boxes, and word ids if wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.preparing import DocumentInput
from megatron_ove.preprocess.ocr.lines import MIN_SCORE, TextLine, believable_lines
from megatron_ove.preprocess.ocr.page_shards import judge_pages
from megatron_ove.preprocess.ocr.recognition import PageRecord
from megatron_ove.preprocess.ocr.tags import NUM_TAGS, no_text_reason, page_tags
from megatron_ove.rejects import RejectsFile
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.vocabulary import Vocabulary


def document_of_lines(lines: Iterable[TextLine], *, min_score: float = MIN_SCORE) -> Document:
    """Returns the document that a page's lines make.

    Args:
        lines: all lines of the page in reading order; boxes in pixels of its picture.
        min_score: lines below are not believed.

    Returns:
        Text: the believed lines, one under the other. Box of a line: the one around its four corners; it may leave the
        page. Lines without corners have none.

    Raises:
        DataError: no line is believed; the sentence is the reject's reason.
    """
    lines = list(lines)
    texts: list[str] = []
    rows: list[tuple[float, ...]] = []
    start = 0
    for line in believable_lines(lines, min_score=min_score):
        text = " ".join(line.text.split("\n"))  # a line of a user's may hold more than one
        if not text.strip():
            continue
        if line.box:
            x, y = zip(*line.box, strict=True)
            rows.append((0, min(x), min(y), max(x), max(y), start, start + len(text)))
        texts.append(text)
        start += len(text) + 1
    if not texts:
        raise DataError(no_text_reason(lines, min_score=min_score))
    return Document("\n".join(texts), lines=Boxes.of(rows))


@dataclass(frozen=True)
class PageDocuments:
    """How pages become documents.

    Attributes:
        vocabulary: words whose ids become labels; None = there are no labels.
        num_tags: labels of a page.
        fill: what follows a page's last label, see `page_tags`.
        min_score: lines below are not believed.
    """

    vocabulary: Vocabulary | None = None
    num_tags: int = NUM_TAGS
    fill: Literal["none", "cyclic"] = "none"
    min_score: float = MIN_SCORE

    def inputs(self, pages: Sequence[PageRecord], *, rejects: RejectsFile) -> list[DocumentInput]:
        """Returns a document for each page; those that `judge_pages` refuses, or that say nothing, go to `rejects`."""
        return judge_pages(pages, self._input, rejects=rejects)

    def _input(self, page: PageRecord) -> DocumentInput:
        labels = None
        if self.vocabulary is not None:
            found = page_tags(
                page.lines, self.vocabulary, num_tags=self.num_tags, fill=self.fill, min_score=self.min_score
            )
            labels = found.ids
        document = document_of_lines(page.lines, min_score=self.min_score)
        picture = page.input_file
        return DocumentInput(page.key, str(picture), (picture,), document, labels, clips=True)


def pages_of_task(
    pages: Sequence[PageRecord], places: range, identities: Sequence[tuple[str, int]]
) -> list[PageRecord]:
    """Returns the pages of some of the pictures, in order.

    Args:
        pages: all of them.
        places: of the wanted pictures in `identities`.
        identities: every picture once. A picture that stands in the list twice goes to one task with both.
    """
    mine = {identities[place] for place in places}
    return [page for page in pages if page.input_file.identity in mine]
