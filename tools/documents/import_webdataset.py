"""WebDataset tars -> a shard set of documents.

Members that follow each other and share their name up to the first dot are a sample: pictures, which are its pages in
the order of their names, and texts. A .txt is a caption; a .json is an object with caption, captions, text, turns,
boxes or a conversation, as LAION's and DataComp's have. Other members are counted and named. A tar is read as a stream,
never unpacked; of a truncated one what came before is used. Each tar is the work of one task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.preprocess.documents.tar_samples import TarSamples, list_tars
from megatron_ove.preprocess.documents.writing import (
    add_document_options,
    picture_settings,
    range_of,
    report_ignored,
    write_documents,
)
from megatron_ove.preprocess.shard_output import names_digest
from megatron_ove.preprocess.tool_arguments import report, run_tool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument("tars", type=Path, nargs="+", metavar="TAR", help="tars, or folders of them, in their order")
    add_document_options(parser)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    tars = list_tars(arguments.tars, say=report)
    names = list(tars)
    mine = [names[place] for place in range_of(arguments, len(names))]
    samples = TarSamples({name: tars[name] for name in mine})
    write_documents(
        arguments,
        lambda rejects: samples.inputs(),
        settings={
            "tool": "import_webdataset",
            "tars": names_digest((name, path.stat().st_size) for name, path in tars.items()),
            **picture_settings(arguments),
        },
        judged=[tars[name] for name in mine],
        title=f"samples of {len(mine)} tars",
    )
    report_ignored("members that are neither picture nor text", samples.ignored)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
