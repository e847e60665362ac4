"""Texts of others, made fit to be shown: on a page and on a terminal."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of what follows: they could make one text read as another."""


def visible(text: str, most: int | None = None) -> str:
    """Returns a text in which what cannot be seen, or would move other text, is written as its number: `[U+202E]`.

    These are control characters other than line feed and tab, marks of direction, and halves of surrogate pairs, which
    no file can hold.

    Args:
        text: any.
        most: characters that are kept; what is cut off is counted at the end. None = all.
    """
    shown = text if most is None else text[:most]
    marked = "".join(f"[U+{ord(character):04X}]" if _is_hidden(character) else character for character in shown)
    return marked if len(shown) == len(text) else f"{marked} … ({len(text) - len(shown):,} more characters)"


def _is_hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs")
