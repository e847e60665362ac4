"""Every moment of a step belongs to one phase; megatron-core's timers are understood; the head's backward is found."""

from __future__ import annotations

import _thread
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.outputs import StepOutput, VisionFeatures
from megatron_ove.parallel.communication_watch import watch_communication
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.step_timers import PHASES, StepTimers
from megatron_ove.training.timed_head import timed_head


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Returns how to let time pass; no other time passes."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


@pytest.fixture
def timers() -> StepTimers:
    return StepTimers(torch.device("cpu"))


def nonzero(seconds: dict[str, float]) -> dict[str, float]:
    assert tuple(seconds) == PHASES
    return {phase: round(value, 9) for phase, value in seconds.items() if value}


def test_the_innermost_phase_is_charged_and_nothing_twice(timers: StepTimers, spend: Callable[[float], None]) -> None:
    spend(64)  # between steps: nobody's
    for _ in range(2):
        with timers.step(1):
            spend(1)
            timers("forward-compute", log_level=2).start()
            spend(2)
            with timers.phase("head"):
                spend(4)
                timers.enter("communication")
                spend(8)
                timers.leave("communication")
            spend(16)
            timers("forward-compute").stop()
            spend(32)
    assert nonzero(timers.take()) == {"forward": 36, "head": 8, "communication": 16, "other": 66}
    assert nonzero(timers.take()) == {}


def test_waiting_for_the_rank_that_decodes_is_waiting_for_data(
    timers: StepTimers, spend: Callable[[float], None]
) -> None:
    with timers.step(1), timers.phase("data"):
        timers.enter("communication")
        spend(3)
        timers.leave("communication")
        spend(1)
    assert nonzero(timers.take()) == {"data": 4}


def test_a_phase_ends_with_the_one_around_it(timers: StepTimers, spend: Callable[[float], None]) -> None:
    """The head's backward pass ends where the gradient reaches the features; a frozen encoder has none to receive."""
    with timers.step(1):
        timers("backward-compute").start()
        timers.enter("head")
        spend(2)
        timers("backward-compute").stop()
        spend(1)
        timers.leave("head")  # of no open phase
    assert nonzero(timers.take()) == {"head": 2, "other": 1}


def test_outside_a_step_nothing_happens(timers: StepTimers, spend: Callable[[float], None]) -> None:
    with timers.phase("optimizer"):
        spend(1)
    timers("backward-compute").start()
    timers("backward-compute").stop()
    assert nonzero(timers.take()) == {}


def test_every_timer_of_megatron_cores_schedules_is_understood(
    timers: StepTimers, spend: Callable[[float], None]
) -> None:
    root = Path(megatron.core.__file__).parent
    files = ("pipeline_parallel/schedules.py", "pipeline_parallel/p2p_communication.py")
    files += ("distributed/finalize_model_grads.py",)
    names = {name for file in files for name in re.findall(r"\btimers\('([\w-]+)'", (root / file).read_text())}
    assert len(names) > 10
    charged: dict[str, set[str]] = {}
    for name in names:
        with timers.step(1):
            timers(name).start(barrier=False)
            spend(1)
            timers(name).stop()
        (phase,) = nonzero(timers.take())
        charged.setdefault(phase, set()).add(name)
    assert charged.pop("forward") == {"forward-compute"}
    assert charged.pop("backward") == {"backward-compute"}
    assert charged.pop("other") == {"forward-backward"}  # encloses the others
    assert charged == {"communication": names - {"forward-compute", "backward-compute", "forward-backward"}}


def test_a_thread_that_prepares_steps_is_not_watched_and_autograds_is(topology: ParallelTopology) -> None:
    entered: list[int] = []

    def communicate() -> None:
        dist.all_reduce(torch.ones(1))

    def communicate_and_tell() -> None:
        communicate()
        done.set()

    done = threading.Event()
    with watch_communication(lambda: entered.append(threading.get_ident()), lambda: None):
        prepares = threading.Thread(target=communicate)
        prepares.start()
        prepares.join()
        assert entered == []
        communicate()
        assert set(entered) == {threading.get_ident()}
        autograds = _thread.start_new_thread(communicate_and_tell, ())  # as C++ does it: unknown to `threading`
        done.wait()
        assert set(entered) == {threading.get_ident(), autograds}


class Head:
    """Stands for the objectives: takes 2 s forward and 8 s backward."""

    def __init__(self, spend: Callable[[float], None]) -> None:
        self.spend = spend

    def forward(self, features: VisionFeatures, batch: Any, scales: Any) -> StepOutput:
        self.spend(2)
        return StepOutput(_Slow.apply(features.pooled, lambda: self.spend(8)).square().sum(), {})


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wait: Callable[[], None]) -> Tensor:
        ctx.wait = wait
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.wait()
        return gradient, None


def test_the_heads_backward_pass_is_told_from_the_encoders(timers: StepTimers, spend: Callable[[float], None]) -> None:
    weight = torch.randn(4, requires_grad=True)
    encoded = _Slow.apply(weight, lambda: spend(16)) * 3
    places = torch.arange(4, dtype=torch.int32)
    features = VisionFeatures(
        tokens=encoded[:, None, None],
        cu_seqlens=torch.arange(5, dtype=torch.int32),
        grids=torch.zeros(4, 3, dtype=torch.int32),
        sample=places,
        pooled=encoded[:, None],
    )
    head: Any = Head(spend)
    batch: Any = None
    plain = head.forward(features, batch, {})
    (expected,) = torch.autograd.grad(plain.loss, weight, retain_graph=True)
    with timers.step(1):
        output = timed_head(timers, head, features, batch, {})
        spend(1)
        timers("backward-compute").start()
        replace(output, loss=output.loss.clone()).loss.backward()
        spend(32)
        timers("backward-compute").stop()
    assert nonzero(timers.take()) == {"head": 10, "backward": 48, "other": 1}
    assert torch.equal(output.loss, plain.loss)
    assert weight.grad is not None and torch.equal(weight.grad, expected)


class Device:
    """A device that works behind the host's back, and events on its stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.done, self.num_events = 0.0, 0.0, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.event())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def event(self) -> DeviceEvent:
        self.num_events += 1
        return DeviceEvent(self)

    def launch(self, seconds: float) -> None:
        self.done = max(self.done, self.host) + seconds


class DeviceEvent:
    def __init__(self, device: Device) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.device.launch(0)
        self.time = self.device.done

    def query(self) -> bool:
        return self.time <= self.device.host

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.time)

    def elapsed_time(self, other: DeviceEvent) -> float:
        if not (self.query() and other.query()):
            raise RuntimeError("device not ready")
        return 1000 * (other.time - self.time)


def test_on_a_device_phases_are_its_streams_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timers = StepTimers(torch.device("cuda"))
    for number in (1, 2, 3, 4, 5):
        with timers.step(number):
            with timers.phase("forward"):
                device.launch(1)
            with timers.phase("backward"):
                device.launch(2)
                with timers.phase("head"):
                    device.launch(1)
            with timers.phase("data"):
                device.host += 1  # the device is busy all the while
    assert device.host < device.done  # nothing waited for the device
    assert nonzero(timers.take()) == {"forward": 5, "backward": 10, "head": 5}
    with timers.step(6):
        with timers.phase("data"):
            device.host += 3
        with timers.phase("forward"):
            device.launch(1)
    assert nonzero(timers.take()) == {"data": 3, "forward": 1}


def test_events_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timers = StepTimers(torch.device("cuda"))
    for number in range(50):
        with timers.step(number), timers.phase("forward"):
            device.launch(1)
        device.host = max(device.host, device.done)
    assert device.num_events == 4
    assert nonzero(timers.take()) == {"forward": 50}
