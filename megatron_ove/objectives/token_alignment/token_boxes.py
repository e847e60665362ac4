"""Where the tokens of a text stand: boxes of the characters that each is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.token_cache import TextTokenizer


@dataclass(frozen=True)
class PlacedToken:
    """A token, or a character, that can be seen.

    Attributes:
        ids: token ids of which its row is the mean: one of a token, those of a character written by itself.
        boxes: which of the character boxes show it.
    """

    ids: tuple[int, ...]
    boxes: tuple[int, ...]


def character_boxes(document: Document) -> Boxes:
    """Returns where characters stand: their own boxes, or parts of equal width of words' boxes, or of lines' where
    words have none. Such parts are rough where letters differ in width, and wrong for text that does not run from left
    to right."""
    if len(document.characters):
        return document.characters
    pieces = document.words if len(document.words) else document.lines
    rows = []
    for page, (left, top, right, bottom), (start, stop) in zip(
        pieces.page.tolist(), pieces.corners.tolist(), pieces.spans.tolist(), strict=True
    ):
        width = (right - left) / max(1, stop - start)
        rows += [
            (page, left + width * i, top, left + width * (i + 1), bottom, start + i, start + i + 1)
            for i in range(stop - start)
            if not document.text[start + i].isspace()
        ]
    return Boxes.of(rows)


def place_tokens(document: Document, boxes: Boxes, tokenizer: TextTokenizer, unit: str) -> list[PlacedToken]:
    """Returns the tokens of a text of which every character but spaces has a box, in order.

    Args:
        document: read as it is stored.
        boxes: of its characters, see `character_boxes`.
        tokenizer: whose tokens; it may not change the text.
        unit: token or character.
    """
    if unit == "character":
        texts = [document.text[start:stop] for start, stop in boxes.spans.tolist()]
        ids = dict(zip(dict.fromkeys(texts), tokenizer.encode(list(dict.fromkeys(texts))), strict=True))
        return [PlacedToken(tuple(ids[text]), (number,)) for number, text in enumerate(texts) if ids[text]]
    found, offsets = tokenizer.encode_with_offsets(document.text)
    order = np.argsort(boxes.spans[:, 0], kind="stable")
    starts, stops = boxes.spans[order, 0], np.maximum.accumulate(boxes.spans[order, 1])
    placed = []
    for token, (start, stop) in zip(found, offsets.tolist(), strict=True):
        first, last = np.searchsorted(stops, start, side="right"), np.searchsorted(starts, stop, side="left")
        own = [int(i) for i in order[first:last] if boxes.spans[i, 1] > start]
        is_whole = _is_covered(document.text, start, stop, boxes.spans[own]) if own else False
        if is_whole:  # half of a token reads as another one
            placed.append(PlacedToken((token,), tuple(own)))
    return placed


def _is_covered(text: str, start: int, stop: int, spans: np.ndarray) -> bool:
    """Whether every character of text[start:stop] but spaces lies in one of the spans."""
    is_there = np.array([character.isspace() for character in text[start:stop]], dtype=bool)
    for first, last in spans.tolist():
        is_there[max(0, first - start) : max(0, last - start)] = True
    return bool(is_there.all())


def identities(tokens: Sequence[PlacedToken]) -> np.ndarray:
    """Returns [n] int64: equal numbers for tokens that are the same."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(token.ids, len(numbers)) for token in tokens], dtype=np.int64)
