"""What is written on a document's pages: the `json` member of samples of kind `document`.

The text is the truth and is stored as it is read, never as token ids: a tokenizer can change. Boxes say where pieces of
it stand, by places in the text, so that whatever a tokenizer cuts it into can be found on the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ove.errors import DataError

MAX_DOCUMENT_BYTES = 16 << 20
"""A page of print has some kilobytes."""
BOX_UNITS = ("words", "lines", "characters")
_BOX_FIELDS = ("page", "left", "top", "right", "bottom", "start", "stop")
_TOLERANCE = 1.0
"""Pixels by which a box may leave its page: rounding of whoever measured it."""
_KNOWN = frozenset({"text", "turns", "captions", *BOX_UNITS})


@dataclass(frozen=True)
class Boxes:
    """Where k pieces of a text stand.

    Attributes:
        page: [k] int32, page of each.
        corners: [k, 4] float32, (left, top, right, bottom) in pixels of the page as it is stored; right and bottom
            exclusive.
        spans: [k, 2] int32, the piece is `text[start:stop]`.
    """

    page: np.ndarray
    corners: np.ndarray
    spans: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Boxes:
        """Returns boxes from rows (page, left, top, right, bottom, start, stop)."""
        values = np.asarray(rows, dtype=np.float64).reshape(-1, len(_BOX_FIELDS))
        whole = np.clip(values[:, [0, 5, 6]], -1, np.iinfo(np.int32).max).astype(np.int32)
        return cls(whole[:, 0], values[:, 1:5].astype(np.float32), whole[:, 1:])

    def __len__(self) -> int:
        return len(self.page)

    def on_page(self, page: int) -> Boxes:
        """Returns those of one page."""
        chosen = self.page == page
        return Boxes(self.page[chosen], self.corners[chosen], self.spans[chosen])


def _no_boxes() -> Boxes:
    return Boxes.of([])


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        task: what is asked: "ocr", "format", "box", "caption", "qa", or a name of one's own.
        question: what is asked; "" = the task says it.
        answer: what is to be said; None = the document's text.
    """

    task: str
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Document:
    """What one sample says.

    Attributes:
        text: all that is written on its pages, in reading order; "" if nothing is or it is not known.
        turns: questions and answers about it.
        captions: what may be said of its pictures, each on its own.
        words: where words of the text stand; may be unknown, and so are the other units.
        lines: where lines stand.
        characters: where characters stand.
    """

    text: str = ""
    turns: tuple[Turn, ...] = ()
    captions: tuple[str, ...] = ()
    words: Boxes = field(default_factory=_no_boxes)
    lines: Boxes = field(default_factory=_no_boxes)
    characters: Boxes = field(default_factory=_no_boxes)

    @property
    def boxes(self) -> dict[str, Boxes]:
        """Unit -> its boxes."""
        return {unit: getattr(self, unit) for unit in BOX_UNITS}

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer of every turn."""
        return tuple(self.text if turn.answer is None else turn.answer for turn in self.turns)

    def encode(self) -> bytes:
        """Returns the `json` member, UTF-8; the same for equal documents.

        Raises:
            DataError: a text is no Unicode: it holds half of a surrogate pair.
        """
        data: dict[str, Any] = {"text": self.text}
        if self.turns:
            data["turns"] = [
                {"task": turn.task, "question": turn.question, "answer": turn.answer} for turn in self.turns
            ]
        if self.captions:
            data["captions"] = list(self.captions)
        for unit, boxes in self.boxes.items():
            if len(boxes):
                data[unit] = [
                    [int(page), *(_short(x) for x in corners.tolist()), int(start), int(stop)]
                    for page, corners, (start, stop) in zip(boxes.page, boxes.corners, boxes.spans, strict=True)
                ]
        try:
            return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text has half of a surrogate pair at {error.start}, which is no character; repair the text"
            ) from error

    @classmethod
    def decode(cls, data: bytes, pages: Sequence[tuple[int, int]] | None = None) -> Document:
        """Reads a `json` member.

        Args:
            data: the member.
            pages: (height, width) of every page in pixels; None = boxes are not compared with pages.

        Raises:
            DataError: it says nothing that can be used; the sentence goes behind the sample's name and a colon.
        """
        if len(data) > MAX_DOCUMENT_BYTES:
            raise DataError(f"its json has {len(data)} bytes, more than {MAX_DOCUMENT_BYTES}; divide the document")
        try:
            parsed = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"its json cannot be read ({error}); write the document again") from error
        if not isinstance(parsed, Mapping):
            raise DataError(f"its json is a {type(parsed).__name__}, not an object with a text; write it again")
        unknown = sorted(set(parsed) - _KNOWN)
        if unknown:
            raise DataError(f"its json has the unknown entry {unknown[0]!r}; known are {', '.join(sorted(_KNOWN))}")
        text = _text(parsed.get("text", ""), "text")
        boxes = {unit: _boxes(parsed.get(unit, []), unit, text, pages) for unit in BOX_UNITS}
        return cls(
            text,
            tuple(_turn(turn, i) for i, turn in enumerate(_list(parsed.get("turns", []), "turns"))),
            tuple(_text(one, f"captions[{i}]") for i, one in enumerate(_list(parsed.get("captions", []), "captions"))),
            **boxes,
        )


def _short(value: float) -> float | int:
    """A tenth of a pixel is all that a box can know."""
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"its json has {place} = {_shown(value)}, which is no text; correct it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"its json has half of a surrogate pair in {place}, which is no character; repair the text"
        ) from error
    return value


def _list(value: object, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"its json has {place} = {_shown(value)}, which is no list; correct it")
    return value


def _turn(value: object, number: int) -> Turn:
    place = f"turns[{number}]"
    if not isinstance(value, Mapping) or not {"answer"} <= set(value) <= {"task", "question", "answer"}:
        raise DataError(f"its json has {place} = {_shown(value)}, which is not {{task, question, answer}}; correct it")
    answer = value["answer"]
    return Turn(
        _text(value.get("task", "qa"), f"{place}.task"),
        _text(value.get("question", ""), f"{place}.question"),
        None if answer is None else _text(answer, f"{place}.answer"),
    )


def _boxes(value: object, unit: str, text: str, pages: Sequence[tuple[int, int]] | None) -> Boxes:
    rows = _list(value, unit)
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(_BOX_FIELDS) or not all(map(_is_number, row)):
            raise DataError(
                f"its json has {unit}[{i}] = {_shown(row)}, which is not the numbers [{', '.join(_BOX_FIELDS)}]; "
                "correct it"
            )
        if any(row[k] != int(row[k]) for k in (0, 5, 6)):
            raise DataError(f"its json has {unit}[{i}] = {_shown(row)}, where page, start and stop must be whole")
    boxes = Boxes.of(rows)
    problem = _box_problem(boxes, len(text), pages)
    if problem is not None:
        raise DataError(f"its json has {unit}[{problem[0]}] = {_shown(rows[problem[0]])}, {problem[1]}; correct it")
    return boxes


def _box_problem(boxes: Boxes, length: int, pages: Sequence[tuple[int, int]] | None) -> tuple[int, str] | None:
    """Returns the first box that cannot be, and why."""
    left, top, right, bottom = boxes.corners.T
    start, stop = boxes.spans.T
    checks = [
        ((start < 0) | (stop > length) | (start >= stop), f"which is no piece of a text of {length} characters"),
        (~((left < right) & (top < bottom)), "whose left and top are not below right and bottom"),
    ]
    if pages is not None:
        heights, widths = (np.array([page[k] for page in pages], dtype=np.float64) for k in (0, 1))
        inside = (boxes.page >= 0) & (boxes.page < len(pages))
        page = np.where(inside, boxes.page, 0)
        leaves = (left < -_TOLERANCE) | (top < -_TOLERANCE)
        if len(pages):
            leaves |= (right > widths[page] + _TOLERANCE) | (bottom > heights[page] + _TOLERANCE)
        checks += [
            (~inside, f"whose page is none of the {len(pages)} that are there"),
            (leaves, "which leaves its page"),
        ]
    for is_wrong, why in checks:
        if is_wrong.any():
            return int(is_wrong.argmax()), why
    return None


def _is_number(value: object) -> bool:
    # A whole number of a JSON file may be larger than any float.
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)  # type: ignore[arg-type]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
