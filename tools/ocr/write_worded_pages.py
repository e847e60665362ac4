"""Pages whose words are at hand -> a shard set of pages with 100 word ids each, without OCR.

The words stand in a table, one JSON line a picture: {"file": "a.png", "words": ["law", "right"]} or
{"file": "b.png", "text": "Law and right."}, with relative files beside the table; or PAGES is a folder in which every
picture a.png has its text in a.txt. Words are split and normalised as those of OCR, and the first ones of a page count
most. Nothing is left out in silence: what cannot be used is in --rejects with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.page_shards import add_pages, add_tag_options, check_origin, tag_pages
from megatron_ove.preprocess.ocr.recognition import PageRecord
from megatron_ove.preprocess.ocr.tags import rank_words
from megatron_ove.preprocess.ocr.vocabulary import MAX_WORDS, build_vocabulary
from megatron_ove.preprocess.ocr.worded_pages import WordedPages, read_worded_pages, unnamed_pictures
from megatron_ove.preprocess.ocr.words import segmentation_name
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.tool_arguments import (
    add_picture_options,
    add_run_options,
    add_shard_options,
    report,
    run_tool,
    whole_number,
)
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary

_NUM_EXAMPLES = 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, help="table of pictures and words, or folder of pictures and .txt files")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--vocabulary", type=Path, help="vocabulary.json of training pages, read by OCR or not")
    words.add_argument(
        "--build-vocabulary",
        type=Path,
        help="vocabulary.json to make of the words of these pages; --overwrite replaces one",
    )
    parser.add_argument(
        "--max-words", type=whole_number(1), default=MAX_WORDS, help="most words built (default: %(default)s)"
    )
    parser.add_argument(
        "--min-pages", type=whole_number(1), default=2, help="a word must be on so many pages (default: %(default)s)"
    )
    add_tag_options(parser)
    add_picture_options(parser, longest_side=1344)
    add_shard_options(parser)
    add_run_options(parser)
    return parser


def _vocabulary(arguments: argparse.Namespace, pages: Sequence[PageRecord]) -> Vocabulary:
    if arguments.vocabulary is not None:
        vocabulary = Vocabulary.load(arguments.vocabulary)
        check_origin(vocabulary, pages, arguments.vocabulary)
        return vocabulary
    vocabulary = build_vocabulary(
        (rank_words(page.lines) for page in pages),
        max_words=arguments.max_words,
        min_pages=arguments.min_pages,
        info={"engine": None, "segmentation": segmentation_name()},
    )
    report(f"{len(vocabulary)} words of {len(pages)} pages")
    return vocabulary


def _require_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuses a place for the vocabulary where something would be lost.

    Raises:
        DataError: another file is there, or a vocabulary and `overwrite` is not given.
    """
    if not path.exists():
        return
    try:
        Vocabulary.load(path)
    except DataError as error:
        raise DataError(f"{path} exists and is no vocabulary, so it is not overwritten; name another file") from error
    if not overwrite:
        raise DataError(
            f"{path} holds a vocabulary already, whose ids may be in other shard sets; give --vocabulary {path} to use "
            "it, --overwrite to replace it, or name another file"
        )


def _read(arguments: argparse.Namespace) -> WordedPages:
    """Reads the pages; says which pictures beside those of a table stand in no line of it."""
    worded = read_worded_pages(arguments.pages)
    if worded.ignored:
        report(worded.ignored)
    unnamed = [] if arguments.pages.is_dir() else unnamed_pictures(worded.files)
    if unnamed:
        report(
            f"{len(unnamed)} pictures beside the named ones stand in no line of {arguments.pages} and are not used: "
            f"{', '.join(unnamed[:_NUM_EXAMPLES])}{', ...' if len(unnamed) > _NUM_EXAMPLES else ''}"
        )
    return worded


def _work(arguments: argparse.Namespace) -> None:
    from megatron_ove.shards.writer import ShardWriter

    if arguments.build_vocabulary is not None:
        _require_replaceable(arguments.build_vocabulary, overwrite=arguments.overwrite)
    worded = _read(arguments)
    pages = worded.pages
    with open_rejects(arguments.rejects, stage="worded pages", files=worded.files) as rejects:
        for file, reason in worded.refused:
            rejects.add(file, reason)
        if not pages:
            raise DataError(
                f"no page of {arguments.pages} has a picture and words; the reasons are in {arguments.rejects}"
            )
        vocabulary = _vocabulary(arguments, pages)
        tagged = tag_pages(pages, vocabulary, rejects=rejects, num_tags=arguments.num_tags, fill=arguments.fill)
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
        if arguments.build_vocabulary is not None:  # last, so that nothing is replaced for a set that does not come
            vocabulary.save(arguments.build_vocabulary)
            report(f"{len(vocabulary)} words -> {arguments.build_vocabulary}")
        report(f"{count} pages, {len(vocabulary)} classes, {rejects.count} rejected -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
