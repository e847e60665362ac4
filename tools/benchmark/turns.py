"""Contenders in processes of their own that take turns, so that a slow minute of the machine hits all alike.

`head_rounds.py` does the same for the heads, over many ranks; here one process is one contender.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from head_rounds import ALLOCATORS
from torch import Tensor

from megatron_ove.errors import ConfigError, MegatronOveError
from megatron_ove.preprocess.tool_arguments import whole_number


class Contender(Protocol):
    """One way to do the work."""

    def outputs(self) -> dict[str, Tensor]:
        """Returns name -> result, on the CPU, to compare with the other contenders' before anything is timed."""
        ...

    def prepare(self) -> None:
        """Makes ready what the next step works on; not timed."""
        ...

    def step(self) -> dict[str, float]:
        """Does the work once; returns the seconds of its parts, {} if it does not tell them apart."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How the contenders run.

    Attributes:
        device: cpu or cuda.
        threads: of each contender, on the CPU.
        warmup: steps of a contender before the first turn; not timed.
        rounds: turns of each contender.
        steps: timed steps of a turn.
        allocator: what becomes of freed memory on the CPU, one of `head_rounds.ALLOCATORS`, for all contenders.
    """

    device: str = "cpu"
    threads: int = 2
    warmup: int = 1
    rounds: int = 3
    steps: int = 1
    allocator: str = "default"


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `schedule_of` reads."""
    add, at_least_1, schedule = parser.add_argument, whole_number(1), Schedule()
    add("--device", choices=["cpu", "cuda"], default=schedule.device, help="where to run")
    add("--threads", type=at_least_1, default=schedule.threads, help="on the CPU")
    add("--repeats", type=at_least_1, default=schedule.rounds, help="turns of each contender")
    add("--steps", type=at_least_1, default=schedule.steps, help="timed steps of a turn")
    add("--warmup", type=whole_number(0), default=schedule.warmup, help="steps before the first turn, not timed")
    add("--allocator", choices=sorted(ALLOCATORS), default=schedule.allocator, help="freed memory on the CPU, for all")


def schedule_of(options: argparse.Namespace) -> Schedule:
    """Returns the schedule that was asked for.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    return Schedule(options.device, options.threads, options.warmup, options.repeats, options.steps, options.allocator)


@dataclass
class Measurement:
    """Of one contender: seconds of each timed step, of its parts, and bytes at the peak above an empty process."""

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int = 0

    def summary(self) -> dict[str, Any]:
        """Returns median, extremes and all figures."""
        return {
            "seconds": statistics.median(self.seconds),
            "seconds_least": min(self.seconds),
            "seconds_most": max(self.seconds),
            "all_seconds": self.seconds,
            "parts": {name: statistics.median(values) for name, values in self.parts.items()},
            "peak_memory_bytes": self.peak_bytes,
        }


def take_turns(
    builders: Mapping[str, tuple[Callable[..., Contender], tuple[Any, ...]]],
    schedule: Schedule,
    compare: Callable[[Mapping[str, dict[str, Tensor]]], None],
    look_into: Callable[[Contender], dict[str, float]] | None = None,
) -> dict[str, Measurement]:
    """Returns name -> figures.

    Args:
        builders: name -> top-level function and arguments that build the contender, in its own process.
        schedule: how often they run.
        compare: given every contender's outputs, raises if they do not agree.
        look_into: top-level function, called at the end in each contender's process; its figures become `parts`.

    Raises:
        RuntimeError: a contender's process died.
        MegatronOveError: what a contender raised.
    """
    results = {name: Measurement() for name in builders}
    with ExitStack() as stack:
        running = {name: _Process(name, *build, schedule=schedule) for name, build in builders.items()}
        for process in running.values():
            stack.enter_context(process)
        for process in running.values():
            process.wait_until_built()
        compare({name: process.ask("outputs") for name, process in running.items()})
        for process in running.values():
            process.ask("steps", schedule.warmup)
        for _ in range(schedule.rounds):
            for name, process in running.items():
                for seconds, parts in process.ask("steps", schedule.steps):
                    results[name].seconds.append(seconds)
                    for part, value in parts.items():
                        results[name].parts.setdefault(part, []).append(value)
        for name, process in running.items():
            results[name].peak_bytes = process.ask("memory")
            if look_into is not None:
                results[name].parts = {part: [value] for part, value in process.ask("look", look_into).items()}
    return results


class _Process:
    def __init__(
        self, name: str, build: Callable[..., Contender], arguments: tuple[Any, ...], *, schedule: Schedule
    ) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments, schedule), daemon=True)
        environment = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(schedule.threads)}
        with mock.patch.dict(os.environ, environment | ALLOCATORS[schedule.allocator]):
            self._process.start()
        theirs.close()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # nothing is left to save, and many GB end sooner this way
        self._process.join()

    def wait_until_built(self) -> None:
        self._receive()

    def ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            why = "was killed, most likely for lack of memory" if code == -9 else f"ended with status {code}"
            raise RuntimeError(f"the process of contender {self._name} {why}") from None
        if isinstance(answer, MegatronOveError):
            raise answer
        return answer


def _serve(pipe: Connection, build: Callable[..., Contender], arguments: tuple[Any, ...], schedule: Schedule) -> None:
    torch.set_num_threads(schedule.threads)
    on_gpu = schedule.device == "cuda"
    _load_libraries(schedule.device)
    baseline = 0 if on_gpu else _status_bytes("VmRSS")
    try:
        contender = build(*arguments)
    except MegatronOveError as error:
        pipe.send(error)
        return
    pipe.send("built")
    while True:
        match pipe.recv():
            case ("outputs",):
                pipe.send(contender.outputs())
                if not on_gpu:
                    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
            case ("steps", count):
                pipe.send([_timed(contender, on_gpu) for _ in range(count)])
            case ("look", function):
                pipe.send(function(contender))
            case ("memory",):
                pipe.send(torch.cuda.max_memory_allocated() if on_gpu else _status_bytes("VmHWM") - baseline)
            case request:
                raise ValueError(f"{request!r} is no request of this worker")


def _timed(contender: Contender, on_gpu: bool) -> tuple[float, dict[str, float]]:
    contender.prepare()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    parts = contender.step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, parts


def _load_libraries(device: str) -> None:
    """Multiplies a little, so that what libraries take for themselves is no contender's."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
        (weight @ weight).sum().backward()


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")
