"""Folders that appear whole or not at all: neighbours stay, dead writers' leftovers go, living ones' are named."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ove.errors import CheckpointError, DataError
from megatron_ove.new_folder import NewFolder, new_folder


@pytest.fixture
def umask_022() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str = "new", **options: object) -> None:
    with new_folder(target, **options) as partial:  # type: ignore[arg-type]
        (partial / "file").write_text(text)


def leave_behind(target: Path, code: str = "") -> Path:
    """A process that dies while it writes `target`; returns its folder."""
    script = (
        "import os, sys; from pathlib import Path; from megatron_ove.new_folder import NewFolder\n"
        f"folder = NewFolder(sys.argv[1], replace_if=lambda path: True)\n(folder.path / 'half').touch()\n{code}\n"
        "print(folder.path, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, target], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    return Path(done.stdout.strip())


def test_the_folder_appears_at_the_end_with_the_rights_of_the_umask(tmp_path: Path, umask_022: None) -> None:
    with new_folder(tmp_path / "a" / "out") as partial:
        (partial / "sub").mkdir()
        assert not (tmp_path / "a" / "out").exists()
        assert partial.name.startswith(".out.writing-") and f"-{os.getpid()}-" in partial.name
    assert names(tmp_path / "a") == ["out"]
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("neighbour", ["out.tmp", "out.new", "out.old", ".out.writing-mine", ".out.writing"])
def test_neighbours_of_the_user_stay(tmp_path: Path, neighbour: str) -> None:
    (tmp_path / neighbour).mkdir()
    (tmp_path / neighbour / "thesis").touch()
    write(tmp_path / "out")
    with pytest.raises(ValueError, match="mine"), new_folder(tmp_path / "other"):
        raise ValueError("mine")
    assert names(tmp_path) == sorted([neighbour, "out"])
    assert names(tmp_path / neighbour) == ["thesis"]


def test_what_exists_is_refused_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="exists already and would be overwritten"):
            NewFolder(target, error=CheckpointError)
    folder = NewFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "of another").touch()
    with pytest.raises(DataError, match="exists already and would be overwritten"):
        folder.publish()
    assert names(tmp_path) == ["file", "out"]


def test_an_empty_folder_and_a_link_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    write(tmp_path / "empty")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "elsewhere") == names(tmp_path / "empty") == ["file"]


def test_only_what_is_known_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    known = lambda path: (path / "file").exists()  # noqa: E731
    write(tmp_path / "out", replace_if=known)
    assert (tmp_path / "out" / "file").read_text() == "new"
    with pytest.raises(DataError, match=r"photos exists and holds something else .* name another folder"):
        write(tmp_path / "photos", replace_if=known)
    assert names(tmp_path) == ["out", "photos"]


def test_a_failure_while_replacing_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if ".writing-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(DataError, match=r"out cannot be written \(Input/output error\); check free space"):
        write(tmp_path / "out", replace_if=lambda path: True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_full_disk_inside_the_block_is_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"out cannot be written \(No space left on device\); check free space"),
        new_folder(tmp_path / "out", error=CheckpointError),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = leave_behind(tmp_path / "out")
    assert names(tmp_path) == [left.name]
    write(tmp_path / "another")
    assert left.exists()
    write(tmp_path / "out")
    assert names(tmp_path) == ["another", "out"]
    assert f"{left} was left by a killed process and has been removed" in caplog.text


def test_what_may_belong_to_a_living_writer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = leave_behind(tmp_path / "out")
    elsewhere = left.rename(left.with_name(left.name.replace("writing-", "writing-other-")))
    with new_folder(tmp_path / "out") as living:
        write(tmp_path / "out")
        assert living.exists() and elsewhere.exists()
        assert f"{living} belongs to process {os.getpid()} on " in caplog.text
        assert f"{elsewhere} belongs to process " in caplog.text
        (tmp_path / "out" / "file").unlink()
    assert names(tmp_path) == [elsewhere.name, "out"]


def test_machines_of_one_name_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave_behind(tmp_path / "out")
    boot_id, read = Path("/proc/sys/kernel/random/boot_id"), Path.read_text
    own = f"{socket.gethostname()}-"
    if boot_id.exists():
        own += boot_id.read_text().replace("-", "")[:12] + "-"
    assert left.name.startswith(f".out.writing-{own}")

    def read_another(path: Path, **options: str) -> str:
        return "0f0f0f0f-1234-5678-9abc-def012345678\n" if path == boot_id else read(path, **options)

    monkeypatch.setattr(Path, "read_text", read_another)
    write(tmp_path / "out")
    assert names(tmp_path) == [left.name, "out"]
    assert f"{left} belongs to process " in caplog.text


def test_a_folder_that_was_moved_away_by_a_killed_writer_is_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "out", "old")
    leave_behind(tmp_path / "out", "folder._place.rename(folder._own_name('replaced'))")
    assert "out" not in names(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert "out was put back" in caplog.text
