"""What a run may add to its page, as data: `<run>/report/extras.json` and the picture files beside it.

The page knows only these general blocks, so any program (the quick start, an evaluation) can add to a report without
touching the report's code, and a page can be drawn again from the run's folder alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from megatron_ove.config.base import StrictModel
from megatron_ove.errors import DataError

EXTRAS_FILE = "report/extras.json"


class Picture(StrictModel):
    """A picture file in the extras folder."""

    file: str
    """File name relative to the folder of extras.json."""
    alt: str
    """Text for those who do not see the picture."""
    caption: str = ""
    """Line under the picture."""
    right: bool | None = None
    """Mark: right, wrong, or none."""


class PictureBlock(StrictModel):
    """Pictures side by side."""

    kind: Literal["pictures"] = "pictures"
    items: list[Picture]
    size: Literal["wide", "half", "thumb"] = "wide"
    """How much of the page's width one picture takes."""


class GalleryRow(StrictModel):
    """One ranking: a query and what was found, best first."""

    label: str
    query: Picture
    found: list[Picture]


class GalleryBlock(StrictModel):
    """Rankings of pictures, one a row."""

    kind: Literal["gallery"] = "gallery"
    rows: list[GalleryRow]


class Word(StrictModel):
    """One ranked word."""

    text: str
    right: bool
    note: str = ""


class WordColumn(StrictModel):
    """One ranking of words."""

    title: str
    words: list[Word]


class WordBlock(StrictModel):
    """Rankings of words side by side, right ones marked."""

    kind: Literal["words"] = "words"
    columns: list[WordColumn]


class TableBlock(StrictModel):
    """A table; the first column is the row's name."""

    kind: Literal["table"] = "table"
    header: list[str]
    rows: list[list[str]]
    note: str = ""


class Section(StrictModel):
    """A headed part of the page."""

    title: str
    text: str = ""
    blocks: list[Annotated[PictureBlock | GalleryBlock | WordBlock | TableBlock, Field(discriminator="kind")]] = []


class StepMarker(StrictModel):
    """A step that every curve marks."""

    step: float
    label: str


class ReportExtras(StrictModel):
    """Content of extras.json."""

    title: str = ""
    """Heading of the page; empty = the run's name."""
    introduction: str = ""
    highlights: list[tuple[str, str]] = []
    """(figure, what it is) shown large at the top."""
    markers: list[StepMarker] = []
    sections: list[Section] = []


def read_extras(run_dir: Path) -> ReportExtras:
    """Reads the extras of a run; an empty set when there are none.

    Raises:
        DataError: when the file is there but not of this form.
    """
    path = run_dir / EXTRAS_FILE
    if not path.exists():
        return ReportExtras()
    try:
        return ReportExtras.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path} does not hold report extras ({where}: {first['msg']}); delete it to draw the report without them"
        ) from error


def write_extras(run_dir: Path, extras: ReportExtras) -> None:
    """Writes extras.json; the pictures it names must lie in the same folder."""
    path = run_dir / EXTRAS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(extras.model_dump_json(indent=1), encoding="utf-8")
