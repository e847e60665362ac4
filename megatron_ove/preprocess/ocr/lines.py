"""Lines of pages, and which of the recognized ones are believed.

Text-free photographs give single characters with high scores ("8" at 0.90); scripts the models do not know and lines
that are sideways or upside down come out as well-formed nonsense at 0.56-0.79, while good lines score 0.97 and more:
hence both a length and a score rule. Lines that were read too small passed every score; tiles.py prevents that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.errors import DataError

MIN_SCORE = 0.85
MIN_CHARACTERS = 2
MAX_CHARACTERS = 500


@dataclass(frozen=True)
class TextLine:
    """One line of a page.

    Attributes:
        text: what it says.
        score: the engine's confidence, 0..1; 1 for a text that was known beforehand.
        box: four corners (x, y) in pixels, clockwise from the line's top left; () for a text that was known beforehand.
    """

    text: str
    score: float = 1.0
    box: tuple[tuple[float, float], ...] = ()

    @property
    def area(self) -> float:
        """Area of the box in square pixels (shoelace formula); 0 without a box."""
        if not self.box:
            return 0.0
        x, y = np.asarray(self.box, dtype=np.float64).T
        return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2.0)

    def as_record(self) -> dict[str, object]:
        """Returns the line ready for JSON."""
        record: dict[str, object] = {"text": self.text, "score": round(self.score, 4)}
        if self.box:
            record["box"] = [[round(x, 1), round(y, 1)] for x, y in self.box]
        return record

    @classmethod
    def from_record(cls, record: object) -> TextLine:
        """Rebuilds a line from `as_record`, or from what a user wrote by hand; only `text` is needed.

        Raises:
            DataError: it is no such record; the sentence names the field and goes behind "lines[0]".
        """
        if not isinstance(record, Mapping):
            raise DataError("is no object with a text")
        if not isinstance(record.get("text"), str):
            raise DataError("has no text" if "text" not in record else f"has the text {record['text']!r}, no string")
        return cls(text=record["text"], score=_score(record.get("score")), box=_corners(record.get("box")))


def _is_number(value: object) -> bool:
    # A whole number of a JSON file may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _score(value: object) -> float:
    if value is None:
        return 1.0
    if not _is_number(value) or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise DataError(f"has the score {value!r}, which is no number from 0 to 1; leave it out for a known text")
    return float(value)  # type: ignore[arg-type]


def _corners(value: object) -> tuple[tuple[float, float], ...]:
    if value is None:
        return ()
    is_list = isinstance(value, Sequence) and len(value) == 4
    if not is_list or not all(isinstance(p, Sequence) and len(p) == 2 and all(map(_is_number, p)) for p in value):  # type: ignore[union-attr]
        raise DataError(f"has the box {value!r}, which is no list of four corners [x, y]; leave it out if unknown")
    return tuple((float(x), float(y)) for x, y in value)  # type: ignore[union-attr]


def believable_lines(lines: Iterable[TextLine], *, min_score: float = MIN_SCORE) -> list[TextLine]:
    """Keeps the lines with a score of at least `min_score` and a plausible length, in their order.

    A line without a box was not recognized, so any length is plausible.
    """
    return [
        line
        for line in lines
        if line.score >= min_score and (not line.box or MIN_CHARACTERS <= len(line.text.strip()) <= MAX_CHARACTERS)
    ]
