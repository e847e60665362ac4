"""`num_classes` of objectives that leave it to the shard set of their source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.config.yaml_file import read_yaml_mapping
from megatron_ove.data.shard_format import DatasetInfo
from megatron_ove.errors import ConfigError, DataError


def fill_in_class_counts(config: TrainConfig, name: str) -> TrainConfig:
    """Returns the configuration with every `num_classes` known; reads one small file of each shard set that decides.

    Args:
        config: the run.
        name: what a report of mistakes calls it.

    Raises:
        DataError: a shard set that decides cannot be opened; one sentence a line.
        ConfigError: what the numbers make of the configuration is a mistake, e.g. more negatives than classes.
    """
    open_objectives = [key for key, objective in config.objectives.items() if objective.num_classes is None]
    if not open_objectives:
        return config
    counts: dict[str, int] = {}
    problems = []
    for key in open_objectives:
        for source in config.objectives[key].sources:
            try:
                info = DatasetInfo.read(Path(config.data.sources[source].path))
            except DataError as error:
                problems.append(
                    f"data.sources.{source}: {error}; objectives.{key}.num_classes is taken from this set, so write "
                    "the number where there is no set"
                )
            else:
                counts[key] = max(info.num_classes, counts.get(key, 0))
    if problems:
        raise DataError("\n".join(problems))
    return _with_counts(config, counts, name)


def fill_in_from_run(config: TrainConfig, name: str) -> TrainConfig | None:
    """As `fill_in_class_counts`, with the numbers that the run in `run_dir` has; None if there is no such run."""
    open_objectives = [key for key, objective in config.objectives.items() if objective.num_classes is None]
    try:
        objectives = read_yaml_mapping(Path(config.run_dir) / "config.resolved.yaml")["objectives"]
        return _with_counts(config, {key: objectives[key]["num_classes"] for key in open_objectives}, name)
    except (ConfigError, KeyError, TypeError):
        return None


def _with_counts(config: TrainConfig, counts: Mapping[str, int], name: str) -> TrainConfig:
    data = config.model_dump(mode="python")
    for key, count in counts.items():
        data["objectives"][key]["num_classes"] = count
    return config_from_dict(data, name)
