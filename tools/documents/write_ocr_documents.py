"""Pages that OCR has read -> a shard set of documents: the text of the believed lines and where each stands.

LINES is lines.jsonl of tools/ocr/1_recognize_pages.py. With --vocabulary each document also has the word ids that
tools/ocr/3_write_page_shards.py gives its page, so that one set serves objectives on words and on text. Pages without
text, changed since they were read, or damaged are in --rejects with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.ocr_documents import PageDocuments, pages_of_task
from megatron_ove.preprocess.documents.writing import (
    add_document_options,
    picture_settings,
    range_of,
    write_documents,
)
from megatron_ove.preprocess.ocr.lines import MIN_SCORE
from megatron_ove.preprocess.ocr.page_shards import NUM_TAGS, add_tag_options, check_origin
from megatron_ove.preprocess.ocr.recognition import read_pages
from megatron_ove.preprocess.shard_output import names_digest
from megatron_ove.preprocess.tool_arguments import run_tool, share
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="lines.jsonl of tools/ocr/1_recognize_pages.py")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary.json whose word ids become labels (default: none)")
    add_tag_options(parser)
    parser.add_argument("--min-score", type=share, default=MIN_SCORE, help="least line score (default: %(default)s)")
    add_document_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    path: Path | None = arguments.vocabulary
    if path is None and (arguments.num_tags != NUM_TAGS or arguments.fill != "none"):
        raise DataError("--num-tags and --fill say how words become labels; give the --vocabulary of the words, too")
    vocabulary = None if path is None else Vocabulary.load(path)
    pages = sorted(read_pages(arguments.lines), key=lambda page: page.file)
    if vocabulary is not None and path is not None:
        check_origin(vocabulary, pages, path)
    identities = list(dict.fromkeys(page.input_file.identity for page in pages))
    mine = pages_of_task(pages, range_of(arguments, len(identities)), identities)
    recipe = PageDocuments(vocabulary, arguments.num_tags, arguments.fill, arguments.min_score)
    labels: dict[str, object] = {}
    if vocabulary is not None:
        labels = {"words": names_digest(vocabulary.words), "num_tags": arguments.num_tags, "fill": arguments.fill}
    write_documents(
        arguments,
        lambda rejects: recipe.inputs(mine, rejects=rejects),
        settings={
            "tool": "write_ocr_documents",
            "pages": names_digest((page.key, page.file, page.sheet, page.file_state) for page in pages),
            "min_score": arguments.min_score,
            **labels,
            **picture_settings(arguments),
        },
        judged=[page.input_file for page in mine],
        title="writing pages",
        files=None if vocabulary is None else {VOCABULARY_FILE: vocabulary.encode()},
        num_classes=0 if vocabulary is None else len(vocabulary),
        label_width=0 if vocabulary is None else arguments.num_tags,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
