"""One page file -> one record of its lines; what the workers of tools/ocr/1_recognize_pages.py run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.engines import build_engine
from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.pictures import load_picture


class PageRecognizer:
    """Loads a page and reads its lines, top to bottom."""

    def __init__(self, engine: str, options: Mapping[str, Any]) -> None:
        """Builds the engine; see `engines.build_engine`."""
        self._engine = build_engine(engine, options)

    def __call__(self, page: InputFile) -> dict[str, Any]:
        """Returns {"width", "height", "engine", "lines"}; raises `DataError` when the file is no usable picture."""
        picture = load_picture(page.path, page.sheet)
        lines = self._engine.recognize(picture)
        return {
            "width": picture.shape[1],
            "height": picture.shape[0],
            "engine": self._engine.info.as_record(),
            "lines": [line.as_record() for line in lines],
        }


PAGE_FIELDS = ("key", "file", "width", "height", "engine", "lines")
"""What a line of lines.jsonl must have."""


@dataclass(frozen=True)
class PageRecord:
    """A recognized page as stored between the OCR steps.

    Attributes:
        key: unique name of the page.
        file: the picture.
        width: of the picture, in pixels, rotation applied.
        height: of the picture, in pixels.
        engine: what recognized it.
        lines: all recognized lines, unfiltered.
        sheet: which picture of a file with several.
        file_state: size and time of the file when it was read; None if that is not known.
    """

    key: str
    file: str
    width: int
    height: int
    engine: Mapping[str, Any]
    lines: tuple[TextLine, ...]
    sheet: int = 0
    file_state: Sequence[int] | None = None

    @property
    def input_file(self) -> InputFile:
        return InputFile(Path(self.file), self.file, self.key, self.sheet)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PageRecord:
        """Rebuilds a page from a line of lines.jsonl."""
        return cls(
            key=record["key"],
            file=record["file"],
            width=record["width"],
            height=record["height"],
            engine=record["engine"],
            lines=tuple(TextLine.from_record(line) for line in record["lines"]),
            sheet=record.get("sheet", 0),
            file_state=record.get("file_state"),
        )
