"""Do shard sets fit a configuration? Kinds of sources and objectives say what fits, before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError, DataError
from megatron_ove.kinds import SourceKind
from megatron_ove.shards.shard_set import ShardSet


def open_shard_sets(config: TrainConfig, *, looks_at_shards: bool = True) -> dict[str, ShardSet]:
    """Opens every source's shard set and checks it against the configuration.

    Args:
        config: the run.
        looks_at_shards: whether the shard files are looked at, which one of many ranks does.

    Returns:
        Source name -> shard set.

    Raises:
        DataError: shard sets that cannot be used; one sentence a line.
        ConfigError: shard sets that do not fit the configuration; every mistake, one sentence a line.
    """
    fitting: dict[str, ShardSet] = {}

    def problems_of(name: str, shards: ShardSet) -> list[str]:
        problems = _source_mismatches(config, name, shards)
        if not problems or shards.info.kind == _source_kind(config, name).shard_kind:
            fitting[name] = shards
        return problems

    def problems_of_objectives() -> list[str]:
        return [
            sentence
            for name, objective in config.objectives.items()
            for sentence in config.kinds.objectives[objective.kind].find_mismatches(
                config, name, _sets_of(config, name, fitting)
            )
        ]

    paths = {name: source.paths for name, source in config.data.sources.items()}
    return _open_fitting(
        paths,
        place="data.sources",
        problems_of=problems_of,
        further=problems_of_objectives,
        looks_at_shards=looks_at_shards,
    )


def open_held_out_sets(config: TrainConfig) -> dict[str, ShardSet]:
    """Opens the shard sets of `evaluation.sets` and compares each with the one that its objective trains on.

    Returns:
        Objective name -> shard set.

    Raises:
        DataError: shard sets that cannot be used; one sentence a line.
        ConfigError: shard sets that do not fit; every mistake, one sentence a line.
    """
    return _open_fitting(
        {name: (path,) for name, path in config.evaluation.sets.items()},
        place="evaluation.sets",
        problems_of=lambda name, shards: _held_out_mismatches(config, name, shards),
    )


def find_doubts(config: TrainConfig, shard_sets: Mapping[str, ShardSet], *, counts_samples: bool) -> list[str]:
    """Returns a sentence for everything in a run's shard sets that may be meant otherwise.

    Args:
        config: the run.
        shard_sets: source -> its shard set.
        counts_samples: whether to look at all samples, which may take a while.
    """
    return [
        sentence
        for name, objective in config.objectives.items()
        for sentence in config.kinds.objectives[objective.kind].find_doubts(
            config, name, _sets_of(config, name, shard_sets), counts_samples=counts_samples
        )
    ]


def _open_fitting(
    paths: Mapping[str, Sequence[str]],
    *,
    place: str,
    problems_of: Callable[[str, ShardSet], list[str]],
    further: Callable[[], list[str]] = list,
    looks_at_shards: bool = True,
) -> dict[str, ShardSet]:
    """Opens sets; raises everything that is wrong with any of them at once, one sentence a line.

    Args:
        paths: name -> folders.
        place: section of the configuration that names them.
        problems_of: says how a set does not fit.
        further: says how sets together do not fit, after all were opened.
        looks_at_shards: see `ShardSet.open`.
    """
    opened: dict[str, ShardSet] = {}
    data_problems: list[str] = []
    config_problems: list[str] = []
    for name, path in paths.items():
        try:
            opened[name] = ShardSet.open_all(path, looks_at_shards=looks_at_shards)
        except DataError as error:
            data_problems += [f"{place}.{name}: {line}" for line in str(error).split("\n")]
        else:
            config_problems += problems_of(name, opened[name])
    config_problems += further()
    if config_problems:
        raise ConfigError("\n".join(data_problems + config_problems))
    if data_problems:
        raise DataError("\n".join(data_problems))
    return opened


def _source_kind(config: TrainConfig, name: str) -> SourceKind:
    return config.kinds.sources[config.data.sources[name].kind]


def _sets_of(config: TrainConfig, name: str, shard_sets: Mapping[str, ShardSet]) -> dict[str, ShardSet]:
    """Returns source -> shard set, of an objective's sources that are there."""
    return {source: shard_sets[source] for source in config.objectives[name].sources if source in shard_sets}


def _source_mismatches(config: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    source, kind = config.data.sources[name], _source_kind(config, name)
    if shards.info.kind != kind.shard_kind:
        return [
            f"data.sources.{name}.kind = {source.kind}, but {source.where} holds samples of kind {shards.info.kind}; "
            "change the kind or the path"
        ]
    return kind.find_mismatches(config, name, shards.info)


def _held_out_mismatches(config: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence for everything in which a held-out set differs from what its objective trains on."""
    first = config.objectives[name].sources[0]
    source, kind = config.data.sources[first], _source_kind(config, first)
    place, path, info = f"evaluation.sets.{name}", shards.directory, shards.info
    compare = config.kinds.objectives[config.objectives[name].kind].find_held_out_mismatches
    if compare is None:
        return [
            f"{place}: objectives of kind {config.objectives[name].kind} have no figures on held-out samples; remove it"
        ]
    if info.kind != kind.shard_kind:
        return [
            f"{place}: {path} holds samples of kind {info.kind}, but objectives.{name} trains on {source.where} of "
            f"kind {kind.shard_kind}, and they become patches in another way; name a set of kind {kind.shard_kind}"
        ]
    problems = compare(config, name, shards)
    if info.frames and info.patch_size != config.encoder.patch_size:
        problems.append(
            f"{place}: the clips of {path} are stored as patches of {info.patch_size} pixels and are not resized, but "
            f"encoder.patch_size = {config.encoder.patch_size}; select the patches again with the encoder's patch size"
        )
    return problems
