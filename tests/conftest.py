"""One thread per process: the machines that run these tests are small and several ranks share them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def topology() -> Iterator["ParallelTopology"]:  # noqa: F821, UP037  # imported late: many tests need no torch
    """This process as a run of one, on the CPU."""
    from megatron_ove.config.parallel import ParallelConfig
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield initialize_topology(ParallelConfig(device="cpu"), seed=0)
        destroy_topology()
