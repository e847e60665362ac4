"""`HeldOutEvaluation`: how well held-out samples find their labels, measured between steps on the run's own layout.

The encoder runs forward through megatron-core's schedule, as in a step but without gradients; each objective then ranks
its classes where its table lies. Weights, tables, generators and the loader are only read, so a run that measures has
the same losses, to the bit, as one that does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.bad_samples import BadSample, read_bad_samples
from megatron_ove.data.held_out import RECORD_PREFIX, HeldOutSamples
from megatron_ove.data.shard_fit import open_held_out_sets
from megatron_ove.errors import MegatronOveError
from megatron_ove.objectives.base import Objective
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.optim.optimizer import DenseOptimizer
from megatron_ove.optim.weight_average import WeightAverage
from megatron_ove.outputs import Observed
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.training.metrics import MetricAccumulator, Total, averages

_COUNTS = ("samples", "bad_samples")
"""Figures that are sums; all others are means over samples."""


class HeldOutEvaluation:
    """Measures on every rank, tells the figures on rank 0."""

    def __init__(
        self,
        config: TrainConfig,
        topology: ParallelTopology,
        chunks: Sequence[DistributedDataParallel],
        objectives: ObjectiveSet | None,
        optimizer: DenseOptimizer,
        average: WeightAverage | None = None,
    ) -> None:
        """Opens the sets, if there are any; collective over all ranks.

        Args:
            config: the run.
            topology: this rank's place.
            chunks: wrapped model chunks of this rank.
            objectives: on the last pipeline stage; None elsewhere.
            optimizer: of dense weights; asked to complete weights that are still to be gathered.
            average: of the weights, which is measured instead of them; None = there is none.

        Raises:
            ConfigError, DataError: on every rank, a set cannot be used or does not fit its objective.
        """
        self._config, self._topology = config.evaluation, topology
        self._num_steps = config.train.num_steps
        self._chunks: list[torch.nn.Module] = list(chunks)
        self._objectives, self._optimizer, self._average = objectives, optimizer, average
        known = self._check(config) if config.evaluation.sets else []
        self._samples: dict[str, HeldOutSamples] = {}
        for name, path in config.evaluation.sets.items():
            self._samples[name] = HeldOutSamples(
                name,
                config,
                ShardSet.open(path, looks_at_shards=False),
                topology,
                wants_pixels=objectives is not None and objectives[name].wants_pixels,
            )
            self._samples[name].know_bad(known)

    def is_due(self, step: int) -> bool:
        """Returns whether to measure after `step` steps."""
        return bool(self._samples) and (step % self._config.interval_steps == 0 or step >= self._num_steps)

    def measure(self, step: int) -> dict[str, float]:
        """Measures all sets; collective over all ranks.

        Args:
            step: steps done.

        Returns:
            On rank 0: "held_out/<objective>/<figure>" -> value, and "held_out_s", the seconds it took; {} elsewhere.
            A set without a readable sample that has a label has counts only.

        Raises:
            DataError: a label is out of range, or samples that cannot be read cannot be recorded.
        """
        start = time.perf_counter()
        self._optimizer.finish_param_gather()
        metrics = MetricAccumulator()
        try:
            for chunk in self._chunks:
                chunk.eval()
            with self._average.in_place() if self._average else nullcontext():
                for name, samples in self._samples.items():
                    for figure, (total, count) in self._measure_set(name, samples, step).items():
                        metrics.add(f"{RECORD_PREFIX}{name}/{figure}", total, count)
        finally:
            for chunk in self._chunks:
                chunk.train()
        totals = metrics.reduce()
        return {**_values(totals), "held_out_s": time.perf_counter() - start} if totals else {}

    @torch.no_grad()
    def _measure_set(
        self, name: str, samples: HeldOutSamples, step: int
    ) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Returns figure -> (sum, count) over this replica's samples, on one rank of the replica; {} elsewhere."""
        objective = None if self._objectives is None else self._objectives[name]
        collate = None
        if objective is not None:
            collate = lambda some, pack, reader: {name: objective.collate_held_out(some, pack, reader)}  # noqa: E731
        observed: list[Any] = []
        inputs: list[Any] = []
        num_items = num_bad = 0
        for part in samples.rounds(step, collate):
            observed += self._observe(objective, part.batches)
            num_bad += part.num_bad
            if objective is not None:
                inputs += [batch.inputs[name] for batch in part.batches]
                num_items += sum(objective.num_items(batch) for batch in part.batches)
        if objective is None:
            return {}
        figures = objective.measure_held_out(observed, inputs, samples.sample_counts)
        if self._topology.tensor_rank > 0:  # they hold the same
            return {}
        return {"samples": (float(num_items), 1.0), "bad_samples": (float(num_bad), 1.0), **figures}

    def _observe(self, objective: Objective | None, batches: Sequence[Batch]) -> list[Any]:
        """Returns what an objective observes in each microbatch on the last stage, [] elsewhere."""
        observe = None if objective is None else objective.observe_held_out

        def forward_step(iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Any, Any]:
            return model(next(iterator), None, observe), _keep

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].main.num_patches,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _check(self, config: TrainConfig) -> list[BadSample]:
        """Returns the recorded held-out samples that could not be read; rank 0 looks at sets and records for all."""
        shared: list[Any] = [[]]
        if self._topology.global_rank == 0:
            try:
                open_held_out_sets(config)
                records = read_bad_samples(Path(config.run_dir))
                shared = [[sample for sample in records if sample.source.startswith(RECORD_PREFIX)]]
            except MegatronOveError as error:
                shared = [error]
        dist.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], MegatronOveError):
            raise type(shared[0])(str(shared[0]), on_every_rank=True)
        return shared[0]


def _keep(observed: Observed, non_loss_data: bool = True) -> Any:
    return observed.value


def _values(totals: Mapping[str, Total]) -> dict[str, float]:
    counts = {name: total.sum for name, total in totals.items() if name.endswith(tuple(f"/{c}" for c in _COUNTS))}
    return {**averages(totals), **counts}
