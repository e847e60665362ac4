"""Step 3 of the OCR pipeline: lines.jsonl + vocabulary.json -> a shard set of pages with 100 word ids each.

The vocabulary goes into the set's folder, and from there into the checkpoints and exports of what is trained on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.ocr.lines import MIN_SCORE
from megatron_ove.preprocess.ocr.page_shards import add_pages, add_tag_options, check_origin, tag_pages
from megatron_ove.preprocess.ocr.recognition import read_pages
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.tool_arguments import (
    add_picture_options,
    add_run_options,
    add_shard_options,
    report,
    run_tool,
    share,
)
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, help="lines.jsonl of step 1")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary.json of step 2")
    add_tag_options(parser)
    parser.add_argument("--min-score", type=share, default=MIN_SCORE, help="least line score (default: %(default)s)")
    add_picture_options(parser, longest_side=1344)
    add_shard_options(parser)
    add_run_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    from megatron_ove.shards.writer import ShardWriter

    vocabulary = Vocabulary.load(arguments.vocabulary)
    pages = sorted(read_pages(arguments.lines), key=lambda page: page.file)
    check_origin(vocabulary, pages, arguments.vocabulary)
    with open_rejects(arguments.rejects, stage="page shards", files=[page.input_file for page in pages]) as rejects:
        tagged = tag_pages(
            pages,
            vocabulary,
            rejects=rejects,
            num_tags=arguments.num_tags,
            fill=arguments.fill,
            min_score=arguments.min_score,
        )
        with ShardWriter(
            arguments.output,
            kind="ocr",
            num_classes=len(vocabulary),
            label_width=arguments.num_tags,
            rejects=rejects,
            samples_per_shard=arguments.samples_per_shard,
            patch_size=arguments.patch_size,
            overwrite=arguments.overwrite,
        ) as writer:
            writer.add_file(VOCABULARY_FILE, vocabulary.encode())
            add_pages(
                writer,
                tagged,
                rejects=rejects,
                longest_side=arguments.longest_side,
                quality=arguments.quality,
                workers=arguments.workers,
            )
            count = len(writer)
        report(f"{count} pages, {len(vocabulary)} classes, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
