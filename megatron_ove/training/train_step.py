"""One optimizer step: what happens, in order, on every rank.

1. the loader hands over this replica's microbatches, and what the objectives found out about the step on the host: its
   active class rows, and the number of each one's samples over all replicas (N_k);
2. the objectives begin the step on the device;
3. megatron-core's schedule runs forward and backward over microbatches and pipeline stages, and reduces gradients;
4. norms are computed, and all ranks agree whether everything is finite;
5. only then dense weights and tables are updated. A refused step changes nothing that lasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.data.step_loader import LoadedStep
from megatron_ove.objectives.objective_set import ObjectiveSet, StepPreparation
from megatron_ove.optim.optimizer import DenseOptimizer
from megatron_ove.optim.updates import Update
from megatron_ove.outputs import StepOutput
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.metrics import MetricAccumulator
from megatron_ove.training.step_timers import StepTimers

_MAX_KEYS_IN_MESSAGE = 8


@dataclass(frozen=True)
class StepResult:
    """What came of a step; the same on every rank except `metrics`.

    Attributes:
        accepted: whether weights were updated.
        stop_requested: whether any rank wants to stop.
        num_bad: samples of all replicas that could not be read and counted as empty.
        refusal: on rank 0 of a refused step, what was not finite.
        metrics: this rank's share of the step's sums; empty after a refusal.
    """

    accepted: bool
    stop_requested: bool
    num_bad: int
    refusal: str = ""
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)


def loss_scales(
    weights: Mapping[str, float], item_counts: Mapping[str, int], *, num_microbatches: int, data_size: int
) -> dict[str, float]:
    """Returns the factor of each objective's loss sum in a microbatch.

    The step's loss is sum_k w_k * (sum of objective k's sample losses over all replicas and microbatches) / N_k.
    megatron-core divides every microbatch's loss by `num_microbatches` and averages gradients over `data_size`
    replicas; the factor undoes both, so that loss and gradient depend on neither.

    Args:
        weights: objective -> w_k.
        item_counts: objective -> N_k, over all replicas and microbatches; 0 when the step has no sample for it.
        num_microbatches: microbatches of one replica.
        data_size: replicas.
    """
    factor = num_microbatches * data_size
    return {name: w * factor / item_counts[name] if item_counts[name] else 0.0 for name, w in weights.items()}


class TrainStep:
    """Runs steps; holds the parts that every step uses."""

    def __init__(
        self,
        topology: ParallelTopology,
        chunks: Sequence[DistributedDataParallel],
        objectives: ObjectiveSet | None,
        optimizer: DenseOptimizer,
        timers: StepTimers,
    ) -> None:
        """
        Args:
            topology: this rank's place.
            chunks: wrapped model chunks of this rank.
            objectives: on the last pipeline stage; None elsewhere.
            optimizer: of dense weights.
            timers: told what is being done; megatron-core's schedules and the chunks get them too.
        """
        self._topology = topology
        self._chunks: list[torch.nn.Module] = list(chunks)
        self._objectives = objectives
        self._optimizer = optimizer
        self._updates: list[Update] = [optimizer, *([objectives] if objectives else [])]
        self._timers = timers
        for chunk in chunks:
            chunk.config.timers = timers
        # Tensor-parallel ranks hold the same losses; one of them reports.
        self._reports = topology.is_last_stage and topology.tensor_rank == 0
        self._counts_bad = topology.is_first_stage and topology.tensor_rank == 0

    def __call__(self, loaded: LoadedStep, *, lr: float, wants_stop: bool) -> StepResult:
        """Runs a step on this replica's microbatches.

        Args:
            loaded: this replica's microbatches, on the last pipeline stage with what `ObjectiveSet.prepare_step` made
                of them.
            lr: the schedule's rate.
            wants_stop: whether this rank wants the run to stop.

        Returns:
            A `StepResult`.
        """
        batches = loaded.batches
        with self._timers.phase("head"):
            scales = self._begin(batches, loaded.prepared)
        with self._timers.phase("optimizer"):
            self._optimizer.zero_grad()
        outputs = self._forward_backward(batches, scales)
        with self._timers.phase("optimizer"):
            norms = {name: (norm, update) for update in self._updates for name, norm in update.gradient_norms().items()}
        problem = _describe_non_finite(outputs, batches, self._objectives, norms)
        refused, stop_requested, num_bad = self._agree(bool(problem), wants_stop, loaded.num_bad)
        if refused:
            for update in self._updates:
                update.discard()
            return StepResult(False, stop_requested, num_bad, refusal=self._collect_problems(problem))
        with self._timers.phase("optimizer"):
            for update in self._updates:
                update.step(lr)
        metrics = self._measure(outputs, batches, {name: norm for name, (norm, _) in norms.items()})
        return StepResult(True, stop_requested, num_bad, metrics=metrics)

    def _begin(self, batches: Sequence[Batch], prepared: StepPreparation | None) -> dict[str, float]:
        if self._objectives is None or prepared is None:
            return {}
        self._objectives.begin_step(prepared)
        return loss_scales(
            self._objectives.weights,
            prepared.item_counts,
            num_microbatches=len(batches),
            data_size=self._topology.data_size,
        )

    def _forward_backward(self, batches: Sequence[Batch], scales: Mapping[str, float]) -> list[StepOutput]:
        """Returns the outputs of this rank's microbatches on the last stage, [] elsewhere."""

        def forward_step(iterator: Iterator[Batch], model: DistributedDataParallel) -> tuple[Any, Any]:
            return model(next(iterator), scales), _loss_of

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].main.num_patches,  # equal in a step, not in all steps
            micro_batch_size=1,
            forward_only=False,
        )

    def _agree(self, refused: bool, wants_stop: bool, num_bad: int) -> tuple[bool, bool, int]:
        mine = [refused, wants_stop, num_bad if self._counts_bad else 0]
        sums = torch.tensor(mine, dtype=torch.int32, device=self._topology.device)
        dist.all_reduce(sums)
        num_refusing, num_stopping, all_bad = sums.tolist()
        return num_refusing > 0, num_stopping > 0, all_bad

    def _collect_problems(self, problem: str) -> str:
        problems: list[str] = [""] * self._topology.world_size
        dist.all_gather_object(problems, problem if self._topology.tensor_rank == 0 else "")
        return "; ".join(dict.fromkeys(text for text in problems if text))

    def _measure(
        self,
        outputs: Sequence[StepOutput],
        batches: Sequence[Batch],
        norms: Mapping[str, float | Tensor],
    ) -> MetricAccumulator:
        metrics = MetricAccumulator()
        if not self._reports:
            return metrics
        replicas = len(batches) * self._topology.data_size
        for output in outputs:
            for name, (total, count) in output.metrics.items():
                objective, _, metric = name.partition("/")
                metrics.add(f"{metric}/{objective}", total, count)
            # Summed over all microbatches and replicas this is the step's loss; counted once, below.
            metrics.add("loss", output.loss / replicas, 0.0)
        for batch in batches:
            pack = batch.main
            lengths = pack.cu_seqlens.diff().double()
            metrics.add("tokens", pack.cu_seqlens[-1], pack.num_patches)
            metrics.add("encoded_samples", batch.num_samples, 0.0)
            metrics.add("token_squares", lengths.square().sum(), 0.0)
        if self._topology.data_rank == 0:
            metrics.add("loss", 0.0, 1.0)
            for name, norm in norms.items():
                metrics.add(f"grad_norm/{name}" if name else "grad_norm", norm)
        return metrics


def _loss_of(output: StepOutput) -> tuple[Tensor, StepOutput]:
    # A clone, because the schedule divides the loss it is given in place; what is kept must not hold the graph.
    return output.loss.clone(), replace(output, loss=output.loss.detach())


def _describe_non_finite(
    outputs: Sequence[StepOutput],
    batches: Sequence[Batch],
    objectives: ObjectiveSet | None,
    norms: Mapping[str, tuple[float | Tensor, Update]],
) -> str:
    """Says what on this rank is not finite, with source and sample keys; "" when all is well.

    Args:
        outputs: of this rank's microbatches, on the last stage.
        batches: this rank's microbatches.
        objectives: on the last stage.
        norms: name -> norm, and whose it is.
    """
    known = [norm for norm, _ in norms.values() if not isinstance(norm, Tensor)]
    figures = [output.loss.float() for output in outputs]
    figures += [norm.float().reshape(()) for norm, _ in norms.values() if isinstance(norm, Tensor)]
    # Looked at together: an accepted step reads back from the device once.
    if all(map(math.isfinite, known)) and (not figures or bool(torch.isfinite(torch.stack(figures)).all())):
        return ""
    problems = []
    for output, batch in zip(outputs, batches, strict=True):
        for name, (total, _) in output.metrics.items():
            if name.endswith("/loss") and objectives is not None and not torch.isfinite(total):
                problems.append(_name_samples(name.removesuffix("/loss"), float(total), objectives, batch))
    for name, (norm, update) in norms.items():
        if name and not math.isfinite(norm):
            problems.append(f"the gradient norm of {update.describe(name)} is {float(norm)}")
    if not problems:
        norm, update = norms[""]
        problems.append(f"the gradient norm of {update.describe('')} is {float(norm)}")
    return "; ".join(problems)


def _name_samples(name: str, loss: float, objectives: ObjectiveSet, batch: Batch) -> str:
    sources = objectives.sources_of(name)
    rows: list[int] = batch.samples.of(*sources).tolist()
    keys = [batch.samples.keys[row] for row in rows[:_MAX_KEYS_IN_MESSAGE]]
    shown = ", ".join(keys) + (" ..." if len(rows) > _MAX_KEYS_IN_MESSAGE else "")
    named = " and ".join(f"'{source}'" for source in sources)
    return f"the loss of objective '{name}' is {loss} in a microbatch with these samples of source {named}: {shown}"
