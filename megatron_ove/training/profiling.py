"""`StepProfiler`: a window of steps under torch's profiler, on the ranks that were asked for.

It writes, for each of them, a trace for Perfetto, a table of the operators that cost most, and memory: on CUDA a
snapshot of the allocator, on a CPU the peak of each phase. It only watches: losses are the same with and without it.
Outside the window nothing is recorded and nothing is called but two comparisons a step.
"""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_ove.config.profile import ProfileConfig
from megatron_ove.errors import ConfigError
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.step_timers import PHASES, RANGE_PREFIX

logger = logging.getLogger(__name__)

_TABLE_ROWS = 40
_NAME_WIDTH = 70
_SNAPSHOT_ENTRIES = 200_000
"""Allocations and frees that a snapshot holds at most, the last ones; several KB each."""
_MIB = 2**20


class StepProfiler:
    """Call `before_step` and `after_step` around every step, inside `run_from`."""

    def __init__(self, config: ProfileConfig, topology: ParallelTopology, folder: Path) -> None:
        """
        Args:
            config: the window.
            topology: this rank's place.
            folder: where the files go.

        Raises:
            ConfigError: a rank does not exist.
        """
        unknown = [rank for rank in config.ranks if rank not in range(topology.world_size)]
        if unknown:
            raise ConfigError(
                f"profile.ranks names rank {unknown[0]}, but the ranks of this run are 0 to "
                f"{topology.world_size - 1}; name some of these",
                on_every_rank=True,
            )
        self._config, self._folder, self._rank = config, folder, topology.global_rank
        self._is_cuda = topology.device.type == "cuda"
        start = config.start_step or 0
        self._window = range(start, start + config.num_steps) if start else range(0)
        self._steps: range = range(0)  # of the window, as far as this launch and this rank record them
        self._profile: profile | None = None
        self._last_recorded = 0

    @contextmanager
    def run_from(self, first_step: int) -> Iterator[None]:
        """Prepares for a launch that starts with `first_step`, counted from 1; writes a window that the launch cuts."""
        self._warn_about_past_steps(first_step)
        if self._rank in self._config.ranks:
            self._steps = range(max(self._window.start, first_step), self._window.stop)
        self._first_step = first_step
        try:
            yield
        finally:
            if self._last_recorded:
                self._finish()

    def before_step(self, step: int) -> None:
        """Starts recording if `step` is the first to be recorded."""
        if not self._steps:
            return
        # One step earlier if there is one, since the profiler's own start is slow.
        if step == max(self._steps.start - 1, self._first_step):
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
            with_memory = self._config.memory and not self._is_cuda
            self._profile = profile(activities=activities, profile_memory=with_memory, acc_events=True)
            self._profile.prepare_trace()
        if step == self._steps.start and self._profile is not None:
            if self._config.memory and self._is_cuda:
                torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
            self._profile.start_trace()

    def after_step(self, step: int) -> None:
        """Writes the files if `step` was the last to be recorded."""
        if step in self._steps:
            self._last_recorded = step
            if step == self._steps[-1]:
                self._finish()

    def _warn_about_past_steps(self, first_step: int) -> None:
        if self._window and self._window.start < first_step and self._rank == min(self._config.ranks):
            rest = f"only from step {first_step} on" if self._window.stop > first_step else "nothing"
            logger.warning(
                "Steps %d to %d are to be profiled, but this run continues with step %d, so %s will be; give --profile "
                "a start that is still to come",
                *(self._window.start, self._window[-1], first_step, rest),
            )

    def _finish(self) -> None:
        recorded, last, self._profile = self._profile, self._last_recorded, None
        first, self._steps, self._last_recorded = self._steps.start, range(0), 0
        assert recorded is not None
        recorded.stop_trace()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = str(self._folder / f"rank{self._rank}_steps{first}-{last}")
        if self._config.memory and self._is_cuda:
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        elif self._config.memory:
            content = json.dumps(describe_memory(recorded), indent=1)
            Path(f"{stem}.memory.json").write_text(content + "\n", encoding="utf-8")
        recorded.export_chrome_trace(f"{stem}.trace.json.gz")
        sort_by = "self_device_time_total" if self._is_cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=sort_by, row_limit=_TABLE_ROWS, max_name_column_width=_NAME_WIDTH)
        Path(f"{stem}.operators.txt").write_text(table + "\n", encoding="utf-8")
        logger.info("Wrote the profile of steps %d to %d: %s.*", first, last, stem)


def describe_memory(recorded: profile) -> dict[str, Any]:
    """Returns what tensors took on the CPU, in MiB, by phase, and what the process took.

    `held` counts from the window's start: 0 is what was there before. A moment belongs to the innermost phase.
    """
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    moments: list[tuple[int, int, str, int]] = []  # (time, order at equal times, phase or "", bytes)
    for event in events:
        name, start = event.name(), event.start_ns()
        if name == "[memory]":
            moments.append((start, 1, "", event.nbytes()))
        elif name.startswith(RANGE_PREFIX):
            phase = name.removeprefix(RANGE_PREFIX).split(" ")[0].replace("step", "other")
            if phase not in PHASES:
                continue
            moments += [(start, 0, phase, 1), (start + event.duration_ns(), 2, phase, -1)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    return {"phases": peaks_by_phase(sorted(moments)), "process_peak_rss_mib": round(peak, 3)}


def peaks_by_phase(moments: Sequence[tuple[int, int, str, int]]) -> dict[str, dict[str, float]]:
    """Returns phase -> {"peak_held_mib", "allocated_mib"}.

    Args:
        moments: (time, order, phase, 1 or -1) where a phase begins or ends; (time, order, "", bytes) where memory is
            allocated or, with negative bytes, freed; sorted.
    """
    open_phases, held = ["outside"], 0
    peaks: dict[str, int] = {}
    allocated: dict[str, int] = {}
    for _, _, phase, amount in moments:
        if not phase:
            held += amount
            allocated[open_phases[-1]] = allocated.get(open_phases[-1], 0) + max(amount, 0)
        elif amount > 0:
            open_phases.append(phase)
        else:
            open_phases.pop()
        peaks[open_phases[-1]] = max(peaks.get(open_phases[-1], held), held)
    return {
        phase: {"peak_held_mib": round(peak / _MIB, 3), "allocated_mib": round(allocated.get(phase, 0) / _MIB, 3)}
        for phase, peak in peaks.items()
    }
