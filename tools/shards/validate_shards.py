"""Checks shard sets and prints one sentence per problem; exits with 1 when there is any.

    python tools/shards/validate_shards.py DIR [DIR ...] [--deep]

Without --deep it compares sizes, the index, and the first and last tar header of shards (seconds); with it, it compares
every header, decodes every picture and compares every label.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="folders of shard sets")
    parser.add_argument("--deep", action="store_true", help="read and decode everything")
    args = parser.parse_args()
    found = False
    for directory in args.directories:
        problems = validate_shard_set(directory, deep=args.deep)
        found = found or bool(problems)
        if problems:
            print("\n".join(problems))
        else:
            info = ShardSet.open(directory).info
            print(f"{directory}: {info.num_samples} {info.kind} samples, {info.num_classes} classes, all well")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
