"""The last step of every tool that makes documents: inputs, one after the other -> a shard set or a task's part."""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from megatron_ove.preprocess.documents.preparing import DocumentInput, DocumentPreparer, PreparedDocument
from megatron_ove.preprocess.file_runs import run_over_stream
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.shard_output import is_done, output_of, rejects_of, shard_output
from megatron_ove.preprocess.tool_arguments import (
    Task,
    add_picture_options,
    add_run_options,
    add_shard_options,
    add_task_option,
    report,
)
from megatron_ove.rejects import RejectsFile

LONGEST_SIDE = 1344
_STAGE = "documents"
_MOST_NAMED = 12
_MOST_NAMES, _LONGEST_NAME = 1000, 80
_OTHER_NAMES = ""
"""Under which names beyond the first `_MOST_NAMES` are counted together."""


def add_document_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every tool that makes documents of pictures takes."""
    add_picture_options(parser, longest_side=LONGEST_SIDE)
    add_shard_options(parser)
    add_task_option(parser)
    add_run_options(parser)


def picture_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `add_document_options` that decide what is in the samples."""
    return {name: getattr(arguments, name) for name in ("longest_side", "quality", "patch_size")}


def range_of(arguments: argparse.Namespace, length: int) -> range:
    """Returns the places of `length` inputs that this process makes: all, or its task's."""
    task: Task | None = arguments.task
    return range(length) if task is None else task.range_of(length)


def preparer_of(arguments: argparse.Namespace) -> Callable[[], DocumentPreparer]:
    """Returns what makes the preparer of pictures in each worker."""
    return functools.partial(DocumentPreparer, longest_side=arguments.longest_side, quality=arguments.quality)


def write_documents(
    arguments: argparse.Namespace,
    make_inputs: Callable[[RejectsFile], Iterable[Any]],
    *,
    settings: Mapping[str, Any],
    judged: Collection[object],
    title: str,
    make_task: Callable[[], Callable[[Any], PreparedDocument]] | None = None,
    files: Mapping[str, bytes] | None = None,
    num_classes: int = 0,
    label_width: int = 0,
) -> None:
    """Writes the set or the part that the arguments ask for, and says what became of the inputs.

    Args:
        arguments: those of `add_document_options`, and `output`.
        make_inputs: gives `DocumentInput`s in the order of the set, a list or a stream of which few are held; what it
            cannot make one of it records itself.
        settings: see `shard_output`.
        judged: files whose earlier rejects are judged again.
        title: beside the progress.
        make_task: makes what turns an input into a `PreparedDocument`; None = a `DocumentPreparer`.
        files: companion files of the set, name -> content.
        num_classes: of the labels; 0 = there are none.
        label_width: labels of a document.

    Raises:
        DataError: the output exists, none of the inputs could be used, or a worker died.
    """
    if is_done(arguments, settings):
        return
    with open_rejects(rejects_of(arguments), stage=_STAGE, files=judged) as rejects:
        ignored: Counter[str] = Counter()
        options = {"kind": "document", "num_classes": num_classes, "label_width": label_width, "rejects": rejects}
        with shard_output(arguments, settings, **options) as writer:
            for name, content in (files or {}).items():
                writer.add_file(name, content)
            inputs = make_inputs(rejects)
            stream = run_over_stream(
                make_task or preparer_of(arguments),
                inputs,
                title=title,
                workers=arguments.workers,
                rejects=rejects,
                total=len(inputs) if isinstance(inputs, Sized) else None,
            )
            sources: dict[str, str] = {}
            for item, made in stream:
                source = str(item)
                if item.key in sources:
                    reason = f"{source} and {sources[item.key]} both get the key {item.key}, so only the latter is used"
                    rejects.add(source, f"{reason}; rename one")
                elif writer.add(item.key, made.members, getattr(item, "labels", None), source=source):
                    sources[item.key] = source
                    count_ignored(ignored, made.ignored)
            count = len(writer)
        report_ignored("entries that were not read", ignored)
        where: Path = output_of(arguments)
        report(f"{count} documents, {rejects.count} rejected -> {where}")


def count_ignored(ignored: Counter[str], names: Iterable[str]) -> None:
    """Counts what was left aside; of names without end, as data may have, only the first are told apart."""
    for name in names:
        shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in name[:_LONGEST_NAME])
        ignored[shown if shown in ignored or len(ignored) < _MOST_NAMES else _OTHER_NAMES] += 1


def report_ignored(what: str, ignored: Counter[str]) -> None:
    """Names what was left aside, the most frequent first; says nothing if there is nothing."""
    if not ignored:
        return
    named = [item for item in ignored.items() if item[0] != _OTHER_NAMES]
    common = sorted(named, key=lambda item: (-item[1], item[0]))
    parts = [f"{name} {count}" for name, count in common[:_MOST_NAMED]]
    rest = ignored[_OTHER_NAMES] + sum(count for _, count in common[_MOST_NAMED:])
    report(f"{what}: {', '.join(parts)}{f', others {rest}' if rest else ''}")


def input_refused(name: str, reason: str) -> DocumentInput:
    """Returns what stands in the stream for something that cannot be used, so that rejects are in order."""
    return DocumentInput(key="", name=name, problem=reason)
