"""`ObjectiveSet`: the objectives of a run, driven together. A plain object: their tables are nobody's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_ove.batch import Batch
from megatron_ove.objectives.base import Objective
from megatron_ove.objectives.step_exchange import MessageLayout, Messages, exchange, raise_mistake
from megatron_ove.outputs import LossTerms, StepOutput, VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology


@dataclass(frozen=True)
class StepPreparation:
    """What `ObjectiveSet.prepare_step` found out about a step.

    Attributes:
        item_counts: objective name -> N_k, samples that its loss is summed over, over all replicas and microbatches.
        parts: objective name -> what its `prepare_step` returned; host tensors, pinned on CUDA.
    """

    item_counts: Mapping[str, int]
    parts: Mapping[str, Any]


class ObjectiveSet:
    """Iterating gives the names, in configuration order, which is the order of all collectives.

    Attributes:
        weights: objective name -> weight in the total loss.
    """

    def __init__(
        self, objectives: Sequence[Objective], weights: Mapping[str, float], topology: ParallelTopology
    ) -> None:
        self._objectives = {objective.name: objective for objective in objectives}
        self._topology = topology
        self.weights = {name: weights[name] for name in self._objectives}

    def __iter__(self) -> Iterator[str]:
        return iter(self._objectives)

    def __len__(self) -> int:
        return len(self._objectives)

    def __getitem__(self, name: str) -> Objective:
        return self._objectives[name]

    def source_of(self, name: str) -> str:
        """Returns the data source of an objective."""
        return self._objectives[name].source

    def num_items(self, name: str, batch: Batch) -> int:
        """Returns how many samples of this replica's microbatch an objective's loss is summed over."""
        return self._objectives[name].num_items(batch)

    def prepare_step(
        self, step: int, batches: Sequence[Batch], sample_counts: Mapping[str, np.ndarray]
    ) -> StepPreparation:
        """Does the host's work for a step; one collective over `data_host_group`, whatever the number of objectives.

        May run in another thread while the step before is under way: it changes nothing, and of the device it touches
        pinned host memory at most.

        Args:
            step: steps done before; random draws are functions of it.
            batches: this replica's microbatches, equally many on every replica; what `forward` gets are these or copies
                of them on the device.
            sample_counts: source -> [replicas, microbatches of a replica] int64, samples.

        Raises:
            DataError: a label does not fit; on every rank of the stage.
        """
        if not self._objectives:
            return StepPreparation({}, {})
        messages = self._exchange(batches, sample_counts)
        parts = {
            name: objective.prepare_step(step, batches, sample_counts[objective.source], numbers)
            for (name, objective), numbers in zip(self._objectives.items(), messages.numbers, strict=True)
        }
        return StepPreparation(dict(zip(self._objectives, messages.item_counts.tolist(), strict=True)), parts)

    def _exchange(self, batches: Sequence[Batch], sample_counts: Mapping[str, np.ndarray]) -> Messages:
        """Sends this replica's message and returns what all said, or raises what any found wrong."""
        objectives = self._objectives.values()
        group, replica = self._topology.data_host_group, self._topology.data_rank
        numbers = [objective.message(batches) for objective in objectives]
        for objective, part in zip(objectives, numbers, strict=True):
            planned = int(sample_counts[objective.source][replica].sum())
            if len(part) != planned:
                raise ValueError(
                    f"the microbatches have {len(part)} samples of source '{objective.source}' where sample_counts has "
                    f"{planned} for replica {replica}"
                )
        mistake = next(filter(None, (objective.find_mistake(batches) for objective in objectives)), "")
        layout = MessageLayout(
            [sample_counts[objective.source].sum(axis=1) for objective in objectives],
            [objective.message_width for objective in objectives],
        )
        message = layout.pack(
            replica,
            has_mistake=bool(mistake),
            item_counts=[sum(objective.num_items(batch) for batch in batches) for objective in objectives],
            numbers=numbers,
        )
        messages = layout.unpack(exchange(message, group))
        if messages.has_mistake:
            raise_mistake(mistake, group, on_every_rank=self._topology.pipeline_size == 1)
        return messages

    def begin_step(self, prepared: StepPreparation) -> None:
        """Begins the step that was prepared: the device's part of it. Waits for nothing."""
        for name, objective in self._objectives.items():
            with _trace(name):
                objective.begin_step(prepared.parts[name])

    def forward(self, features: VisionFeatures, batch: Batch, scales: Mapping[str, float]) -> StepOutput:
        """Returns the weighted loss of one microbatch.

        Args:
            features: encoder output, replicated over tensor-parallel ranks.
            batch: one of the batches given to `prepare_step`, or a copy of it on the device.
            scales: objective name -> factor of its loss sum, the same on every replica.
        """
        # Starting from the features keeps the loss differentiable and exactly 0 in an empty microbatch.
        loss = features.pooled.new_zeros((), dtype=torch.float32)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        by_class: dict[type[Objective], list[Objective]] = {}
        for objective in self._objectives.values():
            by_class.setdefault(type(objective), []).append(objective)
        results: dict[str, LossTerms] = {}
        for kind, objectives in by_class.items():
            names = [objective.name for objective in objectives]
            with _trace(*names):
                results |= zip(names, kind.forward_together(objectives, features, batch), strict=True)
        for name in self._objectives:
            terms = results[name]
            loss = loss + scales[name] * terms.loss_sum
            metrics |= {f"{name}/{metric}": value for metric, value in terms.metrics.items()}
        return StepOutput(loss, metrics)

    def row_gradient_norms(self) -> dict[str, Tensor]:
        """Returns the gradient norm of each objective's table, before clipping; collective."""
        norms = {}
        for name, objective in self._objectives.items():
            with _trace(name):
                norms[name] = objective.row_gradient_norm()
        return norms

    def apply_update(self, lr: float) -> None:
        """Updates every table and ends the step; collective."""
        for objective in self._objectives.values():
            with _trace(objective.name):
                objective.apply_update(lr)

    def discard_update(self) -> None:
        """Ends the step as if it had never begun."""
        for objective in self._objectives.values():
            objective.discard_update()

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns objective name -> its sharded tensors, with keys `<prefix><name>.<tensor>`."""
        return {name: objective.sharded_state_dict(f"{prefix}{name}.") for name, objective in self._objectives.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what was read for `sharded_state_dict`; objectives without rows on this rank may be missing."""
        for name, objective in self._objectives.items():
            objective.load_state(state.get(name, {}))


def _trace(*names: str) -> record_function:
    """Names a part of a profiler's trace after objectives; costs a microsecond when there is no profiler."""
    return record_function(f"ove/objective {' + '.join(names)}")
