"""Runs a function in N gloo processes from an ordinary test.

Every call has processes of its own, so nothing that a rank sets or breaks reaches the next test. They are forked from a
server that has imported once all that ranks use, so that starting four of them takes tenths of a second: it is the
imports, seconds for each rank, that are shared, not the processes. Arguments and results travel by pickle, tensors by
value.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# The trainer imports the rest: megatron-core, DALI, pydantic. None of it starts a thread, which a fork would lose.
PRELOADED = ("torch.distributed", "megatron_ove.training.trainer", "pytest", "tests.support.tiny_run")
_CONTEXT.set_forkserver_preload(list(PRELOADED))


_PEER_FAILURE_S = 2.0


class WorkerError(AssertionError):
    """A rank failed, died or did not answer in time; the message holds its traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on every rank of a gloo world.

    Args:
        fn: a top-level function; torch.distributed (gloo) is initialised when it is called, with one thread per rank.
        world_size: number of processes.
        args: picklable arguments, the same for every rank.
        timeout_s: seconds after which every process is killed and the test fails.

    Returns:
        What each rank returned, in rank order; tensors on the CPU.

    Raises:
        WorkerError: with the traceback of the first rank that failed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before the server starts; its children inherit it
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="ove-rendezvous-") as folder:
        port, payload = _free_port(), pickle.dumps(args)
        workers, pipes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            target = (fn, rank, world_size, payload, sender, environment, f"{folder}/store", port, timeout_s)
            worker = _CONTEXT.Process(target=_worker, args=target, name=f"rank{rank}")
            worker.start()
            sender.close()
            workers.append(worker)
            pipes.append(receiver)
        try:
            return _collect(pipes, workers, time.monotonic() + timeout_s, timeout_s)
        finally:
            for worker in workers:
                _end(worker)


def _collect(pipes: list[Connection], workers: list[Any], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        if failures:  # a peer that was left alone fails too: the first in time is the cause
            open_pipes = [pipe for pipe in open_pipes if pipes.index(pipe) not in [rank for _, rank, _ in failures]]
            deadline = min(deadline, time.monotonic() + _PEER_FAILURE_S)
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic())) if open_pipes else []
        if failures and not ready:
            _, rank, content = min(failures)
            raise WorkerError(f"rank {rank} failed:\n{content}")
        if not ready:
            silent = [rank for rank in range(len(pipes)) if rank not in results]
            raise WorkerError(f"ranks {silent} did not finish within {timeout_s} s; all processes were killed")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                workers[rank].join(5)
                death = f"rank {rank} died with exit code {workers[rank].exitcode}"
                if failures:  # before it died or because of that: both are told
                    _, other, content = min(failures)
                    death += f", and rank {other} failed:\n{content}"
                raise WorkerError(death) from None
            if succeeded:
                results[rank] = content
            else:
                failures.append((content[0], rank, content[1]))
    return [results[rank] for rank in range(len(pipes))]


def _worker(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    payload: bytes,
    sender: Connection,
    environment: dict[str, str],
    store_path: str,
    port: int,
    timeout_s: float,
) -> None:
    os.setsid()  # so that processes this rank starts can be killed with it
    gc.freeze()  # what the server imported is here to stay, and takes half a second to look through
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        message = pickle.dumps((True, fn(rank, world_size, *pickle.loads(payload))))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while a peer still talks to it
    except BaseException:
        message = pickle.dumps((False, (time.time(), traceback.format_exc())))
    sender.send_bytes(message)
    sender.close()
    os._exit(0)  # skips gloo's slow teardown; everything this rank had to say is sent


def _end(worker: Any) -> None:
    worker.join(0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.join(5)
    worker.close()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def repository_root() -> Path:
    """The checkout this test runs in."""
    return Path(__file__).resolve().parents[2]
