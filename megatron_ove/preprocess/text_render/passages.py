"""The texts that pages are rendered from: real passages per language (see texts/SOURCES.md)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError

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
    glue = "" if language in ("ja", "zh-Hant") else " "
    return Passage(language=language, title=flat[start][0], text=glue.join(parts))
