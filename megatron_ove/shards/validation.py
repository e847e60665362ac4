"""The deep check of a shard set: every header compared, every picture decoded, every label and text read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.shards import format as layout
from megatron_ove.shards.opening import header_problems, label_problems
from megatron_ove.shards.samples import SampleChecker, UnusableSampleError
from megatron_ove.shards.shard_set import ShardSet


def validate_shard_set(directory: str | Path, *, deep: bool) -> list[str]:
    """Checks a shard set, with its vocabulary if it has one.

    Args:
        directory: its folder.
        deep: also compare every tar header, decode every picture, read every text and compare every label.

    Returns:
        One sentence per problem; empty when all is well.
    """
    try:
        shards = ShardSet.open(directory)
    except DataError as error:
        return str(error).split("\n")
    return _vocabulary_problems(shards) + (_deep_problems(shards) if deep else [])


def _vocabulary_problems(shards: ShardSet) -> list[str]:
    """Returns what is wrong with the vocabulary beside the shards; nothing where there is none."""
    try:
        shards.read_vocabulary()
    except DataError as error:
        return [str(error)]
    return []


def _deep_problems(shards: ShardSet) -> list[str]:
    problems = label_problems(shards.index, every=True)
    for number, rows in shards.index.shard_rows().items():
        problems += header_problems(shards.index, shards.files.read, number, rows)
    if problems:
        return problems
    checker = SampleChecker(shards.info)
    for i in range(len(shards)):
        problems += _sample_problems(shards, i, checker)
    return problems


def _sample_problems(shards: ShardSet, i: int, checker: SampleChecker) -> list[str]:
    info, name = shards.info, shards.describe(i)
    try:
        members = {member: shards.read(i, member) for member in shards.index.stored_members(i)}
    except DataError as error:
        return [str(error)]
    labels = np.frombuffer(members.pop(layout.LABELS_MEMBER, b""), "<i4")
    try:
        measures = checker.measure(members)
    except UnusableSampleError as error:
        return [f"{error.member} of {name} is unusable: {error}; write the shard set again"]
    if not np.array_equal(labels, shards.labels[i]):
        return [f"the labels of {name} differ between shard and index; write the shard set again"]
    if info.has_pages:
        stored = [(int(height), int(width)) for height, width in shards.page_sizes(np.array([i]))[1]]
    else:
        stored = [(int(shards.height[i]), int(shards.width[i]))]
    for (height, width), (want_height, want_width) in zip(measures.sizes, stored, strict=True):
        if (height, width) != (want_height, want_width):
            return [f"{name} has {width} x {height} pixels, but the index says {want_width} x {want_height}"]
    if info.kind == "video" and measures.num_patches != shards.num_patches[i]:
        return [f"{name} has {measures.num_patches} selected patches, but the index says {shards.num_patches[i]}"]
    for column, value in measures.columns.items():
        if value != shards.columns[column][i]:
            return [f"{name} has {value} {column}, but the index says {shards.columns[column][i]}"]
    return []
