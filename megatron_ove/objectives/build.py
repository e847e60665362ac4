"""From sections of the configuration to objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes

from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.kinds import Kinds
from megatron_ove.model.initialization import initialize_parameters
from megatron_ove.objectives.base import ObjectiveContext
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.optim.parts import is_in_any
from megatron_ove.parallel.topology import ParallelTopology


def build_objectives(
    configs: Mapping[str, ObjectiveConfig],
    *,
    kinds: Kinds,
    topology: ParallelTopology,
    embedding_size: int,
    patch_size: int = 14,
    seed: int,
    optim: ClassCenterOptimConfig,
    dtype: torch.dtype = torch.float32,
    initializer_range: float = 0.02,
    frozen_parts: Sequence[str] = (),
) -> ObjectiveSet:
    """Builds the objectives of a run, with fresh tables; to be called on the last pipeline stage only.

    Args:
        configs: objective name -> its configuration.
        kinds: of the run.
        topology: this rank's place.
        embedding_size: width of the encoder's features.
        patch_size: side of a patch in pixels.
        seed: of initial centers and negatives.
        optim: of class centers.
        dtype: of the run's weights and activations, which `compute_dtype: auto` follows.
        initializer_range: standard deviation of the initial weights of modules.
        frozen_parts: parts of the model that stay as they are.
    """
    context = ObjectiveContext(topology, embedding_size, patch_size, seed, optim, dtype)
    objectives = [kinds.objectives[config.kind].build(name, config, context) for name, config in configs.items()]
    weights = {name: config.loss_weight for name, config in configs.items()}
    frozen = [name for name in configs if is_in_any(f"objectives.{name}.class_centers", frozen_parts)]
    built = ObjectiveSet(objectives, weights, topology, frozen=frozen)
    for parameter in built.modules.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    initialize_parameters(
        ((f"objectives.{name}", parameter) for name, parameter in built.modules.named_parameters()),
        seed=seed,
        initializer_range=initializer_range,
        layer_offset=0,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )
    return built
