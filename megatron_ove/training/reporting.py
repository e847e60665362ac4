"""Turns step results into rows of figures for the files, the trackers and the screen."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from megatron_ove.config.train import TrainConfig
from megatron_ove.training.chance_watch import ChanceWatch
from megatron_ove.training.loggers import MetricLogger, build_loggers
from megatron_ove.training.metrics import MetricAccumulator, Total, averages
from megatron_ove.training.progress import ProgressDisplay
from megatron_ove.training.step_timers import PHASES, StepTimers
from megatron_ove.training.train_state import TrainState
from megatron_ove.training.train_step import StepResult

logger = logging.getLogger(__name__)


class RunReporter:
    """Collects on all ranks, writes and shows on rank 0."""

    def __init__(
        self, config: TrainConfig, timers: StepTimers, *, is_main: bool, start_step: int, peak_rate: float | None
    ) -> None:
        """
        Args:
            config: the run.
            timers: of the steps.
            is_main: whether this is rank 0.
            start_step: steps done before this launch; later rows of an earlier launch are dropped.
            peak_rate: operations per second that a device can do at best; None = not known, so no MFU.
        """
        self._config = config
        self._operations = config.kinds.encoders[config.encoder.kind].operations
        self._timers = timers
        self._is_main = is_main
        self._peak_rate = peak_rate
        self._metrics = MetricAccumulator()
        self._steps = 0
        self._loggers: list[MetricLogger] = build_loggers(config, resume_step=start_step) if is_main else []
        self._chance = ChanceWatch(config) if is_main else None
        self._display = ProgressDisplay(num_steps=config.train.num_steps, start_step=start_step) if is_main else None
        if self._chance and self._chance.losses:
            losses = ", ".join(f"{name} {loss:.2f}" for name, loss in self._chance.losses.items())
            logger.info("A head that knows nothing has the loss: %s.", losses)

    def step_done(self, state: TrainState, result: StepResult, *, lr: float, is_due: bool) -> None:
        """Takes in a step; reports if due; collective.

        Args:
            state: counters after the step.
            result: what came of it.
            lr: the encoder's rate in it.
            is_due: whether to report now. True before every save too, so that rows do not depend on interruptions.
        """
        self._metrics.merge(result.metrics)
        self._steps += 1
        if self._display:
            self._display.step_done(state.step)
        if not is_due:
            return
        num_steps, self._steps = self._steps, 0
        for phase, seconds in self._timers.take().items():
            self._metrics.add(f"phase_s/{phase}", seconds, num_steps)
        totals = self._metrics.reduce()
        if not self._is_main:
            return
        row = self._row(state, totals, lr=lr, num_steps=num_steps)
        for destination in self._loggers:
            destination.log(row)
        if self._display:
            self._display.report(row)
        for sentence in self._chance.observe(row) if self._chance else []:
            logger.warning("%s", sentence)

    def held_out_done(self, state: TrainState, figures: Mapping[str, float]) -> None:
        """Writes and shows figures on held-out data, on rank 0; they are a line of their own in metrics.jsonl.

        Args:
            state: counters after the step.
            figures: from `HeldOutEvaluation.measure`.
        """
        if not self._is_main:
            return
        row = {"step": state.step, **figures, "time": time.time()}
        for destination in self._loggers:
            destination.log(row)
        if self._display:
            self._display.report_held_out(row)

    def _row(self, state: TrainState, totals: dict[str, Total], *, lr: float, num_steps: int) -> dict[str, float]:
        phases = {phase: totals.pop(f"phase_s/{phase}") for phase in PHASES}
        num_ranks = phases["other"].count / num_steps
        seconds = {phase: total.sum / total.count for phase, total in phases.items()}
        step_time = sum(seconds.values())
        nothing = Total(0.0, 0.0, 0.0)
        tokens, capacity, _ = totals.pop("tokens", nothing)
        samples, squares = totals.pop("encoded_samples", nothing).sum, totals.pop("token_squares", nothing).sum
        operations = self._operations(self._config.encoder, tokens=tokens, samples=samples, squares=squares)
        rate = sum(operations.values()) / num_steps / step_time / num_ranks
        values, chance = averages(totals), self._chance.losses if self._chance else {}
        row = {
            "step": state.step,
            "samples": state.samples_seen,
            **{name: values[name] for name in sorted(values)},
            **{f"chance_loss/{name}": loss for name, loss in chance.items() if f"loss/{name}" in values},
            "lr": lr,
            "samples_per_s": self._config.train.global_batch_size / step_time,
            "tokens_per_s": tokens / num_steps / step_time,
            "data_wait_share": seconds["data"] / step_time,
            "step_time_s": step_time,
            "padding_share": 1.0 - tokens / capacity if capacity else 0.0,
            "tflops_per_device": rate / 1e12,
            **({"mfu": rate / self._peak_rate} if self._peak_rate else {}),
            **{f"phase_s/{phase}": value for phase, value in seconds.items()},
            **{f"phase_share/{phase}": value / step_time for phase, value in seconds.items()},
            "refused_steps": state.refused_steps,
            "bad_samples": state.bad_samples,
            "time": time.time(),
        }
        if num_ranks > 1:
            row |= {f"phase_s_max/{phase}": total.largest for phase, total in phases.items()}
        return row

    def close(self) -> None:
        """Writes out and closes everything."""
        if self._display:
            self._display.close()
        for destination in self._loggers:
            destination.close()
