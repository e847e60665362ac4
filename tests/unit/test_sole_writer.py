"""Two runs into one output: the second is refused with a sentence, and a run that died hinders nobody."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.preprocess import sole_writer as module
from megatron_ove.preprocess.record_files import open_rejects
from megatron_ove.preprocess.sole_writer import sole_writer
from megatron_ove.rejects import read_rejects
from tests.support.tool_scripts import run_script

HOLD = """
import sys
from megatron_ove.preprocess.sole_writer import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_a_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_run_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    with held_by_a_process(path) as process:
        sentence = rf"another run writes to {path} \(process {process.pid} on .*\), and two at once would lose what one"
        with pytest.raises(DataError, match=sentence), sole_writer(path):
            pass
        process.kill()
        process.wait()
        assert (tmp_path / "new/lines.jsonl.lock").exists()
        with sole_writer(path):
            pass
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_file_that_was_removed_while_it_was_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, tries = tmp_path / "d.npz", module.fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        tries.append(descriptor)
        if len(tries) == 1:
            (tmp_path / "d.npz.lock").unlink()

    monkeypatch.setattr(module.fcntl, "flock", remove_first)
    with sole_writer(path):
        assert len(tries) == 2
        with pytest.raises(DataError, match="another run writes to"), sole_writer(path):
            pass


def test_a_disk_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with sole_writer(tmp_path / "d.npz"):
        pass
    assert "d.npz cannot be locked on this disk" in caplog.text


def test_rejects_of_two_runs_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    with open_rejects(path, stage="ocr", files=["a.jpg"]) as rejects:
        rejects.add("a.jpg", "it is empty")
        with pytest.raises(DataError, match="another run writes to"), open_rejects(path, stage="ocr", files=["a.jpg"]):
            pass
        rejects.add("b.jpg", "it is empty")
    assert [record["file"] for record in read_rejects(path)] == ["a.jpg", "b.jpg"]
    with open_rejects("/dev/null", stage="ocr", files=[]) as nowhere:
        nowhere.add("a.jpg", "it is empty")


@pytest.mark.parametrize(
    ("script", "output", "locked"),
    [
        ("ocr/1_recognize_pages.py", "lines.jsonl", "lines.jsonl"),
        ("clustering/1_describe_pictures.py", "d.npz", "d.npz"),
        ("codec/1_select_patches.py", "stored", "stored/clips.jsonl"),
    ],
)
def test_every_first_step_is_alone(
    script: str, output: str, locked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "in/a.png")
    with sole_writer(tmp_path / locked):
        arguments = [tmp_path / "in", tmp_path / output, "--workers", 1, "--rejects", tmp_path / "rejects.jsonl"]
        assert run_script(script, *arguments) == 2
    assert f"error: another run writes to {tmp_path / locked} (process {os.getpid()}" in capsys.readouterr().err
