"""Recognized lines, and which of them are believed.

Text-free photographs give single characters with high scores ("8" at 0.90), and scripts the models do not know come out
as well-formed nonsense at 0.57-0.79, while good lines score 0.97 and more: hence both a length and a score rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SCORE = 0.85
MIN_CHARACTERS = 2
MAX_CHARACTERS = 500


@dataclass(frozen=True)
class TextLine:
    """One recognized line.

    Attributes:
        text: what it says.
        score: the engine's confidence, 0..1.
        box: four corners (x, y) in pixels, clockwise from the line's top left.
    """

    text: str
    score: float
    box: tuple[tuple[float, float], ...]

    @property
    def area(self) -> float:
        """Area of the box in square pixels (shoelace formula)."""
        x, y = np.asarray(self.box, dtype=np.float64).T
        return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2.0)

    def as_record(self) -> dict[str, object]:
        """Returns the line ready for JSON."""
        return {
            "text": self.text,
            "score": round(self.score, 4),
            "box": [[round(x, 1), round(y, 1)] for x, y in self.box],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> TextLine:
        """Rebuilds a line from `as_record`."""
        corners: Sequence[Sequence[float]] = record["box"]  # type: ignore[assignment]
        return cls(
            text=str(record["text"]),
            score=float(record["score"]),  # type: ignore[arg-type]
            box=tuple((float(x), float(y)) for x, y in corners),
        )


def believable_lines(lines: Iterable[TextLine], *, min_score: float = MIN_SCORE) -> list[TextLine]:
    """Keeps the lines with a score of at least `min_score` and a plausible length, in their order."""
    return [
        line for line in lines if line.score >= min_score and MIN_CHARACTERS <= len(line.text.strip()) <= MAX_CHARACTERS
    ]
