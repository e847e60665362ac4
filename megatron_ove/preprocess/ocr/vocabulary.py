"""The words that have a class: counted over pages, cut, numbered once, and saved with how they came about.

Ids by falling frequency would give the first rank of a sharded class table all the frequent words, so the ids can be
permuted by a fixed seed. The id of a word is its place in the file and never changes.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError

MAX_WORDS = 365_187  # OneVision-Encoder's OCR head
_FORMAT_VERSION = 1


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

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as JSON, one line a word; replaces `path` at once."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"format_version": _FORMAT_VERSION, **self.info}, ensure_ascii=False)
        rows = ",\n".join(
            json.dumps([word, count], ensure_ascii=False)
            for word, count in zip(self.words, self.page_counts, strict=True)
        )
        partial = target.with_name(target.name + ".tmp")
        partial.write_text(f'{{"info": {header},\n"words": [\n{rows}\n]}}\n', encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads a vocabulary.

        Raises:
            DataError: no such file, not a vocabulary, or a newer format.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            info, rows = dict(record["info"]), record["words"]
            format_version = info.pop("format_version")
        except FileNotFoundError as error:
            raise DataError(
                f"the vocabulary {path} does not exist; build it with tools/ocr/2_build_vocabulary.py"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a vocabulary ({error}); build one with tools/ocr/2_build_vocabulary.py"
            ) from error
        if format_version != _FORMAT_VERSION:
            raise DataError(
                f"the vocabulary {path} has format {format_version}, but this version reads format {_FORMAT_VERSION}; "
                "build it again"
            )
        return cls(tuple(word for word, _ in rows), tuple(count for _, count in rows), info)


def build_vocabulary(
    pages: Iterable[Iterable[str]],
    *,
    max_words: int = MAX_WORDS,
    min_pages: int = 1,
    permutation_seed: int | None = 0,
    info: Mapping[str, object] | None = None,
) -> Vocabulary:
    """Counts words over pages and numbers the most frequent ones.

    Args:
        pages: the words of each page; a word counts once a page.
        max_words: most words kept.
        min_pages: a word on fewer pages is left out.
        permutation_seed: shuffles the ids by this seed; None keeps them sorted by falling frequency.
        info: recorded with the result, e.g. the engine.

    Returns:
        The vocabulary; equal counts are ordered by the word itself, so it depends on the counts alone.

    Raises:
        DataError: no word is left.
    """
    counts: Counter[str] = Counter()
    num_pages = 0
    for words in pages:
        counts.update(set(words))
        num_pages += 1
    kept = [(word, count) for word, count in counts.items() if count >= min_pages]
    kept.sort(key=lambda item: (-item[1], item[0]))
    kept = kept[:max_words]
    if not kept:
        raise DataError(
            f"no word is on at least min_pages = {min_pages} of the {num_pages} pages ({len(counts)} different words "
            "were seen), so the vocabulary would be empty; lower --min-pages or give pages with text"
        )
    if permutation_seed is not None:
        order = np.random.default_rng(permutation_seed).permutation(len(kept))
        kept = [kept[index] for index in order]
    details = {
        "num_pages": num_pages,
        "num_different_words": len(counts),
        "min_pages": min_pages,
        "max_words": max_words,
        "permutation_seed": permutation_seed,
        **(info or {}),
    }
    return Vocabulary(tuple(word for word, _ in kept), tuple(count for _, count in kept), details)
