"""The grid over 4 processes: who is where, and which group holds whom."""

from __future__ import annotations

import torch.distributed as dist

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.parallel.topology import initialize_topology
from tests.support.distributed import run_distributed


def _describe(rank: int, world_size: int, sizes: dict) -> dict:
    topology = initialize_topology(ParallelConfig(**sizes), seed=0)
    groups = {
        name: dist.get_process_group_ranks(getattr(topology, f"{name}_group"))
        for name in ("tensor", "pipeline", "data", "class")
    }
    ranks = (topology.tensor_rank, topology.data_rank, topology.pipeline_rank)
    sizes = (topology.tensor_size, topology.data_size, topology.pipeline_size)
    chunks = [
        (topology.is_first_chunk(vp), topology.is_last_chunk(vp)) for vp in range(topology.virtual_pipeline_size or 1)
    ]
    return {"ranks": ranks, "sizes": sizes, "chunks": chunks, **groups}


def test_tensor_and_pipeline() -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    results = run_distributed(_describe, 4, sizes)
    assert [result["ranks"] for result in results] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [result["sizes"] for result in results] == [(2, 1, 2)] * 4
    assert [result["tensor"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["pipeline"] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [result["class"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["chunks"] for result in results] == [[(True, False)]] * 2 + [[(False, True)]] * 2


def test_data_and_virtual_pipeline() -> None:
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    results = run_distributed(_describe, 4, sizes)
    assert [result["ranks"] for result in results] == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    assert [result["data"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["class"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    first, last = [(True, False), (False, False)], [(False, False), (False, True)]
    assert [result["chunks"] for result in results] == [first, first, last, last]
