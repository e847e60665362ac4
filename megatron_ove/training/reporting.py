"""Turns step results into rows of figures for the files, the trackers and the screen."""

from __future__ import annotations

import time

from megatron_ove.config.train import TrainConfig
from megatron_ove.training.loggers import MetricLogger, build_loggers
from megatron_ove.training.metrics import MetricAccumulator, averages
from megatron_ove.training.progress import ProgressDisplay
from megatron_ove.training.train_state import TrainState
from megatron_ove.training.train_step import StepResult


class RunReporter:
    """Collects on all ranks, writes and shows on rank 0."""

    def __init__(self, config: TrainConfig, *, is_main: bool, start_step: int) -> None:
        """
        Args:
            config: the run.
            is_main: whether this is rank 0.
            start_step: steps done before this launch; later rows of an earlier launch are dropped.
        """
        self._config = config
        self._is_main = is_main
        self._metrics = MetricAccumulator()
        self._steps = 0
        self._loggers: list[MetricLogger] = build_loggers(config, resume_step=start_step) if is_main else []
        self._display = ProgressDisplay(num_steps=config.train.num_steps, start_step=start_step) if is_main else None

    def step_done(
        self,
        state: TrainState,
        result: StepResult,
        *,
        lr: float,
        data_wait_s: float,
        step_time_s: float,
        is_due: bool,
    ) -> None:
        """Takes in a step; reports if due; collective.

        Args:
            state: counters after the step.
            result: what came of it.
            lr: the encoder's rate in it.
            data_wait_s: seconds this rank waited for data.
            step_time_s: seconds of the whole step on this rank.
            is_due: whether to report now. True before every save too, so that rows do not depend on interruptions.
        """
        self._metrics.merge(result.metrics)
        self._metrics.add("data_wait_s", data_wait_s)
        self._metrics.add("step_time_s", step_time_s)
        self._steps += 1
        if self._display:
            self._display.step_done(state.step)
        if not is_due:
            return
        totals = self._metrics.reduce()
        num_steps, self._steps = self._steps, 0
        if not self._is_main:
            return
        row = self._row(state, totals, lr=lr, num_steps=num_steps)
        for logger in self._loggers:
            logger.log(row)
        if self._display:
            self._display.report(row)

    def _row(
        self, state: TrainState, totals: dict[str, tuple[float, float]], *, lr: float, num_steps: int
    ) -> dict[str, float]:
        tokens, capacity = totals.pop("tokens", (0.0, 0.0))
        waited, ranks = totals.pop("data_wait_s")
        step_time = totals["step_time_s"][0] / totals["step_time_s"][1]
        values = averages(totals)
        return {
            "step": state.step,
            "samples": state.samples_seen,
            **{name: values[name] for name in sorted(values) if name != "step_time_s"},
            "lr": lr,
            "samples_per_s": self._config.train.global_batch_size / step_time,
            "tokens_per_s": tokens / num_steps / step_time,
            "data_wait_share": waited / ranks / step_time,
            "step_time_s": step_time,
            "padding_share": 1.0 - tokens / capacity if capacity else 0.0,
            "refused_steps": state.refused_steps,
            "time": time.time(),
        }

    def close(self) -> None:
        """Writes out and closes everything."""
        if self._display:
            self._display.close()
        for logger in self._loggers:
            logger.close()
