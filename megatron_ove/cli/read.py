"""`megatron-ove read`: which words a trained encoder reads on pictures."""

from __future__ import annotations

import argparse
import sys

from megatron_ove.cli.word_options import CHECKPOINT_HELP, add_word_options, open_reader, write_json, write_line

_DESCRIPTION = """Embeds pictures as the run's pages are embedded, and prints the words whose class centers are nearest
to each, with the cosine. They are guesses in order, not a text: how many of them are right, only pages with known words
can say (megatron-ove evaluate). A picture that cannot be used gets a sentence, and the exit status is 2."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser("read", help="words that a checkpoint reads on pictures", description=_DESCRIPTION)
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files of any kind that the tools take")
    add_word_options(parser, what="words of a picture")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the words; returns the exit status."""
    from megatron_ove.evaluation.words import read_pictures

    with open_reader(arguments) as reader:
        results = read_pictures(reader, arguments.pictures, top=arguments.top)
    problems = [result.problem for result in results if result.problem]
    if arguments.json:
        write_json(
            [
                {"file": result.file, "problem": result.problem}
                if result.problem
                else {"file": result.file, "words": [vars(word) for word in result.words]}
                for result in results
            ]
        )
    else:
        for result in results:
            write_line(result.file if not result.problem else f"{result.file}: not read")
            for word in result.words:
                write_line(f"  {word.score:5.2f}  {word.word}")
    for problem in problems:
        sys.stderr.write(f"megatron-ove: {problem}\n")
    return 2 if problems else 0
