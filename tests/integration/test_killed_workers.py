"""A tool that is killed leaves no process behind, neither workers nor what they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SCRIPT = """
import multiprocessing, os, sys, time
from pathlib import Path
from megatron_ove.preprocess.file_runs import end_with_parent, run_over_files
from megatron_ove.rejects import RejectsFile

FOLDER = Path(sys.argv[1])

def nap():
    (FOLDER / str(os.getpid())).touch()
    time.sleep(600)

def busy_child():
    end_with_parent()
    nap()

class Task:
    def __call__(self, file):
        multiprocessing.get_context("spawn").Process(target=busy_child, daemon=True).start()
        nap()

if __name__ == "__main__":
    with RejectsFile(FOLDER.parent / "rejects.jsonl", stage="x") as rejects:
        list(run_over_files(Task, [1, 2], title="x", workers=2, rejects=rejects))
"""


def _wait(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_and_their_processes_end_when_the_tool_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pids")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(_ROOT)}) as process:
        try:
            assert _wait(lambda: len(list((tmp_path / "pids").iterdir())) == 4, 90)
        finally:
            process.send_signal(signal.SIGKILL)
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert _wait(lambda: not any(map(_is_running, pids)), 20)
