"""Draws a page of text and knows where every line, word and glyph is.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive, tight around the ink.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_ove.preprocess.text_render.fonts import font_paths, is_east_asian, open_font
from megatron_ove.preprocess.text_render.passages import Passage

Colour = tuple[int, int, int]
_NOT_AT_LINE_START = "、。，；：」』）！？ー々"
_EAST_ASIAN_WORD = re.compile(r"[^、。，；：「」『』（）\s]+")
_RULE_GREY = 170


@dataclass(frozen=True)
class TextBox:
    """A piece of text and the box of its ink: (left, top, right, bottom)."""

    text: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class RenderedPage:
    """A page picture with its ground truth.

    Attributes:
        picture: [height, width, 3] uint8 RGB.
        lines: lines from top to bottom, column by column; the title first.
        words: words in reading order; in Japanese and Chinese the runs between punctuation marks.
        glyphs: single characters in reading order, without spaces.
        language: language code of the text.
    """

    picture: np.ndarray
    lines: tuple[TextBox, ...]
    words: tuple[TextBox, ...]
    glyphs: tuple[TextBox, ...]
    language: str


@dataclass(frozen=True)
class PageStyle:
    """How a page looks; sizes in pixels."""

    width: int
    height: int
    text_font: Path
    title_font: Path
    text_size: int
    title_size: int
    line_spacing: float
    margin: int
    num_columns: int
    align: Literal["left", "centre", "justified"]
    ink: Colour
    title_ink: Colour
    paper: Colour
    grain: float
    """Standard deviation of the paper's noise, in grey levels."""


def draw_style(language: str, random: np.random.Generator, *, width: int, height: int) -> PageStyle:
    """Draws a readable style: dark ink on light paper or, one time in five, light ink on dark paper."""
    fonts = font_paths(language)
    text_size = int(random.integers(18, 27))
    paper = tuple(int(value) for value in random.integers(222, 256, 3))
    ink = tuple(int(value) for value in random.integers(0, 90, 3))
    title_ink = tuple(int(value) for value in random.integers(0, 130, 3))
    if random.random() < 0.2:
        paper, ink = tuple(255 - value for value in paper), tuple(255 - value for value in ink)
        title_ink = tuple(255 - value for value in title_ink)
    two_columns = width >= 520 and text_size <= 20 and random.random() < 0.3
    return PageStyle(
        width=width,
        height=height,
        text_font=fonts[int(random.integers(len(fonts)))],
        title_font=fonts[int(random.integers(len(fonts)))],
        text_size=text_size,
        title_size=int(text_size * random.uniform(1.3, 1.8)),
        line_spacing=float(random.uniform(1.3, 1.7)),
        margin=int(random.integers(18, 44)),
        num_columns=2 if two_columns else 1,
        align=("left", "centre", "justified")[int(random.integers(3))],
        ink=ink,  # type: ignore[arg-type]
        title_ink=title_ink,  # type: ignore[arg-type]
        paper=paper,  # type: ignore[arg-type]
        grain=float(random.uniform(0.0, 5.0)),
    )


def render_page(passage: Passage, style: PageStyle, *, seed: int) -> RenderedPage:
    """Draws the title and as much of the passage's text as fits.

    Args:
        passage: what to write.
        style: how it looks.
        seed: draws the paper's grain; the same arguments give the same pixels.
    """
    grain = np.random.default_rng(seed).normal(0.0, style.grain, (style.height, style.width, 1))
    paper = np.clip(np.asarray(style.paper) + grain, 0, 255).astype(np.uint8)
    pen = _Pen(Image.fromarray(paper, "RGB"), east_asian=is_east_asian(passage.language))
    title_font = open_font(style.title_font, style.title_size)
    top = style.margin
    for text in _break_lines(passage.title, title_font, style.width - 2 * style.margin, pen.east_asian)[:2]:
        pen.write_line(text, title_font, style.title_ink, style.margin, top)
        top += int(style.title_size * 1.3)
    pen.draw.line((style.margin, top, style.width - style.margin, top), fill=(_RULE_GREY,) * 3)
    top += style.text_size // 2

    font = open_font(style.text_font, style.text_size)
    gap = style.margin // 2
    column_width = (style.width - 2 * style.margin - gap * (style.num_columns - 1)) // style.num_columns
    step = int(style.text_size * style.line_spacing)
    per_column = max(1, (style.height - style.margin - top - style.text_size) // step + 1)
    broken = _break_lines(passage.text, font, column_width, pen.east_asian)[: per_column * style.num_columns]
    for index, text in enumerate(broken):
        left = style.margin + (index // per_column) * (column_width + gap)
        slack = column_width - font.getlength(text)
        is_last = index == len(broken) - 1
        pen.write_line(
            text,
            font,
            style.ink,
            left + (int(slack / 2) if style.align == "centre" else 0),
            top + (index % per_column) * step,
            stretch=slack if style.align == "justified" and not is_last and slack < column_width / 4 else 0.0,
        )
    return RenderedPage(
        picture=np.asarray(pen.image),
        lines=tuple(pen.lines),
        words=tuple(pen.words),
        glyphs=tuple(pen.glyphs),
        language=passage.language,
    )


class _Pen:
    """Writes lines onto an image and records every box."""

    def __init__(self, image: Image.Image, *, east_asian: bool) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.east_asian = east_asian
        self.lines: list[TextBox] = []
        self.words: list[TextBox] = []
        self.glyphs: list[TextBox] = []

    def write_line(
        self, text: str, font: ImageFont.FreeTypeFont, ink: Colour, left: int, top: int, *, stretch: float = 0.0
    ) -> None:
        """Writes one line word by word; `stretch` pixels are shared out between the words."""
        pieces = [text] if self.east_asian else text.split(" ")
        extra = stretch / max(len(pieces) - 1, 1)
        x = float(left)
        first_glyph = len(self.glyphs)
        for piece in pieces:
            start = len(self.glyphs)
            self._write_piece(piece, font, ink, round(x), top)
            if self.east_asian:
                for run in _EAST_ASIAN_WORD.finditer(piece):
                    self.words.append(self._joined(run.group(), start + run.start(), start + run.end()))
            else:
                self.words.append(self._joined(piece, start, len(self.glyphs)))
            x += font.getlength(piece + ("" if self.east_asian else " ")) + extra
        self.lines.append(self._joined(text, first_glyph, len(self.glyphs)))

    def _write_piece(self, piece: str, font: ImageFont.FreeTypeFont, ink: Colour, left: int, top: int) -> None:
        self.draw.text((left, top), piece, font=font, fill=ink)
        for index, glyph in enumerate(piece):
            offset = font.getlength(piece[: index + 1]) - font.getlength(glyph)  # kerning before the glyph included
            x0, y0, x1, y1 = font.getbbox(glyph)
            box = (int(left + offset + x0), int(top + y0), -int(-(left + offset + x1) // 1), int(top + y1))
            self.glyphs.append(TextBox(glyph, box))

    def _joined(self, text: str, start: int, stop: int) -> TextBox:
        """Returns the box around glyphs start .. stop - 1."""
        corners = np.array([glyph.box for glyph in self.glyphs[start:stop]])
        low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
        return TextBox(text, (int(low[0]), int(low[1]), int(high[0]), int(high[1])))


def _break_lines(text: str, font: ImageFont.FreeTypeFont, width: int, east_asian: bool) -> list[str]:
    return list((_break_characters if east_asian else _break_words)(text, font, width))


def _break_words(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line


def _break_characters(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    line = ""
    for character in text:
        if line and font.getlength(line + character) > width and character not in _NOT_AT_LINE_START:
            yield line
            line = ""
        line += character
    if line:
        yield line
