"""Tells when this process is inside a collective or waits for one, whoever called it.

torch has no hook for that, and most calls are made inside megatron-core. So the methods of torch's process groups are
wrapped while `watch_communication` is open, for the whole process; outside it torch is as it was. On CUDA the calls
only start work: an observer that records events on the current stream sees how long that stream is held up.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

# What torch.distributed's functions call; names of several torch versions, and those that are missing are left out.
_CALLS = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "send", "recv", "recv_anysource"),
    *("allgather", "allgather_coalesced", "all_gather_single", "all_gather_single_coalesced", "_allgather_base"),
    *("allgather_into_tensor_coalesced", "gather", "scatter", "alltoall", "alltoall_base", "all_to_all_single"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced", "_reduce_scatter_base"),
    *("reduce_scatter_tensor_coalesced", "_end_coalescing"),
)


@contextmanager
def watch_communication(entered: Callable[[], None], left: Callable[[], None]) -> Iterator[None]:
    """Calls `entered` and `left` around every collective, send, receive and wait of this thread and of autograd's.

    What a thread communicates that Python code has started, as the one that prepares steps, is beside this one's work.

    Args:
        entered: called before; on the thread that communicates.
        left: called after, also when the call fails.
    """
    opener = threading.current_thread()

    def is_watched() -> bool:
        thread = threading.current_thread()
        return thread is opener or isinstance(thread, threading._DummyThread)  # autograd's are not Python's

    places = [(dist.ProcessGroup, name) for name in _CALLS] + [(dist.Work, "wait")]
    saved = [(owner, name, vars(owner)[name]) for owner, name in places if name in vars(owner)]
    for owner, name, _ in saved:
        setattr(owner, name, _observed(getattr(owner, name), is_watched, entered, left))
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def _observed(
    call: Callable[..., Any], is_watched: Callable[[], bool], entered: Callable[[], None], left: Callable[[], None]
) -> Callable[..., Any]:
    @functools.wraps(call)
    def observed(*args: Any, **kwargs: Any) -> Any:
        if not is_watched():
            return call(*args, **kwargs)
        entered()
        try:
            return call(*args, **kwargs)
        finally:
            left()

    return observed
