"""How near written texts come to the wanted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

_REPEATED_TIMES = 4
_FEWEST_CHARACTERS = 16
"""A text whose end is the same words so often in a row is stuck."""


@dataclass(frozen=True)
class WrittenText:
    """An answer.

    Attributes:
        wanted: as it is stored.
        written: by the model.
        is_cut: whether writing was stopped before the model ended.
    """

    wanted: str
    written: str
    is_cut: bool


def measure_texts(texts: Sequence[WrittenText]) -> Mapping[str, tuple[float, float]]:
    """Returns figure -> (sum, count) of texts as they are, without any normalisation.

    Error rates are edits / length of what was wanted, over all texts together, and may be above 1. `exact` is the share
    of texts without any error, `empty`, `cut` and `repeated` the shares that are nothing, were stopped, or end in words
    said over and over.
    """
    count = float(len(texts))
    words = [(text.wanted.split(), text.written.split()) for text in texts]
    return {
        "character_error_rate": (
            float(sum(Levenshtein.distance(text.wanted, text.written) for text in texts)),
            float(sum(len(text.wanted) for text in texts)),
        ),
        "word_error_rate": (
            float(sum(Levenshtein.distance(wanted, written) for wanted, written in words)),
            float(sum(len(wanted) for wanted, _ in words)),
        ),
        "exact": (float(sum(text.wanted == text.written for text in texts)), count),
        "empty": (float(sum(not text.written.strip() for text in texts)), count),
        "cut": (float(sum(text.is_cut for text in texts)), count),
        "repeated": (float(sum(is_repeated(text.written) for text in texts)), count),
    }


def is_repeated(text: str) -> bool:
    """Whether a text ends in the same one to eight words four times in a row, or in the same one to eight characters so
    often that they are 16 or more."""
    return _ends_in_repetition(text.split(), 1) or _ends_in_repetition(text.strip(), _FEWEST_CHARACTERS)


def _ends_in_repetition(sequence: Sequence[str], fewest: int) -> bool:
    for length in range(1, 9):
        span = max(length * _REPEATED_TIMES, -(-fewest // length) * length)
        tail = sequence[-span:]
        if len(tail) == span and all(tail[i] == tail[i % length] for i in range(span)):
            return True
    return False
