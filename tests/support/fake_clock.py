"""Time that passes only when a test says so, on one rank alone or on all at once."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class FakeClock:
    """The clock of one rank: what this rank spent, and what all ranks spent because one kept the others waiting.

    The common part and who waits lie in a file that the ranks share.
    """

    def __init__(self, path: Path, rank: int, world_size: int) -> None:
        self._rank, self._own = rank, 0.0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        size = 8 * (1 + world_size)
        os.ftruncate(self._file, size)  # by every rank: as it was where it has this size already
        self._cells = memoryview(mmap.mmap(self._file, size)).cast("d")  # seconds, then whether each rank waits

    def now(self) -> float:
        return self._cells[0] + self._own

    def spend(self, seconds: float) -> None:
        """Lets time pass on this rank alone."""
        self._own += seconds

    def keep_waiting(self, seconds: float) -> None:
        """Lets time pass on all ranks, as soon as all others wait."""
        others = [cell for cell in range(1, len(self._cells)) if cell != 1 + self._rank]
        while True:
            with self._locked():
                if all(self._cells[cell] for cell in others):
                    self._cells[0] += seconds
                    return
            time.sleep(0.001)

    def drive(self, timers: Any) -> None:
        """Makes `timers`, a `StepTimers`, go by this clock; this rank waits while its phase is communication."""
        from megatron_ove.training import step_timers

        step_timers.time = SimpleNamespace(perf_counter=self.now)  # type: ignore[assignment]
        for name in ("enter", "leave"):
            setattr(timers, name, self._telling(getattr(timers, name), timers))

    def _telling(self, change_phase: Any, timers: Any) -> Any:
        """Returns `change_phase`, that also tells whether this rank waits: never while it reads the clock."""

        def telling(name: str) -> None:
            self._tell(False)
            change_phase(name)
            self._tell(bool(timers._open) and timers._open[-1][1] == "communication")

        return telling

    def _tell(self, waits: bool) -> None:
        with self._locked():
            self._cells[1 + self._rank] = waits

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
