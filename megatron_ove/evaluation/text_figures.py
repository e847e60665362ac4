"""How near written texts come to the wanted ones, in two ways.

`strict` looks at texts as they are and adds up over all of them. `published` follows the evaluation of GOT-OCR2.0 and
Nougat, which average over texts: edits over the longer of both, precision, recall and F1 of the *sets* of words, BLEU
of a text by itself, METEOR. Its numbers can be set beside theirs, and are kinder: a word that is written ten times
counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from megatron_ove.objectives.text_generation.measures import WrittenText, measure_texts

WORDNET = Path("/usr/share/wordnet")
"""Where Debian's wordnet-base puts the files that METEOR finds synonyms in."""


def text_figures(texts: Sequence[WrittenText]) -> dict[str, dict[str, float]]:
    """Returns "strict" and "published" -> figure -> value; every text counts.

    METEOR with synonyms is called `meteor`; without WordNet, where words are compared as they are and by their stems,
    it is called `meteor_exact_stem`.
    """
    return {"strict": strict_figures(texts), "published": published_figures(texts)}


def strict_figures(texts: Sequence[WrittenText]) -> dict[str, float]:
    """Returns error rates over all texts together, F1 of words with their numbers, BLEU of the corpus in 0 .. 1, and
    shares of texts."""
    import sacrebleu

    figures = {name: total / count for name, (total, count) in measure_texts(texts).items() if count}
    wanted = [Counter(text.wanted.split()) for text in texts]
    written = [Counter(text.written.split()) for text in texts]
    both = sum((a & b).total() for a, b in zip(wanted, written, strict=True))
    all_words = sum(one.total() for one in (*wanted, *written))
    figures["word_f1"] = 2 * both / all_words if all_words else 0.0
    score = sacrebleu.corpus_bleu([text.written for text in texts], [[text.wanted for text in texts]])
    return {**figures, "bleu": score.score / 100}


def published_figures(texts: Sequence[WrittenText]) -> dict[str, float]:
    """Returns means over texts as published; a text without any word has a precision or recall of 0."""
    from nltk.translate.bleu_score import sentence_bleu
    from nltk.translate.meteor_score import single_meteor_score

    wordnet, meteor = _wordnet()
    rows: list[dict[str, float]] = []
    for text in texts:
        wanted, written = text.wanted.split(), text.written.split()
        there, said = set(wanted), set(written)
        precision = len(there & said) / len(said) if said else 0.0
        recall = len(there & said) / len(there) if there else 0.0
        longest = max(len(text.wanted), len(text.written), 1)
        rows.append(
            {
                "edit_distance": Levenshtein.distance(text.wanted, text.written) / longest,
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
                "bleu": _quietly(sentence_bleu, [wanted], written) if written else 0.0,
                meteor: single_meteor_score(wanted, written, wordnet=wordnet) if written and wanted else 0.0,
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _quietly(run: Any, *arguments: Any) -> float:
    import warnings

    with warnings.catch_warnings():  # of short texts, which have no four words in a row
        warnings.simplefilter("ignore")
        return float(run(*arguments))


class _NoSynonyms:
    """What nltk asks for synonyms where there is no WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def _wordnet() -> tuple[Any, str]:
    """Returns what knows synonyms, and what METEOR is called with it."""
    if not (WORDNET / "data.noun").is_file():
        return _NoSynonyms(), "meteor_exact_stem"
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    return WordNetCorpusReader(str(WORDNET), None), "meteor"
