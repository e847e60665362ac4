"""Stopping a run between two steps: SIGTERM, SIGINT, SIGUSR1, or a file `stop` in the run folder.

A signal may reach one rank only, or ranks at different steps. So handlers set a flag, and once a step all ranks agree
on it in the same all-reduce that decides whether the step is accepted. The trainer then saves and ends with status 0.
The file stays until the next start removes it: a launch script sees by it that the stop was somebody's wish.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

STOP_FILE_NAME = "stop"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def clear_stop_file(run_dir: Path) -> None:
    """Removes what an earlier launch was asked by; for one rank, as early as it can, since it may be asked soon."""
    (run_dir / STOP_FILE_NAME).unlink(missing_ok=True)


class StopSignal:
    """Context manager that catches the signals; `requested` says whether this rank wants to stop."""

    def __init__(self, run_dir: Path, *, watch_file: bool) -> None:
        """
        Args:
            run_dir: folder in which a file named `stop` stops the run.
            watch_file: whether this rank looks for it (one rank suffices).
        """
        self._file = run_dir / STOP_FILE_NAME
        self._watch_file = watch_file
        self._reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        if self._reason is None and self._watch_file and self._file.exists():
            self._reason = f"the file {self._file} was found"
        return self._reason is not None

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; "" when it does not."""
        return self._reason or ""

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self._reason = f"{name} was received"
        logger.warning("%s: finishing this step, saving, then stopping.", name)
