"""Where ink is collected, with the exact place of every line, word and glyph, before it gets colours and a ground.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive, tight around the ink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.preprocess.text_render.ink import NO_GLYPH, TextInk, put_ink

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class TextBox:
    """A piece of text and where it stands.

    Attributes:
        text: what it says; a line with its spaces.
        box: (left, top, right, bottom) of its ink.
        first, stop: its glyphs are first .. stop - 1 of the picture; so they are its pixels in the glyph map.
    """

    text: str
    box: Box
    first: int
    stop: int


class Canvas:
    """Ink without colour on nothing, and what it says.

    Attributes:
        coverage: [height, width] uint8, 0 = no ink, 255 = all of the pixel.
        glyph_map: [height, width] int32, which of `glyphs` inked the pixel, `NO_GLYPH` = none.
        rules: [height, width] uint8, coverage of lines that are no text.
        glyphs: single characters in reading order, without spaces.
        words, lines: in reading order.
        inks: number of the ink of every glyph: inks have different colours.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.coverage = np.zeros((height, width), np.uint8)
        self.glyph_map = np.full((height, width), NO_GLYPH, np.int32)
        self.rules = np.zeros((height, width), np.uint8)
        self.glyphs: list[TextBox] = []
        self.words: list[TextBox] = []
        self.lines: list[TextBox] = []
        self.inks: list[int] = []

    def fits(self, ink: TextInk, left: int, top: int) -> bool:
        """Tells whether all of `ink` would be on the canvas with its array's corner at (left, top)."""
        width, height = ink.size
        return left >= 0 and top >= 0 and left + width <= self.width and top + height <= self.height

    def add(self, ink: TextInk, left: int, top: int, *, number: int = 0) -> int:
        """Puts `ink` with its array's corner at (left, top), where it must fit; returns the place of its first glyph.

        `number` is that of its colour.
        """
        if not self.fits(ink, left, top):
            raise ValueError(f"'{ink.text}' at ({left}, {top}) leaves a canvas of {self.width} x {self.height}")
        first = len(self.glyphs)
        width, height = ink.size
        corner = np.array((left, top, left, top))
        numbers = np.where(ink.coverage > 0, ink.glyph_map + first, NO_GLYPH)
        put_ink(self.coverage, self.glyph_map, corner + np.array((0, 0, width, height)), ink.coverage, numbers)
        for place, (character, box) in enumerate(zip(ink.glyphs, (ink.boxes + corner).tolist(), strict=True), first):
            self.glyphs.append(TextBox(character, tuple(box), place, place + 1))
        self.inks += [number] * len(ink.glyphs)
        return first

    def mark_word(self, text: str, first: int, stop: int) -> None:
        """Records that glyphs first .. stop - 1 are a word."""
        self.words.append(TextBox(text, joined_box(self.glyphs[first:stop]), first, stop))

    def mark_line(self, text: str, first: int, stop: int) -> None:
        """Records that glyphs first .. stop - 1 are a line."""
        self.lines.append(TextBox(text, joined_box(self.glyphs[first:stop]), first, stop))

    def add_rule(self, box: Box) -> None:
        """Draws a filled box that is no text, such as the rule under a title."""
        self.rules[max(box[1], 0) : max(box[3], 0), max(box[0], 0) : max(box[2], 0)] = 255


def joined_box(pieces: Sequence[TextBox]) -> Box:
    """Returns the box around all of `pieces`, of which there must be one."""
    lefts, tops, rights, bottoms = zip(*(piece.box for piece in pieces), strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)
