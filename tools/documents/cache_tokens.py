"""Encodes the texts of a document set with a tokenizer and keeps the ids beside the set, in SET/tokens-<fingerprint>.

Objectives that read texts need it: a step is planned by the lengths of texts before anything is read. Many tasks may
share the work (--task 3/16); when all are done, --join 16 makes one cache of their pieces. The fingerprint is that of
everything in tokenizer.json and of the normalisation, so caches of several tokenizers lie side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.preprocess.tool_arguments import Task, report, run_tool, whole_number
from megatron_ove.shards.format import set_mark
from megatron_ove.shards.merge import part_name
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import (
    Normalisation,
    TextTokenizer,
    cache_folder,
    join_cache,
    pieces_folder,
    read_cache_info,
    write_cache,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="document set")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or a folder that holds one")
    parser.add_argument(
        "--normalisation",
        choices=get_args(Normalisation),
        default="none",
        help="of texts before they are encoded (default: %(default)s)",
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--task", type=Task.parse, metavar="NUMBER/COUNT", help="encode only this part, e.g. 3/16")
    share.add_argument("--join", type=whole_number(1), metavar="COUNT", help="join the pieces of so many tasks")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    shards = ShardSet.open(arguments.directory)
    tokenizer = TextTokenizer(arguments.tokenizer, normalisation=arguments.normalisation)
    folder = cache_folder(arguments.directory, tokenizer.fingerprint)
    if arguments.join is not None:
        info = join_cache(shards, tokenizer.fingerprint, arguments.join)
        report(f"{info.num_samples:,} samples -> {folder}")
        return
    task: Task = arguments.task or Task(0, 1)
    target = folder if arguments.task is None else pieces_folder(folder) / part_name(task.number, task.count)
    there = read_cache_info(folder) or read_cache_info(target)
    if there is not None and there.set_mark == set_mark(arguments.directory):
        report(f"{target} is there already: {there.num_samples:,} samples; nothing to do")
        return
    counts = write_cache(
        shards,
        tokenizer,
        task.range_of(len(shards)),
        target,
        progress=lambda starts: show_progress(starts, title="encoding texts, 512 samples each"),
    )
    report(
        f"{counts.samples:,} samples, {counts.tokens:,} tokens, {counts.longest:,} in the longest, {counts.empty:,} "
        f"samples without any -> {target}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
