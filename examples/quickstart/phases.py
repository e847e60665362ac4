"""Phases of the demo: headings, seconds, and other programs run in view of the user."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class DemoError(Exception):
    """Something the user can mend; its text is one sentence."""


class PhaseLog:
    """Numbers the phases, prints their headings and keeps their seconds."""

    def __init__(self, num_phases: int) -> None:
        self.num_phases = num_phases
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Runs a phase; `name` is its key in summary.json, `what` its heading."""
        say(f"\n[{len(self.seconds) + 1}/{self.num_phases}] {what}")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
        say(f"      {self.seconds[name]:.1f} s")


def say(text: str) -> None:
    """Prints a line at once, so that it keeps its place between the lines of other programs."""
    print(text, flush=True)


def environment() -> dict[str, str]:
    """One thread a process: the demo runs one process per core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_tool(script: str, *arguments: object) -> None:
    """Runs a script of this repository; its progress goes to the terminal.

    Raises:
        DemoError: it failed; its own message stands above.
    """
    run_python([str(ROOT / script), *map(str, arguments)], name=script)


def run_python(arguments: Sequence[str], *, name: str) -> None:
    """Runs this Python with `arguments`; raises `DemoError` when it fails."""
    status = subprocess.run([sys.executable, *arguments], env=environment(), check=False).returncode
    if status:
        raise DemoError(f"{name} ended with status {status}; its message is above")
