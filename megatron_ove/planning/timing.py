"""How long a step should take: operations, bytes and messages over the rates of the device, nothing overlapped.

An estimate to choose between layouts and to plan a purchase with, not a promise: the rates' shares in `devices` are
assumptions. Messages do not overlap with computation, so their times add up, except for gradients and weights under
`overlap_grad_reduce` and `overlap_param_gather`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.communication import Traffic
from megatron_ove.planning.devices import (
    ATTENTION_SHARE,
    COLLECTIVE_LATENCY_S,
    GEMM_SHARE,
    LINK_SHARE,
    MEMORY_SHARE,
    Device,
)
from megatron_ove.planning.footprint import Work, activation_bytes
from megatron_ove.planning.layout import Layout
from megatron_ove.planning.memory import RankMemory
from megatron_ove.planning.needs import encoder_footprint, trained_parameters
from megatron_ove.planning.parameters import gradient_buffer
from megatron_ove.planning.table_plan import TablePlan
from megatron_ove.planning.workload import Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest path.

    Attributes:
        encoder: matrix products, attention and element-wise passes of the slowest stage.
        heads: the class-center tables.
        optimizer: reading and writing gradients, moments and weights.
        tensor, pipeline, data, other: messages by group; `other` are class, model and world.
        bubble: waiting for the pipeline to fill and to drain.
    """

    encoder: float
    heads: float
    optimizer: float
    tensor: float
    pipeline: float
    data: float
    other: float
    bubble: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def estimate_step(
    config: TrainConfig,
    layout: Layout,
    workload: Workload,
    device: Device,
    *,
    tables: list[TablePlan],
    traffic: list[list[Traffic]],
    memory: list[RankMemory],
) -> StepTime:
    """Estimates a step.

    Args:
        config: the run.
        layout: of the ranks.
        workload: of the step.
        device: what every rank runs on.
        tables: of a rank of the last stage.
        traffic: of a rank of each stage.
        memory: of a rank of each stage.
    """
    n = workload.num_microbatches
    squares = float(workload.squared_lengths.mean(axis=0).max())
    samples = float(workload.num_samples.mean(axis=0).max())
    passes = [
        _seconds(
            encoder_footprint(config).work(config, layout, stage, squared_lengths=squares, num_samples=samples),
            config,
            device,
        )
        for stage in range(layout.pipeline)
    ]
    heads = _head_seconds(tables, config, device)
    times = [_message_seconds(messages, layout, device) for messages in traffic]
    for stage, seconds in enumerate(passes):
        times[stage]["data"] = times[stage].get("data", 0.0) - _hidden_seconds(config, layout, device, stage, seconds)
    by_group = {group: max(part.get(group, 0.0) for part in times) for group in ("tensor", "pipeline", "data", "other")}
    busy = [n * one for one in passes]
    busy[-1] += heads
    tensor = [part.get("tensor", 0.0) for part in times]
    fullest = max(range(layout.pipeline), key=lambda stage: busy[stage] + tensor[stage])
    # Filling and draining: each of the other stages keeps the slowest one waiting for one of its passes.
    bubble = (layout.pipeline - 1) / layout.chunks * (busy[fullest] + tensor[fullest]) / n
    largest = max(memory, key=lambda part: part.optimizer)
    moved = 2 * largest.optimizer + 2 * largest.gradients + 2 * largest.parameters
    return StepTime(
        encoder=n * passes[fullest],
        heads=heads if fullest == layout.pipeline - 1 else 0.0,
        optimizer=moved / (device.bandwidth * MEMORY_SHARE),
        tensor=tensor[fullest],
        pipeline=by_group["pipeline"],
        data=by_group["data"],
        other=by_group["other"],
        bubble=bubble,
    )


def _seconds(work: Work, config: TrainConfig, device: Device) -> float:
    precision = "fp8" if config.encoder.is_fp8 else config.train.precision
    return (
        work.products / (device.rate(precision) * GEMM_SHARE)
        + work.attention / (device.rate(config.train.precision) * ATTENTION_SHARE)
        + work.moved / (device.bandwidth * MEMORY_SHARE)
    )


def _head_seconds(tables: list[TablePlan], config: TrainConfig, device: Device) -> float:
    total = 0.0
    for table in tables:
        precision = "bf16" if table.compute_bytes == 2 else "fp32"
        # Coefficients, or cosines, are written and read a few times, active rows read twice.
        moved = 4 * table.num_active * float(table.samples.sum()) * table.compute_bytes
        moved += 2 * len(table.samples) * table.num_active * table.embedding_size * table.compute_bytes
        total += table.operations / (device.rate(precision) * GEMM_SHARE)
        total += (moved + table.moved_bytes) / (device.bandwidth * MEMORY_SHARE)
    return total


def _hidden_seconds(config: TrainConfig, layout: Layout, device: Device, stage: int, pass_seconds: float) -> float:
    """Returns what of the exchange of gradients and weights goes on beside computation.

    On the first stage all buckets but one have the step's last backward pass and the next first forward pass of a
    microbatch; a later stage waits for the stages before it to drain and to fill.
    """
    if layout.data == 1 or not layout.overlaps_reduce:
        return 0.0
    buckets: list[int] = []
    for chunk in range(layout.chunks):
        parameters = trained_parameters(config, layout, stage=stage, chunk=chunk)
        buckets += gradient_buffer(parameters, layout, stage=stage, chunk=chunk).buckets
    elements = sum(buckets) - (buckets[-1] if stage == 0 else 0)
    link = device.network_link if layout.spans_nodes("data") else device.node_link
    seconds = elements * (layout.data - 1) / layout.data / (link * LINK_SHARE)  # of one byte each
    reduce = seconds * 4 * (1 if layout.distributed_optimizer else 2)
    gather = seconds * activation_bytes(config) if layout.overlaps_gather else 0.0
    room = pass_seconds * max(stage, 1)
    return min(reduce, room * 2 / 3) + min(gather, room / 3)


def _message_seconds(messages: list[Traffic], layout: Layout, device: Device) -> dict[str, float]:
    times: dict[str, float] = {}
    for one in messages:
        link = device.network_link if layout.spans_nodes(one.group) else device.node_link
        seconds = one.wire_bytes(layout.group_size(one.group)) / (link * LINK_SHARE) + one.count * COLLECTIVE_LATENCY_S
        name = one.group if one.group in ("tensor", "pipeline", "data") else "other"
        times[name] = times.get(name, 0.0) + seconds
    return times
