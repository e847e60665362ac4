"""Rewrites shard sets of an earlier format into the present one; nothing of a sample changes.

The tar files are the same in both, so they are linked into the new folder where it is on the same disk, and copied
elsewhere. Training reads the earlier format as well: rewriting makes reading from a network disk faster, and only the
present format can be joined (tools/shards/merge_parts.py joins sets of either).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.tool_arguments import report, run_tool
from megatron_ove.shards.rewrite import rewrite_shard_set


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="shard set of an earlier format")
    parser.add_argument("output", type=Path, help="new folder")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    info = rewrite_shard_set(arguments.directory, arguments.output)
    report(f"{info.num_samples:,} samples -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
