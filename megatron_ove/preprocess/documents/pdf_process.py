"""PDFs are read in a process of their own, so that a file that ends or hangs it costs itself and nothing else.

PDFium is written in C++, and files from anywhere can crash it, or let it work or allocate without end. The process is
kept from one page to the next and started anew after a crash; the page that did it is refused with a sentence.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.pdf_pages import PageText, PdfFile
from megatron_ove.preprocess.file_runs import end_with_parent
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.pictures import encode_jpeg

PAGE_CPU_S = 60.0
"""Seconds of computing that one page may take; a page of print takes less than one, a large map some. Some files of a
kilobyte would take for ever: forms that draw themselves several times."""
MEMORY_BYTES = 8 << 30
"""Address space of the process; a page of print takes some hundred MiB with the program."""
_CRASH = "ended the process that reads PDFs"


@dataclass(frozen=True)
class PagePlace:
    """A page of a PDF, counted from 0. As text it is the file, which rejects name; reasons name the page."""

    file: InputFile
    page: int

    def __str__(self) -> str:
        return str(self.file)

    @property
    def key(self) -> str:
        """Names the page: the file's key and the page's number from 1, e.g. `manual-0a1b2c3d4e5f6071-p00012`."""
        return f"{self.file.key}-p{self.page + 1:05d}"


@dataclass(frozen=True)
class StoredPage:
    """A page as it is stored.

    Attributes:
        jpeg: its picture.
        text: None if it has no usable text layer.
        problem: why it has none, as the end of a sentence; "" with a text.
        left_out: why -> number of characters of the layer that are not in the text.
    """

    jpeg: bytes
    text: PageText | None
    problem: str
    left_out: Counter[str]


class PageCounter:
    """A file -> the number of its pages."""

    def __init__(self) -> None:
        self._reader = _Reader()

    def __call__(self, file: InputFile) -> int:
        """Raises `DataError` if it cannot be opened or has no page."""
        return self._reader.ask(file.path, None)


class PageReader:
    """A page -> how it is stored."""

    def __init__(self, *, longest_side: int, quality: int) -> None:
        """`longest_side` of the picture in pixels; `quality` of its JPEG."""
        self._settings = (longest_side, quality)
        self._reader = _Reader()

    def __call__(self, place: PagePlace) -> StoredPage:
        """Raises `DataError` if it cannot be read or is blank."""
        return self._reader.ask(place.file.path, place.page, *self._settings)


class _Reader:
    """The process, seen from the one that asks."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._connection: Any = None  # of a class that depends on the system

    def ask(self, path: Path, page: int | None, *settings: int) -> Any:
        """Returns what `_answer` does.

        Raises:
            DataError: of it, or the process ended.
        """
        name = str(path) if page is None else f"page {page + 1} of {path}"
        is_fresh = self._process is None
        try:
            is_good, value = self._exchange((path, page, *settings))
        except (EOFError, OSError):
            reason = self._end()
            if is_fresh or reason == -signal.SIGPROF:
                raise DataError(f"{name} {_how_it_ended(reason)}") from None
            return self.ask(path, page, *settings)  # what came before may have left it damaged
        if not is_good:
            raise DataError(value)
        return value

    def _exchange(self, request: tuple[Any, ...]) -> tuple[bool, Any]:
        connection = self._connection or self._start()
        connection.send(request)
        return connection.recv()

    def _start(self) -> Any:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of what can be received
        self._connection = mine
        return mine

    def _end(self) -> int | None:
        """Cleans up after the process has ended; returns its exit status."""
        assert self._process is not None and self._connection is not None
        self._connection.close()
        self._process.join()
        status = self._process.exitcode
        self._process = self._connection = None
        return status


def _how_it_ended(status: int | None) -> str:
    if status == -signal.SIGPROF:
        return f"took more than {PAGE_CPU_S:.0f} s of computing; simplify it (for example by printing it) or remove it"
    how = signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
    return (
        f"{_CRASH} ({how}), so it is damaged, made to do harm, or needs more than {MEMORY_BYTES >> 30} GiB of memory; "
        "repair it (qpdf) or remove it"
    )


def _serve(connection: Any) -> None:
    """Answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, also inside PDFium
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(
        resource.RLIMIT_AS, (MEMORY_BYTES if limit == resource.RLIM_INFINITY else min(limit, MEMORY_BYTES), limit)
    )
    end_with_parent()  # also in the middle of a page
    logging.disable()  # what goes wrong is answered
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    files = _OpenFile()
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, PAGE_CPU_S)
        answer = _answer(files, *request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            connection.send(answer)
        except OSError:
            return


class _OpenFile:
    """The file that was asked for last stays open, as its next page is likely to be asked for."""

    def __init__(self) -> None:
        self._file: PdfFile | None = None

    def open(self, path: Path) -> PdfFile:
        if self._file is None or self._file.path != path:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file = PdfFile(path)
        return self._file


def _answer(files: _OpenFile, path: Path, page: int | None, *settings: int) -> tuple[bool, Any]:
    """Returns (True, number of pages or `StoredPage`) or (False, the sentence of an error)."""
    try:
        file = files.open(path)
        if page is None:
            return True, len(file)
        longest_side, quality = settings
        found = file.read(page, longest_side)
        return True, StoredPage(encode_jpeg(found.picture, quality=quality), found.text, found.problem, found.left_out)
    except DataError as error:
        return False, str(error)
    except MemoryError:
        where = path if page is None else f"page {page + 1} of {path}"
        return False, f"{where} needs more than {MEMORY_BYTES >> 30} GiB of memory; simplify or remove it"
    except Exception as error:  # one file of many must not end a run
        where = path if page is None else f"page {page + 1} of {path}"
        return False, f"{where} could not be read (unexpected {type(error).__name__}: {error}); repair or remove it"
