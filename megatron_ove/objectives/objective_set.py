"""`ObjectiveSet`: the objectives of a run, driven together. A plain object: their tables are nobody's parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.objectives.base import Objective
from megatron_ove.objectives.step_exchange import MessageLayout, Messages, exchange, raise_mistake
from megatron_ove.optim.updates import RowTable
from megatron_ove.outputs import LossTerms, StepOutput, VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


@dataclass(frozen=True)
class StepPreparation:
    """What `ObjectiveSet.prepare_step` found out about a step.

    Attributes:
        item_counts: objective name -> N_k, items that its loss is summed over, over all replicas and microbatches.
        parts: objective name -> what its `prepare_step` returned; host tensors, pinned on CUDA.
    """

    item_counts: Mapping[str, int]
    parts: Mapping[str, Any]


class ObjectiveSet:
    """Iterating gives the names, in configuration order, which is the order of all collectives.

    To the training step it is an `Update`: that of every table.

    Attributes:
        weights: objective name -> weight in the total loss.
        modules: objective -> name -> dense weights, of objectives that have some; to be made children of the model.
        wants_pixels: whether any objective looks at patches.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        weights: Mapping[str, float],
        topology: ParallelTopology,
        *,
        frozen: Collection[str] = (),
    ) -> None:
        """
        Args:
            objectives: in configuration order.
            weights: objective name -> weight in the total loss.
            topology: this rank's place.
            frozen: objectives whose tables stay as they are.
        """
        self._objectives = {objective.name: objective for objective in objectives}
        self._topology = topology
        self._frozen = frozenset(frozen)
        self.weights = {name: weights[name] for name in self._objectives}
        owned = {name: objective.modules() for name, objective in self._objectives.items()}
        self.modules = torch.nn.ModuleDict(
            {name: torch.nn.ModuleDict(modules) for name, modules in owned.items() if modules}
        )
        self.wants_pixels = any(objective.wants_pixels for objective in objectives)

    def __iter__(self) -> Iterator[str]:
        return iter(self._objectives)

    def __len__(self) -> int:
        return len(self._objectives)

    def __getitem__(self, name: str) -> Objective:
        return self._objectives[name]

    def sources_of(self, name: str) -> tuple[str, ...]:
        """Returns the data sources of an objective."""
        return self._objectives[name].sources

    def table_names(self) -> list[str]:
        """Returns the names of all tables as parts of the model; see `optim/parts.py`."""
        return [f"objectives.{name}.class_centers" for name, _ in self._tables()]

    def num_items(self, name: str, batch: Batch) -> int:
        """Returns how many items of this replica's microbatch an objective's loss is summed over."""
        return self._objectives[name].num_items(batch)

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> dict[str, Any]:
        """Returns objective -> its inputs of a microbatch; runs in a loader's thread."""
        return {name: objective.collate(samples, pack, reader) for name, objective in self._objectives.items()}

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
        counts = {
            name: np.sum([sample_counts[source] for source in objective.sources], axis=0)
            for name, objective in self._objectives.items()
        }
        messages = self._exchange(batches, counts)
        parts = {
            name: objective.prepare_step(step, batches, counts[name], numbers)
            for (name, objective), numbers in zip(self._objectives.items(), messages.numbers, strict=True)
        }
        return StepPreparation(dict(zip(self._objectives, messages.item_counts.tolist(), strict=True)), parts)

    def _exchange(self, batches: Sequence[Batch], sample_counts: Mapping[str, np.ndarray]) -> Messages:
        """Sends this replica's message and returns what all said, or raises what any found wrong."""
        objectives = self._objectives.values()
        group, replica = self._topology.data_host_group, self._topology.data_rank
        numbers = [objective.message(batches) for objective in objectives]
        for objective, part in zip(objectives, numbers, strict=True):
            planned = int(sample_counts[objective.name][replica].sum())
            if len(part) != planned:
                raise ValueError(
                    f"the microbatches have {len(part)} samples for objective '{objective.name}' where sample_counts "
                    f"has {planned} for replica {replica}"
                )
        mistake = next(filter(None, (objective.find_mistake(batches) for objective in objectives)), "")
        layout = MessageLayout(
            [sample_counts[name].sum(axis=1) for name in self._objectives],
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
        # The schedule wants a loss with a gradient, and data parallelism one of every weight, in every microbatch.
        loss = features.anchor()
        for parameter in self.modules.parameters():
            if parameter.requires_grad:
                loss = loss + parameter.flatten()[:0].sum(dtype=torch.float32)
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

    # -- an Update ----------------------------------------------------------------------------------------------------

    def gradient_norms(self) -> dict[str, Tensor]:
        """Returns table -> norm of its gradient, before clipping; collective."""
        norms = {}
        for objective, table in self._tables():
            if objective not in self._frozen:
                with _trace(objective):
                    norms[table.name] = table.gradient_norm()
        return norms

    def describe(self, name: str) -> str:
        return f"the class centers of '{name}'"

    def step(self, lr: float) -> None:
        """Updates every table and ends the step; collective. `lr` is that of the schedule."""
        for objective, table in self._tables():
            with _trace(objective):
                if objective in self._frozen:
                    table.discard_update()
                else:
                    table.apply_update(lr * table.lr_multiplier)
        for objective in self._objectives.values():
            objective.end_step(accepted=True)  # what else it keeps follows the encoder, also beside a frozen table

    def discard(self) -> None:
        """Ends the step as if it had never begun."""
        for _, table in self._tables():
            table.discard_update()
        for objective in self._objectives.values():
            objective.end_step(accepted=False)

    def _tables(self) -> Iterator[tuple[str, RowTable]]:
        return ((name, table) for name, objective in self._objectives.items() for table in objective.tables())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns objective name -> its sharded tensors, with keys `<prefix><name>.<tensor>`; modules belong to the
        model."""
        states = {
            name: objective.sharded_state_dict(f"{prefix}{name}.") for name, objective in self._objectives.items()
        }
        return {name: state for name, state in states.items() if state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what was read for `sharded_state_dict`; objectives without rows on this rank may be missing."""
        for name, objective in self._objectives.items():
            objective.load_state(state.get(name, {}))


def _trace(*names: str) -> record_function:
    """Names a part of a profiler's trace after objectives; costs a microsecond when there is no profiler."""
    return record_function(f"ove/objective {' + '.join(names)}")
