"""Single pages of a labelled set and the words that a head reads on them: as text, and as a picture to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megatron_ove.convert.class_centers import ClassHead
from megatron_ove.evaluation.embedding import EmbeddedSet
from megatron_ove.preprocess.text_render.typefaces import Typeface, typefaces
from megatron_ove.shards.format import PICTURE_MEMBER, page_member
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.vocabulary import Vocabulary

_MOST_WORDS = 8
_COLUMNS, _CELL, _GAP, _TEXT_SIZE = 6, 200, 12, 14
_RIGHT, _WRONG, _EDGE = (0, 120, 40), (190, 30, 30), (215, 215, 215)


@dataclass(frozen=True)
class PageRead:
    """A page and the nearest words, as many as it has, at most eight.

    Attributes:
        key: of the sample.
        words: on the page, by its labels.
        read: words whose class centers are nearest, best first.
    """

    key: str
    words: tuple[str, ...]
    read: tuple[str, ...]

    def __str__(self) -> str:
        """One line; words that are not on the page in brackets."""
        read = ", ".join(word if word in self.words else f"({word})" for word in self.read)
        return f"{self.key}  has {', '.join(self.words)}  reads {read}"


def choose_pages(embedded: EmbeddedSet, count: int) -> list[int]:
    """Returns rows of at most `count` labelled samples, evenly spread over the set."""
    labelled = (embedded.labels >= 0).any(dim=1).nonzero().flatten().tolist()
    places = np.linspace(0, len(labelled) - 1, min(count, len(labelled))).round().astype(int)
    return [labelled[place] for place in places]


def read_pages(embedded: EmbeddedSet, rows: Sequence[int], head: ClassHead, vocabulary: Vocabulary) -> list[PageRead]:
    """Returns what is read on samples.

    Args:
        embedded: embeddings as the encoder puts them out.
        rows: samples to look at, each with a label.
        head: its classes are in the order of the vocabulary; those beyond its end have no word and are left out.
        vocabulary: words of the classes.
    """
    count = min(len(vocabulary), len(head))
    scores = head.of_classes(slice(count)).cosines(embedded.embeddings[list(rows)])
    pages = []
    for row, of_page in zip(rows, scores, strict=True):
        ids = dict.fromkeys(label for label in embedded.labels[row].tolist() if 0 <= label < count)
        nearest = of_page.topk(min(max(len(ids), 1), _MOST_WORDS)).indices.tolist()
        words = vocabulary.words
        pages.append(PageRead(embedded.keys[row], tuple(words[i] for i in ids), tuple(words[i] for i in nearest)))
    return pages


def draw_pages(shards: ShardSet, rows: Sequence[int], pages: Sequence[PageRead], path: str | Path) -> None:
    """Writes a PNG of pages with the words read below each: green if they are on the page, red if not."""
    member = page_member(0) if shards.info.has_pages else PICTURE_MEMBER  # of a document its first page
    cells = [_draw_page(shards.read(row, member), page) for row, page in zip(rows, pages, strict=True)]
    columns = min(_COLUMNS, len(cells))
    bottoms = [_GAP] * columns  # each column on its own: a tall page leaves no gap beside it
    places = []
    for number, cell in enumerate(cells):
        column = number % columns
        places.append((_GAP + column * (_CELL + _GAP), bottoms[column]))
        bottoms[column] += cell.height + _GAP
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, max(bottoms)), "white")
    for place, cell in zip(places, cells, strict=True):
        sheet.paste(cell, place)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _typeface_for(word: str) -> Typeface:
    faces = (*typefaces("latin", "train"), *typefaces("japanese"))
    return next((face for face in faces if face.can_write(word)), faces[0])


def _draw_page(stored: bytes, page: PageRead) -> Image.Image:
    picture = Image.open(io.BytesIO(stored)).convert("RGB")
    scale = (_CELL - 2) / picture.width
    if picture.height * scale > 2 * _CELL:
        scale = 2 * _CELL / picture.height
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    line = _TEXT_SIZE + 5
    cell = Image.new("RGB", (_CELL, picture.height + 6 + line * len(page.read)), "white")
    cell.paste(picture, (1, 1))
    pen = ImageDraw.Draw(cell)
    pen.rectangle((0, 0, picture.width + 1, picture.height + 1), outline=_EDGE)  # white pages have an edge too
    for place, word in enumerate(page.read):
        font = _typeface_for(word).open(_TEXT_SIZE)
        colour = _RIGHT if word in page.words else _WRONG
        pen.text((2, picture.height + 4 + place * line), word, font=font, fill=colour)
    return cell
