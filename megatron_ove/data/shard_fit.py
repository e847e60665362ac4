"""Do shard sets fit a configuration, and can anything be learned from them? Asked before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megatron_ove.config.data import VideoSourceConfig, list_choices
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.shard_format import read_vocabulary
from megatron_ove.data.shard_index import DatasetInfo, ShardSet
from megatron_ove.errors import ConfigError, DataError
from megatron_ove.vocabulary import VOCABULARY_FILE, describe_difference

_PROBED_ROWS = 64
"""Samples, evenly spaced, of which two must differ in their labels; only if none do are all samples compared."""
_CHUNK = 1 << 16
"""Samples whose labels are read in one go."""
_COUNTED_LABELS = 1 << 26
"""Labels that are looked at to count classes without a sample (256 MiB)."""
_MANY_DEAD = 0.01
"""Share of classes without a sample from which on they are spoken of."""


def open_shard_sets(config: TrainConfig) -> dict[str, ShardSet]:
    """Opens every source's shard set and checks it against the configuration.

    Returns:
        Source name -> shard set.

    Raises:
        DataError: shard sets that cannot be used; one sentence a line.
        ConfigError: shard sets that do not fit the configuration; every mistake, one sentence a line.
    """
    return _open_fitting(
        {name: source.path for name, source in config.data.sources.items()},
        place="data.sources",
        problems_of=lambda name, shards: [
            *find_mismatches(config, name, shards.info),
            *find_unlearnable(config, name, shards),
        ],
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
        config.evaluation.sets,
        place="evaluation.sets",
        problems_of=lambda name, shards: _held_out_mismatches(config, name, shards),
    )


def _open_fitting(
    paths: Mapping[str, str], *, place: str, problems_of: Callable[[str, ShardSet], list[str]]
) -> dict[str, ShardSet]:
    """Opens sets; raises everything that is wrong with any of them at once, one sentence a line.

    Args:
        paths: name -> folder.
        place: section of the configuration that names them.
        problems_of: says how a set does not fit.
    """
    opened: dict[str, ShardSet] = {}
    data_problems: list[str] = []
    config_problems: list[str] = []
    for name, path in paths.items():
        try:
            opened[name] = ShardSet.open(path)
        except DataError as error:
            data_problems += [f"{place}.{name}: {line}" for line in str(error).split("\n")]
        else:
            config_problems += problems_of(name, opened[name])
    if config_problems:
        raise ConfigError("\n".join(data_problems + config_problems))
    if data_problems:
        raise DataError("\n".join(data_problems))
    return opened


def _held_out_mismatches(config: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence for everything in which a held-out set differs from what its objective trains on."""
    source = config.data.sources[config.objectives[name].sources[0]]
    place, path, info = f"evaluation.sets.{name}", shards.directory, shards.info
    if info.kind != source.kind:
        return [
            f"{place}: {path} holds samples of kind {info.kind}, but objectives.{name} trains on {source.path} of kind "
            f"{source.kind}, and they become patches in another way; name a set of kind {source.kind}"
        ]
    problems = []
    if common_labels(shards.labels) == []:
        problems.append(f"{place}: no sample of {path} has a label, so there is nothing to find; name a labelled set")
    if info.kind == "video" and info.patch_size != config.encoder.patch_size:
        problems.append(
            f"{place}: the clips of {path} are stored as patches of {info.patch_size} pixels and are not resized, but "
            f"encoder.patch_size = {config.encoder.patch_size}; select the patches again with the encoder's patch size"
        )
    try:
        trained = DatasetInfo.read(Path(source.path))
    except DataError:
        return problems  # has its own sentence
    consequence = "so equal labels mean different things; write both sets with one vocabulary or clustering"
    if info.num_classes != trained.num_classes:
        problems.append(
            f"{place}: {path} has {info.num_classes} classes, but {source.path}, which objectives.{name} trains on, "
            f"has {trained.num_classes}, {consequence}"
        )
        return problems
    try:
        difference = _word_difference(Path(source.path), trained, shards)
    except DataError as error:
        return [*problems, f"{place}: {error}"]
    if difference:
        problems.append(
            f"{place}: {path} has other words than {source.path}, which objectives.{name} trains on ({difference}), "
            f"{consequence}"
        )
    return problems


def _word_difference(folder: Path, info: DatasetInfo, shards: ShardSet) -> str:
    """Says how the words of `shards` (here) and of the set in `folder` (there) differ; "" = not, or unknown."""
    there, here = folder / VOCABULARY_FILE, shards.directory / VOCABULARY_FILE
    if not (there.is_file() and here.is_file()) or there.read_bytes() == here.read_bytes():
        return ""
    trained, held_out = read_vocabulary(folder, info), shards.read_vocabulary()
    return describe_difference(trained.words, held_out.words) if trained and held_out else ""


def find_mismatches(config: TrainConfig, name: str, info: DatasetInfo) -> list[str]:
    """Returns a sentence for everything in which a shard set does not fit the configuration.

    Args:
        config: the run.
        name: the source.
        info: description of its shard set.
    """
    source = config.data.sources[name]
    place = f"data.sources.{name}"
    if info.kind != source.kind:
        return [
            f"{place}.kind = {source.kind}, but {source.path} holds samples of kind {info.kind}; change the kind or "
            "the path"
        ]
    problems = []
    if info.label_width < 1:
        problems.append(
            f"{source.path} stores no labels (label_width = {info.label_width}), so {place} could teach nothing; write "
            "the shard set with at least one label per sample"
        )
    for objective_name, objective in config.objectives.items():
        if name in objective.sources and (objective.num_classes or info.num_classes) < info.num_classes:
            problems.append(
                f"objectives.{objective_name}.num_classes = {objective.num_classes} is smaller than the "
                f"{info.num_classes} classes of {source.path}, so some labels would have no class center; set it to "
                f"{info.num_classes}"
            )
    if isinstance(source, VideoSourceConfig):
        problems += _video_mismatches(config, place, source, info)
    return problems


def _video_mismatches(config: TrainConfig, place: str, source: VideoSourceConfig, info: DatasetInfo) -> list[str]:
    problems = []
    if info.patch_size != config.encoder.patch_size:
        problems.append(
            f"encoder.patch_size = {config.encoder.patch_size}, but the clips of {source.path} are stored as patches "
            f"of {info.patch_size} pixels and are not resized; use patch_size: {info.patch_size} or write the shard "
            "set again"
        )
    if info.frames != config.encoder.rope_temporal_size:
        problems.append(
            f"encoder.rope_temporal_size = {config.encoder.rope_temporal_size}, but the clips of {source.path} lie on "
            f"a time grid of {info.frames} frames, so an exported model would place frames elsewhere than training "
            f"did; set it to {info.frames} or write the shard set again"
        )
    _, rows, columns = info.clip_grid
    budget, strategies = config.data.tokens_per_microbatch, source.strategies
    shows_frames = strategies.frame_sampling + strategies.collage > 0
    for count in dict.fromkeys(list_choices(source.num_frames)):
        if info.frames % count:
            problems.append(
                f"{place}.num_frames = {count} does not divide the {info.frames} stored frames of {source.path}, so "
                f"the bins that frames are drawn from would be unequal; use a divisor of {info.frames}"
            )
        tokens = count * rows * columns
        if tokens > budget and shows_frames:
            problems.append(
                f"{place}.num_frames = {count} frames of {rows} x {columns} patches make {tokens} patches, more than "
                f"data.tokens_per_microbatch = {budget}; raise the budget or use fewer frames"
            )
    return problems


def find_unlearnable(config: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence when the labels of a shard set are none or all there are, so that no loss could fall.

    Args:
        config: the run.
        name: the source.
        shards: its shard set.
    """
    users, common = _labels_alike(config, name, shards)
    if common is None:
        return []
    if not common:
        return [
            f"no sample of {shards.directory} has a label, so {users} could learn nothing; write the shard set with "
            "labels"
        ]
    if len(common) == shards.info.num_classes:
        return [
            f"each of the {len(shards)} samples of {shards.directory} has all {len(common)} classes among its labels, "
            f"so there is no negative and {users} could learn nothing (its loss would be 0 from the first step on); "
            "store fewer labels a sample or make more classes, e.g. with --num-labels and --clusters of "
            "tools/clustering/2_cluster_descriptors.py"
        ]
    return []


def _alike_warnings(config: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """As `find_unlearnable`, when all labels are the same ones; no mistake in a set of one sample for a trial."""
    users, common = _labels_alike(config, name, shards)
    if not common or len(common) == shards.info.num_classes:
        return []
    labels = ", ".join(map(str, common[:3])) + (", ..." if len(common) > 3 else "")
    path, count = shards.directory, len(shards)
    which = f"each of the {count} samples of {path} has the same labels" if count > 1 else f"{path} has only one sample"
    return [
        f"{which} ({labels}), so {users} has nothing to tell samples apart by; write the shard set with labels that "
        "differ, or do not mind it in a trial"
    ]


def _labels_alike(config: TrainConfig, name: str, shards: ShardSet) -> tuple[str, list[int] | None]:
    """Returns the objectives of a source, and `common_labels` of its set if it is what they use."""
    users = ", ".join(f"objectives.{key}" for key, one in config.objectives.items() if name in one.sources)
    if shards.info.kind != config.data.sources[name].kind or not users:
        return users, None  # has its own sentence
    return users, common_labels(shards.labels)


def common_labels(labels: np.ndarray) -> list[int] | None:
    """Returns the set of labels that all samples have alike, ascending; None as soon as two samples differ.

    Samples without a label do not count; [] = no sample has any. Of a usual set a few rows are read.

    Args:
        labels: [n, L] int32, -1 = none; may be memory-mapped.
    """
    probed = np.unique(np.linspace(0, len(labels) - 1, _PROBED_ROWS).astype(np.int64))
    common: np.ndarray | None = None
    for rows in (probed, *(slice(start, start + _CHUNK) for start in range(0, len(labels), _CHUNK))):
        sets = _label_sets(labels[rows])
        if len(sets):
            common = sets[0] if common is None else common
            if (sets != common).any():
                return None
    return [] if common is None else [int(label) for label in common if label >= 0]


def _label_sets(labels: np.ndarray) -> np.ndarray:
    """Returns the labels of samples that have any, [m, L], ascending, each once, with -1 in front."""
    ordered = np.sort(labels, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    ordered.sort(axis=1)
    return ordered[ordered[:, -1] >= 0]


def class_warnings(config: TrainConfig, shard_sets: dict[str, ShardSet], *, counts_samples: bool) -> list[str]:
    """Returns a sentence for every source whose samples have the same labels, or objective with classes without any.

    Args:
        config: the run.
        shard_sets: source -> its shard set.
        counts_samples: whether labels are looked at: up to 256 MiB of them are read.
    """
    warnings = [line for name, shards in shard_sets.items() for line in _alike_warnings(config, name, shards)]
    for key, shards in ((k, shard_sets[s]) for k, one in config.objectives.items() for s in one.sources):
        objective = config.objectives[key]
        known, path = shards.info.num_classes, shards.directory
        size = objective.num_classes or known
        if size > known:
            warnings.append(
                f"objectives.{key}.num_classes = {size}, but {path} has {known} classes, so {size - known} class "
                f"centers ({(size - known) / size:.0%}) would only ever be negatives; set it to {known}, or leave "
                "num_classes out to have it taken from the set"
            )
        if counts_samples:
            seen, looked_at = count_classes(shards.labels, known)
            if known - seen >= _MANY_DEAD * known:
                among = "no sample" if looked_at == len(shards) else f"none of the {looked_at:,} samples looked at"
                warnings.append(
                    f"{known - seen:,} of the {known:,} classes of {path} ({(known - seen) / known:.0%}) have {among}, "
                    f"so their centers in objectives.{key} would only ever be negatives; make fewer classes, or do not "
                    "mind it where the set is a part of a larger one"
                )
    return warnings


def count_classes(labels: np.ndarray, num_classes: int) -> tuple[int, int]:
    """Counts the classes that have a sample, in evenly spaced runs of rows where there are too many to read all.

    Args:
        labels: [n, L] int32 in -1 .. num_classes - 1; may be memory-mapped.
        num_classes: of the set.

    Returns:
        (classes seen, samples looked at).
    """
    most = max(1, _COUNTED_LABELS // labels.shape[1])
    num_runs = -(-min(most, len(labels)) // _CHUNK)
    starts = np.linspace(0, max(0, len(labels) - _CHUNK), num_runs).astype(np.int64)
    if len(labels) <= most:
        starts = np.arange(0, len(labels), _CHUNK)
    is_seen, looked_at = np.zeros(num_classes + 1, dtype=bool), 0
    for start in starts:
        part = labels[start : start + _CHUNK]
        is_seen[part] = True  # -1 is the place behind the last class
        looked_at += len(part)
    return int(is_seen[:num_classes].sum()), looked_at
