"""One function over many files, in several processes, with progress, and with rejects instead of crashes.

A task is made once per process (it may load a model) and called once per file. What it raises as `DataError` becomes
the file's reject reason; any other exception is a defect of ours, but one file in a hundred million must not stop a
run, so it is rejected too, with its type, and logged with its traceback.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
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
_HELD_PER_WORKER = 4
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Task = Callable[[Any], Any]
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
    for file, (result, reason) in zip(
        files, show_progress(_outcomes(make_task, files, workers), title=title, total=len(files)), strict=True
    ):
        if reason is None:
            yield file, result
        else:
            rejects.add(file, reason)


def _outcomes(make_task: Callable[[], Task], files: Sequence[Any], workers: int) -> Iterator[tuple[Any, str | None]]:
    if workers == 1:
        task = make_task() if files else None
        for file in files:
            yield _outcome(task, file)  # type: ignore[arg-type]
        return
    chunk = max(1, min(_MAX_CHUNK, len(files) // (4 * workers)))
    # Fresh interpreters: forking a process that already runs ONNX or OpenMP threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(make_task,)) as pool:
        try:
            yield from pool.map(_call_worker, files, chunksize=chunk)
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died, most likely for lack of memory; {workers} were running: try fewer --workers "
                "and start again, finished files are kept"
            ) from error


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

    Of the inputs at most `_HELD_PER_WORKER` a process are in memory. `total` is their number, for the progress; None if
    it is not known. Errors of `items` itself are passed on.
    """
    for item, (result, reason) in show_progress(
        _outcomes_of_stream(make_task, items, workers), title=title, total=total
    ):
        if reason is None:
            yield item, result
        else:
            rejects.add(item, reason)


def _outcomes_of_stream(
    make_task: Callable[[], Task], items: Iterable[_Item], workers: int
) -> Iterator[tuple[_Item, tuple[Any, str | None]]]:
    if workers == 1:
        task = make_task()
        for item in items:
            yield item, _outcome(task, item)
        return
    context = multiprocessing.get_context("spawn")  # as above
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(make_task,)) as pool:
        waiting: deque[tuple[_Item, Future[tuple[Any, str | None]]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(_call_worker, item)))
                if len(waiting) >= _HELD_PER_WORKER * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died, most likely for lack of memory; {workers} were running: try fewer --workers "
                "and start again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not wanted


def _start_worker(make_task: Callable[[], Task]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a task may load torch, which would take every core in each process
    cv2.setNumThreads(1)
    _Process.task = make_task()


def _call_worker(file: Any) -> tuple[Any, str | None]:
    assert _Process.task is not None
    return _outcome(_Process.task, file)


def _outcome(task: Task, file: Any) -> tuple[Any, str | None]:
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
