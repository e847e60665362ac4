"""`num_classes` of objectives that leave it to the shard set of their source."""

from __future__ import annotations

from pathlib import Path

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.shard_format import DatasetInfo
from megatron_ove.errors import DataError


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
    data = config.model_dump(mode="python")
    problems = []
    for key in open_objectives:
        source = config.objectives[key].source
        try:
            info = DatasetInfo.read(Path(config.data.sources[source].path))
        except DataError as error:
            problems.append(
                f"data.sources.{source}: {error}; objectives.{key}.num_classes is taken from this set, so write the "
                "number where there is no set"
            )
        else:
            data["objectives"][key]["num_classes"] = info.num_classes
    if problems:
        raise DataError("\n".join(problems))
    return config_from_dict(data, name)
