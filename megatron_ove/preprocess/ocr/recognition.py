"""Pages as records of their lines: made by the workers of tools/ocr/1_recognize_pages.py, or by hand, and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.engines import build_engine
from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.pictures import load_picture
from megatron_ove.preprocess.record_files import is_file_state, read_records
from megatron_ove.sample_keys import MAX_KEY_LENGTH, is_valid_key

READ_BY = "tools/ocr/1_recognize_pages.py"
MIN_SIDE = 8  # pixels; no letter is readable in less


class PageRecognizer:
    """Loads a page and reads its lines, top to bottom."""

    def __init__(self, engine: str, options: Mapping[str, Any]) -> None:
        """Builds the engine; see `engines.build_engine`."""
        self._engine = build_engine(engine, options)

    def __call__(self, page: InputFile) -> dict[str, Any]:
        """Returns {"width", "height", "engine", "lines"}; raises `DataError` when the file is no usable picture."""
        picture = load_picture(page.path, page.sheet, suffix=page.suffix)
        if min(picture.shape[:2]) < MIN_SIDE:
            raise DataError(
                f"{page} has {picture.shape[1]} x {picture.shape[0]} pixels, which is too thin for a line of text (at "
                f"least {MIN_SIDE} on each side); if it was cut or scaled by mistake, make it again, else remove it"
            )
        lines = self._engine.recognize(picture)
        return {
            "width": picture.shape[1],
            "height": picture.shape[0],
            "engine": self._engine.info.as_record(),
            "lines": [line.as_record() for line in lines],
        }


PAGE_FIELDS = ("key", "file", "lines")
"""What a line of lines.jsonl must have."""


@dataclass(frozen=True)
class PageRecord:
    """A page with its text, as stored between the OCR steps.

    Attributes:
        key: unique name of the page.
        file: the picture.
        lines: all lines, unfiltered.
        engine: what recognized it; None for a text that was known beforehand.
        sheet: which picture of a file with several.
        file_state: size and time of the file when it was read; None if that is not known.
        link_name: see `InputFile.link_name`.
    """

    key: str
    file: str
    lines: tuple[TextLine, ...]
    engine: Mapping[str, Any] | None = None
    sheet: int = 0
    file_state: Sequence[int] | None = None
    link_name: str = ""

    @property
    def input_file(self) -> InputFile:
        return InputFile(Path(self.file), self.link_name or self.file, self.key, self.sheet)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PageRecord:
        """Rebuilds a page from a line of lines.jsonl.

        Raises:
            DataError: a field is missing or holds something else; the sentence names it and goes behind "line 1 of X".
        """
        for name in ("key", "file"):
            if not isinstance(record.get(name), str) or not record[name]:
                raise DataError(f"has the {name} {record.get(name)!r}, which is no name")
        if not is_valid_key(record["key"]):
            raise DataError(
                f"has the key {record['key']!r}, but names in a shard are 1 to {MAX_KEY_LENGTH} letters, digits, "
                "'_' or '-'; choose another"
            )
        engine, lines = record.get("engine"), record.get("lines")
        if engine is not None and not (isinstance(engine, Mapping) and {"name", "version"} <= engine.keys()):
            raise DataError(f"has the engine {engine!r}, which has no name and version; leave it out for a known text")
        if not isinstance(lines, list):
            raise DataError(f"has the lines {lines!r}, which are no list")
        texts = tuple(_line(i, line) for i, line in enumerate(lines))
        sheet, state, link_name = record.get("sheet", 0), record.get("file_state"), record.get("link_name", "")
        if type(sheet) is not int or sheet < 0:
            raise DataError(f"has the sheet {sheet!r}, which is no number from 0 on")
        if state is not None and not is_file_state(state):
            raise DataError(
                f"has the file_state {state!r}, which is not [bytes, modification time in ns]; leave it out"
            )
        if not isinstance(link_name, str):
            raise DataError(f"has the link_name {link_name!r}, which is no name")
        return cls(record["key"], record["file"], texts, engine, sheet, state, link_name)


def _line(index: int, record: object) -> TextLine:
    try:
        return TextLine.from_record(record)
    except DataError as error:
        raise DataError(f"has in lines[{index}] a line that {error}") from error


def read_pages(path: str | Path) -> list[PageRecord]:
    """Reads a lines.jsonl of step 1, or one that a user wrote (docs/data_format.md); in its order.

    Raises:
        DataError: no such file, or the first line of it that is no page or has the key of another page, with its number
            and the field.
    """
    pages: list[PageRecord] = []
    first_lines: dict[str, int] = {}
    records = read_records(path, made_by=READ_BY, fields=PAGE_FIELDS, may_be_cut=_is_of_step_1(Path(path)))
    for number, record in enumerate(records, start=1):
        try:
            pages.append(PageRecord.from_record(record))
            first = first_lines.setdefault(pages[-1].key, number)
            # A page that stands there twice is left to whoever uses the pages.
            if pages[first - 1].input_file.identity != pages[-1].input_file.identity:
                raise DataError(f"has the key '{record['key']}' of another page, that of line {first}; change one")
        except DataError as error:
            raise DataError(f"line {number} of {path} {error}") from error
    return pages


def _is_of_step_1(path: Path) -> bool:
    """Whether step 1 wrote this lines.jsonl, which puts its settings into every line, and not a user."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return b'"run_settings": ' in stream.readline()


def common_engine(pages: Iterable[PageRecord]) -> Mapping[str, Any] | None:
    """Returns the engine that read the pages; None if all texts were known beforehand, which go with any engine.

    Raises:
        DataError: two pages were read by different engines or models.
    """
    engines = [page.engine for page in pages if page.engine is not None]
    if any(engine != engines[0] for engine in engines):
        names = sorted({f"{engine['name']} {engine['version']}" for engine in engines})
        raise DataError(
            f"the pages were read by different engines or models ({', '.join(names)}), whose words do not match; read "
            "all of them with one engine"
        )
    return engines[0] if engines else None
