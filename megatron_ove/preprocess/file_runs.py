"""One function over many files, in several processes, with progress, and with rejects instead of crashes.

A task is made once per process (it may load a model) and called once per file. What it raises as `DataError` becomes
the file's reject reason; any other exception is a defect of ours, but one file in a hundred million must not stop a
run, so it is rejected too, with its type, and logged with its traceback.
"""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ove.errors import DataError
from megatron_ove.rejects import RejectsFile, printable

_log = logging.getLogger(__name__)
_PLAIN_INTERVAL_S = 5.0
_MAX_CHUNK = 16
_CHUNKS_AHEAD = 4
"""Of each worker, done or waiting; more would fill the memory if what takes the results is slower."""
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Task = Callable[[Any], Any]
_Outcome = tuple[Any, str | None]
"""What a task returned, or why it refused."""
_Item = TypeVar("_Item")


class _Process:
    """The task of this worker process; process pools have no other place to keep one."""

    task: Task | None = None


def run_over_files(
    make_task: Callable[[], Task],
    files: Sequence[_Item],
    *,
    title: str,
    workers: int,
    rejects: RejectsFile,
) -> Iterator[tuple[_Item, Any]]:
    """Calls the task on every file and yields the results in the order of `files`.

    Args:
        make_task: makes the task; called once in every process, so it must be picklable.
        files: what to work on: paths, or what has one as its text.
        title: shown beside the progress.
        workers: processes; 1 works in this one.
        rejects: gets the files that the task refuses.

    Yields:
        (file, result) of the files that were not rejected.

    Raises:
        DataError: a worker process died.
        OSError: the disk is full, which would refuse every further file as well.
    """
    workers = max(1, min(workers, len(files)))
    chunk = max(1, min(_MAX_CHUNK, len(files) // (4 * workers)))
    outcomes = _outcomes(make_task, files, workers, chunk)
    yield from _used(outcomes, title=title, total=len(files), rejects=rejects)


def run_over_stream(
    make_task: Callable[[], Task],
    items: Iterable[_Item],
    *,
    title: str,
    workers: int,
    rejects: RejectsFile,
    total: int | None = None,
) -> Iterator[tuple[_Item, Any]]:
    """As `run_over_files` for inputs that are made one after the other and are too many or too large to be held.

    Of the inputs at most `_CHUNKS_AHEAD` a process are in memory. `total` is their number, for the progress; None if it
    is not known. Errors of `items` itself are passed on.
    """
    yield from _used(_outcomes(make_task, items, workers, 1), title=title, total=total, rejects=rejects)


def _used(
    outcomes: Iterable[tuple[_Item, _Outcome]], *, title: str, total: int | None, rejects: RejectsFile
) -> Iterator[tuple[_Item, Any]]:
    for item, (result, reason) in show_progress(outcomes, title=title, total=total):
        if reason is None:
            yield item, result
        else:
            rejects.add(item, reason)


def _outcomes(
    make_task: Callable[[], Task], items: Iterable[_Item], workers: int, chunk: int
) -> Iterator[tuple[_Item, _Outcome]]:
    """Yields (item, outcome) in the order of `items`; some chunks are in work or wait to be taken, no more."""
    if workers == 1:
        task = None
        for item in items:
            task = task or make_task()
            yield item, _outcome(task, item)
        return
    # Fresh interpreters: forking a process that already runs ONNX or OpenMP threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(make_task,)) as pool:
        waiting: deque[tuple[list[_Item], Future[list[_Outcome]]]] = deque()
        remaining = iter(items)
        try:
            while own := list(itertools.islice(remaining, chunk)):
                waiting.append((own, pool.submit(_call_worker, own)))
                if len(waiting) >= _CHUNKS_AHEAD * workers:
                    first, future = waiting.popleft()
                    yield from zip(first, future.result(), strict=True)
            while waiting:
                first, future = waiting.popleft()
                yield from zip(first, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died, most likely for lack of memory; {workers} were running: try fewer --workers "
                "and start again, finished files are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not wanted


def end_with_parent() -> None:
    """Ends this process, whatever it does, when the process that started it is gone; a kill lets nobody say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _start_worker(make_task: Callable[[], Task]) -> None:
    end_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a task may load torch, which would take every core in each process
    cv2.setNumThreads(1)
    _Process.task = make_task()


def _call_worker(files: Sequence[Any]) -> list[_Outcome]:
    assert _Process.task is not None
    return [_outcome(_Process.task, file) for file in files]


def _outcome(task: Task, file: Any) -> _Outcome:
    if printable(str(file)) != str(file):
        return None, f"the name of {printable(str(file))} is not UTF-8, so records cannot hold it; rename the file"
    try:
        return task(file), None
    except DataError as error:
        return None, str(error)
    except OSError as error:
        if error.errno in _DISK_IS_FULL:
            raise
        return None, f"{file} could not be processed ({error.strerror or error}); check the path and its permissions"
    except Exception as error:  # see the module header
        _log.warning("unexpected error on %s", file, exc_info=True)
        return None, f"unexpected {type(error).__name__} while processing {file}: {error}"


def show_progress(items: Iterable[_Item], *, title: str, total: int | None = None) -> Iterator[_Item]:
    """Yields `items` and shows how far they are: a bar on a terminal, a line every few seconds elsewhere.

    Without `total`, where `items` have no length, only how many are done.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    console = Console()
    start = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, total=total, description=title)
        return
    of_all = "" if total is None else f" of {total}"
    count, next_line = 0, start + _PLAIN_INTERVAL_S
    for item in items:
        yield item
        count += 1
        if time.monotonic() >= next_line:
            console.print(f"{title}: {count}{of_all}", highlight=False)
            next_line = time.monotonic() + _PLAIN_INTERVAL_S
    console.print(f"{title}: {count}{of_all} in {time.monotonic() - start:.1f} s", highlight=False)
