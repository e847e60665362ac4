"""Random-number generators of every rank, saved per rank.

Data order, augmentation, label slots and negatives are functions of (seed, step, sample) and keep no generator. What is
saved here are the ambient ones: torch, CUDA, numpy, Python and megatron-core's tensor-parallel tracker. They belong to
a rank, so they are restored only into an equal layout; another layout keeps its fresh seeds.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker


def sharded_rng_state(*, rank: int, world_size: int) -> ShardedObject:
    """Returns this rank's generators as one object of the checkpoint, under the key "rng"."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), cached),
        "python": random.getstate(),
        "tensor_parallel": dict(_tensor_parallel_tracker().get_states()),
    }
    return ShardedObject("rng", state, (world_size,), (rank,))


def restore_rng_state(state: dict[str, Any]) -> None:
    """Sets this rank's generators to what `sharded_rng_state` saved."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    _tensor_parallel_tracker().set_states(state["tensor_parallel"])


def _tensor_parallel_tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None, "the topology seeds megatron-core's generators before anything else"
    return tracker
