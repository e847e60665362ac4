"""Step 2 of the OCR pipeline: lines.jsonl of the training pages -> vocabulary.json (word -> class id).

Pages whose file has changed or is gone are left out, as in step 3: a folder that was renamed would count twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.file_runs import show_progress
from megatron_ove.preprocess.ocr.lines import MIN_SCORE
from megatron_ove.preprocess.ocr.recognition import READ_BY, common_engine, read_pages
from megatron_ove.preprocess.ocr.tags import rank_words
from megatron_ove.preprocess.ocr.vocabulary import MAX_WORDS, build_vocabulary
from megatron_ove.preprocess.ocr.words import segmentation_name
from megatron_ove.preprocess.record_files import current_rows
from megatron_ove.preprocess.tool_arguments import report, run_tool, share, whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, nargs="+", help="lines.jsonl files of step 1")
    parser.add_argument("--output", type=Path, required=True, help="vocabulary.json to write")
    parser.add_argument(
        "--max-words", type=whole_number(1), default=MAX_WORDS, help="most words kept (default: %(default)s)"
    )
    parser.add_argument(
        "--min-pages", type=whole_number(1), default=2, help="a word must be on so many pages (default: %(default)s)"
    )
    parser.add_argument("--min-score", type=share, default=MIN_SCORE, help="least line score (default: %(default)s)")
    parser.add_argument(
        "--id-order",
        choices=["permuted", "frequency"],
        default="permuted",
        help="permuted spreads frequent words over the ranks of a sharded head (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the permutation (default: %(default)s)")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    read = [page for path in arguments.lines for page in read_pages(path)]
    rows, left_out = current_rows([(page.file, page.file_state) for page in read], what="pages", step=READ_BY)
    if left_out:
        report(left_out)
    pages = [read[row] for row in rows]
    vocabulary = build_vocabulary(
        (
            rank_words(page.lines, min_score=arguments.min_score)
            for page in show_progress(pages, title="counting words")
        ),
        max_words=arguments.max_words,
        min_pages=arguments.min_pages,
        permutation_seed=arguments.seed if arguments.id_order == "permuted" else None,
        info={
            "engine": common_engine(pages),
            "segmentation": segmentation_name(),
            "min_score": arguments.min_score,
        },
    )
    vocabulary.save(arguments.output)
    report(f"{len(vocabulary)} words of {len(pages)} pages -> {arguments.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
