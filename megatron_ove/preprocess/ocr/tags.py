"""A page's lines -> exactly 100 tag ids, most visible words first.

A word weighs as much as its share of its line's box area, times the line's score; the heaviest occurrence counts. On
pages whose text was known beforehand, without boxes, the words that come first are the heaviest.
Source: OneVision-Encoder stores the first 100 in reading order and repeats them if there are fewer. Ranking by area
keeps headlines, and -1 keeps the loss free of duplicates; `fill="cyclic"` restores the repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.lines import MIN_CHARACTERS, MIN_SCORE, TextLine, believable_lines
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.vocabulary import Vocabulary

NUM_TAGS = 100


@dataclass(frozen=True)
class PageTags:
    """The tags of a page.

    Attributes:
        ids: [num_tags] int32 vocabulary ids, heaviest first; -1 = none.
        words: the words of the leading ids, without repetition.
    """

    ids: np.ndarray
    words: tuple[str, ...]


def rank_words(lines: Sequence[TextLine], *, min_score: float = MIN_SCORE) -> dict[str, float]:
    """Returns every word of a page with its weight (square pixels x score), heaviest first, ties by the word.

    If a line has no box, areas cannot be compared: then the weights fall from the first word of the page to the last.
    """
    believed = believable_lines(lines, min_score=min_score)
    if not all(line.box for line in believed):
        in_order = dict.fromkeys(word for line in believed for word in segment_words(line.text))
        return {word: float(len(in_order) - place) for place, word in enumerate(in_order)}
    weights: dict[str, float] = {}
    for line in believed:
        words = segment_words(line.text)
        area_per_character = line.area * line.score / max(len(line.text), 1)
        for word in words:
            weights[word] = max(weights.get(word, 0.0), area_per_character * len(word))
    return dict(sorted(weights.items(), key=lambda item: (-item[1], item[0])))


def page_tags(
    lines: Sequence[TextLine],
    vocabulary: Vocabulary,
    *,
    num_tags: int = NUM_TAGS,
    fill: Literal["none", "cyclic"] = "none",
    min_score: float = MIN_SCORE,
) -> PageTags:
    """Chooses the tags of a page.

    Args:
        lines: recognized lines, unfiltered.
        vocabulary: words with ids.
        num_tags: length of the result.
        fill: what follows when there are fewer words: -1, or the ids again and again.
        min_score: lines below are not believed.

    Raises:
        DataError: there is no text, or no word of it is in the vocabulary. The sentence is the reject reason.
    """
    weights = rank_words(lines, min_score=min_score)
    if not weights:
        raise DataError(no_text_reason(lines, min_score=min_score))
    known = [word for word in weights if word in vocabulary.ids][:num_tags]
    if not known:
        raise DataError(f"none of the page's {len(weights)} words is in the vocabulary of {len(vocabulary)} words")
    ids = np.full(num_tags, -1, np.int32)
    ids[: len(known)] = [vocabulary.ids[word] for word in known]
    if fill == "cyclic":
        ids = np.resize(ids[: len(known)], num_tags).astype(np.int32)
    return PageTags(ids=ids, words=tuple(known))


def no_text_reason(lines: Sequence[TextLine], *, min_score: float) -> str:
    """Returns the reject reason of a page of whose lines none is believed, or none holds a word."""
    if not lines:
        return "the page has no text: no line was recognized"
    if not any(line.box for line in lines):
        return f"the page has no text: none of the {len(lines)} texts given for it holds a word that counts"
    best = max(line.score for line in lines)
    return (
        f"the page has no text: none of its {len(lines)} recognized lines has at least {MIN_CHARACTERS} characters "
        f"of words and a score of {min_score} (best score {best:.2f})"
    )
