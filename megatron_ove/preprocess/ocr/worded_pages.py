"""Pages whose words are at hand, without OCR: a table of pictures and texts, or texts beside the pictures.

A table is JSON lines: {"file": "a.png", "words": ["law", "right"]} or {"file": "b.png", "text": "Law and right."};
other fields are not read, and relative files lie beside the table. In a folder of pictures `a.png` has its text in
`a.txt` (or `a.TXT`), both under any name that a link in the folder gives them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_kinds import PICTURE_SUFFIXES
from megatron_ove.preprocess.input_files import InputFile, real_path, sample_key
from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.ocr.recognition import PageRecord
from megatron_ove.preprocess.paired_texts import pair_texts, stem
from megatron_ove.preprocess.record_files import read_records

_TEXT_SUFFIX = ".txt"
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
        item = InputFile(real_path(file), file.name, _key(file, path.parent))
        pages.append(PageRecord(item.key, str(item.path), lines, link_name=item.link_name))
    return pages


def _from_folder(folder: Path) -> tuple[list[PageRecord], list[tuple[str, str]], str]:
    found = pair_texts(folder, (_TEXT_SUFFIX,))
    refused = list(found.unreadable)
    pages = []
    for item, texts in found.pairs:
        if not texts:
            expected = Path(stem(item.name, (_TEXT_SUFFIX,)) + _TEXT_SUFFIX).name
            refused.append((str(item), f"{item} has no text beside it: there is no {expected} that can be read"))
        elif item.sheet:
            refused.append((str(item), f"{item} has no text of its own; write its sheets as single pictures"))
        else:
            first = found.paths[texts[0]]
            try:
                lines = _text_lines(first.read_text(encoding="utf-8-sig"))
                pages.append(PageRecord(item.key, str(item.path), lines, link_name=item.link_name))
            except UnicodeDecodeError:
                reason = f"the text beside {item} is not UTF-8; save {Path(texts[0]).name} as UTF-8"
                refused.append((str(item), reason))
            except OSError as error:
                text = _at(folder, texts[0])
                refused.append((str(item), f"{text} cannot be read ({error.strerror}); check its permissions"))
            more = [text for text in texts[1:] if found.paths[text] != first]
            refused += [(_at(folder, text), f"{item} has the text {texts[0]}, so {text} is not used") for text in more]
    for text in found.alone:
        refused.append((_at(folder, text), f"{_at(folder, text)} has no picture of this name beside it"))
    return pages, refused, found.ignored


def _at(folder: Path, name: str) -> str:
    return str(folder / name)


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
