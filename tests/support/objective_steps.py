"""How tests begin a step: as the trainer does it, with sample counts that they ask the other replicas for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_ove.batch import Batch
from megatron_ove.objectives.objective_set import ObjectiveSet, StepPreparation


def count_samples(objectives: ObjectiveSet, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Returns source -> [replicas, microbatches], which a run knows from its plan; collective over replicas."""
    group = objectives._topology.data_host_group
    own = {
        source: [len(batch.samples.of(source)) for batch in batches]
        for name in objectives
        for source in objectives.sources_of(name)
    }
    replicas = [own] * group.size()
    if group.size() > 1:
        dist.all_gather_object(replicas, own, group=group)
    return {source: np.array([replica[source] for replica in replicas], dtype=np.int64) for source in own}


def prepare(objectives: ObjectiveSet, step: int, batches: Sequence[Batch]) -> StepPreparation:
    """Prepares a step."""
    return objectives.prepare_step(step, batches, count_samples(objectives, batches))


def begin(objectives: ObjectiveSet, step: int, batches: Sequence[Batch]) -> StepPreparation:
    """Prepares and begins a step."""
    prepared = prepare(objectives, step, batches)
    objectives.begin_step(prepared)
    return prepared
