"""PDFs with a text layer -> a shard set of documents: pictures of pages, their text, and where it stands.

Boxes are those of words, lines and characters. Each page is a sample; with --pages-per-document N, pages 1 to N of a
file are one, N + 1 to 2 N the next, their texts divided by a form feed. A page without a text layer, or with one
that is not to be trusted, is not used: --without-text keeps the picture of each, named by the page's key, for
tools/ocr/1_recognize_pages.py. Whatever else is not used is in --rejects with file, page and reason. Encrypted PDFs are
read if they ask for no password. Annotations and values of form fields are neither read nor drawn.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.pdf_documents import MAX_PAGES_PER_DOCUMENT, samples_of
from megatron_ove.preprocess.documents.pdf_process import PageCounter, PagePlace, PageReader, StoredPage
from megatron_ove.preprocess.documents.writing import picture_settings
from megatron_ove.preprocess.file_runs import run_over_files
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.shard_output import is_done, names_digest, output_of, rejects_of, shard_output
from megatron_ove.preprocess.tool_arguments import (
    Task,
    add_picture_options,
    add_run_options,
    add_shard_options,
    add_task_option,
    report,
    report_listing,
    run_tool,
    whole_number,
)
from megatron_ove.rejects import RejectsFile
from megatron_ove.whole_file import write_whole

_MAX_SIDE = 10_000
"""Pixels: a page in memory is 300 MB then."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_folder", type=Path, help="folder of PDFs, with subfolders")
    parser.add_argument("output", type=Path, help="folder of the shard set to write")
    parser.add_argument(
        "--pages-per-document",
        type=whole_number(0, MAX_PAGES_PER_DOCUMENT),
        default=1,
        help=f"pages of a sample; 0 = whole documents, divided every {MAX_PAGES_PER_DOCUMENT} pages (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--without-text",
        type=Path,
        metavar="FOLDER",
        help="where pictures of pages without a usable text layer are written (default: such pages are rejected)",
    )
    add_picture_options(parser, longest_side=1344)
    add_task_option(parser)
    add_shard_options(parser)
    add_run_options(parser)
    return parser


class _Pages:
    """The pages with a text, while those without are put aside and both are counted."""

    def __init__(self, without_text: Path | None, rejects: RejectsFile) -> None:
        self._folder, self._rejects = without_text, rejects
        self.num_used = self.num_put_aside = 0
        self.left_out: Counter[str] = Counter()

    def used(self, pages: Iterable[tuple[PagePlace, StoredPage]]) -> Iterator[tuple[PagePlace, StoredPage]]:
        for place, page in pages:
            if page.text is not None:
                self.num_used += 1
                self.left_out += page.left_out
                yield place, page
            elif self._folder is not None:
                write_whole(self._folder / f"{place.key}.jpg", page.jpeg)
                self.num_put_aside += 1
            else:
                self._rejects.add(
                    place,
                    f"page {place.page + 1} of {place.file} {page.problem}; give --without-text FOLDER, which keeps "
                    "its picture for tools/ocr/1_recognize_pages.py",
                )

    def report(self) -> None:
        if self.num_put_aside:
            report(
                f"{self.num_put_aside} pages without a usable text layer -> {self._folder}; read them with "
                "tools/ocr/1_recognize_pages.py"
            )
        if self.left_out:
            counts = ", ".join(f"{count} {why}" for why, count in sorted(self.left_out.items()))
            report(f"characters of the text layers that are left out: {counts}")


def _work(arguments: argparse.Namespace) -> None:
    if arguments.longest_side > _MAX_SIDE:
        raise DataError(
            f"--longest-side {arguments.longest_side} is more than {_MAX_SIDE}, which no page needs to be read; give "
            "a smaller one"
        )
    listing = list_inputs(arguments.input_folder, "document")
    task: Task | None = arguments.task
    inputs = listing.inputs
    mine = inputs if task is None else [inputs[place] for place in task.range_of(len(inputs))]
    settings = {
        "tool": "tools/documents/write_pdf_documents.py",
        "files": names_digest((file.name, *(file.state or ())[:1]) for file in inputs),
        "pages_per_document": arguments.pages_per_document,
        "without_text": arguments.without_text is not None,
        **picture_settings(arguments),
    }
    if is_done(arguments, settings):
        return
    judged = [*(file.path for file in mine), *listing.unreadable]
    with open_rejects(rejects_of(arguments), stage="pdf documents", files=judged) as rejects:
        report_listing(listing, rejects)
        pages = _Pages(arguments.without_text, rejects)
        with shard_output(arguments, settings, kind="document", rejects=rejects) as writer:
            read = run_over_files(
                functools.partial(PageReader, longest_side=arguments.longest_side, quality=arguments.quality),
                _places(mine, arguments.workers, rejects),
                title="reading pages",
                workers=arguments.workers,
                rejects=rejects,
            )
            for sample in samples_of(pages.used(read), arguments.pages_per_document or MAX_PAGES_PER_DOCUMENT):
                writer.add(sample.key, sample.members, source=sample.source)
            pages.report()
            count = len(writer)
        report(f"{count} documents of {pages.num_used} pages, {rejects.count} rejected -> {output_of(arguments)}")


def _places(files: list[InputFile], workers: int, rejects: RejectsFile) -> list[PagePlace]:
    """Returns all pages of the files; a file that cannot be opened goes to the rejects."""
    counts = run_over_files(PageCounter, files, title="counting pages", workers=workers, rejects=rejects)
    return [PagePlace(file, page) for file, count in counts for page in range(count)]


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
