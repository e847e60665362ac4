"""Text -> words, for many scripts, the same on every machine.

NFKC and case folding, then one rule per script: Han through jieba without its statistical guesses (HMM=False), Japanese
and the scripts of South-East Asia through ICU's dictionaries when PyICU is installed, everything else by Unicode word
characters. Without PyICU Japanese gives its kanji and katakana runs (hiragana, mostly grammar, is left out), and Thai,
Lao, Khmer and Burmese give overlapping pairs of grapheme clusters: weaker tags, but stable ones. `segmentation_name()`
says which rules ran, down to the content of jieba's dictionary, and is stored with a vocabulary.

Known misses: lines whose spaces the recognizer lost, pieces of URLs, elisions ("l'automne" stays one word).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import itertools
import logging
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import version

import regex

_SEA = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_OTHER = rf"[\p{{L}}\p{{M}}\p{{N}}--[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}{_SEA}]]"
_RUN = regex.compile(
    rf"(?P<east>[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}ー々〆]+)|(?P<sea>[{_SEA}]+)|"
    rf"(?P<word>{_OTHER}+(?:['\-_.,]{_OTHER}+)*)",
    regex.V1,
)
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_JAPANESE_CONTENT = regex.compile(r"[\p{Han}々〆]+|[\p{Katakana}ー]+")
_CLUSTER = regex.compile(r"\X")
_LATIN_LETTER = regex.compile(r"\p{Latin}")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "‐": "-", "‑": "-"})

MAX_WORD_CHARACTERS = 32
MAX_DIGITS = 8

_NUM_DIGITS = 12
_UNDIGESTED, _DIGESTED = "/jieba-0.42.1/", "/jieba-0.42.1-7197c3211ddd/"


def segment_words(text: str) -> list[str]:
    """Returns the words of one line of text in reading order, normalised, with the useless ones dropped.

    Dropped: single Latin letters, words longer than `MAX_WORD_CHARACTERS`, numbers longer than `MAX_DIGITS`, and single
    kana.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    is_japanese = _KANA.search(text) is not None  # decides how the line's Han characters are read
    words: list[str] = []
    for match in _RUN.finditer(text):
        run = match.group()
        if match.lastgroup == "word":
            words.append(run)
        elif match.lastgroup == "sea":
            words.extend(_sea_words(run))
        else:
            words.extend(_japanese_words(run) if is_japanese else _han_words(run))
    return [word for word in words if _is_useful(word)]


def segmentation_name() -> str:
    """Names the rules in force, e.g. "nfkc-casefold/jieba-0.42.1-7197c3211ddd/icu"; the digits are the dictionary's."""
    return f"nfkc-casefold/jieba-{version('jieba')}-{_dictionary_digits()}/{'icu' if _has_icu() else 'no-icu'}"


def is_same_segmentation(stored: object) -> bool:
    """Tells whether words that were stored with this segmentation name were made by the rules in force.

    Names of earlier versions have no digits, but those versions were pinned to jieba 0.42.1: they stand for its
    dictionary.
    """
    if not isinstance(stored, str):
        return False
    return stored.replace(_UNDIGESTED, _DIGESTED, 1) == segmentation_name()


def _is_useful(word: str) -> bool:
    if not word or len(word) > MAX_WORD_CHARACTERS:
        return False
    if len(word) == 1 and (_LATIN_LETTER.match(word) or _KANA.match(word)):
        return False
    return sum(character.isdigit() for character in word) <= MAX_DIGITS


def _han_words(run: str) -> Iterator[str]:
    return _jieba().cut(run, HMM=False)


def _japanese_words(run: str) -> Iterator[str]:
    if _has_icu():
        yield from _icu_words(run, "ja")
    else:
        yield from _JAPANESE_CONTENT.findall(run)


def _sea_words(run: str) -> Iterator[str]:
    if _has_icu():
        yield from _icu_words(run, "th")
        return
    clusters = _CLUSTER.findall(run)
    if len(clusters) == 1:
        yield clusters[0]
    for first, second in itertools.pairwise(clusters):
        yield first + second


@functools.lru_cache(maxsize=1)
def _jieba():  # type: ignore[no-untyped-def]  # an untyped package's object
    """Returns a jieba tokenizer with its bundled dictionary, apart from jieba's global one; takes 0.7 s.

    jieba's own `initialize` would take the words from a file "jieba.cache" in the temporary folder, if there is one,
    whoever wrote it and whatever jieba it came from. So that the same text gives the same words, no cache is used.
    """
    import jieba

    jieba.setLogLevel(logging.ERROR)
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(io.BytesIO(_dictionary()))
    tokenizer.initialized = True
    return tokenizer


def _dictionary() -> bytes:
    """Returns jieba's bundled dictionary, a text file of 5 MB."""
    import jieba

    with jieba.Tokenizer().get_dict_file() as stream:
        return bytes(stream.read())


@functools.lru_cache(maxsize=1)
def _dictionary_digits() -> str:
    """Returns the first digits of the dictionary's SHA-256."""
    return hashlib.sha256(_dictionary()).hexdigest()[:_NUM_DIGITS]


@functools.lru_cache(maxsize=1)
def _has_icu() -> bool:
    return importlib.util.find_spec("icu") is not None


@functools.lru_cache(maxsize=4)
def _icu_breaker(locale: str) -> Callable[[str], Iterator[str]]:
    import icu

    breaker = icu.BreakIterator.createWordInstance(icu.Locale(locale))

    def split(run: str) -> Iterator[str]:
        units = icu.UnicodeString(run)
        breaker.setText(units)
        start = 0
        for end in breaker:
            yield str(units[start:end])
            start = end

    return split


def _icu_words(run: str, locale: str) -> Iterator[str]:
    return _icu_breaker(locale)(run)
