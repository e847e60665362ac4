"""The ink of a piece of text: how much of every pixel it covers, and which glyph covers it.

Glyphs are drawn one by one at whole pixels, so that it is known of every pixel which glyph inked it. Where two glyphs
overlap, as kerned italics do, the one that covers more of the pixel has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.text_render.typefaces import Typeface

NO_GLYPH = -1


@dataclass(frozen=True)
class TextInk:
    """A drawn piece of text, cut tight around its ink.

    Attributes:
        text: what was drawn, left to right.
        coverage: [height, width] uint8, 0 = no ink, 255 = all of the pixel.
        glyph_map: [height, width] int32, place in `glyphs` of the glyph that inked the pixel, `NO_GLYPH` = none.
        glyphs: the characters with ink, in reading order.
        boxes: [num_glyphs, 4] int32 (left, top, right, bottom) in this array, right and bottom exclusive.
        starts: [len(text) + 1] number of glyphs before every character, and of all.
        left: pixels from the pen's first position to the array's left edge.
        top: pixels from the top of the line to the array's top edge.
        advance: pixels from the pen's first position to its last.
    """

    text: str
    coverage: np.ndarray
    glyph_map: np.ndarray
    glyphs: tuple[str, ...]
    boxes: np.ndarray
    starts: tuple[int, ...]
    left: int
    top: int
    advance: float

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.coverage.shape[1], self.coverage.shape[0]


def draw_ink(text: str, typeface: Typeface, size: int) -> TextInk:
    """Draws `text` in one line.

    Args:
        text: at least one character that leaves ink.
        typeface: must have all of its characters.
        size: of the font, in pixels.

    Raises:
        DataError: a character is missing in the typeface, or nothing leaves ink.
    """
    missing = typeface.missing(text)
    if missing is not None:
        raise DataError(
            f"{typeface.family} {typeface.style} has no glyph for '{missing}' of '{text}' and would draw a box "
            "instead; choose a typeface that can write it (Typeface.can_write)"
        )
    font = _sized_font(typeface, size)
    glyphs: list[tuple[str, int, int, np.ndarray]] = []  # with left and top edges
    starts, pen = [], 0.0
    for place, character in enumerate(text):
        starts.append(len(glyphs))
        if place:
            pen += font.step(text[place - 1], character)
        left, top, coverage = font.glyph(character)
        if coverage.size:
            glyphs.append((character, round(pen) + left, top, coverage))
    if not glyphs:
        raise DataError(f"'{text}' leaves no ink in {typeface.family} {typeface.style}; leave it out")
    boxes = np.array([(x, y, x + c.shape[1], y + c.shape[0]) for _, x, y, c in glyphs], np.int32)
    left, top = (int(value) for value in boxes[:, :2].min(axis=0))
    boxes -= (left, top, left, top)
    width, height = boxes[:, 2:].max(axis=0)
    coverage, glyph_map = np.zeros((height, width), np.uint8), np.full((height, width), NO_GLYPH, np.int32)
    for number, (_, _, _, of_glyph) in enumerate(glyphs):
        put_ink(coverage, glyph_map, boxes[number], of_glyph, number)
    return TextInk(
        text=text,
        coverage=coverage,
        glyph_map=glyph_map,
        glyphs=tuple(character for character, *_ in glyphs),
        boxes=boxes,
        starts=(*starts, len(glyphs)),
        left=left,
        top=top,
        advance=pen + font.advance(text[-1]),
    )


def put_ink(
    coverage: np.ndarray, glyph_map: np.ndarray, box: np.ndarray, added: np.ndarray, numbers: np.ndarray | int
) -> None:
    """Adds ink to maps in place: a pixel belongs to what covers more of it.

    Args:
        coverage: [height, width] uint8 so far.
        glyph_map: [height, width] int32 so far.
        box: (left, top, right, bottom) of the new ink in them.
        added: [bottom - top, right - left] uint8, coverage of the new ink.
        numbers: its glyph, or [bottom - top, right - left] the glyph of every pixel.
    """
    place = np.s_[box[1] : box[3], box[0] : box[2]]
    is_more = added > coverage[place]
    np.copyto(glyph_map[place], numbers, where=is_more)
    np.copyto(coverage[place], added, where=is_more)


class _SizedFont:
    """A typeface at a size, with what it has drawn and measured so far."""

    def __init__(self, typeface: Typeface, size: int) -> None:
        self._font = typeface.open(size)
        self._glyphs: dict[str, tuple[int, int, np.ndarray]] = {}
        self._lengths: dict[str, float] = {}

    def advance(self, text: str) -> float:
        """Returns how far a character or a pair of them moves the pen, kerning included."""
        length = self._lengths.get(text)
        if length is None:
            length = self._lengths[text] = self._font.getlength(text)
        return length

    def step(self, first: str, second: str) -> float:
        """Returns how far `second` is from `first` when they follow each other."""
        return self.advance(first + second) - self.advance(second)

    def glyph(self, character: str) -> tuple[int, int, np.ndarray]:
        """Returns left and top edge relative to the pen, and the coverage, tight; [0, 0] without ink."""
        glyph = self._glyphs.get(character)
        if glyph is None:
            glyph = self._glyphs[character] = self._draw(character)
        return glyph

    def _draw(self, character: str) -> tuple[int, int, np.ndarray]:
        mask, (left, top) = self._font.getmask2(character, mode="L")
        width, height = mask.size
        coverage = np.array(mask, np.uint8).reshape(height, width)
        columns, rows = np.flatnonzero(coverage.any(axis=0)), np.flatnonzero(coverage.any(axis=1))
        if not columns.size:
            return 0, 0, np.zeros((0, 0), np.uint8)
        coverage = np.ascontiguousarray(coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        coverage.setflags(write=False)
        return int(left + columns[0]), int(top + rows[0]), coverage


@lru_cache(maxsize=512)
def _sized_font(typeface: Typeface, size: int) -> _SizedFont:
    return _SizedFont(typeface, size)
