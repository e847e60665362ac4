"""Training on two processes, cut short half-way like a job whose time is up, then continued by the same command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from phases import ROOT, DemoError, environment, say

NUM_PROCESSES = 2
_POLL_S = 0.2
_STOP_TIMEOUT_S = 120.0


def train_with_interruption(config: Path, overrides: Sequence[str], run_dir: Path, *, stop_at: int) -> int:
    """Trains to about step `stop_at`, sends SIGTERM, and runs the same command again to the end.

    Returns:
        The step at which the run was stopped.

    Raises:
        DemoError: a launch failed, or the first one ended before it could be stopped.
    """
    command = _train_command(config, overrides)
    say(f"      {' '.join(command[command.index('-m') :])}")
    first = _start(command, run_dir)
    try:
        while last_logged_step(run_dir) < stop_at:
            if first.poll() is not None:
                raise DemoError(f"training ended early with status {first.returncode}; its message is above")
            time.sleep(_POLL_S)
        say(f"      step {last_logged_step(run_dir)}: SIGTERM, as from a scheduler whose time is up")
        for worker in psutil.Process(first.pid).children():
            worker.terminate()
        if first.wait(timeout=_STOP_TIMEOUT_S):
            raise DemoError(f"training did not stop cleanly (status {first.returncode}); its message is above")
    finally:
        _end(first)
    stopped_at = last_logged_step(run_dir)
    say(f"      stopped after step {stopped_at}; the same command again:")
    second = _start(command, run_dir)
    try:
        if second.wait():
            raise DemoError(f"training ended with status {second.returncode}; its message is above")
    finally:
        _end(second)
    return stopped_at


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


def _train_command(config: Path, overrides: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    command += ["-m", "megatron_ove", "train", str(config)]
    for override in overrides:
        command += ["--set", override]
    return command


def _start(command: Sequence[str], run_dir: Path) -> subprocess.Popen[bytes]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "train_output.txt").open("ab") as stream:  # the resolved configuration; progress is on stderr
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=stream)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leaves no process behind, whatever happened."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for running in (*children, process):
            running.kill()
        process.wait()
