"""Every message of a training step, by group: what is sent, how often, how many bytes.

The bytes of a message are those of the whole tensor that the group shares: what an all-reduce sums, what an all-gather
returns, what a reduce-scatter is given. What crosses a link is `wire_bytes`. Reports of metrics, once every
`train.log_interval_steps`, are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.footprint import activation_bytes
from megatron_ove.planning.layout import Layout, Place
from megatron_ove.planning.needs import encoder_footprint, objective_footprint, trained_parameters
from megatron_ove.planning.parameters import gradient_buffer
from megatron_ove.planning.table_plan import TablePlan
from megatron_ove.planning.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind in one step of one rank.

    Attributes:
        group: tensor, pipeline, data, class, model or world.
        operation: all_reduce, all_gather, reduce_scatter, broadcast or send.
        count: messages.
        num_bytes: of all of them together.
    """

    group: str
    operation: str
    count: int
    num_bytes: int

    def wire_bytes(self, group_size: int) -> float:
        """Returns what one rank sends, with ring algorithms."""
        factor = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}.get(self.operation)
        return self.num_bytes * (factor * (group_size - 1) / group_size if factor else 1.0)


class _Ledger:
    """Adds up messages; groups of one rank send nothing."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._entries: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, group: str, operation: str, num_bytes: int, count: int = 1) -> None:
        """Adds `count` messages of `num_bytes` each."""
        if count and self._layout.group_size(group) > 1:
            entry = self._entries[group, operation]
            entry[0] += count
            entry[1] += count * num_bytes

    def traffic(self) -> list[Traffic]:
        return [Traffic(*key, *entry) for key, entry in sorted(self._entries.items())]


def plan_communication(
    config: TrainConfig, layout: Layout, place: Place, workload: Workload, tables: list[TablePlan]
) -> list[Traffic]:
    """Returns what a rank takes part in during one step, loading included."""
    ledger = _Ledger(layout)
    _add_loading(ledger, config, layout, place, workload)
    for message in encoder_footprint(config).messages(config, layout, place, workload):
        ledger.add(message.group, message.operation, message.num_bytes, message.count)
    _add_pipeline(ledger, config, layout, place, workload)
    if place.stage == layout.pipeline - 1:
        _add_step_labels(ledger, config, layout, workload)
        _add_heads(ledger, config, layout, place, workload, tables)
    _add_gradients(ledger, config, layout, place)
    ledger.add("world" if layout.distributed_optimizer else "model", "all_reduce", 4)  # norm of the gradient
    ledger.add("world", "all_reduce", 12)  # is the step refused, is the run to stop, how many samples could not be read
    return ledger.traffic()


def _add_loading(ledger: _Ledger, config: TrainConfig, layout: Layout, place: Place, workload: Workload) -> None:
    tokens = workload.num_microbatches * workload.tokens_per_microbatch
    if place.stage == 0:
        ledger.add("tensor", "broadcast", tokens * 3 * config.encoder.patch_size**2)
    ledger.add("tensor", "broadcast", tokens * 3 * 4)
    own = sum(int(counts[:, place.data].sum()) for counts in workload.sample_counts.values())
    ledger.add("model", "all_reduce", own)  # which of the replica's samples could not be read


def _add_pipeline(ledger: _Ledger, config: TrainConfig, layout: Layout, place: Place, workload: Workload) -> None:
    hidden = workload.tokens_per_microbatch // layout.token_share * config.encoder.hidden_size
    ends = [end(place.stage, chunk) for chunk in range(layout.chunks) for end in (layout.is_first, layout.is_last)]
    sends = workload.num_microbatches * ends.count(False)
    ledger.add("pipeline", "send", hidden * activation_bytes(config), sends)


def _add_step_labels(ledger: _Ledger, config: TrainConfig, layout: Layout, workload: Workload) -> None:
    """The one message of all objectives; see `objectives/step_exchange.py`."""
    numbers = np.full(layout.data, 1 + len(config.objectives))
    for name, objective in config.objectives.items():
        width = objective_footprint(config, name).message_width(objective)
        numbers += workload.samples_of(objective).sum(axis=0) * width
    ledger.add("data", "all_gather", layout.data * int(numbers.max()) * 4)


def _add_heads(
    ledger: _Ledger, config: TrainConfig, layout: Layout, place: Place, workload: Workload, tables: list[TablePlan]
) -> None:
    row = config.encoder.hidden_size * 4
    for is_wide in (True, False):
        heads = [table for table in tables if table.is_stage_wide == is_wide]
        if not heads:
            continue
        counts = np.sum([workload.items_of(config.objectives[head.name]) for head in heads], axis=0)
        for index in range(workload.num_microbatches):
            totals = [int(total) for total in counts[index]]
            if not is_wide:
                ledger.add("tensor", "all_reduce", totals[place.data] * row)
            elif sum(totals) and layout.tensor > 1:
                ledger.add("data", "all_gather", layout.data * max(totals) * row)
                ledger.add("class", "all_reduce", sum(totals) * row)
            elif sum(totals):
                ledger.add("data", "all_gather", layout.data * max(totals) * row)
                ledger.add("data", "reduce_scatter", layout.data * max(totals) * row)
            numbers = sum(int(head.samples[index]) * (head.num_sets + head.num_slots) for head in heads)
            if numbers:
                item = max(head.statistics_bytes for head in heads)
                ledger.add("class" if is_wide else "tensor", "all_reduce", numbers * item)
    for table in tables:
        if not table.is_stage_wide and table.num_active:
            ledger.add("data", "all_reduce", table.num_active * row)
            ledger.add("data", "all_reduce", table.num_active * 4)
        if not table.is_stage_wide and config.objectives[table.name].centering == "embeddings":
            ledger.add("data", "all_reduce", row)  # the step's sum of embeddings, and their number
            ledger.add("data", "all_reduce", 8)
        ledger.add("class" if table.is_stage_wide else "tensor", "all_reduce", 8)  # norm of the table's gradient


def _add_gradients(ledger: _Ledger, config: TrainConfig, layout: Layout, place: Place) -> None:
    summed = averaged = 0
    for chunk in range(layout.chunks):
        parameters = trained_parameters(config, layout, stage=place.stage, chunk=chunk)
        for size in gradient_buffer(parameters, layout, stage=place.stage, chunk=chunk).buckets:
            if layout.distributed_optimizer:
                ledger.add("data", "reduce_scatter", 4 * size)
                ledger.add("data", "all_gather", activation_bytes(config) * size)  # the updated weights
            else:
                ledger.add("data", "all_reduce", 4 * size)
        replicated = [parameter for parameter in parameters if not parameter.is_sharded]
        parts = sum(parameter.size for parameter in replicated if layout.sequence_parallel and parameter.sees_sequence)
        summed += parts
        averaged += sum(parameter.size for parameter in replicated) - parts
    for size in (summed, averaged):
        if size:
            ledger.add("tensor", "all_reduce", 4 * size)
