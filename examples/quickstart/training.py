"""Training on two processes, cut short half-way like a job whose time is up, then continued by the same command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from phases import ROOT, DemoError, environment, say

NUM_PROCESSES = 2
_POLL_S = 0.2
_STOP_TIMEOUT_S = 120.0


class TrainingRun:
    """The training command of the demo, launched as often as needed."""

    def __init__(self, config: Path, overrides: Sequence[str], run_dir: Path) -> None:
        self._run_dir = run_dir
        self._command = [sys.executable, "-m", "megatron_ove", "train", str(config), f"--nproc={NUM_PROCESSES}"]
        for override in overrides:
            self._command += ["--set", override]

    def train_until(self, step: int) -> int:
        """Trains to about `step`, then sends SIGTERM to the processes and waits until they have saved and ended.

        Returns:
            The step that was saved.

        Raises:
            DemoError: the launch failed, or ended before it could be stopped.
        """
        say(f"      megatron-ove {' '.join(self._command[3:])}")
        with self._launched() as process:
            while last_logged_step(self._run_dir) < step:
                if process.poll() is not None:
                    raise DemoError(f"training ended early with status {process.returncode}; its message is above")
                time.sleep(_POLL_S)
            say(f"      step {last_logged_step(self._run_dir)}: SIGTERM, as from a scheduler whose time is up")
            for worker in psutil.Process(process.pid).children():
                worker.terminate()
            if process.wait(timeout=_STOP_TIMEOUT_S):
                raise DemoError(f"training did not stop cleanly (status {process.returncode}); its message is above")
        return last_logged_step(self._run_dir)

    def resume(self) -> None:
        """Runs the same command to the end; raises `DemoError` when it fails."""
        with self._launched() as process:
            if process.wait():
                raise DemoError(f"training ended with status {process.returncode}; its message is above")

    @contextmanager
    def _launched(self) -> Iterator[subprocess.Popen[bytes]]:
        """Starts the command and leaves no process behind, whatever happens."""
        with (self._run_dir / "train_output.txt").open(
            "ab"
        ) as stream:  # the resolved configuration; progress is stderr
            process = subprocess.Popen(self._command, cwd=ROOT, env=environment(), stdout=stream)
        try:
            yield process
        finally:
            if process.poll() is None:
                for running in (*psutil.Process(process.pid).children(recursive=True), process):
                    running.kill()
                process.wait()


def last_logged_step(run_dir: Path) -> int:
    """Returns the last step in metrics.jsonl, 0 when there is none yet."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return int(json.loads(complete.rpartition("\n")[2])["step"]) if complete else 0


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Returns the folder of a checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:08d}"
