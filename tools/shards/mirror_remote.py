"""Makes a folder by which training reads a shard set on an object store (s3://, gs://, https://, ...) through fsspec.

The folder gets everything of the set but its shards: description, index, vocabulary, token caches. Name it as the
source's path. Shards are read when they are needed and kept on each node in --cache, which may name a variable that
differs from node to node, as '$TMPDIR/cache'. Give the source `order: {block: ..., window: ...}`, so that a block that
was read serves many samples. S3 needs `pip install s3fs`, Google's store gcsfs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number
from megatron_ove.shards.remote import RemoteSettings, make_mirror


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the set, as fsspec reads it")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--cache", required=True, help="folder on each node for what was read")
    parser.add_argument(
        "--max-gib", type=whole_number(1), default=100, help="most that the cache holds (default: %(default)s)"
    )
    parser.add_argument(
        "--block-mib", type=whole_number(1), default=8, help="what is read in one go (default: %(default)s)"
    )
    return parser


def _work(arguments: argparse.Namespace) -> None:
    settings = RemoteSettings(arguments.url, arguments.cache, arguments.max_gib, arguments.block_mib)
    info = make_mirror(settings, arguments.output)
    report(f"{info.num_samples:,} samples of {arguments.url} -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
