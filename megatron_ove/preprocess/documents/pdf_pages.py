"""Pages of PDFs: the picture of each, and what its text layer says with boxes.

The text is what can be seen of the layer: in the order in which PDFium reads it, lines ended by "\\n", words of a line
divided by one space. Left out, and counted, are characters wholly outside the page, words without any ink where they
should stand (hidden layers, white on white), and characters of which the file does not say what they mean (U+FFFD,
private use, controls). A hyphen at the end of a line stays there, before its "\\n". A ligature, a letter with its
combining marks, and whatever else is one glyph is one box for all its characters. Annotations and form fields are
neither in the text layer nor drawn.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pypdfium2 import raw

from megatron_ove.errors import DataError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""
_Handle = Any
"""A page, or the text of one, of PDFium; its types are made while the package is imported."""

_MIN_CONTRAST = 12
"""Grey levels between the darkest and the lightest pixel from which on something is drawn."""
_INK_CONTRAST = 64
"""Grey levels from the ground at which a pixel counts as ink, as anti-aliased edges do not."""
_MAX_UNKNOWN = 0.2
"""Share of characters without a known meaning above which a text layer is none."""
_FEW_CHARACTERS, _MOST_INK = 100, 0.9
"""So few characters beside so much of the ink are a stamp or a page number on a scan."""
_HYPHEN_AT_LINE_END = 0x02
"""What PDFium says for a hyphen after which it leaves out the line's end."""
_MIN_PAGE_BYTES = 4
"""Of a file, a page; less than even the best compression leaves."""
_REPLACEMENT, _SOFT_HYPHEN = "\ufffd", "\u00ad"
_JOINERS = "\u200c\u200d"
"""Characters without a picture that scripts need; others of their category only steer a layout."""


@dataclass(frozen=True)
class PageText:
    """What is written on one page.

    Attributes:
        text: lines ended by "\\n" (the last one is not), without form feeds.
        words: [k, 6] float64: left, top, right, bottom in pixels of the picture, start, stop in `text`.
        lines: [k, 6], as `words`.
        characters: [k, 6], as `words`; of a ligature, one for all its characters. What is drawn nowhere has none.
    """

    text: str
    words: np.ndarray
    lines: np.ndarray
    characters: np.ndarray


@dataclass(frozen=True)
class PdfPage:
    """One page.

    Attributes:
        picture: [height, width, 3] uint8 RGB on white.
        text: None if the page has no usable text layer.
        problem: why it has none, as the end of a sentence; "" with a text.
        left_out: why -> number of characters that the layer holds besides.
    """

    picture: np.ndarray
    text: PageText | None
    problem: str
    left_out: Counter[str] = field(default_factory=Counter)


class PdfFile:
    """An open PDF; pages are counted from 0. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens a file; one that is encrypted is opened only if it asks for no password.

        Raises:
            DataError: it cannot be read, needs a password, or has no page.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
        if not size:
            raise DataError(f"{path} is empty (0 bytes), so it is not a PDF; remove it or copy it again")
        handle = raw.FPDF_LoadDocument(f"{path}\0".encode(), None)
        if not handle:
            raise DataError(f"{path} {_why_not_opened(raw.FPDF_GetLastError())}")
        self._handle = handle
        self._count = raw.FPDF_GetPageCount(handle)
        if self._count < 1:
            self.close()
            raise DataError(f"{path} is a PDF without pages, so there is nothing to use; remove it or make it again")
        if self._count * _MIN_PAGE_BYTES > max(size, _MIN_PAGE_BYTES):  # each would be tried and rejected
            self.close()
            raise DataError(
                f"{path} says that it has {self._count} pages, more than its {size} bytes can hold; repair it "
                "(qpdf) or remove it"
            )

    def __len__(self) -> int:
        return self._count

    def read(self, number: int, longest_side: int) -> PdfPage:
        """Draws a page and reads its text layer.

        Args:
            number: from 0.
            longest_side: of the picture in pixels; pages of any size are drawn to fit it.

        Raises:
            DataError: it cannot be loaded, is blank, or there is no such page.
        """
        name = f"page {number + 1} of {self.path}"
        if number >= self._count:
            raise DataError(f"{name} is not there: the file has changed since its pages were counted; start again")
        page = raw.FPDF_LoadPage(self._handle, number)
        if not page:
            raise DataError(f"{name} cannot be loaded, because that part of the file is damaged; repair or remove it")
        try:
            return _read(page, longest_side, name)
        finally:
            raw.FPDF_ClosePage(page)

    def close(self) -> None:
        """Closes the file; nothing can be read from it any more."""
        handle, self._handle = self._handle, None
        if handle is not None:
            raw.FPDF_CloseDocument(handle)

    def __enter__(self) -> PdfFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _why_not_opened(code: int) -> str:
    """Returns the end of a sentence for an error of PDFium."""
    if code == raw.FPDF_ERR_PASSWORD:
        return "is encrypted and needs a password, which is not asked for here; write it without one, or remove it"
    if code == raw.FPDF_ERR_SECURITY:
        return "is encrypted in a way that is not known here; write it without encryption, or remove it"
    return (
        "is no PDF, or a truncated or damaged one of which nothing can be read; copy it again, repair it (qpdf) or "
        "remove it"
    )


class _Places:
    """From a page's own coordinates, in which PDFium says boxes, to pixels of its picture."""

    def __init__(self, page: _Handle, longest_side: int, name: str) -> None:
        bounds = raw.FS_RECTF()  # crop box and media box together; the origin may be anywhere
        has_bounds = raw.FPDF_GetPageBoundingBox(page, ctypes.byref(bounds))
        self._left, self._top = bounds.left, bounds.top
        self._extent = (bounds.right - bounds.left, bounds.top - bounds.bottom)
        if not has_bounds or not all(math.isfinite(side) and side > 0 for side in self._extent):
            raise DataError(f"{name} has no area, so nothing can be drawn; correct its boxes or leave it out")
        self._turns = raw.FPDFPage_GetRotation(page) % 4
        width, height = self._extent if self._turns % 2 == 0 else self._extent[::-1]
        scale = longest_side / max(width, height)
        self.width, self.height = (max(1, round(side * scale)) for side in (width, height))

    def box(self, left: float, bottom: float, right: float, top: float) -> Box | None:
        """Returns a box in pixels, which may leave the picture; None if it has no area or is no box."""
        if not all(map(math.isfinite, (left, bottom, right, top))):
            return None
        corners = [self._point(left, top), self._point(right, bottom)]
        (x0, x1), (y0, y1) = (sorted(point[k] for point in corners) for k in (0, 1))
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def _point(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._left) / self._extent[0]
        down = (self._top - y) / self._extent[1]
        if self._turns == 1:
            across, down = 1 - down, across
        elif self._turns == 2:
            across, down = 1 - across, 1 - down
        elif self._turns == 3:
            across, down = down, 1 - across
        return across * self.width, down * self.height

    def clipped(self, box: Box) -> Box | None:
        """Returns what of a box is on the page, to a tenth of a pixel outwards; None if nothing is."""
        left, top = (max(0.0, math.floor(value * 10) / 10) for value in box[:2])
        right = min(float(self.width), math.ceil(box[2] * 10) / 10)
        bottom = min(float(self.height), math.ceil(box[3] * 10) / 10)
        return (left, top, right, bottom) if left < right and top < bottom else None


@dataclass
class _Glyph:
    """Something drawn, or said to be.

    Attributes:
        text: what it means.
        box: where it is on the page; None = nowhere.
        place: what PDFium says of that, equal for characters of one glyph.
    """

    text: str
    box: Box | None
    place: Box | None


def _read(page: _Handle, longest_side: int, name: str) -> PdfPage:
    places = _Places(page, longest_side, name)
    picture = _draw(page, places)
    grey = picture.mean(axis=2).astype(np.uint8)
    if np.ptp(grey) < _MIN_CONTRAST:
        raise DataError(f"{name} is blank: nothing that can be seen is drawn on it; leave it out")
    left_out: Counter[str] = Counter()
    lines = _lines_of(page, places, left_out)
    lines = [[word for word in line if _is_visible(word, grey, left_out)] for line in lines]
    text = _compose([line for line in lines if line])
    problem = _problem_of(text, left_out, grey)
    return PdfPage(picture, None if problem else text, problem, left_out)


def _draw(page: _Handle, places: _Places) -> np.ndarray:
    """Returns the page as [height, width, 3] uint8 RGB."""
    width, height = places.width, places.height
    pixels = np.full((height, width, 4), 255, np.uint8)  # blue, green, red, unused
    bitmap = raw.FPDFBitmap_CreateEx(width, height, raw.FPDFBitmap_BGRx, pixels.ctypes.data, pixels.strides[0])
    try:
        raw.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, 0)
    finally:
        raw.FPDFBitmap_Destroy(bitmap)
    return np.ascontiguousarray(pixels[:, :, 2::-1])


def _lines_of(page: _Handle, places: _Places, left_out: Counter[str]) -> list[list[list[_Glyph]]]:
    """Returns the text layer as lines of words of glyphs."""
    handle = raw.FPDFText_LoadPage(page)
    if not handle:
        return []
    lines: list[list[list[_Glyph]]] = [[[]]]
    try:
        number, count = 0, raw.FPDFText_CountChars(handle)
        while number < count:
            code, first = raw.FPDFText_GetUnicode(handle, number), number
            number += 1
            if 0xD800 <= code < 0xDC00 and number < count:  # PDFium counts in UTF-16
                low = raw.FPDFText_GetUnicode(handle, number)
                if 0xDC00 <= low < 0xE000:
                    code, number = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), number + 1
            is_line_end = code == _HYPHEN_AT_LINE_END and raw.FPDFText_IsHyphen(handle, first) == 1
            character = "-" if is_line_end else chr(code) if code <= sys.maxunicode else _REPLACEMENT
            if character == "\n":
                lines.append([[]])
            elif character.isspace():
                lines[-1].append([])
            else:
                _add_character(lines[-1][-1], character, handle, first, places, left_out)
            if is_line_end:
                lines.append([[]])
    finally:
        raw.FPDFText_ClosePage(handle)
    return [[word for word in line if word] for line in lines]


def _add_character(
    word: list[_Glyph],
    character: str,
    handle: _Handle,
    number: int,
    places: _Places,
    left_out: Counter[str],
) -> None:
    """Adds a character of the text layer to the word that it belongs to, unless it is left out."""
    place = _place_of(handle, number, places)
    box = None if place is None else places.clipped(place)
    if place is not None and box is None:
        left_out["outside the page"] += 1
        return
    is_unknown = raw.FPDFText_HasUnicodeMapError(handle, number) == 1
    text = None if is_unknown else _meaning(character)
    if text is None:
        left_out["without a known meaning"] += 1
    elif word and box is not None and word[-1].place == place:
        word[-1].text += text
    elif text:
        word.append(_Glyph(text, box, place))


def _place_of(handle: _Handle, number: int, places: _Places) -> Box | None:
    """Returns where a character is in pixels: the bounds of its outline, or of its cell in the line if it has none."""
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    if raw.FPDFText_GetCharBox(handle, number, *map(ctypes.byref, (left, right, bottom, top))):
        box = places.box(left.value, bottom.value, right.value, top.value)
        if box is not None:
            return box
    loose = raw.FS_RECTF()
    if raw.FPDFText_GetLooseCharBox(handle, number, ctypes.byref(loose)):
        return places.box(loose.left, loose.bottom, loose.right, loose.top)
    return None


def _meaning(character: str) -> str | None:
    """Returns what a character stands for in the text: "" = nothing that is read, None = it is not known."""
    category = unicodedata.category(character)
    if category in ("Cc", "Cs", "Co") or character == _REPLACEMENT or ord(character) & 0xFFFE == 0xFFFE:
        return None
    if character == _SOFT_HYPHEN:  # in a PDF it is drawn, as the lines are broken already
        return "-"
    if category == "Cf" and character not in _JOINERS:
        return ""
    if "\ufb00" <= character <= "\ufdff" or "\ufe70" <= character <= "\ufefc":  # ligatures and forms of letters
        plain = unicodedata.normalize("NFKC", character)
        return character if " " in plain else plain
    return character


def _is_visible(word: Sequence[_Glyph], grey: np.ndarray, left_out: Counter[str]) -> bool:
    """Whether anything is drawn where a word should stand; counts those of which nothing is."""
    for glyph in word:
        if glyph.box is not None:
            left, top, right, bottom = glyph.box
            cut = grey[max(0, int(top) - 1) : math.ceil(bottom) + 1, max(0, int(left) - 1) : math.ceil(right) + 1]
            if int(cut.max()) - int(cut.min()) >= _MIN_CONTRAST:
                return True
    left_out["not to be seen"] += sum(len(glyph.text) for glyph in word)
    return False


def _compose(lines: Sequence[Sequence[Sequence[_Glyph]]]) -> PageText:
    """Joins words to a text and says where its pieces are."""
    text = ""
    rows: dict[str, list[tuple[float, ...]]] = {"words": [], "lines": [], "characters": []}
    pieces: list[str] = []
    place = 0
    for i, line in enumerate(lines):
        pieces += ["\n"] if i else []
        place += 1 if i else 0
        line_start, first_word = place, len(rows["words"])
        for j, word in enumerate(line):
            pieces += [" "] if j else []
            place += 1 if j else 0
            word_start, first = place, len(rows["characters"])
            for glyph in word:
                if glyph.box is not None:
                    rows["characters"].append((*glyph.box, place, place + len(glyph.text)))
                pieces.append(glyph.text)
                place += len(glyph.text)
            rows["words"].append((*_around(rows["characters"][first:]), word_start, place))
        rows["lines"].append((*_around(rows["words"][first_word:]), line_start, place))
    text = "".join(pieces)
    return PageText(text, **{unit: np.array(values, np.float64).reshape(-1, 6) for unit, values in rows.items()})


def _around(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Returns the box around boxes; a visible word has at least one."""
    return tuple(pick(row[k] for row in rows) for k, pick in enumerate((min, min, max, max)))


def _problem_of(text: PageText, left_out: Counter[str], grey: np.ndarray) -> str:
    """Returns why a text layer is not to be trusted with saying what is on the page, or ""."""
    known = sum(not character.isspace() for character in text.text)
    unknown = left_out["without a known meaning"]
    if known + left_out.total() == 0:
        return "has no text layer"
    if unknown > _MAX_UNKNOWN * (known + unknown):
        return f"has a text layer of which {unknown} of {known + unknown} characters have no known meaning"
    if known == 0:
        return f"has a text layer of {left_out.total()} characters of which none can be seen"
    if known < _FEW_CHARACTERS:
        ground = int(np.bincount(grey.ravel(), minlength=256).argmax())
        ink = np.abs(grey.astype(np.int16) - ground) >= _INK_CONTRAST
        total = int(ink.sum())
        for left, top, right, bottom in text.words[:, :4]:
            ink[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = False
        if int(ink.sum()) > _MOST_INK * total:
            return f"has a text layer of only {known} characters beside much more that is drawn"
    return ""
