"""Pictures with what is known of them beside: a folder of pictures and texts, or a table of JSON lines -> documents."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.known_text import TEXT_SUFFIXES, KnownText
from megatron_ove.preprocess.documents.preparing import DocumentInput
from megatron_ove.preprocess.documents.writing import input_refused
from megatron_ove.preprocess.input_files import InputFile, real_path, sample_key
from megatron_ove.preprocess.paired_texts import PairedTexts, pair_texts, stem
from megatron_ove.preprocess.record_files import file_state
from megatron_ove.preprocess.shard_output import names_digest
from megatron_ove.rejects import printable
from megatron_ove.shards.documents import MAX_DOCUMENT_BYTES

_FILE = "file"
_MAX_LINE_BYTES = 64 << 20
"""Four of the largest documents; a line is in memory whole."""


@dataclass(frozen=True)
class CaptionedFolder:
    """What a folder holds.

    Attributes:
        inputs: its documents, those that are refused among them.
        ignored: a sentence on what is neither; "" if there is nothing.
        digest: changes with names and sizes of its files, see `names_digest`; the same wherever the folder lies.
    """

    inputs: tuple[DocumentInput, ...]
    ignored: str
    digest: str


def read_folder(folder: Path) -> CaptionedFolder:
    """Pairs pictures with the texts beside them: `a.jpg` with its caption in `a.txt` or what is known in `a.json`.

    Sheets of one file are pages of one document. A picture without a text, a text without a picture and what cannot be
    looked at are inputs with a `problem`.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    found = pair_texts(folder, TEXT_SUFFIXES)
    named = [(item.name, _document(item, sheets, texts, found)) for item, sheets, texts in _files(found)]
    for text in found.alone:
        path = str(real_path(folder) / text)
        named.append((text, input_refused(path, f"{path} has no picture of this name beside it")))
    named += [(path, input_refused(path, reason)) for path, reason in found.unreadable]
    inputs = tuple(item for _, item in sorted(named, key=lambda entry: entry[0]))
    return CaptionedFolder(inputs, found.ignored, _digest(found))


def _digest(found: PairedTexts) -> str:
    pictures = ((item.name, item.sheet, *(item.state or ())[:1], texts) for item, texts in found.pairs)
    texts = ((name, file_state(path)[0]) for name, path in sorted(found.paths.items()))
    return names_digest(itertools.chain(pictures, texts, [len(found.unreadable)]))


def _files(found: PairedTexts) -> Iterator[tuple[InputFile, tuple[InputFile, ...], tuple[str, ...]]]:
    """Yields (first sheet, all sheets, names of the texts) of every file."""
    for _, group in itertools.groupby(found.pairs, key=lambda pair: pair[0].path):
        pairs = list(group)
        yield pairs[0][0], tuple(item for item, _ in pairs), pairs[0][1]


def _document(
    item: InputFile, sheets: tuple[InputFile, ...], texts: tuple[str, ...], found: PairedTexts
) -> DocumentInput:
    if not texts:
        expected = " or ".join(Path(stem(item.name, TEXT_SUFFIXES) + suffix).name for suffix in TEXT_SUFFIXES)
        return input_refused(str(item), f"{item} has no text beside it: there is no {expected} that can be read")
    paths = dict.fromkeys(found.paths[text] for text in texts)  # one text may lie there under two names
    known = tuple(KnownText(str(path), path) for path in paths)
    return DocumentInput(item.key, str(item), sheets, known)


@dataclass(frozen=True)
class CaptionTable:
    """A table of JSON lines with `file` and what is known of it; relative files lie beside the table."""

    path: Path

    def digest(self) -> str:
        """Returns what changes with the table's content, wherever it lies."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def count(self) -> int:
        """Returns the number of lines that are not empty.

        Raises:
            DataError: there are none, or one has no end.
            OSError: the table cannot be read.
        """
        with self.path.open("rb") as stream:
            count = sum(bool(line.strip()) for line in self._lines(stream))
        if not count:
            raise DataError(f'{self.path} is empty; write lines such as {{"file": "a.png", "caption": "A red house."}}')
        return count

    def inputs(self, places: range) -> Iterator[DocumentInput]:
        """Yields the documents of some of the lines that are not empty, counted from 0; a broken one has a `problem`.

        Lines are read one by one, as a table may be larger than memory.
        """
        place = -1
        with self.path.open("rb") as stream:
            for number, line in enumerate(self._lines(stream), start=1):
                place += bool(line.strip())
                if place >= places.stop:
                    return
                if line.strip() and place in places:
                    yield self._input(line, number)

    def _lines(self, stream: BinaryIO) -> Iterator[bytes]:
        for number in itertools.count(1):
            line = stream.readline(_MAX_LINE_BYTES + 1)
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(
                    f"line {number} of {self.path} has more than {_MAX_LINE_BYTES} bytes, so it looks like a JSON "
                    "array on one line; write one object a line"
                )
            if not line:
                return
            yield line

    def _input(self, line: bytes, number: int) -> DocumentInput:
        name = f"{self.path}/line {number}"
        try:
            record = _parse(line)
        except DataError as error:
            return input_refused(name, f"line {number} of {self.path} {error}")
        file = self.path.parent / record.pop(_FILE)
        shown = file.relative_to(self.path.parent) if file.is_relative_to(self.path.parent) else file
        # A picture may stand in several lines, as captions often do.
        key = sample_key(f"{shown.as_posix()}/line {number}.")
        picture = InputFile(real_path(file), file.name, key)
        return DocumentInput(key, f"{name} ({file})", (picture,), record, whole_files=True)


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_DOCUMENT_BYTES:
        raise DataError(f"has {len(line)} bytes, more than {MAX_DOCUMENT_BYTES}, which is no text of a picture")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # the latter of what is nested without end
        raise DataError(f"is no JSON in UTF-8 ({error}); correct it") from error
    if not isinstance(record, dict):
        raise DataError('is no object like {"file": "a.png", "caption": "A red house."}; correct it')
    file = record.get(_FILE)
    if not isinstance(file, str) or not file or "\0" in file or printable(file) != file:
        raise DataError(f"has the {_FILE} {json.dumps(file, default=str)[:80]}, which names no picture; correct it")
    return record
