"""From the configuration's union of objectives to objects: one `case` per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import torch

from megatron_ove.config.objectives import ObjectiveConfig, PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.objectives.base import Objective
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.objectives.partial_fc import PartialFC
from megatron_ove.parallel.topology import ParallelTopology


def build_objectives(
    configs: Mapping[str, ObjectiveConfig],
    *,
    topology: ParallelTopology,
    embedding_size: int,
    seed: int,
    optim: ClassCenterOptimConfig,
    dtype: torch.dtype = torch.float32,
) -> ObjectiveSet:
    """Builds the objectives of a run, with fresh tables; to be called on the last pipeline stage only.

    Args:
        configs: objective name -> its configuration.
        topology: this rank's place.
        embedding_size: width of the pooled embedding.
        seed: of initial centers and negatives.
        optim: of class centers.
        dtype: of the run's weights and activations, which `compute_dtype: auto` follows.
    """
    objectives: list[Objective] = []
    for name, config in configs.items():
        match config:
            case PartialFCConfig():
                objective = PartialFC(
                    name,
                    config,
                    topology=topology,
                    embedding_size=embedding_size,
                    seed=seed,
                    optim=optim,
                    dtype=dtype,
                )
            case _:
                assert_never(config)
        objectives.append(objective)
    return ObjectiveSet(objectives, {name: config.loss_weight for name, config in configs.items()}, topology)
