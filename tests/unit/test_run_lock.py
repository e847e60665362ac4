"""One launch at a time in a run folder: who is refused, who takes over, and what becomes of who was taken over."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ove.errors import ConfigError, TrainingError
from megatron_ove.training import run_lock
from megatron_ove.training.run_lock import DEAD_AFTER_S, STEP_DEAD_AFTER_S, LockHolder, RunLock, require_unlocked

HOLD = """
import sys
from pathlib import Path
from megatron_ove.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Whoever gets the lock keeps it until all others have had their try.
RACE = """
import sys, time
from pathlib import Path
from megatron_ove.errors import ConfigError
from megatron_ove.training.run_lock import RunLock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    RunLock(folder)
except ConfigError:
    print("refused", flush=True)
else:
    print("took it", flush=True)
sys.stdin.readline()
"""


@contextmanager
def process(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, str(folder)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def line(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def holder(**changes: Any) -> LockHolder:
    """A launch on another machine that has just given a sign of life."""
    fields = {"token": "other", "host": "node07", "namespace": "elsewhere", "pid": 4711, "process_start": 1}
    return replace(LockHolder.of_this_process(), **{**fields, "job": None, "restart": 0, **changes})


def write_lock(folder: Path, content: LockHolder | str) -> None:
    text = content if isinstance(content, str) else json.dumps(asdict(content))
    (folder / "lock").write_text(text)


def token(folder: Path) -> str:
    return json.loads((folder / "lock").read_text())["token"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.beat()
        lock.require()
        content = json.loads((tmp_path / "lock").read_text())
        assert content["pid"] == os.getpid() and content["beat"] >= content["since"]
        assert names(tmp_path) == ["lock"]
    assert names(tmp_path) == []


def test_a_live_holder_on_this_machine_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as other:
        assert line(other) == "held"
        before = (tmp_path / "lock").read_text()
        with pytest.raises(ConfigError) as caught:
            RunLock(tmp_path)
        assert str(caught.value).startswith(f"run_dir = {tmp_path} is in use by process {other.pid} on ")
        assert f"stop it by a file {tmp_path}/stop, or give this run another run_dir; if" in str(caught.value)
        assert str(caught.value).endswith(f"is certainly gone, delete {tmp_path}/lock")
        assert names(tmp_path) == ["lock"] and (tmp_path / "lock").read_text() == before
        other.communicate("", timeout=60)
    assert names(tmp_path) == []


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as other:
        assert line(other) == "held"
        other.send_signal(signal.SIGKILL)
        assert other.stdout is not None and other.stdout.read() == ""  # it is dead, but nobody has waited for it
        while (state := Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z":
            time.sleep(0.01)
        assert state == "Z"
        with RunLock(tmp_path):
            assert names(tmp_path) == ["lock"]


def test_a_process_that_has_only_its_number_in_common_is_not_the_holder(tmp_path: Path) -> None:
    here = LockHolder.of_this_process()
    write_lock(tmp_path, here)
    with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "):
        RunLock(tmp_path)
    assert here.process_start is not None
    write_lock(tmp_path, replace(here, process_start=here.process_start - 1))
    with RunLock(tmp_path):
        assert token(tmp_path) != here.token


@pytest.mark.parametrize("age", [0, 60, DEAD_AFTER_S / 2, -45])  # the clock of the other machine may be ahead
def test_elsewhere_a_heartbeat_is_a_sign_of_life(tmp_path: Path, age: float) -> None:
    write_lock(tmp_path, holder(beat=time.time() - age))
    with pytest.raises(ConfigError, match="is in use by process 4711 on node07, since 20"):
        RunLock(tmp_path)
    assert token(tmp_path) == "other"


def test_elsewhere_a_holder_that_has_long_been_silent_is_dead(tmp_path: Path) -> None:
    write_lock(tmp_path, holder(beat=time.time() - DEAD_AFTER_S - 60))
    with RunLock(tmp_path):
        assert token(tmp_path) != "other"
        assert names(tmp_path) == ["lock"]


@pytest.mark.parametrize(
    ("job", "restart", "is_taken"),
    [
        ("77", 1, True),  # the attempt before this one
        ("77", 3, False),  # this is a left-over of an earlier attempt
        ("78", 0, False),
        (None, 0, False),
    ],
)
def test_a_requeued_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, restart: int, is_taken: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_lock(tmp_path, holder(job=job, restart=restart))
    if is_taken:
        with RunLock(tmp_path):
            assert token(tmp_path) != "other"
    else:
        with pytest.raises(ConfigError, match=r"4711 on node07( of SLURM job 7[78])?, since"):
            RunLock(tmp_path)


def test_within_one_attempt_of_a_job_a_silent_holder_elsewhere_is_dead_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_lock(tmp_path, holder(job="77", restart=0))
    with pytest.raises(ConfigError, match="4711 on node07 of SLURM job 77, since"):
        RunLock(tmp_path)
    write_lock(tmp_path, holder(job="77", restart=0, beat=time.time() - STEP_DEAD_AFTER_S - 10))
    with RunLock(tmp_path):
        assert token(tmp_path) != "other"


def test_a_process_of_somebody_else_that_the_system_hides_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(run_lock.os, "kill", refuse)
    monkeypatch.setattr(run_lock, "_process_start", lambda pid: None)
    assert run_lock._is_alive(4711, 12)
    monkeypatch.setattr(run_lock, "_process_start", lambda pid: 13)
    assert not run_lock._is_alive(4711, 12)


def test_within_one_attempt_of_a_job_a_live_process_of_this_machine_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_lock(tmp_path, LockHolder.of_this_process())
    with pytest.raises(ConfigError, match="of SLURM job 77"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "other"}', "7", "nobody"])
def test_a_file_that_is_no_lock_does_not_count(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ove.training.run_lock._PAUSE_S", 0.0)
    write_lock(tmp_path, text)
    with RunLock(tmp_path):
        assert token(tmp_path)
    assert f"{tmp_path}/lock is no lock file (cut, or written by something else); it does not" in caplog.text


def test_who_was_taken_over_stops_and_leaves_the_other_alone(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught, RunLock(tmp_path) as lock:
        write_lock(tmp_path, holder(job="78"))
        lock.require()  # goes by the last heartbeat
        with pytest.raises(TrainingError):
            lock.beat()
        assert token(tmp_path) == "other"
        lock.require()
    assert str(caught.value).startswith(
        f"the run folder {tmp_path} was taken over by another launch (process 4711 on node07 of SLURM job 78, since "
    )
    assert "it stops here and saves nothing" in str(caught.value)
    assert token(tmp_path) == "other"


def test_the_thread_notices_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ove.training.run_lock.BEAT_INTERVAL_S", 0.01)
    with RunLock(tmp_path) as lock:
        first = (tmp_path / "lock").read_text()
        while (tmp_path / "lock").read_text() == first:
            time.sleep(0.01)
        (tmp_path / "new").write_text(json.dumps(asdict(holder())))
        (tmp_path / "new").replace(tmp_path / "lock")
        with pytest.raises(TrainingError):
            while True:
                lock.require()
                time.sleep(0.01)


def test_a_lock_that_somebody_deleted_is_made_again(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        (tmp_path / "lock").unlink()
        lock.beat()
        assert names(tmp_path) == ["lock"]


def test_a_disk_that_refuses_a_heartbeat_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with RunLock(tmp_path) as lock, monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        lock.beat()
    assert "cannot be refreshed (Disk quota exceeded); after 10 minutes another launch" in caplog.text


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path: Path) -> None:
    write_lock(tmp_path, holder(beat=0.0))
    racers = [process(RACE, tmp_path) for _ in range(6)]
    started = [racer.__enter__() for racer in racers]
    try:
        assert [line(one) for one in started] == ["ready"] * 6
        for one in started:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        assert sorted(line(one) for one in started) == ["refused"] * 5 + ["took it"]
    finally:
        for racer in racers:
            racer.__exit__(None, None, None)
    assert names(tmp_path) == ["lock"]


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path):
        with pytest.raises(ConfigError, match="is in use by process"):
            RunLock(tmp_path)
        assert names(tmp_path) == ["lock"]
    write_lock(tmp_path, holder(beat=0.0))
    with RunLock(tmp_path):
        assert token(tmp_path) != "other"


def test_asking_changes_nothing(tmp_path: Path) -> None:
    assert require_unlocked(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()
    dead = holder(beat=0.0)
    write_lock(tmp_path, dead)
    assert require_unlocked(tmp_path) == dead
    assert token(tmp_path) == "other" and names(tmp_path) == ["lock"]


def test_a_lock_that_appears_during_a_takeover_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(tmp_path, holder(beat=0.0))
    looks: list[Path] = []

    def look(run_dir: Path, newcomer: Any = None) -> Any:
        found = require_unlocked(run_dir, newcomer)
        looks.append(run_dir)
        if len(looks) == 2:  # under the guard: the lock goes, and another launch makes its own before this one acts
            (run_dir / "lock").unlink()
            found = require_unlocked(run_dir, newcomer)
            write_lock(run_dir, holder(token="other", beat=time.time()))
        return found

    monkeypatch.setattr("megatron_ove.training.run_lock.require_unlocked", look)
    with pytest.raises(ConfigError, match="is in use by process"):
        RunLock(tmp_path)
    assert token(tmp_path) == "other" and names(tmp_path) == ["lock"]
