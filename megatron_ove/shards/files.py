"""Open shard files, read by any number of threads at once.

A read borrows a file: no lock is held while the disk or the network works, and a file is closed only when nobody reads
from it. With tens of thousands of shards in random order nearly every read opens its file anew; then opening, reading
and closing take place side by side as well.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

_SHARE_OF_LIMIT = 8
"""A set of shards keeps at most this part of the process's open files; a run has a few sets, sockets and logs."""
_MOST_FILES = 65536
"""More are not asked for."""


@dataclass
class _OpenFile:
    handle: int
    readers: int = 0
    is_wanted: bool = True  # False: to be closed by its last reader


class ShardFiles:
    """Files by number, the longest unused ones closed when there are too many."""

    pread = staticmethod(os.pread)
    """Reads (handle, size, offset); tests and benchmarks put a slow or failing disk in its place."""

    def __init__(self, path_of: Callable[[int], Path], *, most_open: int | None = None) -> None:
        """Opens nothing yet.

        Args:
            path_of: returns the file of a number.
            most_open: files kept open; None = an eighth of what the system allows this process.
        """
        self._path_of = path_of
        self._most_open = most_open or max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARE_OF_LIMIT)
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Returns up to `size` bytes of a file, from `offset` on; fewer where it ends early.

        Raises:
            OSError: it cannot be opened or read.
        """
        file = self._borrow(number)
        try:
            return self.pread(file.handle, size, offset)
        finally:
            self._give_back(file)

    def peek(self, number: int, size: int, offset: int) -> bytes:
        """As `read`, for a few bytes whose neighbours are not wanted."""
        return self.read(number, size, offset)

    def size(self, number: int) -> int:
        """Returns the bytes of a file.

        Raises:
            OSError: it is not there, or cannot be looked at.
        """
        return self._path_of(number).stat().st_size

    def forget(self, number: int) -> None:
        """Closes a file, so that the next read opens it anew: a handle of a network disk can go stale."""
        with self._lock:
            file = self._files.pop(number, None)
            unused = self._unused([file] if file else [])
        _close(unused)

    def close(self) -> None:
        """Closes all files, those in use when their readers are done; reading opens them again."""
        with self._lock:
            unused = self._unused(list(self._files.values()))
            self._files.clear()
        _close(unused)

    def _borrow(self, number: int) -> _OpenFile:
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                file.readers += 1
                return file
        opened = _OpenFile(os.open(self._path_of(number), os.O_RDONLY))
        with self._lock:
            file = self._files.setdefault(number, opened)
            file.readers += 1
            surplus = [self._files.popitem(last=False)[1] for _ in range(len(self._files) - self._most_open)]
            if file is not opened:  # another thread was faster
                surplus.append(opened)
            unused = self._unused(surplus)
        _close(unused)
        return file

    def _give_back(self, file: _OpenFile) -> None:
        with self._lock:
            file.readers -= 1
            unused = [file] if not file.is_wanted and not file.readers else []
        _close(unused)

    @staticmethod
    def _unused(files: Sequence[_OpenFile]) -> list[_OpenFile]:
        """Marks files as no longer wanted; returns those to close now, the others are closed by their last readers."""
        for file in files:
            file.is_wanted = False
        return [file for file in files if not file.readers]


def _close(files: Sequence[_OpenFile]) -> None:
    """Closes files, outside of any lock: on a network disk it takes as long as a read."""
    for file in files:
        os.close(file.handle)


def raise_file_limit() -> None:
    """Lets this process open as many files as the system permits it at most; many systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
