"""What objectives leave to the shard sets of their sources, like `num_classes`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.config.yaml_file import read_yaml_mapping
from megatron_ove.errors import ConfigError, DataError
from megatron_ove.shards.format import DatasetInfo


def fill_in_class_counts(config: TrainConfig, name: str) -> TrainConfig:
    """Returns the configuration with all of it known; reads one small file of each shard set that decides.

    Args:
        config: the run.
        name: what a report of mistakes calls it.

    Raises:
        DataError: a shard set that decides cannot be opened; one sentence a line.
        ConfigError: what the numbers make of the configuration is a mistake, e.g. more negatives than classes.
    """
    found: dict[str, Mapping[str, Any]] = {}
    problems = []
    for key, objective in config.objectives.items():
        kind = config.kinds.objectives[objective.kind]
        infos = []
        for source in objective.sources if needs_shard_sets(objective) else ():
            try:
                infos += [DatasetInfo.read(Path(path)) for path in config.data.sources[source].paths]
            except DataError as error:
                problems.append(
                    f"data.sources.{source}: {error}; objectives.{key}.num_classes is taken from this set, so write "
                    "the number where there is no set"
                )
        if infos:
            found[key] = kind.fill_in(objective, infos)
    if problems:
        raise DataError("\n".join(problems))
    return _filled_in(config, found, name) if any(found.values()) else config


def fill_in_from_run(config: TrainConfig, name: str) -> TrainConfig | None:
    """As `fill_in_class_counts`, with the numbers that the run in `run_dir` has; None if there is no such run."""
    open_objectives = [key for key, objective in config.objectives.items() if needs_shard_sets(objective)]
    try:
        stored = read_yaml_mapping(Path(config.run_dir) / "config.resolved.yaml")["objectives"]
        found = {
            key: {field: stored[key][field] for field in config.objectives[key].from_shards} for key in open_objectives
        }
        return _filled_in(config, found, name)
    except (ConfigError, KeyError, TypeError):
        return None


def needs_shard_sets(objective: ObjectiveConfig) -> bool:
    """Whether fields of a section are left to the shard sets of its sources."""
    return any(getattr(objective, field) is None for field in objective.from_shards)


def _filled_in(config: TrainConfig, found: Mapping[str, Mapping[str, Any]], name: str) -> TrainConfig:
    data = config.model_dump(mode="python")
    for key, fields in found.items():
        data["objectives"][key] |= fields
    return config_from_dict(data, name)
