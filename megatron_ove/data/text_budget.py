"""Room for texts in a microbatch: what their cached lengths take of `data.text_tokens_per_microbatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ove.config.train import TrainConfig
from megatron_ove.data.planner import PlannedBudget, PlannedSource
from megatron_ove.shards.token_cache import SourceTexts, View

SETTING = "data.text_tokens_per_microbatch"

MeasureTexts = Callable[[SourceTexts, PlannedSource, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TextCounts:
    """What becomes of a source's texts in a run.

    Attributes:
        samples: of the source.
        empty: that have no text of the view, and teach nothing.
        cut: that have more tokens than are used of a sample.
        lost_tokens: of those that are cut.
    """

    samples: int
    empty: int
    cut: int
    lost_tokens: int


def open_texts(config: TrainConfig, sources: Sequence[str], fingerprint: str) -> dict[str, SourceTexts]:
    """Opens the token caches of sources.

    Raises:
        DataError: one is missing or does not fit its set.
    """
    return {name: SourceTexts.open(config.data.sources[name].paths, fingerprint) for name in sources}


def text_budget(
    config: TrainConfig,
    sources: Sequence[str],
    fingerprint: str,
    *,
    measure: MeasureTexts,
    largest: Callable[[str], int],
) -> PlannedBudget:
    """Returns the budget that an objective's texts share a microbatch by; caches are opened when it first measures.

    Args:
        config: the run.
        sources: that the objective reads.
        fingerprint: of the tokenizer.
        measure: (texts of a source, the source, rows, seeds) -> tokens of each sample, whatever the objective puts
            around its texts included, [n] int64.
        largest: name of a source -> the most tokens that a sample can have.
    """
    assert config.data.text_tokens_per_microbatch is not None, "TrainConfig asks for it"
    texts: dict[str, SourceTexts] = {}

    def measure_samples(source: PlannedSource, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        if source.name not in sources:
            return np.zeros(len(rows), dtype=np.int64)
        if source.name not in texts:
            # A held-out set comes under the name of the source that it is like.
            own = getattr(source, "texts", None)
            texts[source.name] = (
                own(fingerprint) if own else open_texts(config, [source.name], fingerprint)[source.name]
            )
        return measure(texts[source.name], source, rows, seeds)

    return PlannedBudget(
        SETTING,
        config.data.text_tokens_per_microbatch,
        measure_samples,
        lambda name: largest(name) if name in sources else 0,
    )


def count_texts(texts: SourceTexts, view: View, *, most: int) -> TextCounts:
    """Counts what is empty or cut, so that nothing is lost in silence."""
    lengths = texts.lengths(view)
    is_cut = lengths > most
    return TextCounts(
        samples=len(lengths),
        empty=int((lengths == 0).sum()),
        cut=int(is_cut.sum()),
        lost_tokens=int((lengths[is_cut].astype(np.int64) - most).sum()),
    )


def describe_counts(source: str, counts: TextCounts, *, most: int) -> list[str]:
    """Returns a sentence for everything of a source's texts that a run does not use."""
    doubts = []
    if counts.cut:
        doubts.append(
            f"{counts.cut:,} of {counts.samples:,} samples of data.sources.{source} have more than {most:,} tokens and "
            f"are cut: {counts.lost_tokens:,} tokens are not used; raise the limit, or do not mind it"
        )
    if counts.empty:
        doubts.append(
            f"{counts.empty:,} of {counts.samples:,} samples of data.sources.{source} have no text to learn from; "
            "leave them out of the set, or do not mind it"
        )
    return doubts
