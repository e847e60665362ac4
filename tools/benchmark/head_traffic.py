"""Bytes that one optimizer step of a head has to move, and memory that it is expected to take: counted, not measured.

Letters: T bytes of one rank's fp32 table, S bytes of one class set's rows, b samples of a microbatch, M microbatches,
a rows of the union of the class sets, e dimensions, s sets. Reads and writes of tensors too large for a cache count
each time; what fits into one (a chunk of rows, embeddings) counts once. Page faults and the zeroing that the operating
system does for them are not counted, although they cost (see docs/benchmarks.md).

published, per microbatch:    8 slots x [ copy 2 S, norm S, division 2 S, product S
                                          + gradients: products 2 S, normalization 11 S, zeros T, added rows 3 S ]
                              + 7 x 3 T to add the slots' dense gradients up (8 after the first microbatch)
          per step:           clip 3 T + AdamW 20 T (fused: 7 T)
full softmax, per microbatch: table read 2 T, gradient written T (and added 3 T after the first)
          per step:           clip 3 T + AdamW 20 T
ours, per microbatch:         rows read twice 2 a e w; cosines written, read, overwritten by coefficients 3 * 4 a b;
                              weights of the sets read twice 2 * 4 a s
          per step:           coefficients read twice (norms, update) 2 * 4 a M b; rows and moments read and written
                              2 a (e w + e m + v); where M b > e: instead of the coefficients, gradient rows
                              2 * 4 a e per microbatch and 2 * 4 a e in the update
          w, m: bytes of an element of weight and first moment; v: bytes of a row's second moment. With update: dense
          the rows and moments are those of the whole table.
"""

from __future__ import annotations

from dataclasses import dataclass

from head_contenders import OURS, Workload, head_config, optim_config

_BYTES = {"float32": 4, "bfloat16": 2, "none": 0}
_GIB = 2**30
_PROCESS = 0.6 * _GIB  # interpreter, torch and megatron-core


@dataclass(frozen=True)
class Cost:
    """Of one rank.

    Attributes:
        moved_bytes: by one optimizer step.
        memory_bytes: peak of tables, moments and workspace, roughly; decides what can run side by side.
    """

    moved_bytes: float
    memory_bytes: float


def count_cost(name: str, work: Workload, ranks: int) -> Cost:
    """Returns what a contender's step costs on each rank."""
    if name in OURS:
        return _ours(name, work, ranks)
    table = 4.0 * work.num_classes * work.embedding_size / ranks
    adamw = 7 if name == "published_fused" else 20
    if name == "full_softmax":
        moved = work.microbatches * 3 + (work.microbatches - 1) * 3 + 3 + adamw
        return Cost(moved * table, 5 * table)
    slots = work.labels_per_step
    one_set = table * work.rate_of_sets(slots)
    per_microbatch = slots * (22 * one_set + table) + (slots - 1) * 3 * table
    moved = work.microbatches * per_microbatch + (work.microbatches - 1) * 3 * table + (3 + adamw) * table
    return Cost(moved, 5 * table + 2.2 * slots * one_set)


def active_rows(name: str, work: Workload) -> float:
    """Returns how many classes are expected in the union of one of ours' sets, over all ranks."""
    config = head_config(name, work)
    idle = (1 - config.inclusion_probability) ** len(config.slots_of_sets)
    labels = work.batch_size * work.microbatches * work.labels_per_step
    idle *= (1 - 1 / work.num_classes) ** labels
    return work.num_classes * (1 - idle)


def _ours(name: str, work: Workload, ranks: int) -> Cost:
    optim = optim_config(name, work)
    rows, sets = active_rows(name, work) / ranks, len(head_config(name, work).slots_of_sets)
    local, width, samples = work.num_classes / ranks, work.embedding_size, work.batch_size
    weight_bytes = _BYTES[optim.weight_dtype] * width
    second_bytes = 4 if optim.second_moment == "row" else 4 * width
    state_bytes = weight_bytes + _BYTES[optim.first_moment] * width + second_bytes
    updated = local if optim.update == "dense" else rows
    per_microbatch = rows * (2 * weight_bytes + 12 * samples + 8 * sets)
    step_samples = samples * work.microbatches
    if step_samples <= width:
        gradient = held = 4 * step_samples * rows
        gradient *= 2
    else:
        gradient, held = 8 * width * rows * (work.microbatches + 1), 4 * width * rows
    moved = work.microbatches * per_microbatch + gradient + 2 * updated * state_bytes
    return Cost(moved, local * state_bytes + held + rows * (4 * samples + 8 * sets + 64))


def fits_together(costs: list[Cost], ranks: int, available_bytes: float, *, on_gpu: bool) -> bool:
    """Returns whether contenders can be held at the same time."""
    overhead = _GIB if on_gpu else _PROCESS
    return ranks * sum(cost.memory_bytes * 1.1 + overhead for cost in costs) < available_bytes
