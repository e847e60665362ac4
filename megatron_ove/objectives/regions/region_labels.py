"""What a box says, as class ids: words of a vocabulary, or tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_ove.config.regions import RegionConfig
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.token_cache import TextTokenizer
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary

LabelBoxes = Callable[[Document, Boxes], list[list[int]]]
"""(document, some of its boxes) -> class ids of each box, each once; none where nothing in it is a class."""


def word_labels(vocabulary: Vocabulary) -> LabelBoxes:
    """Returns what finds the words of a vocabulary in boxes: the text as it stands, else its words one by one, as
    pages are tagged."""
    ids = vocabulary.ids

    def find(document: Document, boxes: Boxes) -> list[list[int]]:
        found = []
        for start, stop in boxes.spans.tolist():
            text = document.text[start:stop].strip()
            words = [text] if text in ids else segment_words(text)
            found.append(list(dict.fromkeys(ids[word] for word in words if word in ids)))
        return found

    return find


def token_labels(tokenizer: TextTokenizer) -> LabelBoxes:
    """Returns what finds the tokens of a text that have a character in a box."""

    def find(document: Document, boxes: Boxes) -> list[list[int]]:
        ids, offsets = tokenizer.encode_with_offsets(document.text)
        starts, stops = offsets.T
        found = []
        for start, stop in boxes.spans.tolist():
            # Offsets ascend, so the tokens that end behind `start` and begin before `stop` are neighbours.
            first, last = np.searchsorted(stops, start, side="right"), np.searchsorted(starts, stop, side="left")
            found.append(list(dict.fromkeys(ids[first:last])))
        return found

    return find


def vocabulary_of(section: RegionConfig, directory: Path) -> Vocabulary:
    """Returns the vocabulary that the section names, or the one beside a shard set.

    Raises:
        DataError: it is not there or cannot be read.
    """
    return Vocabulary.load(section.vocabulary or directory / VOCABULARY_FILE)


def labels_of_section(section: RegionConfig, directory: Path) -> LabelBoxes:
    """Returns the labels that a section asks for.

    Args:
        section: of the objective.
        directory: a shard set, beside which the vocabulary lies if the section names none.

    Raises:
        DataError: vocabulary or tokenizer cannot be read.
    """
    if section.labels == "tokens":
        return token_labels(TextTokenizer(section.tokenizer or ""))
    return word_labels(vocabulary_of(section, directory))
