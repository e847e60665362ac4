"""`StepTimers`: where the time of a step goes on this rank.

Every moment of a step belongs to one phase, the innermost that was entered, so that the parts add up to the step. On a
CPU moments are read from the clock. On CUDA they are events on the current stream, read once the device has passed
them: nothing waits, and what the host does while the device is busy counts as nothing. The object is passed to those
who use it; megatron-core's schedules call it as their `config.timers`.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from megatron_ove.parallel.communication_watch import watch_communication

PHASES = ("data", "forward", "backward", "head", "optimizer", "communication", "other")
RANGE_PREFIX = "ove/"
"""Starts the names of all our ranges in a profiler's trace."""

# megatron-core's timers: what they time in our words. Its others enclose these, or time what our phases already do.
_PHASE_OF_TIMER = {"forward-compute": "forward", "backward-compute": "backward"}
_COMMUNICATION_ENDINGS = ("-recv", "-send", "-sync", "-reduce")


class StepTimers:
    """Seconds of each phase. Only `step` starts the clock; outside it everything else does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._clock: _Clock = _StreamClock() if device.type == "cuda" else _HostClock()
        # (name, phase that is charged, range in the profiler's trace), innermost last.
        self._open: list[tuple[str, str, record_function | None]] = []
        self._is_traced = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Times one step; `number` is its number, counted from 1."""
        self._is_traced = torch.autograd._profiler_enabled()
        self._clock.start()
        self._open.append(("step", "other", self._open_range(f"step {number}")))
        try:
            yield
        finally:
            self.leave("step")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges what happens inside to a phase, as far as it enters no other one."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def enter(self, name: str) -> None:
        """Starts a phase inside the present one."""
        if not self._open:
            return
        present = self._open[-1][1]
        self._clock.charge(present)
        # Waiting for the rank that decodes is waiting for data, though it happens in a broadcast.
        phase = present if name == "communication" and present == "data" else name
        self._open.append((name, phase, self._open_range(name)))

    def leave(self, name: str) -> None:
        """Ends the innermost phase of this name and what is still open inside it."""
        if all(name != other for other, _, _ in self._open):
            return
        self._clock.charge(self._open[-1][1])
        left = ""
        while left != name:
            left, _, trace_range = self._open.pop()
            if trace_range is not None:
                trace_range.__exit__(None, None, None)

    def __call__(self, name: str, log_level: int | None = None) -> PhaseTimer:
        """Returns a timer by one of megatron-core's names, or by the name of a phase."""
        phase = _PHASE_OF_TIMER.get(name, name if name in PHASES else None)
        if phase is None and name.endswith(_COMMUNICATION_ENDINGS):
            phase = "communication"
        return PhaseTimer(self, phase)

    def watch_communication(self) -> AbstractContextManager[None]:
        """Charges this thread's collectives and waits for them to `communication`, while the result is open."""
        return watch_communication(lambda: self.enter("communication"), lambda: self.leave("communication"))

    def take(self) -> dict[str, float]:
        """Returns phase -> seconds since the last call; waits for the device. Call it between steps."""
        seconds = self._clock.take()
        return {phase: seconds.get(phase, 0.0) for phase in PHASES}

    def _open_range(self, name: str) -> record_function | None:
        if not self._is_traced:
            return None
        trace_range = record_function(RANGE_PREFIX + name)
        trace_range.__enter__()
        return trace_range


class PhaseTimer:
    """What megatron-core calls a timer; without a phase it does nothing."""

    def __init__(self, timers: StepTimers, phase: str | None) -> None:
        self._timers, self._phase = timers, phase

    def start(self, barrier: bool = False) -> None:
        if self._phase is not None:
            self._timers.enter(self._phase)

    def stop(self, barrier: bool = False) -> None:
        if self._phase is not None:
            self._timers.leave(self._phase)


class _Clock(Protocol):
    def start(self) -> None:
        """Begins a step."""

    def charge(self, phase: str) -> None:
        """Gives the time since the last call to `phase`."""

    def take(self) -> dict[str, float]:
        """Returns phase -> seconds and starts anew."""
        ...


class _HostClock:
    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def charge(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class _StreamClock:
    """Events on the current stream. A step's are read when a later one begins and the device has passed them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps: deque[list[tuple[str, Any]]] = deque()
        self._free: list[Any] = []

    def start(self) -> None:
        while self._steps and self._steps[0][-1][1].query():
            self._read(self._steps.popleft())
        self._steps.append([("", self._record())])

    def charge(self, phase: str) -> None:
        if not torch.cuda.is_current_stream_capturing():  # an event in a CUDA graph has no time
            self._steps[-1].append((phase, self._record()))

    def take(self) -> dict[str, float]:
        if self._steps:
            self._steps[-1][-1][1].synchronize()
        while self._steps:
            self._read(self._steps.popleft())
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _record(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, marks: list[tuple[str, Any]]) -> None:
        for (_, before), (phase, after) in pairwise(marks):
            self._seconds[phase] += before.elapsed_time(after) / 1000
        self._free += [event for _, event in marks]
