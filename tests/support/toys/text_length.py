"""An objective that reads texts: how many tokens has the text on the pages?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ove.batch import Batch
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.data.text_budget import count_texts, describe_counts, open_texts, text_budget
from megatron_ove.errors import DataError
from megatron_ove.kinds import ObjectiveKind
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.planning.footprint import ObjectiveFootprint
from megatron_ove.planning.parameters import Parameter
from megatron_ove.shards.token_cache import TextTokenizer


class TextLengthConfig(ObjectiveConfig):
    """Which texts, by which tokenizer."""

    kind: Literal["text_length"]
    reads_pooled: ClassVar[bool] = True
    reads_texts: ClassVar[bool] = True
    tokenizer: str
    max_text_tokens: int = 8


class TextLength(Objective):
    """Squared error of a linear map of embeddings."""

    def __init__(self, name: str, config: TextLengthConfig, context: ObjectiveContext) -> None:
        self.name, self.sources, self._most = name, config.sources, config.max_text_tokens
        self._fingerprint = tokenizer_at(config.tokenizer).fingerprint
        self.layer = nn.Linear(context.embedding_size, 1, device=context.topology.device, dtype=context.dtype)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"layer": self.layer}

    def collate(self, samples, pack, reader) -> Tensor:
        (source,) = self.sources
        rows = samples.row[samples.of(source)]
        texts = reader.texts(source, self._fingerprint)
        lengths = [min(len(texts.tokens(row)[0][2]), self._most) for row in rows.tolist()]
        documents = reader.documents(source, rows)
        assert [bool(length) for length in lengths] == [bool(document.text) for document in documents]
        return torch.tensor(lengths, dtype=torch.float32)

    def num_items(self, batch: Batch) -> int:
        return len(batch.inputs[self.name])

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        pooled = features.sample_embeddings(batch.num_samples)[batch.samples.of(*self.sources)]
        wanted = batch.inputs[self.name].to(pooled.device)
        loss = (self.layer(pooled).float().squeeze(1) - wanted).square().sum()
        return LossTerms(loss, {"loss": (loss.detach(), torch.tensor(float(len(wanted))))})


@cache
def tokenizer_at(path: str) -> TextTokenizer:
    return TextTokenizer(path)


def budgets(run: Any, name: str) -> list[Any]:
    """The text's tokens and one more."""
    section = run.objectives[name]
    fingerprint = tokenizer_at(section.tokenizer).fingerprint
    most = section.max_text_tokens

    def measure(texts, source, rows, seeds):
        return np.minimum(texts.lengths("text")[rows].astype(np.int64), most) + 1

    return [text_budget(run, section.sources, fingerprint, measure=measure, largest=lambda source: most + 1)]


def find_mismatches(run: Any, name: str, sets: Mapping[str, Any]) -> list[str]:
    try:
        open_texts(run, list(sets), tokenizer_at(run.objectives[name].tokenizer).fingerprint)
    except DataError as error:
        return str(error).split("\n")
    return []


def find_doubts(run: Any, name: str, sets: Mapping[str, Any], *, counts_samples: bool) -> list[str]:
    del counts_samples
    section = run.objectives[name]
    doubts = []
    for source, texts in open_texts(run, list(sets), tokenizer_at(section.tokenizer).fingerprint).items():
        counts = count_texts(texts, "text", most=section.max_text_tokens)
        doubts += describe_counts(source, counts, most=section.max_text_tokens)
    return doubts


class _Footprint(ObjectiveFootprint):
    def parameters(self, config, name, layout):
        return [Parameter("layer.weight", (1, config.encoder.hidden_size)), Parameter("layer.bias", (1,))]


OBJECTIVES = {
    "text_length": ObjectiveKind(
        config=TextLengthConfig,
        build=TextLength,
        footprint=_Footprint,
        budgets=budgets,
        find_mismatches=find_mismatches,
        find_doubts=find_doubts,
    )
}
