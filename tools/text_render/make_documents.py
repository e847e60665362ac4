"""Makes a shard set of documents: pages of running text that know where each line, word and character stands.

Texts are the project's, in the languages that are named; typefaces, sizes, columns, titles, alignment and looks vary.
Page i follows from the options and --seed alone, whatever --workers and --task are; another seed gives other pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.documents.rendered_documents import PAGE_LOOKS, PageNumber, RenderedPages
from megatron_ove.preprocess.documents.writing import range_of, write_documents
from megatron_ove.preprocess.text_render.look_options import look_among, pair_of_numbers
from megatron_ove.preprocess.text_render.passages import languages
from megatron_ove.preprocess.tool_arguments import (
    add_run_options,
    add_shard_options,
    add_task_option,
    run_tool,
    whole_number,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument("--count", type=whole_number(1), required=True, help="number of pages")
    parser.add_argument(
        "--languages",
        nargs="+",
        choices=languages(),
        default=list(languages()),
        metavar="LANGUAGE",
        help="of the texts, each as often, among %(choices)s (default: all)",
    )
    parser.add_argument(
        "--looks",
        nargs="+",
        type=look_among(PAGE_LOOKS),
        default=[("printed", 1.0)],
        metavar="NAME[=SHARE]",
        help=f"looks and their shares, among {', '.join(PAGE_LOOKS)} (default: printed)",
    )
    parser.add_argument(
        "--typefaces",
        choices=["train", "siblings", "families"],
        default="train",
        help="which split: those of training, unseen siblings, or unseen families (default: %(default)s)",
    )
    parser.add_argument("--size", **pair_of_numbers("WIDTH", "HEIGHT"), default=(448, 448), help="default: 448 448")
    parser.add_argument("--patch-size", type=whole_number(1), default=14, help="of the set (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of all pages (default: %(default)s)")
    add_shard_options(parser)
    add_task_option(parser)
    add_run_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    recipe = RenderedPages(
        languages=tuple(arguments.languages),
        looks=tuple(name for name, _ in arguments.looks),
        shares=tuple(share for _, share in arguments.looks),
        size=tuple(arguments.size),
        split=arguments.typefaces,
        seed=arguments.seed,
    )
    recipe.check()
    pages = [PageNumber(number) for number in range_of(arguments, arguments.count)]
    write_documents(
        arguments,
        lambda rejects: pages,
        settings={"tool": "make_documents", "count": arguments.count, **vars(recipe), "patch": arguments.patch_size},
        judged=pages,
        title="making pages",
        make_task=recipe.worker,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
