"""From the words of many pages to a vocabulary: counted, cut, and numbered once, with how it came about.

Ids by falling frequency would give the first rank of a sharded class table all the frequent words, so the ids can be
permuted by a fixed seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.vocabulary import Vocabulary

MAX_WORDS = 365_187  # OneVision-Encoder's OCR head


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
