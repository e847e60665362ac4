"""`megatron-ove find`: on which pages of a shard set a trained encoder sees a word."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from megatron_ove.cli.word_options import CHECKPOINT_HELP, add_word_options, open_reader, write_json, write_line

_DESCRIPTION = """Embeds every sample of a shard set and prints those nearest to the class center of each word, with the
cosine, whether the word is among the sample's labels, its key, and the shard that holds it."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "find", help="pages of a shard set on which a checkpoint sees a word", description=_DESCRIPTION
    )
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("shards", help="folder of a shard set")
    parser.add_argument("words", nargs="+", metavar="WORD", help="word of the vocabulary")
    add_word_options(parser, what="pages of a word")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the pages; returns the exit status."""
    from megatron_ove.evaluation.words import find_pages
    from megatron_ove.shards.shard_set import ShardSet

    shards = ShardSet.open(arguments.shards)
    with open_reader(arguments) as reader:
        results = find_pages(reader, shards, arguments.words, top=arguments.top)
    if arguments.json:
        write_json([asdict(result) for result in results])
        return 0
    marks = {True: "yes", False: "no ", None: "?  "}
    for result in results:
        known = f"{shards.directory} has no vocabulary.json, so which pages hold it is not known"
        if result.num_holding is not None:
            known = f"among the labels of {result.num_holding} of {len(shards)} samples"
        if result.average_precision is not None:
            known += f", average precision {result.average_precision:.3f}"
        write_line(f"{result.word} (class {result.index}): {known}")
        for page in result.pages:
            write_line(f"  {page.score:5.2f}  {marks[page.holds]}  {page.key}  {page.shard}")
    return 0
