"""What the heads cost the host in a step of a large run: ahead of it in a thread, and on its critical path.

Simulates one rank among many replicas in a single process; the message of all replicas is made up. What is done ahead
is measured at full size. On the critical path the host only asks a device for operations, whose number does not depend
on sizes; so that is measured with a step of as many replicas, microbatches and class sets but hardly any rows and
samples, on a CPU, where an operation on a few numbers costs about what it costs to ask a GPU for one. The index of the
embeddings' gather is built at full size.

Also compares the active rows of a few ranks with those that the definition gives for the whole table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.heads.keyed_permutation import KeyedPermutation
from megatron_ove.kinds import load_kinds
from megatron_ove.objectives.build import build_objectives
from megatron_ove.objectives.objective_set import ObjectiveSet, StepPreparation
from megatron_ove.objectives.step_exchange import MessageLayout
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.parallel.row_blocks import arrange_gathered_rows
from megatron_ove.parallel.topology import ParallelTopology

NUM_CLASSES = {"images": 2_000_000, "pages": 365_187, "clips": 400_000}
LABELS_PER_STEP, STORED_LABELS, EMBEDDING_SIZE, SEED = 8, 16, 8, 0
SAMPLES = {128: 16_384, 1_000: 32_768}
"""Replicas -> samples of a head in a step."""
_TINY_RATE, _FEW_SAMPLES = 1e-5, 16


@dataclass(frozen=True)
class SimulatedGroup:
    """Stands for a process group of which only this rank exists."""

    num_ranks: int
    own_rank: int

    def size(self) -> int:
        return self.num_ranks

    def rank(self) -> int:
        return self.own_rank


@dataclass
class Step:
    """One step of all replicas: sample counts and labels of everybody, batches of this rank.

    Attributes:
        counts: source -> [replicas, microbatches].
        labels: source -> [n, k] int32, drawn class ids, one replica after the other.
        batches: of this rank.
    """

    counts: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    batches: list[Batch] = field(default_factory=list)


def main() -> int:
    """Measures and prints a table; 1 if active rows are not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[128, 1_000])
    parser.add_argument("--microbatches", type=int, default=2, help="of a replica in a step")
    parser.add_argument("--sample-rate", type=float, default=0.1, help="of the heads, as in the recipes")
    parser.add_argument("--co-positives", choices=["masked", "negative"], default="masked")
    parser.add_argument("--steps", type=int, default=5, help="the median of them is shown")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(replicas, options) for replicas in options.replicas]
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result["rows_are_exact"] for result in results) else 1


def measure(replicas: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one number of replicas."""
    samples = SAMPLES.get(replicas, 16 * replicas)
    rank = replicas // 2
    objectives, tiny = build(replicas, rank, options.sample_rate, options), build(replicas, rank, _TINY_RATE, options)
    rows, exact = {}, True
    seconds: dict[str, list[float]] = {"ahead": [], "begin": [], "gather_index": []}
    message_bytes = 0
    for step in range(options.steps):
        work = make_step(step, replicas, rank, samples, options.microbatches)
        with simulated_messages(objectives, work) as sizes:
            prepared = timed(seconds["ahead"], objectives.prepare_step, step, work.batches, work.counts)
        message_bytes = sizes[-1]
        few = make_step(step, replicas, rank, _FEW_SAMPLES, options.microbatches)
        with simulated_messages(tiny, few):
            few_prepared = tiny.prepare_step(step, few.batches, few.counts)
        timed(seconds["begin"], tiny.begin_step, few_prepared)
        timed(seconds["gather_index"], build_gather_indices, work, rank)
        rows = {name: prepared.parts[name].chosen.rows.numel() for name in objectives}
    for one in sorted({0, rank, replicas - 1}):
        work = make_step(0, replicas, one, samples, options.microbatches)
        exact &= rows_are_exact(build(replicas, one, options.sample_rate, options), work)
    figures = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    return {
        "replicas": replicas,
        "samples_of_a_head": samples,
        "microbatches": options.microbatches,
        "heads": len(NUM_CLASSES),
        "critical_path_ms": figures["begin"] + figures["gather_index"],
        "begin_ms": figures["begin"],
        "gather_index_ms": figures["gather_index"],
        "ahead_in_thread_ms": figures["ahead"],
        "message_bytes_a_replica": message_bytes,
        "active_rows": rows,
        "rows_of_shard": {name: objectives[name].centers.num_rows for name in objectives},
        "rows_are_exact": exact,
    }


def build(replicas: int, rank: int, sample_rate: float, options: argparse.Namespace) -> ObjectiveSet:
    """Builds three heads as one rank of a run has them, with tables of a few components."""
    alone, group = SimulatedGroup(1, 0), SimulatedGroup(replicas, rank)
    groups: dict[str, Any] = {
        "tensor_group": alone,
        "pipeline_group": alone,
        "data_group": group,
        "data_host_group": group,
        "replica_host_group": alone,
        "class_group": group,
        "process_groups": None,
    }
    topology = ParallelTopology(
        world_size=replicas,
        global_rank=rank,
        tensor_size=1,
        tensor_rank=0,
        pipeline_size=1,
        pipeline_rank=0,
        virtual_pipeline_size=None,
        first_stage_layers=None,
        last_stage_layers=None,
        data_size=replicas,
        data_rank=rank,
        sequence_parallel=False,
        device=torch.device("cpu"),
        **groups,
    )
    configs = {
        f"{source}_head": PartialFCConfig(
            kind="partial_fc",
            source=source,
            num_classes=num_classes,
            labels_per_step=LABELS_PER_STEP,
            sample_rate=sample_rate,
            co_positives=options.co_positives,
            compute_dtype="float32",  # another one would be copied chunk by chunk here, which a kernel does on a GPU
        )
        for source, num_classes in NUM_CLASSES.items()
    }
    return build_objectives(
        configs,
        kinds=load_kinds(),
        topology=topology,
        embedding_size=EMBEDDING_SIZE,
        seed=SEED,
        optim=ClassCenterOptimConfig(),
    )


def make_step(step: int, replicas: int, rank: int, samples: int, microbatches: int) -> Step:
    """Makes up a step: uneven microbatches, a few of them empty, labels anywhere."""
    generator = np.random.default_rng([step, replicas])
    counts, labels = {}, {}
    for source, num_classes in NUM_CLASSES.items():
        places = generator.integers(0, replicas * microbatches, samples)
        counts[source] = np.bincount(places, minlength=replicas * microbatches).reshape(replicas, microbatches)
        labels[source] = generator.integers(-1, num_classes, (samples, LABELS_PER_STEP), dtype=np.int32)
    work = Step(counts, labels)
    for index in range(microbatches):
        sizes = [int(counts[source][rank, index]) for source in NUM_CLASSES]
        total = sum(sizes)
        pack = PatchPack.of_whole_samples(
            torch.empty(total, 3, dtype=torch.int32), torch.arange(total + 1, dtype=torch.int32)
        )
        known = Samples(
            source_names=tuple(NUM_CLASSES),
            source=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).int(),
            row=torch.arange(total),
            seed=torch.from_numpy(generator.integers(0, 2**62, total)),
            is_valid=torch.ones(total, dtype=torch.bool),
            keys=range(total),  # type: ignore[arg-type]  # read for messages only
        )
        stored = {
            f"{source}_head": torch.from_numpy(
                generator.integers(-1, num_classes, (size, STORED_LABELS), dtype=np.int32)
            )
            for (source, num_classes), size in zip(NUM_CLASSES.items(), sizes, strict=True)
        }
        work.batches.append(Batch({MAIN_PACK: pack}, known, stored))
    return work


@contextmanager
def simulated_messages(objectives: ObjectiveSet, work: Step) -> Iterator[list[int]]:
    """Answers the collective of `prepare_step` with the other replicas' messages; yields the bytes of those sent."""
    per_replica = {source: counts.sum(axis=1) for source, counts in work.counts.items()}
    layout = MessageLayout(list(per_replica.values()), [LABELS_PER_STEP] * len(per_replica))
    parts = {source: np.split(work.labels[source], np.cumsum(sizes)[:-1]) for source, sizes in per_replica.items()}
    others = np.stack(
        [
            layout.pack(
                replica,
                has_mistake=False,
                item_counts=[int(sizes[replica]) for sizes in per_replica.values()],
                numbers=[parts[source][replica] for source in per_replica],
            )
            for replica in range(len(next(iter(per_replica.values()))))
        ]
    )
    sizes: list[int] = []

    def gather(gathered: Tensor, sent: Tensor, group: SimulatedGroup) -> None:
        others[group.rank()] = sent.numpy()
        gathered.copy_(torch.from_numpy(others).flatten())
        sizes.append(sent.numel() * sent.element_size())

    with patch.object(dist, "all_gather_into_tensor", gather):
        yield sizes


def build_gather_indices(work: Step, rank: int) -> None:
    """What `forward` works out on the host for the gather of each microbatch's embeddings."""
    by_head = np.stack(list(work.counts.values()))  # [heads, replicas, microbatches]
    for index in range(by_head.shape[2]):
        arrange_gathered_rows(by_head[:, :, index], rank, torch.device("cpu"))


def rows_are_exact(objectives: ObjectiveSet, work: Step) -> bool:
    """Returns whether this rank's active rows are those of the definition, worked out over the whole table."""
    all_labels: dict[str, np.ndarray] = {}

    def keep(layout: MessageLayout, gathered: np.ndarray) -> Any:
        messages = unpack(layout, gathered)
        all_labels.update(zip(NUM_CLASSES, messages.numbers, strict=True))
        return messages

    unpack = MessageLayout.unpack
    with simulated_messages(objectives, work), patch.object(MessageLayout, "unpack", keep):
        prepared: StepPreparation = objectives.prepare_step(0, work.batches, work.counts)
    for name in objectives:
        plan, centers = prepared.parts[name], objectives[name].centers  # type: ignore[attr-defined]
        (source,) = objectives.sources_of(name)
        draw, num_classes = plan.draw, NUM_CLASSES[source]
        permutation = KeyedPermutation(num_classes, draw.key)
        in_order = permutation.points_at(np.arange(permutation.num_points))
        is_active = np.zeros(num_classes, dtype=bool)
        is_active[in_order[in_order < num_classes][: draw.size]] = True
        labels = torch.from_numpy(all_labels[source])
        rows = rows_of_classes(labels, num_classes).numpy()
        is_active[rows[rows >= 0]] = True
        expected = np.flatnonzero(is_active[centers.first_row : centers.first_row + centers.num_rows])
        if not np.array_equal(expected, plan.chosen.rows.numpy()):
            return False
    return True


def timed(seconds: list[float], work: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `work` returns, and notes the CPU time that this thread took for it."""
    start = time.thread_time()
    result = work(*arguments)
    seconds.append(time.thread_time() - start)
    return result


def print_table(results: list[Mapping[str, Any]]) -> None:
    """Prints the figures, one line for each number of replicas."""
    print("| replicas | samples a head | critical path ms | of it begin | of it gather index | ahead, in a thread ms |")
    print("|---|---|---|---|---|---|")
    for one in results:
        print(
            f"| {one['replicas']:,} | {one['samples_of_a_head']:,} | {one['critical_path_ms']:.1f} | "
            f"{one['begin_ms']:.1f} | {one['gather_index_ms']:.2f} | {one['ahead_in_thread_ms']:.1f} |"
        )
    print()
    for one in results:
        shards = [
            f"{rows:,} of {one['rows_of_shard'][name]:,} rows ({name})" for name, rows in one["active_rows"].items()
        ]
        print(
            f"{one['replicas']:,} replicas: active are {', '.join(shards)}; "
            f"{'exactly' if one['rows_are_exact'] else 'NOT'} those of the definition on the ranks compared; "
            f"a message has {one['message_bytes_a_replica']:,} bytes"
        )


if __name__ == "__main__":
    sys.exit(main())
