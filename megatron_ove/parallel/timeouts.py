"""How long a collective may wait for another rank, changed while a run goes on."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

# How gloo says that it gave up. NCCL says nothing to Python: its watchdog writes a message and ends the process.
_SIGN = "Timed out waiting"


def set_collective_timeout(seconds: float) -> None:
    """Sets the timeout of all process groups of this process, megatron-core's too, for collectives that start later.

    Sends and receives between pipeline stages keep the timeout that gloo's connections were made with.

    Args:
        seconds: that one collective may wait.
    """
    for group in list(distributed_c10d._world.pg_map):  # torch alone knows all of them
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def wait_for_all_ranks() -> None:
    """Returns when every rank of the run has called it; collective."""
    dist.barrier()


def is_collective_timeout(error: BaseException | None) -> bool:
    """Whether an error says that a collective has waited as long as it may."""
    return isinstance(error, RuntimeError) and _SIGN in str(error)
