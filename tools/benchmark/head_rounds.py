"""Times contenders in turns, each in processes of its own.

If all fit into memory together they stay up and take turns every few steps. If not, one at a time is started, warmed
up, timed and ended, and the round starts again with the first. Either way a slow minute of the machine hits all alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from head_contenders import Workload
from head_traffic import count_cost, fits_together

from megatron_ove.errors import ConfigError

# What becomes of freed memory: as glibc has it; kept by the process; as glibc has it, but in huge pages.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)},
    "huge-pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}


@dataclass(frozen=True)
class Schedule:
    """How and where the contenders run.

    Attributes:
        steps: timed steps of a turn.
        rounds: turns of each contender.
        warmup: steps before the first turn of a process; not timed.
    """

    device: str = "cpu"
    threads: int = 1
    ranks: int = 1
    steps: int = 2
    rounds: int = 3
    warmup: int = 2
    allocator: str = "default"


@dataclass
class Measurement:
    """Of one contender; seconds of each timed step on the slowest rank, bytes on the largest.

    Attributes:
        missing: why there is no figure; "" when there is.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    moved_bytes: float = 0.0
    missing: str = ""

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def measure(names: Sequence[str], work: Workload, schedule: Schedule) -> dict[str, Measurement]:
    """Returns contender -> figures. One that does not fit into memory is left out with the reason."""
    available = _available_bytes(schedule.device)
    costs = {name: count_cost(name, work, schedule.ranks) for name in names}
    on_gpu = schedule.device == "cuda"
    results = {name: Measurement(moved_bytes=costs[name].moved_bytes) for name in names}
    runnable = []
    for name in names:
        if fits_together([costs[name]], schedule.ranks, available, on_gpu=on_gpu):
            runnable.append(name)
        else:
            needed = schedule.ranks * costs[name].memory_bytes
            results[name].missing = f"needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
    if fits_together([costs[name] for name in runnable], schedule.ranks, available, on_gpu=on_gpu):
        _take_turns(runnable, work, schedule, results)
    else:
        for _ in range(schedule.rounds):
            for name in runnable:
                _take_turns([name], work, schedule, results, rounds=1)
    return results


def _take_turns(
    names: Sequence[str],
    work: Workload,
    schedule: Schedule,
    results: Mapping[str, Measurement],
    rounds: int | None = None,
) -> None:
    with ExitStack() as stack:
        running = {}
        for name in names:
            if not results[name].missing:
                running[name] = stack.enter_context(_Contender(name, work, schedule, results[name]))
                running[name].steps(schedule.warmup, timed=False)
        for _ in range(rounds or schedule.rounds):
            for contender in running.values():
                contender.steps(schedule.steps, timed=True)
        for contender in running.values():
            contender.ask_memory()


class _Contender:
    """The processes of one contender, one per rank."""

    def __init__(self, name: str, work: Workload, schedule: Schedule, result: Measurement) -> None:
        self._name, self._work, self._schedule, self._result = name, work, schedule, result
        self._processes: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="head-benchmark-")

    def __enter__(self) -> Self:
        schedule = self._schedule
        environment = os.environ | ALLOCATORS[schedule.allocator]
        environment |= {"OMP_NUM_THREADS": str(schedule.threads), "PYTHONWARNINGS": "ignore"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        for rank in range(schedule.ranks):
            order = {"contender": self._name, "work": asdict(self._work), "rank": rank, "ranks": schedule.ranks}
            order |= {"threads": schedule.threads, "device": schedule.device, "store": f"{self._folder.name}/store"}
            script = Path(__file__).with_name("head_worker.py")
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), json.dumps(order)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        self._collect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()  # nothing is left to save, and tables of many GB end sooner this way
        for process in self._processes:
            process.communicate()
        self._folder.cleanup()

    def steps(self, count: int, *, timed: bool) -> None:
        replies = self._tell({"steps": count}) if count else []
        if timed and replies:
            for key, known in (("seconds", self._result.seconds), ("cpu_seconds", self._result.cpu_seconds)):
                known += [max(times) for times in zip(*(reply[key] for reply in replies), strict=True)]

    def ask_memory(self) -> None:
        peaks = [reply["peak_bytes"] for reply in self._tell({"memory": True})]
        self._result.peak_bytes = max([self._result.peak_bytes, *peaks])

    def _tell(self, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self._result.missing:
            return []
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                break  # `_collect` says what became of the process
        return self._collect()

    def _collect(self) -> list[dict[str, Any]]:
        replies = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            reply = json.loads(line) if line else {"error": self._describe_death(process), "kind": "death"}
            if "error" in reply:
                if reply["kind"] == "user":
                    raise ConfigError(reply["error"])
                if reply["kind"] == "death" and process.returncode not in (-9, 137):
                    raise RuntimeError(f"contender {self._name}, rank {rank}: {reply['error']}")
                self._result.missing = reply["error"]
                return []
            replies.append(reply)
        return replies

    def _describe_death(self, process: subprocess.Popen[str]) -> str:
        status = process.wait()
        return "was killed, most likely for lack of memory" if status == -9 else f"ended with status {status}"


def _available_bytes(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")
