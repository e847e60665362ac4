"""What the scripts under tools/ have in common: a few options, and errors as one sentence with exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_ove.errors import MegatronOveError, file_system_sentence
from megatron_ove.preprocess.folders import Listing
from megatron_ove.rejects import RejectsFile, printable

DEFAULT_REJECTS = Path("rejects.jsonl")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Returns an argparse type: a whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {bounds}")
        return value

    return parse


def share(text: str) -> float:
    """Is an argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # nan is neither
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Adds --workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=whole_number(1), default=cores, help="processes (default: one per core, here %(default)s)"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --workers and --rejects."""
    add_workers_option(parser)
    parser.add_argument(
        "--rejects",
        type=Path,
        default=DEFAULT_REJECTS,
        help="JSON lines of unusable files and why (default: %(default)s)",
    )


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every shard-writing script takes."""
    parser.add_argument(
        "--samples-per-shard", type=whole_number(1), default=4096, help="samples in a tar file (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing shard set once the new one is whole"
    )


@dataclass(frozen=True)
class Task:
    """Which part of the work this process does.

    Attributes:
        number: from 0.
        count: tasks that share the work.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Task:
        """Reads "3/16", the third of 16; for argparse."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise argparse.ArgumentTypeError(
                f"{text} is not of the form NUMBER/COUNT with 1 <= NUMBER <= COUNT, like 3/16 for the third of 16 tasks"
            )
        return cls(int(match[1]) - 1, int(match[2]))

    def range_of(self, length: int) -> range:
        """Returns the places of this task's inputs among `length` of them: neighbours, so that parts stay in order."""
        return range(length * self.number // self.count, length * (self.number + 1) // self.count)


def add_task_option(parser: argparse.ArgumentParser) -> None:
    """Adds --task."""
    parser.add_argument(
        "--task",
        type=Task.parse,
        metavar="NUMBER/COUNT",
        help="do only this part of the work, e.g. 3/16, and write it below OUTPUT/parts; when all are there, "
        "tools/shards/merge_parts.py OUTPUT joins them",
    )


def add_picture_options(parser: argparse.ArgumentParser, *, longest_side: int) -> None:
    """Adds how pictures are stored."""
    parser.add_argument(
        "--longest-side",
        type=whole_number(1),
        default=longest_side,
        help="scale larger pictures down to this (default: %(default)s)",
    )
    parser.add_argument(
        "--quality",
        type=whole_number(1, 95),
        default=92,
        help="JPEG quality of re-encoded pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--patch-size", type=whole_number(1), default=14, help="side of a patch in pixels (default: %(default)s)"
    )


def add_describer_option(parser: argparse.ArgumentParser) -> None:
    """Adds what pictures are described with."""
    parser.add_argument(
        "--model-folder",
        type=Path,
        help="local HuggingFace vision model to describe with (default: colours and gradients, no model); an encoder "
        "exported by megatron-ove is one",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let Python code in the model folder run, which some models need; it can do anything, so read it first",
    )


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send some seconds before they kill."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM end a tool as Ctrl-C does, so that it keeps what is finished."""

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def run_tool(work: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Runs a tool; returns 0, 2 after showing the sentence of a user error, 130 after Ctrl-C, or 143 after SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        with _sigterm_interrupts():
            work(arguments)
    except MegatronOveError as error:
        return _show_error(str(error))
    except OSError as error:
        sentence = file_system_sentence(error)
        if sentence is None:
            raise
        return _show_error(sentence)
    except KeyboardInterrupt as error:
        _show_error("interrupted; what is finished is kept, the same command continues or starts again")
        return 143 if isinstance(error, _Terminated) else 130
    return 0


def _show_error(sentence: str) -> int:
    Console(stderr=True, soft_wrap=True).print(f"error: {printable(sentence)}", highlight=False, markup=False)
    return 2


def report_listing(listing: Listing, rejects: RejectsFile) -> None:
    """Says what of a folder was left aside, and records what could not be looked at."""
    for path, reason in listing.unreadable.items():
        rejects.add(path, reason)
    if sentence := listing.ignored_sentence():
        report(sentence)


def report(message: str) -> None:
    """Prints one plain line of a tool's outcome."""
    Console(soft_wrap=True).print(printable(message), highlight=False, markup=False)
