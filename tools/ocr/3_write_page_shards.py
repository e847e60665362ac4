"""Step 3 of the OCR pipeline: lines.jsonl + vocabulary.json -> a shard set of pages with 100 word ids each.

The vocabulary goes into the set's folder, and from there into the checkpoints and exports of what is trained on it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.lines import MIN_SCORE
from megatron_ove.preprocess.ocr.recognition import PAGE_FIELDS, PageRecord
from megatron_ove.preprocess.ocr.tags import NUM_TAGS, page_tags
from megatron_ove.preprocess.ocr.words import segmentation_name
from megatron_ove.preprocess.pictures import JpegPreparer
from megatron_ove.preprocess.record_files import open_rejects, read_records, stale_reason
from megatron_ove.preprocess.tool_arguments import (
    add_picture_options,
    add_run_options,
    add_shard_options,
    report,
    run_tool,
    whole_number,
)
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, help="lines.jsonl of step 1")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary.json of step 2")
    parser.add_argument(
        "--num-tags", type=whole_number(1), default=NUM_TAGS, help="label slots of a page (default: %(default)s)"
    )
    parser.add_argument(
        "--fill",
        choices=["none", "cyclic"],
        default="none",
        help="what follows a page's last tag: -1, or the tags again as OneVision-Encoder does (default: %(default)s)",
    )
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="least line score (default: %(default)s)")
    add_picture_options(parser, longest_side=1344)
    add_shard_options(parser)
    add_run_options(parser)
    return parser


def _check_origin(vocabulary: Vocabulary, pages: list[PageRecord], path: Path) -> None:
    """Refuses pages that were read or would be segmented otherwise than the vocabulary's."""
    segmentation = vocabulary.info.get("segmentation")
    if segmentation != segmentation_name():
        raise DataError(
            f"{path} was built with the word segmentation {segmentation}, but this installation has "
            f"{segmentation_name()}; build the vocabulary again, or install or remove PyICU"
        )
    for page in pages:
        if page.engine != vocabulary.info.get("engine"):
            raise DataError(
                f"{page.file} was read by {page.engine['name']} {page.engine['version']} with other models than the "
                f"pages of {path}; read all pages with one engine"
            )


def _work(arguments: argparse.Namespace) -> None:
    from megatron_ove.data.shard_index import ShardWriter

    vocabulary = Vocabulary.load(arguments.vocabulary)
    records = read_records(arguments.lines, made_by="tools/ocr/1_recognize_pages.py", fields=PAGE_FIELDS)
    pages = sorted(map(PageRecord.from_record, records), key=lambda page: page.file)
    _check_origin(vocabulary, pages, arguments.vocabulary)
    with open_rejects(arguments.rejects, stage="page shards", files=[page.input_file for page in pages]) as rejects:
        tagged: dict[InputFile, np.ndarray] = {}
        for page in pages:
            if page.file_state is not None:
                reason = stale_reason(page.file, page.file_state, "tools/ocr/1_recognize_pages.py")
                if reason:
                    rejects.add(page.input_file, reason)
                    continue
            try:
                tags = page_tags(
                    page.lines,
                    vocabulary,
                    num_tags=arguments.num_tags,
                    fill=arguments.fill,
                    min_score=arguments.min_score,
                )
            except DataError as error:
                rejects.add(page.input_file, str(error))
                continue
            tagged[page.input_file] = tags.ids
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
            make_task = functools.partial(JpegPreparer, longest_side=arguments.longest_side, quality=arguments.quality)
            for item, jpeg in run_over_files(
                make_task, list(tagged), title="writing pages", workers=arguments.workers, rejects=rejects
            ):
                writer.add(item.key, {"jpg": jpeg}, tagged[item], source=str(item))
            count = len(writer)
        report(f"{count} pages, {len(vocabulary)} classes, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
