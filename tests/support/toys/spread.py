"""An objective without weights: embeddings are to point where their samples' seeds say."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from megatron_ove.batch import Batch
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.data.planner import PlannedBudget, PlannedSource
from megatron_ove.kinds import ObjectiveKind
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.planning.footprint import ObjectiveFootprint


class SpreadConfig(ObjectiveConfig):
    """A direction for each sample."""

    kind: Literal["spread"]
    reads_pooled: ClassVar[bool] = True
    samples_per_microbatch: int = 3


class Spread(Objective):
    """One minus the cosine with a random direction."""

    def __init__(self, name: str, config: SpreadConfig, context: ObjectiveContext) -> None:
        self.name, self.sources, self._size = name, config.sources, context.embedding_size

    def collate(self, samples, pack, reader):
        seeds = samples.seed[samples.of(*self.sources)].tolist()
        rows = [torch.randn(self._size, generator=torch.Generator().manual_seed(seed % 2**63)) for seed in seeds]
        return torch.stack(rows) if rows else torch.empty(0, self._size)

    def num_items(self, batch: Batch) -> int:
        return len(batch.inputs[self.name])

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        pooled = features.sample_embeddings(batch.num_samples)[batch.samples.of(*self.sources)].float()
        wanted = batch.inputs[self.name].to(pooled.device)
        loss = (1 - (normalize(pooled, dim=1) * normalize(wanted, dim=1)).sum(dim=1)).sum()
        return LossTerms(loss, {"loss": (loss.detach(), torch.tensor(float(len(wanted))))})


def budgets(run, name):
    """Few samples a microbatch, whatever their patches."""
    section = run.objectives[name]
    assert isinstance(section, SpreadConfig)

    def measure(source: PlannedSource, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return np.full(len(rows), int(source.name in section.sources))

    setting = f"objectives.{name}.samples_per_microbatch"
    return [
        PlannedBudget(setting, section.samples_per_microbatch, measure, lambda source: int(source in section.sources))
    ]


OBJECTIVES = {"spread": ObjectiveKind(config=SpreadConfig, build=Spread, footprint=ObjectiveFootprint, budgets=budgets)}
