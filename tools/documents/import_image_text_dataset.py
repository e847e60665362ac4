"""An image-text data set of HuggingFace on disk -> a shard set of documents; nothing is downloaded.

FOLDER is what save_to_disk wrote, or a snapshot of the hub with parquet files. Pictures come from the first column that
holds some (lists: pages of a document). What is said of them comes from the columns named text, caption or captions,
question and answer, conversations, messages or texts, unless options name other ones: then only those are read. The
tool says which it uses. Each file is the work of one task. Rows that cannot be used are in --rejects with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.arrow_files import first_schema, list_data_files
from megatron_ove.preprocess.documents.arrow_rows import Columns, RowDocuments, choose_columns
from megatron_ove.preprocess.documents.writing import (
    add_document_options,
    picture_settings,
    range_of,
    write_documents,
)
from megatron_ove.preprocess.shard_output import names_digest
from megatron_ove.preprocess.tool_arguments import report, run_tool

_ROLES = {
    "image": "pictures (default: the first that can hold some)",
    "text": "all that is written in the pictures",
    "caption": "a caption, or a list of them",
    "question": "a question, or a list of them",
    "answer": "its answer, or a list of them; of several answers to one question the most frequent one is used",
    "conversation": "a list of what was said, as {from, value}, {role, content} or {user, assistant}",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the data set, or one of its files")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument(
        "--files", default="*", metavar="PATTERN", help="only files like this, e.g. 'data/train-*' (default: all)"
    )
    for role, what in _ROLES.items():
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"column with {what}")
    add_document_options(parser)
    return parser


def _columns(arguments: argparse.Namespace, files: dict[str, Path]) -> Columns:
    first, schema = first_schema(files.values())
    try:
        columns = choose_columns(schema, {role: getattr(arguments, role) for role in _ROLES})
    except DataError as error:
        raise DataError(f"{first}: {error}") from error
    uses = [f"{role} from '{name}'" for role, name in vars(columns).items() if name]
    ignored = [name for name in schema.names if name not in columns.used]
    report(f"{len(files)} files; {', '.join(uses)}; columns that are not read: {', '.join(ignored) or 'none'}")
    return columns


def _work(arguments: argparse.Namespace) -> None:
    files = list_data_files(arguments.folder, arguments.files, say=report)
    columns = _columns(arguments, files)
    names = list(files)
    mine = {names[place]: files[names[place]] for place in range_of(arguments, len(names))}
    write_documents(
        arguments,
        lambda rejects: RowDocuments(mine, columns).inputs(),
        settings={
            "tool": "import_image_text_dataset",
            "files": names_digest((name, path.stat().st_size) for name, path in files.items()),
            "columns": vars(columns),
            **picture_settings(arguments),
        },
        judged=list(mine.values()),
        title=f"rows of {len(mine)} files",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
