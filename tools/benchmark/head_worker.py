"""One rank of one contender in a process of its own: holds the head, does steps when told, says what they took.

Started by heads.py. A line of JSON in, a line of JSON out: {"steps": n} -> {"seconds": [...], "cpu_seconds": [...],
"loss": x}; {"memory": true} -> {"peak_bytes": n}; the end of the input ends the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from head_contenders import Workload, build_contender

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.errors import MegatronOveError
from megatron_ove.parallel.topology import initialize_topology

_PAGE = 4096
_LARGE = 2**20


def main() -> int:
    """Serves until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("order", type=json.loads)
    order = parser.parse_args().order
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    try:
        _serve(order, replies)
    except (MegatronOveError, torch.OutOfMemoryError) as error:
        sentence = str(error).split("\n")[0]
        kind = "memory" if isinstance(error, torch.OutOfMemoryError) else "user"
        print(json.dumps({"error": sentence, "kind": kind}), file=replies, flush=True)
    return 0


def _serve(order: dict[str, Any], replies: TextIO) -> None:
    torch.set_num_threads(order["threads"])
    rank, ranks = order["rank"], order["ranks"]
    if order["device"] == "cpu":
        # Gloo from here on, also when there is one rank: megatron-core needs a process group.
        store = dist.FileStore(order["store"], ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    topology = initialize_topology(ParallelConfig(device=order["device"]), seed=0)
    _load_libraries(topology.device)
    baseline = _current_bytes(topology.device)
    work = Workload(**order["work"])
    contender = build_contender(order["contender"], work, topology)
    _touch_large_tensors(topology.device)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    step = 0
    for line in sys.stdin:
        command = json.loads(line)
        if "steps" not in command:
            print(json.dumps({"peak_bytes": _peak_bytes(topology.device) - baseline}), file=replies, flush=True)
            continue
        seconds, cpu_seconds = [], []
        for _ in range(command["steps"]):
            prepared = contender.prepare(work.samples(step, rank, ranks))
            _synchronize(topology.device)
            if ranks > 1:
                dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = contender.step(step, prepared)
            _synchronize(topology.device)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            step += 1
        reply = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": float(loss)}
        print(json.dumps(reply), file=replies, flush=True)


def _load_libraries(device: torch.device) -> None:
    """Does a little of everything, so that what libraries take for themselves is in the baseline."""
    weight = torch.nn.Parameter(torch.randn(64, 64, device=device))
    optimizer = torch.optim.AdamW([weight])
    for dtype in (torch.float32, torch.bfloat16):
        (torch.randn(64, 64, device=device, dtype=dtype) @ weight.to(dtype)).float().logsumexp(1).sum().backward()
        optimizer.step()


def _touch_large_tensors(device: torch.device) -> None:
    """Writes a byte of every page of every tensor: memory that was asked for as zeros is given at the first write."""
    if device.type != "cpu":
        return
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu" and item.layout == torch.strided:
            storage = item.untyped_storage()
            if storage.nbytes() >= _LARGE:
                torch.empty(0, dtype=torch.uint8).set_(storage)[::_PAGE] += 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _current_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status_bytes("VmRSS")


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    sys.exit(main())
