"""Do the parts that a configuration names exist, and have the ranks something left to train?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import Tensor

from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.optim.parts import missing_part_sentence, parts_without_weights
from megatron_ove.parallel.topology import ParallelTopology


def check_parts(
    config: TrainConfig, topology: ParallelTopology, names: Mapping[Tensor, str], objectives: ObjectiveSet | None
) -> None:
    """Compares `freeze` and `optim.parts` with the weights of all ranks; collective over them.

    Args:
        config: the run.
        topology: this rank's place.
        names: parameter -> its name in the whole model, of this rank.
        objectives: on the last pipeline stage; None elsewhere.

    Raises:
        ConfigError: on every rank.
    """
    if not config.freeze and not config.optim.parts:
        return
    mine, tables = list(names.values()), objectives.table_names() if objectives else []
    trains = any(parameter.requires_grad for parameter in names)
    gathered: list[tuple[list[str], list[str], bool]] = [([], [], False)] * topology.world_size
    # One replica's ranks have every weight; the others repeat them.
    dist.all_gather_object(gathered, (mine, tables, trains) if topology.data_rank == 0 else ([], [], trains))
    dense = list(dict.fromkeys(name for part, _, _ in gathered for name in part))
    all_tables = list(dict.fromkeys(name for _, part, _ in gathered for name in part))
    # Tables have an optimizer of their own, with its own rate and decay.
    settings: tuple[tuple[str, Iterable[str], list[str], list[str]], ...] = (
        ("freeze", config.freeze, dense + all_tables, []),
        ("optim.parts", config.optim.parts, dense, all_tables),
    )
    problems = [
        missing_part_sentence(setting, missing, known, others)
        for setting, parts, known, others in settings
        if (missing := parts_without_weights(parts, known))
    ]
    training = [trains for _, _, trains in gathered]
    if any(training) and not all(training):
        problems.append(
            "freeze leaves a stage of the pipeline without any dense weight to train, so the optimizer's state could "
            "not be put back; use fewer pipeline stages, or freeze less"
        )
    if config.parallel.use_distributed_optimizer and not any(training):
        problems.append(
            "freeze leaves no dense weight to train, so parallel.use_distributed_optimizer has nothing to share; set "
            "it to false"
        )
    if problems:
        raise ConfigError("\n".join(problems), on_every_rank=True)
