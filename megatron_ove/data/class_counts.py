"""What objectives leave to the shard sets of their sources, like `num_classes`, or to folders that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.config.yaml_file import read_yaml_mapping
from megatron_ove.errors import CheckpointError, ConfigError, DataError
from megatron_ove.shards.format import DatasetInfo


def fill_in_class_counts(config: TrainConfig, name: str) -> TrainConfig:
    """Returns the configuration with all of it known; reads one small file of each shard set that decides.

    Args:
        config: the run.
        name: what a report of mistakes calls it.

    Raises:
        DataError: a shard set or folder that decides cannot be opened; one sentence a line.
        ConfigError: what the numbers make of the configuration is a mistake, e.g. more negatives than classes.
    """
    found: dict[str, Mapping[str, Any]] = {}
    problems = []
    for key, objective in config.objectives.items():
        kind, unknown = config.kinds.objectives[objective.kind], objective.unknown_fields
        needs_sets = any(field in objective.from_shards for field in unknown)
        infos = []
        for source in objective.sources if needs_sets else ():
            try:
                infos += [DatasetInfo.read(Path(path)) for path in config.data.sources[source].paths]
            except DataError as error:
                problems.append(
                    f"data.sources.{source}: {error}; objectives.{key}.num_classes is taken from this set, so write "
                    "the number where there is no set"
                )
        if infos or (unknown and not needs_sets):
            try:
                found[key] = kind.fill_in(objective, infos)
            except (CheckpointError, DataError) as error:
                problems.append(f"objectives.{key}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return _filled_in(config, found, name) if any(found.values()) else config


def fill_in_from_run(config: TrainConfig, name: str) -> TrainConfig | None:
    """As `fill_in_class_counts`, with the numbers that the run in `run_dir` has; None if there is no such run."""
    unknown = {key: objective.unknown_fields for key, objective in config.objectives.items()}
    try:
        stored = read_yaml_mapping(Path(config.run_dir) / "config.resolved.yaml")["objectives"]
        found = {key: {field: stored[key][field] for field in fields} for key, fields in unknown.items() if fields}
        return _filled_in(config, found, name)
    except (ConfigError, KeyError, TypeError):
        return None


def _filled_in(config: TrainConfig, found: Mapping[str, Mapping[str, Any]], name: str) -> TrainConfig:
    data = config.model_dump(mode="python")
    for key, fields in found.items():
        data["objectives"][key] |= fields
    return config_from_dict(data, name)
