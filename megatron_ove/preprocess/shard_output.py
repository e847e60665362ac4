"""Where a tool writes its shard set: all of it, or the part of one task; a part that is done is not done again."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.tool_arguments import DEFAULT_REJECTS, Task, report
from megatron_ove.shards.format import INFO_FILE, PARTS_FOLDER, DatasetInfo
from megatron_ove.shards.merge import PART_FILE, part_name, read_part_settings
from megatron_ove.shards.writer import ShardWriter


def output_of(arguments: argparse.Namespace) -> Path:
    """Returns the folder of the set that a tool with `output` and `task` among its arguments writes."""
    task: Task | None = arguments.task
    return arguments.output if task is None else arguments.output / PARTS_FOLDER / part_name(task.number, task.count)


def rejects_of(arguments: argparse.Namespace) -> Path:
    """Returns the file of its rejects: of tasks each has one of its own, OUTPUT/rejects/00003-of-00016.jsonl."""
    task: Task | None = arguments.task
    if task is None:
        return arguments.rejects
    return arguments.output / "rejects" / f"{part_name(task.number, task.count)}.jsonl"


def names_digest(names: Iterable[object]) -> str:
    """Returns what changes if inputs are added, removed or named otherwise: all tasks of a set must see the same.

    Names should be those below the user's folder, with the sizes of the files: tasks may run on machines that have the
    folder at different places, and a copy of it has other modification times. So of a file that is replaced by another
    of the same size the change is not seen.
    """
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def is_done(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> bool:
    """Whether the part of a task is there already; says so.

    Raises:
        DataError: it is there, but was written with other settings; or no task may write here.
    """
    if arguments.task is None:
        return False
    _check_task(arguments)
    folder = output_of(arguments)
    if arguments.overwrite or not folder.is_dir():
        return False
    count = DatasetInfo.read(folder).num_samples
    found = read_part_settings(folder)
    if found != json.loads(json.dumps(settings)):
        odd = sorted(name for name in settings if (found or {}).get(name) != json.loads(json.dumps(settings[name])))
        raise DataError(
            f"{folder} was written with another {odd[0] if odd else 'tool'} (see its {PART_FILE}), so it is not part "
            "of what this command makes; give --overwrite to all tasks, or another output"
        )
    report(f"{folder} is there already: {count} samples; nothing to do")
    return True


def _check_task(arguments: argparse.Namespace) -> None:
    """Refuses options that a task would not heed, and an output that joining its parts would destroy."""
    if arguments.rejects != DEFAULT_REJECTS:
        raise DataError(
            f"--rejects {arguments.rejects} would not be used: each task writes rejects of its own, here "
            f"{rejects_of(arguments)}; give no --rejects with --task"
        )
    output: Path = arguments.output
    is_whole = (output / "shards").is_dir()
    if not is_whole and (output / INFO_FILE).is_file():  # the set of parts below it may be joined already
        is_whole = DatasetInfo.read(output).num_parts == 0 or not (output / PARTS_FOLDER).is_dir()
    if is_whole:
        raise DataError(f"{output} is a whole shard set itself, which joining parts would replace; name another folder")


@contextmanager
def shard_output(arguments: argparse.Namespace, settings: Mapping[str, Any], **options: Any) -> Iterator[ShardWriter]:
    """Opens the writer of a tool's set or part; it appears at the end of the block.

    Args:
        arguments: of the tool: output, task, overwrite, samples_per_shard, patch_size.
        settings: everything that decides which samples there are and what is in them; JSON.
        options: further arguments of `ShardWriter`.
    """
    with ShardWriter(
        output_of(arguments),
        overwrite=arguments.overwrite,
        samples_per_shard=arguments.samples_per_shard,
        patch_size=arguments.patch_size,
        may_be_empty=arguments.task is not None,
        **options,
    ) as writer:
        writer.add_file(PART_FILE, json.dumps(settings, indent=1).encode())
        yield writer
