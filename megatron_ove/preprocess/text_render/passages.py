"""The texts that pages are rendered from, and lists of their words: real passages per language (texts/SOURCES.md)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.preprocess.text_render.typefaces import is_east_asian

_TEXTS = Path(__file__).with_name("texts")
_SENTENCE_END = re.compile(r"(?<=[.;:])\s+|(?<=[。；])")


@dataclass(frozen=True)
class Passage:
    """A title and running text in one language."""

    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Text:
    """One language's text, as (title, sentences) per section."""

    language: str
    name: str
    source: str
    sections: tuple[tuple[str, tuple[str, ...]], ...]


def languages() -> tuple[str, ...]:
    """Returns the languages there are texts for, sorted."""
    return tuple(sorted(path.stem for path in _TEXTS.glob("*.json")))


@lru_cache(maxsize=32)
def load_text(language: str) -> Text:
    """Loads the text of `language`; raises `DataError` for a language without one."""
    path = _TEXTS / f"{language}.json"
    if not path.is_file():
        raise DataError(f"there is no text in language {language!r}; choose among {', '.join(languages())}")
    record = json.loads(path.read_text(encoding="utf-8"))
    sections = []
    for passage in record["passages"]:
        sentences = [part for paragraph in passage["paragraphs"] for part in _SENTENCE_END.split(paragraph) if part]
        sections.append((passage["title"], tuple(sentences)))
    return Text(language=language, name=record["name"], source=record["source"], sections=tuple(sections))


def draw_passage(language: str, random: np.random.Generator, *, num_characters: int) -> Passage:
    """Draws a run of successive sentences, starting anywhere in the text and going round at its end.

    Args:
        language: one of `languages()`.
        random: decides where to start.
        num_characters: the passage is at least this long.
    """
    text = load_text(language)
    flat = [(title, sentence) for title, sentences in text.sections for sentence in sentences]
    start = int(random.integers(len(flat)))
    parts: list[str] = []
    index = start
    while sum(map(len, parts)) < num_characters:
        parts.append(flat[index % len(flat)][1])
        index += 1
    glue = "" if is_east_asian(language) else " "
    return Passage(language=language, title=flat[start][0], text=glue.join(parts))


def draw_word_list(language: str, count: int, *, letters: tuple[int, int] = (3, 8), seed: int = 0) -> tuple[str, ...]:
    """Draws words of a language's text, each with the same chance however often it stands there.

    Words are split and written as those of OCR (`ocr/words.py`); with digits, hyphens or apostrophes they do not count.

    Args:
        language: one of `languages()`; of Japanese, which words there are depends on whether PyICU is installed.
        count: how many.
        letters: least and greatest number of letters of a word.
        seed: of the drawing.

    Returns:
        [count] words, sorted.

    Raises:
        DataError: there are fewer of them.
    """
    sentences = [sentence for _, sentences in load_text(language).sections for sentence in sentences]
    found = {word for sentence in sentences for word in segment_words(sentence)}
    words = sorted(word for word in found if word.isalpha() and letters[0] <= len(word) <= letters[1])
    if count > len(words):
        raise DataError(
            f"{count} words of {letters[0]} to {letters[1]} letters are wanted, but the text in language {language!r} "
            f"has {len(words)}; ask for fewer or allow other lengths"
        )
    return tuple(sorted(np.random.default_rng(seed).permutation(words)[:count].tolist()))
