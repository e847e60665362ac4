"""On a GPU phases are the stream's time, nothing waits in a step, and a window holds kernels and allocations."""

from __future__ import annotations

import gzip
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ove.config.profile import ProfileConfig
from megatron_ove.training.profiling import StepProfiler
from megatron_ove.training.step_timers import StepTimers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUSY_S = 0.1


@pytest.fixture(scope="module")
def cycles() -> int:
    """Cycles that keep the device busy for BUSY_S."""
    trial = 100_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    start.record()
    torch.cuda._sleep(trial)
    end.record()
    end.synchronize()
    return int(trial * BUSY_S / (start.elapsed_time(end) / 1000))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_phases_are_the_streams_time_and_nothing_waits(cycles: int, no_waiting: None) -> None:
    timers = StepTimers(torch.device("cuda"))
    started = time.perf_counter()
    for number in (1, 2, 3):
        with timers.step(number):
            with timers.phase("forward"):
                torch.cuda._sleep(cycles)
            with timers.phase("backward"):
                torch.cuda._sleep(2 * cycles)
                with timers.phase("head"):
                    torch.cuda._sleep(cycles)
            with timers.phase("data"):
                time.sleep(BUSY_S)  # hidden: the device is busy all the while
    launched = time.perf_counter() - started
    assert launched < 6 * BUSY_S  # of the 12 that the device takes
    torch.cuda.set_sync_debug_mode("default")
    seconds = {phase: value / BUSY_S for phase, value in timers.take().items()}
    assert seconds == pytest.approx(
        {"data": 0, "forward": 3, "backward": 6, "head": 3, "optimizer": 0, "communication": 0, "other": 0}, abs=0.3
    )


def test_waiting_for_data_shows_when_the_device_has_nothing_to_do(cycles: int) -> None:
    timers = StepTimers(torch.device("cuda"))
    torch.cuda.synchronize()
    with timers.step(1):
        with timers.phase("data"):
            time.sleep(BUSY_S)
        with timers.phase("forward"):
            torch.cuda._sleep(cycles)
    seconds = timers.take()
    assert seconds["data"] == pytest.approx(BUSY_S, rel=0.3)
    assert seconds["forward"] == pytest.approx(BUSY_S, rel=0.3)


def test_events_are_used_again(cycles: int) -> None:
    timers = StepTimers(torch.device("cuda"))
    for number in range(50):
        with timers.step(number + 1):
            for _ in range(10):
                with timers.phase("forward"):
                    torch.cuda._sleep(1000)
        torch.cuda.synchronize()  # as every training step does, to agree on whether it is finite
    clock: Any = timers._clock
    assert len(clock._free) + sum(len(marks) for marks in clock._steps) <= 3 * 22


def test_a_captured_graph_disturbs_nothing() -> None:
    timers = StepTimers(torch.device("cuda"))
    x = torch.ones(8, device="cuda")
    with timers.step(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), timers.phase("communication"):
            x.add_(1)
        graph.replay()
    assert timers.take()["other"] > 0


def test_a_window_holds_kernels_and_allocations(tmp_path: Path) -> None:
    topology: Any = SimpleNamespace(world_size=1, global_rank=0, device=torch.device("cuda", 0))
    profiler = StepProfiler(ProfileConfig(start_step=2, num_steps=1), topology, tmp_path)
    timers = StepTimers(torch.device("cuda"))
    with profiler.run_from(1):
        for step in (1, 2, 3):
            profiler.before_step(step)
            with timers.step(step), timers.phase("forward"):
                x = torch.randn(512, 512, device="cuda")
                (x @ x).sum()
            profiler.after_step(step)
    stem = tmp_path / "rank0_steps2-2"
    with gzip.open(f"{stem}.trace.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert {"ove/step 2", "ove/forward"} <= {event["name"] for event in events}
    assert "ove/step 3" not in {event["name"] for event in events}
    snapshot = pickle.loads(Path(f"{stem}.memory.pickle").read_bytes())
    assert any(entry["action"] == "alloc" for device in snapshot["device_traces"] for entry in device)
    assert "CUDA" in Path(f"{stem}.operators.txt").read_text()
