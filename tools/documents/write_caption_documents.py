"""Pictures with their captions or texts beside them -> a shard set of documents.

INPUT is a folder in which a.jpg has its caption in a.txt, or what is known of it in a.json; or a table of JSON lines
such as {"file": "a.jpg", "caption": "A red house."}, with relative files beside the table. An object may have caption,
captions, text (what is written in the picture), turns (questions and answers), boxes, and a conversation. A picture
without a text, a text without a picture and what cannot be used is in --rejects with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.caption_documents import CaptionTable, read_folder
from megatron_ove.preprocess.documents.writing import (
    add_document_options,
    picture_settings,
    range_of,
    write_documents,
)
from megatron_ove.preprocess.input_files import real_path
from megatron_ove.preprocess.tool_arguments import report, run_tool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder of pictures and texts, or table of JSON lines")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    add_document_options(parser)
    return parser


def _settings(arguments: argparse.Namespace, inputs: str) -> dict[str, Any]:
    return {"tool": "write_caption_documents", "inputs": inputs, **picture_settings(arguments)}


def _write_folder(arguments: argparse.Namespace) -> None:
    found = read_folder(arguments.input)
    if found.ignored:
        report(found.ignored)
    mine = [found.inputs[place] for place in range_of(arguments, len(found.inputs))]
    write_documents(
        arguments,
        lambda rejects: mine,
        settings=_settings(arguments, found.digest),
        judged=mine,
        title="writing documents",
    )


def _write_table(arguments: argparse.Namespace) -> None:
    if not arguments.input.is_file():
        raise DataError(f"{arguments.input} does not exist; give a folder of pictures and texts, or a table")
    # Rejects name it, and must name the same by whatever path it is given. A link to it keeps the pictures beside it.
    table = CaptionTable(real_path(arguments.input.parent) / arguments.input.name)
    places = range_of(arguments, table.count())
    write_documents(
        arguments,
        lambda rejects: table.inputs(places),
        settings=_settings(arguments, table.digest()),
        judged=[table.path],
        title=f"writing {len(places)} documents",
    )


def _work(arguments: argparse.Namespace) -> None:
    (_write_folder if arguments.input.is_dir() else _write_table)(arguments)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
