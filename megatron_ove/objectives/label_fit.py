"""Do the labels of shard sets fit a Partial-FC head, and can anything be learned from them? Asked before decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import DataError
from megatron_ove.objectives.regions.region_fit import (
    region_class_count,
    region_doubts,
    region_held_out_mismatches,
    region_mismatches,
)
from megatron_ove.shards.format import DatasetInfo, read_vocabulary
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.vocabulary import VOCABULARY_FILE, describe_difference

_PROBED_ROWS = 64
"""Samples, evenly spaced, of which two must differ in their labels; only if none do are all samples compared."""
_CHUNK = 1 << 16
"""Samples whose labels are read in one go."""
_COUNTED_LABELS = 1 << 26
"""Labels that are looked at to count classes without a sample (256 MiB)."""
_MANY_DEAD = 0.01
"""Share of classes without a sample from which on they are spoken of."""


def find_mismatches(run: TrainConfig, name: str, sets: Mapping[str, ShardSet]) -> list[str]:
    """Returns a sentence for everything in the labels of its sources that the head could not learn.

    Args:
        run: the run.
        name: of the objective.
        sets: source -> its shard set, of the sources that could be opened.
    """
    problems: list[str] = []
    if _section(run, name).level == "region":
        return region_mismatches(run, name, sets)
    for source, shards in sets.items():
        problems += _label_mismatches(run, name, source, shards)
    pairs = list(sets.items())
    for other in pairs[1:]:
        problems += _class_mismatches(name, pairs[0], other)
    return problems


def _label_mismatches(run: TrainConfig, name: str, source: str, shards: ShardSet) -> list[str]:
    info, path, num_classes = shards.info, shards.directory, _section(run, name).num_classes
    if info.label_width < 1:
        return [
            f"{path} stores no labels (label_width = {info.label_width}), so data.sources.{source} could teach "
            f"objectives.{name} nothing; write the shard set with at least one label per sample"
        ]
    problems = []
    if (num_classes or info.num_classes) < info.num_classes:
        problems.append(
            f"objectives.{name}.num_classes = {num_classes} is smaller than the {info.num_classes} classes of {path}, "
            f"so some labels would have no class center; set it to {info.num_classes}"
        )
    common = common_labels(shards.labels)
    if common == []:
        problems.append(
            f"no sample of {path} has a label, so objectives.{name} could learn nothing; write the shard set with "
            "labels"
        )
    elif common is not None and len(common) == info.num_classes:
        problems.append(
            f"each of the {len(shards)} samples of {path} has all {len(common)} classes among its labels, so there is "
            f"no negative and objectives.{name} could learn nothing (its loss would be 0 from the first step on); "
            "store fewer labels a sample or make more classes, e.g. with --num-labels and --clusters of "
            "tools/clustering/2_cluster_descriptors.py"
        )
    return problems


def _class_mismatches(name: str, one: tuple[str, ShardSet], other: tuple[str, ShardSet]) -> list[str]:
    """Says in what the classes of two sources of one head differ."""
    (first, trained), (second, shards) = one, other
    consequence = (
        "so equal labels would mean different things; write both sets with one vocabulary or clustering, or give each "
        "an objective of its own"
    )
    counts = trained.info.num_classes, shards.info.num_classes
    if counts[0] != counts[1]:
        return [
            f"objectives.{name} reads data.sources.{first} with {counts[0]} classes and data.sources.{second} with "
            f"{counts[1]}, {consequence}"
        ]
    difference = _word_difference(trained.directory, trained.info, shards)
    if difference:
        return [
            f"objectives.{name} reads data.sources.{first} and data.sources.{second}, whose words differ "
            f"({difference}), {consequence}"
        ]
    return []


def find_doubts(run: TrainConfig, name: str, sets: Mapping[str, ShardSet], *, counts_samples: bool) -> list[str]:
    """Returns a sentence for every source whose samples have the same labels, and for classes without any sample.

    Args:
        run: the run.
        name: of the objective.
        sets: source -> its shard set.
        counts_samples: whether labels are looked at: up to 256 MiB of them are read.
    """
    doubts = []
    if _section(run, name).level == "region":
        return region_doubts(_section(run, name), sets)
    for shards in sets.values():
        known, path = shards.info.num_classes, shards.directory
        size = _section(run, name).num_classes or known
        common = common_labels(shards.labels)
        if common and len(common) < known:
            doubts.append(_alike_sentence(name, common, shards))
        if size > known:
            doubts.append(
                f"objectives.{name}.num_classes = {size}, but {path} has {known} classes, so {size - known} class "
                f"centers ({(size - known) / size:.0%}) would only ever be negatives; set it to {known}, or leave "
                "num_classes out to have it taken from the set"
            )
        if counts_samples:
            seen, looked_at = count_classes(shards.labels, known)
            if known - seen >= _MANY_DEAD * known:
                among = "no sample" if looked_at == len(shards) else f"none of the {looked_at:,} samples looked at"
                doubts.append(
                    f"{known - seen:,} of the {known:,} classes of {path} ({(known - seen) / known:.0%}) have {among}, "
                    f"so their centers in objectives.{name} would only ever be negatives; make fewer classes, or do "
                    "not mind it where the set is a part of a larger one"
                )
    return doubts


def _alike_sentence(name: str, common: list[int], shards: ShardSet) -> str:
    """Says that all labels are the same ones; no mistake in a set of one sample for a trial."""
    labels = ", ".join(map(str, common[:3])) + (", ..." if len(common) > 3 else "")
    path, count = shards.directory, len(shards)
    which = f"each of the {count} samples of {path} has the same labels" if count > 1 else f"{path} has only one sample"
    return (
        f"{which} ({labels}), so objectives.{name} has nothing to tell samples apart by; write the shard set with "
        "labels that differ, or do not mind it in a trial"
    )


def find_held_out_mismatches(run: TrainConfig, name: str, shards: ShardSet) -> list[str]:
    """Returns a sentence for everything in which the classes of a held-out set differ from those trained on.

    Args:
        run: the run.
        name: of the objective.
        shards: of `evaluation.sets`.
    """
    if _section(run, name).level == "region":
        return region_held_out_mismatches(run, name, shards)
    source = run.data.sources[run.objectives[name].sources[0]]
    place, path, info = f"evaluation.sets.{name}", shards.directory, shards.info
    problems = []
    if common_labels(shards.labels) == []:
        problems.append(f"{place}: no sample of {path} has a label, so there is nothing to find; name a labelled set")
    try:
        trained = DatasetInfo.read(Path(source.paths[0]))
    except DataError:
        return problems  # has its own sentence
    consequence = "so equal labels mean different things; write both sets with one vocabulary or clustering"
    if info.num_classes != trained.num_classes:
        problems.append(
            f"{place}: {path} has {info.num_classes} classes, but {source.where}, which objectives.{name} trains on, "
            f"has {trained.num_classes}, {consequence}"
        )
        return problems
    try:
        difference = _word_difference(Path(source.paths[0]), trained, shards)
    except DataError as error:
        return [*problems, f"{place}: {error}"]
    if difference:
        problems.append(
            f"{place}: {path} has other words than {source.where}, which objectives.{name} trains on ({difference}), "
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


def class_count_of(section: PartialFCConfig, infos: Sequence[DatasetInfo]) -> Mapping[str, Any]:
    """Returns the number of classes that the shard sets of a head's sources have, where it is not given."""
    if section.level == "region":
        return region_class_count(section, infos)
    most = max(info.num_classes for info in infos)
    return {"num_classes": most} if section.num_classes is None and most else {}  # sets without labels are refused


def stored_differences(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yields a clause for everything that stored class centers cannot be used with.

    Args:
        name: of the objective.
        there: its stored section, plain values.
        here: its present section.
    """
    if there.get("num_classes") != here.get("num_classes"):
        yield f"objectives.{name}.num_classes is {there.get('num_classes')} there and {here.get('num_classes')} here"
        return
    level, now = (section.get("level", "sample") for section in (there, here))
    if level != now:
        yield f"objectives.{name}.level is {level} there and {now} here"
    elif now == "region":
        for field in ("labels", "pooling", "tokenizer_fingerprint"):
            before, now = (section["regions"].get(field) for section in (there, here))
            if before != now:
                yield f"objectives.{name}.regions.{field} is {before} there and {now} here"
    before, now = (section.get("centering", "none") for section in (there, here))
    if before != now and "embeddings" in (before, now):  # such class centers lie around another point
        yield f"objectives.{name}.centering is {before} there and {now} here"


def describe(section: Mapping[str, Any]) -> str:
    """Says of a stored section what it learns."""
    regions = f" of {section['regions']['unit']}" if section.get("level") == "region" else ""
    return f"{section['num_classes']:,} classes{regions}, {section['margin_type']} {section['margin']:g}"


def _section(run: TrainConfig, name: str) -> PartialFCConfig:
    section = run.objectives[name]
    assert isinstance(section, PartialFCConfig)
    return section


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
