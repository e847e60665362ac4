"""The harness itself: a failing, hanging or dying rank fails the test quickly and leaves nothing behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import WorkerError, run_distributed


def _add_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, total


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    time.sleep(60)


def _die(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def test_results_in_rank_order() -> None:
    assert run_distributed(_add_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 1 failed:.*_fail_on_one.*ValueError: the reason"):
        run_distributed(_fail_on_one, 2)


def test_hanging_ranks_are_killed() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"ranks \[0, 1\] did not finish within 3 s"):
        run_distributed(_hang, 2, timeout_s=3)
    assert time.monotonic() - start < 20


def test_dead_rank_is_noticed() -> None:
    with pytest.raises(WorkerError, match="rank 0 died with exit code 3"):
        run_distributed(_die, 2)
