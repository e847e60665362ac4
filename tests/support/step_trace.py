"""What a training step really does on this rank: messages by group, and the bytes that the backward pass keeps.

Messages of the thread that traces are seen where torch dispatches them to a backend, so it does not matter through
which reference to which function they were sent. Kept bytes are storages that autograd saved, counted once however many
views were saved.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ove.parallel.topology import ParallelTopology

# c10d operator -> (name, index of the argument whose tensors are what the group shares)
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
_SILENT = {"recv_", "barrier", "monitored_barrier_"}


class MessageTrace(TorchDispatchMode):
    """Counts messages: (group, operation) -> [number, bytes of the whole tensor]; groups of one rank are left out."""

    def __init__(self, topology: ParallelTopology) -> None:
        super().__init__()
        self.messages: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._names = _group_names(topology)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        if name in _SILENT:
            return
        operation, place = _COLLECTIVES[name]
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        if group.size() == 1:
            return
        tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
        name = self._names.get(group.group_name, str(dist.get_process_group_ranks(group)))
        # Between two stages megatron-core sends one direction over the group of all ranks.
        entry = self.messages["pipeline" if operation == "send" else name, operation]
        entry[0] += 1
        entry[1] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _group_names(topology: ParallelTopology) -> dict[str, str]:
    groups = topology.process_groups
    named = [
        ("world", dist.group.WORLD),
        ("model", groups.mp),
        ("tensor", groups.tp),
        ("pipeline", groups.pp),
        ("data", groups.dp),
        ("data", groups.dp_cp),
        ("world", getattr(groups, "intra_dist_opt", None)),
        ("tensor", topology.tensor_group),
        ("pipeline", topology.pipeline_group),
        ("data", topology.data_group),
        ("data", topology.data_host_group),
        ("model", topology.replica_host_group),
        ("class", topology.class_group),
    ]
    return {group.group_name: name for name, group in named if group is not None}


class KeptBytes:
    """Bytes of storages that are saved for a backward pass: now, and at most so far; `ignored` ones do not count."""

    def __init__(self, ignored: Callable[[], set[int]]) -> None:
        self._ignored = ignored
        self._holders: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        kept = _Kept(tensor.detach() if not tensor.requires_grad else tensor)
        key = storage.data_ptr()
        if storage.nbytes() == 0 or key in self._ignored():
            return kept
        self._holders[key] += 1
        if self._holders[key] == 1:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self._release, key)
        return kept

    def _release(self, key: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self.now -= self._sizes.pop(key)


class _Kept:
    """Holds a saved tensor; lives as long as autograd needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made since it was entered and not yet freed: now, and at most since `reset_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size
