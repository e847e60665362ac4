"""READ THIS FIRST. A training run from top to bottom.

`Trainer` builds the parts in the order in which they need one another, continues from the newest checkpoint of the run
folder if there is one, and then repeats: next microbatches, one step, report, save. Everything that happens inside a
step is in `train_step.py`; which samples a step sees is a function of (seed, step) in `data/`; rates are a function of
the step in `optim/schedule.py`. So the only states of a run are weights, moments and the step.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_ove.config.train import TrainConfig
from megatron_ove.data.build import build_loader
from megatron_ove.errors import TrainingError
from megatron_ove.objectives.build import build_objectives
from megatron_ove.optim.optimizer import build_encoder_optimizer
from megatron_ove.optim.schedule import learning_rate
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.build_model import build_model_chunks, weight_dtype
from megatron_ove.training.profiling import StepProfiler
from megatron_ove.training.reporting import RunReporter
from megatron_ove.training.run_checkpoints import RunCheckpoints
from megatron_ove.training.step_timers import StepTimers
from megatron_ove.training.stop_signal import StopSignal
from megatron_ove.training.train_state import TrainState
from megatron_ove.training.train_step import StepResult, TrainStep

logger = logging.getLogger(__name__)


class Trainer:
    """One run on one rank; build and run it on every rank of the topology."""

    def __init__(self, config: TrainConfig, topology: ParallelTopology, *, peak_rate: float | None = None) -> None:
        """Builds all parts and restores the newest checkpoint of `config.run_dir`; collective.

        Args:
            config: the run.
            topology: this rank's place.
            peak_rate: operations per second that a device can do at best, for MFU; None = not known.

        Raises:
            ConfigError: a rank is to be profiled that does not exist.
            CheckpointError: the run folder holds a checkpoint that does not fit or cannot be read.
            DataError: a source cannot be used.
        """
        self.config = config
        self.state = TrainState()
        self._is_main = topology.global_rank == 0
        self._run_dir = Path(config.run_dir)
        self.timers = StepTimers(topology.device)
        self.profiler = StepProfiler(config.profile, topology, self._run_dir / "profile")

        self.objectives = None
        if topology.is_last_stage:
            self.objectives = build_objectives(
                config.objectives,
                topology=topology,
                embedding_size=config.encoder.hidden_size,
                seed=config.seed,
                optim=config.optim.class_centers,
                dtype=weight_dtype(config),
            )
        self.chunks = build_model_chunks(config, topology, self.objectives)
        self.optimizer = build_encoder_optimizer(
            self.chunks,
            config.optim,
            dtype=weight_dtype(config),
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            process_groups=topology.process_groups,
        )
        self.train_step = TrainStep(
            topology,
            self.chunks,
            self.objectives,
            self.optimizer,
            self.timers,
        )
        self.checkpoints = RunCheckpoints(config, topology, self.chunks, self.objectives, self.optimizer)
        self._restore()
        self.loader = build_loader(config, topology, start_step=self.state.step)
        if self._is_main:
            for sentence in self.checkpoints.size_warnings(self.loader.source_sizes):
                logger.warning("%s", sentence)
        self.reporter = RunReporter(
            config, self.timers, is_main=self._is_main, start_step=self.state.step, peak_rate=peak_rate
        )

    def run(self) -> TrainState:
        """Trains to `num_steps`, or until a stop is asked for; saves at the end; returns the counters."""
        config, state = self.config, self.state
        first_step = state.step
        try:
            with (
                StopSignal(self._run_dir, watch_file=self._is_main) as stop,
                self.timers.watch_communication(),
                self.profiler.run_from(state.step + 1),
            ):
                if config.checkpoint.save_initial and not self._was_restored:
                    self._save()
                is_last = state.step >= config.train.num_steps
                while not is_last:
                    wants_stop = stop.requested or state.step + 1 - first_step == config.train.stop_after_steps
                    lr, number = self._lr(state.step), state.step + 1
                    self.profiler.before_step(number)
                    with self.timers.step(number):
                        result = self._one_step(lr, wants_stop)
                    self.profiler.after_step(number)
                    is_last = result.stop_requested or state.step >= config.train.num_steps
                    saves = is_last or state.step % config.checkpoint.interval_steps == 0
                    self.reporter.step_done(
                        state,
                        result,
                        lr=lr,
                        is_due=saves or state.step % config.train.log_interval_steps == 0,
                    )
                    if saves:
                        self._save()
                self._log_end(stop)
        finally:
            self.reporter.close()
            self.loader.close()
        return state

    def _one_step(self, lr: float, wants_stop: bool) -> StepResult:
        state = self.state
        with self.timers.phase("data"):
            batches = self.loader.step_batches(state.step)
        prepared = None
        if self.objectives is not None:
            with self.timers.phase("head"):
                prepared = self.objectives.prepare_step(state.step, batches, self.loader.sample_counts)
        result = self.train_step(
            batches,
            prepared,
            encoder_lr=lr,
            class_lr=lr * self.config.optim.class_centers.lr_multiplier,
            wants_stop=wants_stop,
        )
        if result.accepted:
            state.accept(self.config.train.global_batch_size)
        else:
            state.refuse()
            self._check_refusals(result)
        return result

    def _log_end(self, stop: StopSignal) -> None:
        if self.state.step >= self.config.train.num_steps:
            logger.info("All %d steps are done.", self.state.step)
        else:
            reason = (
                stop.reason if stop.requested else "train.stop_after_steps is reached, or another rank asked for it"
            )
            logger.info("Stopped after step %d (%s); the same command continues.", self.state.step, reason)

    def _check_refusals(self, result: StepResult) -> None:
        state, limit = self.state, self.config.train.max_refused_steps
        if self._is_main:
            logger.warning("Step %d was refused and changed nothing: %s.", state.step, result.refusal)
        if state.refused_in_a_row >= limit:
            raise TrainingError(
                f"{state.refused_in_a_row} steps in a row up to step {state.step} were refused because they were not "
                f"finite (last: {result.refusal or 'see rank 0'}); weights are unchanged since then, so continue from "
                "the last checkpoint with a lower optim.lr or without the samples named above",
                on_every_rank=True,
            )

    def _restore(self) -> None:
        path = self.checkpoints.restore(self.state)
        self._was_restored = path is not None
        init_from = self.config.init_from
        if path is None and init_from is not None:
            self.checkpoints.initialize(init_from)
        if self._is_main:
            if path is None:
                weights = "random weights" if init_from is None else f"the encoder of {init_from}"
                logger.info("No checkpoint in %s: starting at step 0 with %s.", self._run_dir, weights)
            else:
                logger.info("Resumed from %s at step %d.", path, self.state.step)

    def _save(self) -> None:
        path = self.checkpoints.save(self.state, lr=self._lr(self.state.step), source_sizes=self.loader.source_sizes)
        if self._is_main:
            logger.info("Saved %s in %.1f s.", path, self.checkpoints.last_save_s)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(optim.schedule, base_lr=optim.lr, step=step, num_steps=self.config.train.num_steps)
