"""The words that have a class, numbered. They travel with the ids: beside shard sets, in checkpoints and in exports.

The id of a word is its place in the file and never changes. `preprocess/ocr/vocabulary.py` builds vocabularies.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from megatron_ove.errors import DataError
from megatron_ove.whole_file import write_whole

VOCABULARY_FILE = "vocabulary.json"
"""Name of the file in the folder of a shard set."""
VOCABULARIES_FOLDER = "vocabularies"
"""Folder of a checkpoint or an export with the vocabulary of every objective that has one."""
_FORMAT_VERSION = 1


def vocabulary_path(objective: str) -> str:
    """Returns where a checkpoint or an export keeps the words of an objective's classes, relative to its folder."""
    return f"{VOCABULARIES_FOLDER}/{quote(objective, safe=' ')}.json"  # a name is any text, a file's name is not


@dataclass(frozen=True)
class Vocabulary:
    """Words with ids 0 .. n - 1.

    Attributes:
        words: word of every id.
        page_counts: number of pages each word was seen on.
        info: engine, segmentation, pages counted, cuts and permutation seed.
    """

    words: tuple[str, ...]
    page_counts: tuple[int, ...]
    info: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def ids(self) -> Mapping[str, int]:
        """Word -> id."""
        return {word: index for index, word in enumerate(self.words)}

    def encode(self) -> bytes:
        """Returns the vocabulary as JSON in UTF-8, one line a word."""
        header = json.dumps({"format_version": _FORMAT_VERSION, **self.info}, ensure_ascii=False)
        rows = ",\n".join(
            json.dumps([word, count], ensure_ascii=False)
            for word, count in zip(self.words, self.page_counts, strict=True)
        )
        return f'{{"info": {header},\n"words": [\n{rows}\n]}}\n'.encode()

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary; replaces `path` at once."""
        write_whole(Path(path), self.encode())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads a vocabulary.

        Raises:
            DataError: no such file, not a vocabulary, or a newer format.
        """
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise DataError(
                f"the vocabulary {path} does not exist; build it with tools/ocr/2_build_vocabulary.py"
            ) from error
        except OSError as error:
            raise DataError(f"the vocabulary {path} cannot be read ({error.strerror}); check the path") from error
        return cls.decode(content, path)

    @classmethod
    def decode(cls, content: bytes, path: str | Path) -> Vocabulary:
        """Returns the vocabulary that `encode` gave; `path` is used in error sentences.

        Raises:
            DataError: not a vocabulary, a newer format, or a word that has two ids.
        """
        try:
            record = json.loads(content)
            info, rows = dict(record["info"]), list(record["words"])
            format_version = info.pop("format_version")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} is not a vocabulary ({error}); build one with tools/ocr/2_build_vocabulary.py"
            ) from error
        if format_version != _FORMAT_VERSION:
            raise DataError(
                f"the vocabulary {path} has format {format_version}, but this version reads format {_FORMAT_VERSION}; "
                "build it again"
            )
        wrong = next((number for number, row in enumerate(rows) if not _is_row(row)), None)
        if wrong is not None:
            raise DataError(
                f"{path} is not a vocabulary (entry {wrong} of its words is {str(rows[wrong])[:40]}, not [word, number "
                "of pages]); build one with tools/ocr/2_build_vocabulary.py"
            )
        vocabulary = cls(tuple(word for word, _ in rows), tuple(count for _, count in rows), info)
        if len(vocabulary.ids) < len(vocabulary):
            word, first = next((w, n) for n, w in enumerate(vocabulary.words) if vocabulary.ids[w] != n)
            raise DataError(
                f"the vocabulary {path} has the word '{word}' twice, as the ids {first} and {vocabulary.ids[word]}, "
                "but a class has one word and a word one class; build it again"
            )
        return vocabulary


def describe_difference(there: Sequence[str], here: Sequence[str]) -> str:
    """Says in a clause how two lists of words differ; "" when they are equal."""
    if len(there) != len(here):
        return f"{len(there)} words there, {len(here)} here"
    unequal = (number for number, words in enumerate(zip(there, here, strict=True)) if words[0] != words[1])
    number = next(unequal, None)
    return "" if number is None else f"class {number} is '{there[number]}' there and '{here[number]}' here"


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int
