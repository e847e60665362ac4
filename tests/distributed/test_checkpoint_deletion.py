"""Deleting checkpoints: what fails is a warning and tried again, and no interruption harms the last checkpoint."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.checkpoint.manifest import data_files, structural_problem
from megatron_ove.parallel import cpu_backend
from tests.distributed.test_checkpoint_manager import flip_bit, load_latest, save_steps, table_state
from tests.support.distributed import run_distributed

REASONS = {errno.ENOTEMPTY: "Directory not empty", errno.EBUSY: "Device or resource busy", errno.EACCES: "Permission"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def listen() -> list[str]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_ove.checkpoint").addHandler(handler)
    return messages


def save_while_a_file_is_read(
    rank: int, world_size: int, folder: str, name: str, number: int
) -> tuple[list[str], list[str], list[str]]:
    """Saves a step whose deletions fail as on a network disk where somebody reads `name`, and one more step.

    Returns the folder's content after the first, the warnings, and the content after the second. Of a discarded folder
    it must have deleted all that can be.
    """
    cpu_backend.install()
    messages, remove, path = listen(), os.unlink, Path(folder)

    def refuse(target: Any, *args: Any, **kwargs: Any) -> None:
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), str(target))
        remove(target, *args, **kwargs)

    checkpoints = CheckpointManager(folder, keep=1, verify="full")
    os.unlink = refuse  # what shutil.rmtree and pathlib use
    checkpoints.save(4, table_state(rank, world_size, 4))
    os.unlink = remove
    after_first = names(path)
    assert all(names(discarded) == [name] for discarded in path.glob("*.discarded"))
    checkpoints.save(6, table_state(rank, world_size, 6))
    return after_first, messages, names(path)


@pytest.mark.parametrize("number", REASONS)
def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, number):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    (answer,) = run_distributed(save_while_a_file_is_read, 1, str(tmp_path), "common.pt", number)
    left, (warning,), later = answer
    assert left == ["step_00000002.discarded", "step_00000004"]
    assert warning.startswith(
        f"Cannot delete {tmp_path}/step_00000002, which is not needed any more ({REASONS[number]}"
    )
    assert warning.endswith("; the run goes on, and the next save tries again.")
    assert later == ["step_00000006"]


def test_a_checkpoint_that_cannot_be_touched_stays_whole(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    left, messages, later = run_distributed(save_while_a_file_is_read, 2, str(tmp_path), "manifest.json", errno.EACCES)[
        0
    ]
    assert left == ["step_00000002", "step_00000004"] and len(messages) == 1
    assert later == ["step_00000006"]


def test_a_link_to_an_archive_is_loaded_and_neither_deleted_nor_emptied(tmp_path):
    """Old checkpoints on a slower disk, linked back: the archive stays whole, and the run goes on."""
    run, archive = tmp_path / "checkpoints", tmp_path / "archive"
    run_distributed(save_steps, 1, str(run), [2])
    (run / "step_00000002").rename(archive)
    (run / "step_00000002").symlink_to(archive)
    assert run_distributed(load_latest, 1, str(run)) == [("step_00000002", [], True)]
    (left,) = run_distributed(save_steps, 1, str(run), [4, 6, 8], 1)
    assert left == ["step_00000002", "step_00000008"]
    assert (run / "step_00000002").is_symlink() and structural_problem(archive) is None


@pytest.mark.parametrize("target", ["archive", "nowhere"])
def test_a_link_in_the_way_of_a_save_is_set_aside(tmp_path, target):
    run, archive = tmp_path / "checkpoints", tmp_path / "archive"
    run_distributed(save_steps, 1, str(run), [2, 4])
    (run / "step_00000004").rename(archive)
    damage(archive)
    for name in ("step_00000004", "step_00000006.tmp"):
        (run / name).symlink_to(tmp_path / target)
    (left,) = run_distributed(save_steps, 1, str(run), [4, 6])
    assert left == [
        *("step_00000002", "step_00000004", "step_00000004.discarded", "step_00000006", "step_00000006.tmp.discarded")
    ]
    assert len(data_files(archive)) > 2 and (archive / "manifest.json").exists()
    assert run_distributed(load_latest, 1, str(run)) == [("step_00000006", [], True)]


def damage(folder: Path) -> None:
    flip_bit(folder / "common.pt")


def cut_off(folder: Path) -> None:
    folder.rename(folder.with_name(folder.name + ".tmp"))


@pytest.mark.parametrize(("spoil", "left"), [(damage, "step_00000004"), (cut_off, "step_00000004.tmp")])
def test_remains_of_the_same_step_that_cannot_be_deleted_do_not_end_the_run(tmp_path, spoil, left):
    run_distributed(save_steps, 1, str(tmp_path), [2, 4])
    spoil(tmp_path / "step_00000004")
    after, messages, later = run_distributed(save_while_a_file_is_read, 1, str(tmp_path), "__0_0.distcp", errno.EBUSY)[
        0
    ]
    assert after == ["step_00000002.discarded", "step_00000004", f"{left}.discarded"]
    assert any(f"Cannot delete {tmp_path}/{left}.discarded" in message for message in messages)
    assert later == ["step_00000006"]


def test_a_file_that_nfs_keeps_for_a_reader_belongs_to_no_checkpoint(tmp_path):
    for name in ("common.pt", ".metadata", ".nfs000000000012", "manifest.json"):
        (tmp_path / name).write_text("")
    assert data_files(tmp_path) == [".metadata", "common.pt"]


class Killed(BaseException):
    """The process ends here."""


def interrupted_saves(rank: int, world_size: int, folder: str) -> list[tuple[str | None, bool]]:
    """Ends a save at its first change of a folder, at its second, and so on until one comes through.

    Returns, for each, the newest usable checkpoint and whether its content is right.
    """
    cpu_backend.install()
    real = {name: getattr(os, name) for name in ("unlink", "rmdir", "rename", "mkdir")}
    results, finished = [], False
    while not finished:
        path, left = Path(folder) / str(len(results)), len(results)
        CheckpointManager(path, keep=1, verify="full").save(2, table_state(rank, world_size, 2))
        shutil.copytree(path / "step_00000002", path / "step_00000004")
        shutil.copytree(path / "step_00000002", path / "step_00000005.tmp")
        (path / "step_00000004" / "common.pt").write_text("damaged")

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return change(*args, **kwargs)

            return call

        for name, change in real.items():
            setattr(os, name, counted(change))
        try:
            CheckpointManager(path, keep=1, verify="full").save(4, table_state(rank, world_size, 4))
            finished = True
        except Killed:
            pass
        for name, change in real.items():
            setattr(os, name, change)
        assert all(structural_problem(item) is not None for item in path.glob("*.tmp"))
        name, _, is_right = load_latest(rank, world_size, str(path))
        results.append((name, is_right))
    return results


def test_no_interruption_harms_the_last_checkpoint(tmp_path):
    (results,) = run_distributed(interrupted_saves, 1, str(tmp_path))
    assert len(results) > 10
    kept = [name for name, _ in results]
    assert all(is_right for _, is_right in results)
    assert kept == ["step_00000002"] * kept.count("step_00000002") + ["step_00000004"] * kept.count("step_00000004")
    assert len(set(kept)) == 2
