"""Pages whose words are at hand, without OCR: a table of pictures and texts, or texts beside the pictures.

A table is JSON lines: {"file": "a.png", "words": ["law", "right"]} or {"file": "b.png", "text": "Law and right."};
other fields are not read, and relative files lie beside the table. In a folder of pictures `a.png` has its text in
`a.txt`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_kinds import PICTURE_SUFFIXES
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.input_files import real_path, sample_key
from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.ocr.recognition import PageRecord
from megatron_ove.preprocess.record_files import read_records

_MADE_BY = 'lines such as {"file": "a.png", "words": ["law", "right"]} or {"file": "b.png", "text": "Law and right."}'


@dataclass(frozen=True)
class WordedPages:
    """Pages with words whose pictures are there, (file, reason) of what is refused, and a sentence on the rest."""

    pages: tuple[PageRecord, ...]
    refused: tuple[tuple[str, str], ...]
    ignored: str = ""

    @property
    def files(self) -> list[str]:
        """All files that were judged."""
        return [page.file for page in self.pages] + [file for file, _ in self.refused]


def read_worded_pages(source: Path) -> WordedPages:
    """Reads a table, or the texts beside the pictures of a folder.

    Raises:
        DataError: no such file, no picture, or a line of another form; the sentence names the line and the field.
    """
    pages, refused, ignored = _from_folder(source) if source.is_dir() else (_from_table(source), [], "")
    usable = []
    for page in pages:
        if not Path(page.file).is_file():
            refused.append(
                (page.file, f"{page.file} does not exist or is no file; relative files lie beside the table")
            )
        elif not page.lines:
            refused.append((page.file, f"no word is given for {page.file}"))
        else:
            usable.append(page)
    return WordedPages(tuple(usable), tuple(refused), ignored)


def _from_table(path: Path) -> list[PageRecord]:
    pages = []
    for number, record in enumerate(read_records(path, made_by=_MADE_BY, fields=("file",)), start=1):
        try:
            name, lines = _name(record), _lines(record)
        except DataError as error:
            raise DataError(f"line {number} of {path} {error}; write {_MADE_BY}") from error
        file = path.parent / name
        pages.append(PageRecord(key=_key(file, path.parent), file=str(real_path(file)), lines=lines))
    return pages


def _from_folder(folder: Path) -> tuple[list[PageRecord], list[tuple[str, str]], str]:
    pages, partners = [], set()
    listing = list_inputs(folder, "picture")
    refused = [(str(path), reason) for path, reason in listing.unreadable.items()]
    for item in listing.inputs:
        text_file = (folder / item.name).with_suffix(".txt")  # beside the name, which may be a link
        partners.add(text_file)
        try:
            text = text_file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            refused.append((str(item), f"{item} has no text beside it: {text_file.name} does not exist"))
        except UnicodeDecodeError:
            refused.append((str(item), f"the text beside {item} is not UTF-8; save {text_file.name} as UTF-8"))
        else:
            if item.sheet:
                refused.append((str(item), f"{item} has no text of its own; write its sheets as single pictures"))
            else:
                pages.append(PageRecord(key=item.key, file=str(item.path), lines=_text_lines(text)))
    for text_file in sorted(folder.rglob("*.txt")):
        if text_file not in partners:
            refused.append((str(text_file), f"{text_file} has no picture of this name beside it"))
    listing.other_files.pop(".txt", None)  # each was judged
    return pages, refused, listing.ignored_sentence()


def unnamed_pictures(files: Iterable[str]) -> list[str]:
    """Returns the pictures that lie in the folders of `files` but are not among them, sorted."""
    named = {Path(file) for file in files}  # absolute, links followed
    found = []
    for folder in {file.parent for file in named if file.parent.is_dir()}:
        with os.scandir(folder) as entries:
            found += [folder / e.name for e in entries if Path(e.name).suffix.lower() in PICTURE_SUFFIXES]
    return sorted(str(file) for file in found if file not in named)


def _name(record: Mapping[str, Any]) -> str:
    if not isinstance(record["file"], str) or not record["file"]:
        raise DataError(f"has the file {record['file']!r}, which is no name")
    return str(record["file"])


def _lines(record: Mapping[str, Any]) -> tuple[TextLine, ...]:
    words, text = record.get("words"), record.get("text")
    if (words is None) == (text is None):
        raise DataError(f"has {'neither words nor' if words is None else 'both words and'} text, but one is needed")
    if text is not None:
        if not isinstance(text, str):
            raise DataError(f"has the text {text!r}, which is no string")
        return _text_lines(text)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"has the words {words!r}, which are no list of strings")
    return tuple(TextLine(word) for word in words if word.strip())


def _text_lines(text: str) -> tuple[TextLine, ...]:
    return tuple(TextLine(line) for line in text.splitlines() if line.strip())


def _key(file: Path, root: Path) -> str:
    """Returns a key that does not depend on where the table lies, unless the file is given by its absolute path."""
    return sample_key((file.relative_to(root) if file.is_relative_to(root) else file).as_posix())
