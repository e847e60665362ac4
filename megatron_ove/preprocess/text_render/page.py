"""Pages and lines of running text, laid out as in print."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ImageFont

from megatron_ove.errors import DataError
from megatron_ove.preprocess.text_render.canvas import Canvas
from megatron_ove.preprocess.text_render.ink import draw_ink
from megatron_ove.preprocess.text_render.looks import PRINTED, Look
from megatron_ove.preprocess.text_render.passages import Passage
from megatron_ove.preprocess.text_render.picture import TextPicture, finish_picture
from megatron_ove.preprocess.text_render.typefaces import Typeface, is_east_asian, script_of, typefaces

_NOT_AT_LINE_START = "、。，；：」』）！？ー々"
_EAST_ASIAN_WORD = re.compile(r"[^、。，；：「」『』（）\s]+")


@dataclass(frozen=True)
class PageStyle:
    """How a page is laid out; sizes in pixels.

    Attributes:
        width, height: of the page.
        text_face, title_face: typefaces.
        text_size, title_size: of the fonts; title_size 0 = no title, only lines of text.
        line_spacing: distance of two lines, as a multiple of text_size.
        margin: on all sides.
        num_columns: of the text.
        align: of the lines.
        look: colours, ground and wear.
    """

    width: int
    height: int
    text_face: Typeface
    title_face: Typeface
    text_size: int
    title_size: int
    line_spacing: float
    margin: int
    num_columns: int
    align: Literal["left", "centre", "justified"]
    look: Look


def draw_style(
    passage: Passage,
    random: np.random.Generator,
    *,
    width: int,
    height: int,
    look: Look = PRINTED,
    faces: Sequence[Typeface] | None = None,
    has_title: bool = True,
) -> PageStyle:
    """Draws a readable style.

    Args:
        passage: the typefaces are able to write it.
        random: decides.
        width, height: of the page in pixels; without a title a low page is a single line.
        look: its sizes are those of the text; its places are not used.
        faces: typefaces to draw from; None = those of training that have the passage's script.
        has_title: whether the page begins with its title and a rule.

    Raises:
        DataError: no typeface can write the passage.
    """
    writing = passage.title + passage.text
    at_hand = typefaces(script_of(passage.language), "train") if faces is None else faces
    able = [face for face in at_hand if face.can_write(writing)]
    if not able:
        raise DataError(
            f"none of the {len(at_hand)} typefaces at hand has all characters of the passage '{passage.title}' in "
            f"language {passage.language!r}; give others"
        )
    text_size = int(random.integers(look.size[0], look.size[1] + 1))
    two_columns = width >= 520 and text_size <= 20 and random.random() < 0.3
    return PageStyle(
        width=width,
        height=height,
        text_face=able[int(random.integers(len(able)))],
        title_face=able[int(random.integers(len(able)))],
        text_size=text_size,
        title_size=int(text_size * random.uniform(1.3, 1.8)) if has_title else 0,
        line_spacing=float(random.uniform(1.3, 1.7)),
        margin=int(random.integers(18, 44)) if has_title else int(random.integers(2, 10)),
        num_columns=2 if two_columns and has_title else 1,
        align=("left", "centre", "justified")[int(random.integers(3))],
        look=look,
    )


def render_page(passage: Passage, style: PageStyle, *, seed: int) -> TextPicture:
    """Draws the title and as much of the passage's text as fits.

    Args:
        passage: what to write.
        style: how it looks.
        seed: draws colours, ground and wear; the same arguments give the same pixels.

    Raises:
        DataError: not even a word fits.
    """
    canvas = Canvas(style.width, style.height)
    writer = _LineWriter(canvas, east_asian=is_east_asian(passage.language))
    top = style.margin
    if style.title_size:
        font = style.title_face.open(style.title_size)
        for text in _break_lines(passage.title, font, style.width - 2 * style.margin, writer.east_asian)[:2]:
            writer.write(text, style.title_face, style.title_size, style.margin, top, number=1)
            top += int(style.title_size * 1.3)
        canvas.add_rule((style.margin, top, style.width - style.margin + 1, top + 1))
        top += style.text_size // 2

    font = style.text_face.open(style.text_size)
    gap = style.margin // 2
    column_width = (style.width - 2 * style.margin - gap * (style.num_columns - 1)) // style.num_columns
    step = int(style.text_size * style.line_spacing)
    per_column = max(1, (style.height - style.margin - top - style.text_size) // step + 1)
    broken = _break_lines(passage.text, font, column_width, writer.east_asian)[: per_column * style.num_columns]
    for index, text in enumerate(broken):
        left = style.margin + (index // per_column) * (column_width + gap)
        slack = column_width - font.getlength(text)
        is_last = index == len(broken) - 1
        writer.write(
            text,
            style.text_face,
            style.text_size,
            left + (int(slack / 2) if style.align == "centre" else 0),
            top + (index % per_column) * step,
            stretch=slack if style.align == "justified" and not is_last and slack < column_width / 4 else 0.0,
        )
    if not canvas.glyphs:
        raise DataError(
            f"no word of '{passage.title}' fits a page of {style.width} x {style.height} pixels at a text size of "
            f"{style.text_size}; make the page larger or the text smaller"
        )
    return finish_picture(canvas, style.look, np.random.default_rng(seed))


class _LineWriter:
    """Writes lines onto a canvas."""

    def __init__(self, canvas: Canvas, *, east_asian: bool) -> None:
        self.canvas = canvas
        self.east_asian = east_asian

    def write(
        self, text: str, face: Typeface, size: int, left: int, top: int, *, number: int = 0, stretch: float = 0.0
    ) -> None:
        """Writes one line word by word; `stretch` pixels are shared out between the words.

        A word that would leave the canvas ends the line. `number` is that of the ink.
        """
        pieces = [text] if self.east_asian else text.split(" ")
        extra = stretch / max(len(pieces) - 1, 1)
        space = 0.0 if self.east_asian else face.open(size).getlength(" ")
        x, first, written = float(left), len(self.canvas.glyphs), []
        for piece in pieces:
            ink = draw_ink(piece, face, size)
            place = (round(x) + ink.left, top + ink.top)
            if not self.canvas.fits(ink, *place):
                break
            start = self.canvas.add(ink, *place, number=number)
            written.append(piece)
            for word in _EAST_ASIAN_WORD.finditer(piece) if self.east_asian else ():
                self.canvas.mark_word(word.group(), start + ink.starts[word.start()], start + ink.starts[word.end()])
            if not self.east_asian:
                self.canvas.mark_word(piece, start, len(self.canvas.glyphs))
            x += ink.advance + space + extra
        if written:
            self.canvas.mark_line(" ".join(written), first, len(self.canvas.glyphs))


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
