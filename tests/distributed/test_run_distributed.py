"""The harness itself: a failing, hanging or dying rank fails the test quickly and leaves nothing behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import PRELOADED, WorkerError, run_distributed


def _add_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, total


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def _hang(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(3600)


def _die(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def _imported(rank: int, world_size: int) -> set[str]:
    return set(sys.modules)


def _set_something(rank: int, world_size: int) -> tuple[bool, str | None, int]:
    """Leaves a variable and an attribute behind; returns whether they were there before, and this process's id."""
    before = hasattr(dist, "left_behind"), os.environ.get("LEFT_BEHIND"), os.getpid()
    dist.left_behind = True  # type: ignore[attr-defined]
    os.environ["LEFT_BEHIND"] = "yes"
    return before


def test_results_in_rank_order() -> None:
    assert run_distributed(_add_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 1 failed:.*_fail_on_one.*ValueError: the reason"):
        run_distributed(_fail_on_one, 2)


def test_hanging_ranks_are_killed(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ranks \[0, 1\] did not finish within 3 s"):
        run_distributed(_hang, 2, tmp_path, timeout_s=3)
    for process in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process.name), 0)


def test_dead_rank_is_noticed() -> None:
    with pytest.raises(WorkerError, match="rank 0 died with exit code 3"):
        run_distributed(_die, 2)


def test_ranks_find_everything_imported() -> None:
    """A module that cannot be imported by the server is passed over in silence; each rank would import it anew."""
    assert set(PRELOADED) <= run_distributed(_imported, 1)[0]


def test_nothing_that_a_rank_leaves_behind_reaches_the_next_call() -> None:
    first, second = (run_distributed(_set_something, 1)[0] for _ in range(2))
    assert first[:2] == second[:2] == (False, None)
    assert first[2] != second[2]
