"""Regions: boxes of words, lines or characters whose content an encoder learns to name where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel


class RegionConfig(StrictModel):
    """Which boxes of a document are looked at, and what is to be said of each."""

    unit: Literal["words", "lines", "characters"] = "words"
    """Boxes that a region is."""
    labels: Literal["vocabulary", "tokens"] = "vocabulary"
    """vocabulary: the words in the box that the vocabulary has; tokens: the tokens that a part of its text belongs to.
    Each is a class, and all of a region's are right."""
    vocabulary: str | None = None
    """vocabulary.json of the classes; null = the one beside the shard set."""
    tokenizer: str | None = None
    """Folder with tokenizer.json, or the file, of labels: tokens."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer's meaning; filled in, and compared when a run resumes."""
    per_sample: Annotated[int, Field(gt=0, le=4096)] = 10
    """Regions of a sample in a step, drawn from those with a label."""
    fill: Literal["repeat", "empty"] = "repeat"
    """Of a sample with fewer: repeat = they are taken again; empty = what is missing stays without a label. With
    `per_sample` as large as any sample has, empty takes every region once."""
    pooling: Literal["attention", "mean"] = "attention"
    """How the tokens in a box become one embedding: a learned query attends to them, or their mean."""

    def _check_labels(self) -> Iterator[str]:
        if self.labels == "tokens" and self.tokenizer is None:
            yield (
                "regions.labels: tokens does not say of which tokenizer; add regions.tokenizer, the folder of a "
                "tokenizer.json"
            )
        for field, reader in (("vocabulary", "vocabulary"), ("tokenizer", "tokens")):
            if getattr(self, field) is not None and self.labels != reader:
                yield (
                    f"regions.{field} = {getattr(self, field)} has no effect with regions.labels: {self.labels}; set "
                    f"labels: {reader} or remove it"
                )
