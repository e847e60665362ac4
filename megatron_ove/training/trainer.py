"""READ THIS FIRST. A training run from top to bottom.

`Trainer` builds the parts in the order in which they need one another, continues from the newest checkpoint of the run
folder if there is one, and then repeats: next microbatches, one step, report, save. Everything that happens inside a
step is in `train_step.py`; which samples a step sees is a function of (seed, step) in `data/`; rates are a function of
the step in `optim/schedule.py`. So the states of a run are weights, moments and the step, and for equality to the bit
each rank's generators and FP8's scaling history.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ove.config.train import TrainConfig
from megatron_ove.data.bad_samples import FOLDER_NAME, KnownBad, known_bad, read_bad_samples
from megatron_ove.data.build import build_loader
from megatron_ove.data.step_loader import StepLoader
from megatron_ove.errors import DataError, TrainingError
from megatron_ove.objectives.build import build_objectives
from megatron_ove.optim.optimizer import build_dense_optimizer
from megatron_ove.optim.schedule import learning_rate
from megatron_ove.optim.weight_average import WeightAverage
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.build_model import build_model_chunks, parameter_names, weight_dtype
from megatron_ove.training.garbage_collection import StepwiseCollection
from megatron_ove.training.held_out import HeldOutEvaluation
from megatron_ove.training.part_check import check_parts
from megatron_ove.training.profiling import StepProfiler
from megatron_ove.training.reporting import RunReporter
from megatron_ove.training.run_checkpoints import RunCheckpoints
from megatron_ove.training.run_lock import RunLock
from megatron_ove.training.start_weights import StartWeights
from megatron_ove.training.step_timeout import StepTimeout
from megatron_ove.training.step_timers import StepTimers
from megatron_ove.training.stop_signal import StopSignal
from megatron_ove.training.train_state import TrainState
from megatron_ove.training.train_step import StepResult, TrainStep

logger = logging.getLogger(__name__)

_FEWEST_SAMPLES_OF_SHARE = 1000
"""A share of unreadable samples is taken of at least so many: one bad picture in the first step must not end a run."""


class Trainer:
    """One run on one rank; build and run it on every rank of the topology."""

    def __init__(
        self,
        config: TrainConfig,
        topology: ParallelTopology,
        *,
        peak_rate: float | None = None,
        lock: RunLock | None = None,
    ) -> None:
        """Builds all parts and restores the newest checkpoint of `config.run_dir`; collective.

        Args:
            config: the run.
            topology: this rank's place.
            peak_rate: operations per second that a device can do at best, for MFU; None = not known.
            lock: of the run folder, on the rank that holds it.

        Raises:
            ConfigError: a rank is to be profiled that does not exist; a shard set does not fit; a part of the model is
                named that does not exist, or nothing is left to train.
            CheckpointError: the run folder holds a checkpoint that does not fit or cannot be read.
            DataError: a source or a held-out set cannot be used.
        """
        self.config = config
        self.state = TrainState()
        self._is_main = topology.global_rank == 0
        self._run_dir = Path(config.run_dir)
        self._lock = lock
        self.timers = StepTimers(topology.device)
        self.profiler = StepProfiler(config.profile, topology, self._run_dir / "profile")
        self.timeout = StepTimeout(config.parallel)

        self.objectives = None
        if topology.is_last_stage:
            self.objectives = build_objectives(
                config.objectives,
                kinds=config.kinds,
                topology=topology,
                embedding_size=config.encoder.hidden_size,
                patch_size=config.encoder.patch_size,
                seed=config.seed,
                initializer_range=config.encoder.initializer_range,
                frozen_parts=config.freeze,
                optim=config.optim.class_centers,
                dtype=weight_dtype(config),
            )
        self.chunks = build_model_chunks(config, topology, self.objectives)
        self.names = parameter_names(self.chunks)
        check_parts(config, topology, self.names, self.objectives)
        self.optimizer = build_dense_optimizer(
            self.chunks,
            config.optim,
            names=self.names,
            num_layers=config.encoder.num_layers,
            before_layers=config.kinds.encoders[config.encoder.kind].before_layers,
            dtype=weight_dtype(config),
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            process_groups=topology.process_groups,
        )
        decay = config.train.ema_decay
        self.average = None if decay is None else WeightAverage(self.names, decay)
        self.train_step = TrainStep(topology, self.chunks, self.objectives, self.optimizer, self.timers)
        self.checkpoints = RunCheckpoints(config, topology, self.chunks, self.objectives, self.optimizer, self.average)
        self._restore(topology)
        self.held_out = HeldOutEvaluation(config, topology, self.chunks, self.objectives, self.optimizer, self.average)
        self.loader = self._start_loading(topology)
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
        if self._lock:
            self._lock.beat()  # of several that found a dead holder at one moment, one has it by now
        try:
            with (
                StopSignal(self._run_dir, watch_file=self._is_main) as stop,
                self.timers.watch_communication(),
                self.profiler.run_from(state.step + 1),
                StepwiseCollection(config.train.gc_interval_steps) as collection,
                self.timeout,
            ):
                if config.checkpoint.save_initial and not self._was_restored:
                    self._save()
                is_last = state.step >= config.train.num_steps
                while not is_last:
                    if self._lock:
                        self._lock.require()
                    wants_stop = stop.requested or state.step + 1 - first_step == config.train.stop_after_steps
                    lr, number = self._lr(state.step), state.step + 1
                    self.profiler.before_step(number)
                    with self.timers.step(number):
                        result = self._one_step(lr, wants_stop)
                        collection.after_step(number)
                    self.timeout.after_step(number)
                    self.profiler.after_step(number)
                    is_last = result.stop_requested or state.step >= config.train.num_steps
                    saves = is_last or state.step % config.checkpoint.interval_steps == 0
                    self.reporter.step_done(
                        state,
                        result,
                        lr=lr,
                        is_due=saves or state.step % config.train.log_interval_steps == 0,
                    )
                    measures = self.held_out.is_due(state.step)
                    if measures and not result.stop_requested:
                        self._measure_held_out()  # first, so that a run continued from this save has the figures
                    if saves:
                        self._save()
                    if measures and result.stop_requested:
                        self._measure_held_out()  # last, since whoever asks for a stop may not wait long
                self._log_end(stop)
        finally:
            self.reporter.close()
            self.loader.close()
        return state

    def _one_step(self, lr: float, wants_stop: bool) -> StepResult:
        state = self.state
        with self.timers.phase("data"):
            loaded = self.loader.load_step(state.step)
        result = self.train_step(
            loaded,
            lr=lr,
            wants_stop=wants_stop,
        )
        if result.accepted:
            state.accept(self.config.train.global_batch_size)
            if self.average:
                self.optimizer.finish_param_gather()
                self.average.update(state.step - state.refused_steps)
        else:
            state.refuse()
            self._check_refusals(result)
        self._count_bad(result.num_bad)
        return result

    def _measure_held_out(self) -> None:
        if self._lock:
            self._lock.require()
        with self.timeout.lifted():
            figures = self.held_out.measure(self.state.step)
        self.reporter.held_out_done(self.state, figures)

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

    def _count_bad(self, num_bad: int) -> None:
        state, limit = self.state, self.config.data.max_bad_samples_share
        state.bad_samples += num_bad
        num_samples = state.step * self.config.train.global_batch_size
        if num_bad and state.bad_samples > limit * max(num_samples, _FEWEST_SAMPLES_OF_SHARE):
            raise TrainingError(
                f"{state.bad_samples} of the {num_samples} samples up to step {state.step} could not be read, more "
                f"than data.max_bad_samples_share = {limit:g} allows; {self._run_dir / FOLDER_NAME} names each with "
                "its reason: repair the shards or the disk, move that folder away so that these samples are tried "
                "again, and start the same command; or raise the limit",
                on_every_rank=True,
            )

    def _restore(self, topology: ParallelTopology) -> None:
        path = self.checkpoints.restore(self.state)
        self._was_restored = path is not None
        if path is None and self._starts:
            start = StartWeights(self.config, topology, self.chunks, self.objectives, self.names)
            self.checkpoints.started_from(start.take())
        if self._is_main:
            if path is None:
                weights = "other weights than random ones" if self._starts else "random weights"
                logger.info("No checkpoint in %s: starting at step 0 with %s.", self._run_dir, weights)
            else:
                logger.info("Resumed from %s at step %d.", path, self.state.step)

    @property
    def _starts(self) -> bool:
        """Whether a new run takes weights from somewhere."""
        return bool(self.config.starts) or any(one.starts_from for one in self.config.objectives.values())

    def _start_loading(self, topology: ParallelTopology) -> StepLoader:
        return build_loader(
            self.config,
            topology,
            start_step=self.state.step,
            known_bad=self._known_bad(),
            collate=self.objectives.collate if self.objectives else None,
            prepare=self.objectives.prepare_step if self.objectives else None,
            last_stage_has_pixels=self.objectives is not None and self.objectives.wants_pixels,
        )

    def _known_bad(self) -> KnownBad:
        """Returns the recorded bad samples of the steps to come; rank 0 reads them for all."""
        shared: list[Any] = [None]
        if self._is_main:
            try:
                shared = [known_bad(read_bad_samples(self._run_dir), start_step=self.state.step)]
            except DataError as error:
                shared = [error]
        dist.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], DataError):
            raise DataError(str(shared[0]), on_every_rank=True)
        return shared[0]

    def _save(self) -> None:
        if self._lock:
            self._lock.beat()
        with self.timeout.lifted():
            path = self.checkpoints.save(self.state, source_sizes=self.loader.source_sizes)
        if self._is_main:
            logger.info("Saved %s in %.1f s.", path, self.checkpoints.last_save_s)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(optim.schedule, base_lr=optim.lr, step=step, num_steps=self.config.train.num_steps)
