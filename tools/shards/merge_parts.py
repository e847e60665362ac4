"""Joins the parts that tasks have written below DIR/parts into one shard set: writes DIR/index and DIR/dataset.json.

No tar file is touched or copied, so it takes some milliseconds a part. Keys are compared over all parts. May be
repeated when parts were written anew. Other folders can be joined by naming them; they stay where they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.preprocess.tool_arguments import report, run_tool
from megatron_ove.shards.merge import merge_parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder of the joined set; holds `parts` unless PART is given")
    parser.add_argument(
        "parts",
        type=Path,
        nargs="*",
        metavar="PART",
        help="shard sets to join in this order, of either format (default: all of DIR/parts)",
    )
    return parser


def _work(arguments: argparse.Namespace) -> None:
    info = merge_parts(
        arguments.directory,
        arguments.parts,
        progress=lambda folders: show_progress(folders, title="opening parts"),
    )
    report(f"{info.num_samples:,} samples of {info.num_parts} parts -> {arguments.directory}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
