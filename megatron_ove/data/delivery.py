"""`StepLoader`: a step's microbatches, decoded once per replica and sent to the ranks that share it.

One rank of each tensor-parallel group (its rank 0) reads and decodes in a background thread, some steps ahead; the main
thread broadcasts the result inside the group. Everything that follows from plan and index (sample boundaries, seeds,
keys, labels, all sizes) is computed or read by every rank itself, so only patches and positions travel: at most one
broadcast each a step. Pipeline stages read for themselves what they need: patches on the first, labels on the last,
positions everywhere.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.data.mixture import MicrobatchPlan, MicrobatchPlanner
from megatron_ove.data.patchify import empty_patches
from megatron_ove.data.shard_validation import bad_label, label_sentence
from megatron_ove.data.source import DataSource
from megatron_ove.errors import DataError

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology

_log = logging.getLogger(__name__)

_POLL_S = 0.1
"""How often a waiting thread looks whether it should stop."""
_CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for the picture batch that is being decoded."""


@dataclass
class StepTensors:
    """One replica's share of a step, n microbatches; patches and positions travel inside a tensor-parallel group.

    Attributes:
        patches: [n, P, 3 * p * p] uint8; None off the first stage.
        positions: [n, P, 3] int32.
        labels: [sum over samples of their source's L] int32, microbatch by microbatch, in each source by source;
            None off the last stage. On the CPU, where objectives plan with them.
    """

    patches: Tensor | None
    positions: Tensor
    labels: Tensor | None

    def travelling(self) -> list[Tensor]:
        """Returns the tensors to broadcast, in a fixed order."""
        return [value for value in (self.patches, self.positions) if value is not None]


class StepLoader:
    """Delivers the steps of a run in order, each as this replica's microbatches."""

    def __init__(
        self,
        planner: MicrobatchPlanner,
        sources: Sequence[DataSource],
        topology: ParallelTopology,
        *,
        patch_size: int,
        prefetch_steps: int,
        start_step: int,
    ) -> None:
        """Starts decoding at `start_step`.

        Args:
            planner: of all steps; the same on every rank.
            sources: in the planner's order.
            topology: which part of a step this rank gets.
            patch_size: p.
            prefetch_steps: decoded steps that may wait.
            start_step: first step that will be asked for; a resumed run passes its next step and needs nothing else.
        """
        self.last_wait_s = 0.0
        """Seconds the last `step_batches` took: waiting for the decoder, broadcast and copies."""
        self.sample_counts: Mapping[str, np.ndarray] = {}
        """Of the last step: source -> [replicas, microbatches of a replica] int64, samples; the same on every rank."""
        self._planner = planner
        self._sources = tuple(sources)
        self._names = tuple(source.name for source in sources)
        self._topology = topology
        self._patch_size = patch_size
        self._next_step = start_step
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[MicrobatchPlan, StepTensors] | BaseException] = queue.Queue(prefetch_steps)
        self._thread: threading.Thread | None = None
        if topology.tensor_rank == 0:
            self._thread = threading.Thread(target=self._decode_steps, name="step-decoder", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # an interpreter that ends under a decoding thread can crash

    @property
    def source_sizes(self) -> dict[str, int]:
        """Source name -> number of samples: with the seed and the step, what decides the order."""
        return {source.name: source.size for source in self._sources}

    def step_batches(self, step: int) -> list[Batch]:
        """Returns this replica's microbatches of a step, in order. Collective over the tensor-parallel group.

        Args:
            step: the step after the last one asked for, or `start_step`.

        Returns:
            Batches with patches and positions on the topology's device and the rest on the CPU, the same on every rank
            of the tensor-parallel group, as many on every replica.

        Raises:
            DataError: a sample could not be read or decoded; named with its file.
        """
        started = time.perf_counter()
        if step != self._next_step:
            raise ValueError(f"step {step} was asked for, but steps come in order and the next is {self._next_step}")
        plan, tensors = self._take() if self._thread is not None else self._prepare(self._planner.plan(step))
        tensors = self._share(tensors)
        batches = self._assemble(plan, tensors)
        self.sample_counts = count_samples(plan, self._names, self._topology.data_size)
        self._next_step += 1
        self.last_wait_s = time.perf_counter() - started
        return batches

    def close(self) -> None:
        """Stops decoding and closes the shards. May be called more than once."""
        self._stop.set()
        if self._thread is not None:
            atexit.unregister(self.close)
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                _log.warning(
                    "the decoding thread is still busy after %g s; the process ends without it", _CLOSE_TIMEOUT_S
                )
                return
        for source in self._sources:
            source.shards.close()

    # -- background thread --------------------------------------------------------------------------------------------

    def _decode_steps(self) -> None:
        """Decodes step after step until told to stop; an error becomes the last thing in the queue."""
        step = self._next_step
        device = self._topology.device
        on_gpu = device.type == "cuda"
        try:
            if on_gpu:
                torch.cuda.set_device(device)
            with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext():
                while not self._stop.is_set():
                    plan = self._planner.plan(step)
                    tensors = self._read(plan)
                    if on_gpu:
                        torch.cuda.current_stream().synchronize()
                    self._put((plan, tensors))
                    step += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[MicrobatchPlan, StepTensors] | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_S)
                return

    def _read(self, plan: MicrobatchPlan) -> StepTensors:
        """Reads and decodes this replica's share of a step, as far as this pipeline stage needs it."""
        _, tensors = self._prepare(plan)
        places, targets = [], []
        for i, microbatch in enumerate(self._microbatches(plan)):
            samples = plan.samples_of(microbatch)
            stops = np.cumsum(plan.num_tokens[samples])
            for place, start, stop in zip(samples, stops - plan.num_tokens[samples], stops, strict=True):
                source = self._sources[plan.source_index[place]]
                positions = source.positions(int(plan.rows[place]), int(plan.seeds[place]))
                tensors.positions[i, start:stop] = torch.from_numpy(positions)
                places.append(place)
                if tensors.patches is not None:
                    targets.append(tensors.patches[i, start:stop])
        if tensors.patches is not None:
            self._decode(plan, np.array(places, dtype=np.int64), targets)
        if self._topology.device.type == "cuda":
            tensors.positions = tensors.positions.pin_memory()
        return tensors

    def _decode(self, plan: MicrobatchPlan, places: np.ndarray, targets: list[Tensor]) -> None:
        for index, source in enumerate(self._sources):
            chosen = np.flatnonzero(plan.source_index[places] == index)
            if chosen.size:
                mine = places[chosen]
                source.decode_into(plan.rows[mine], plan.seeds[mine], [targets[i] for i in chosen])

    def _read_labels(self, plan: MicrobatchPlan) -> np.ndarray:
        parts = [np.empty(0, dtype=np.int32)]
        for microbatch in self._microbatches(plan):
            for index, samples in self._by_source(plan, microbatch):
                shards, rows = self._sources[index].shards, plan.rows[samples]
                labels = np.asarray(shards.labels[rows])
                problem = bad_label(labels, shards.info.num_classes)
                if problem is not None:
                    key = shards.key(int(rows[problem[0]]))
                    raise DataError(label_sentence(problem[1], key, shards.directory, shards.info.num_classes))
                parts.append(labels.ravel())
        return np.concatenate(parts)

    # -- main thread --------------------------------------------------------------------------------------------------

    def _take(self) -> tuple[MicrobatchPlan, StepTensors]:
        while True:
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if self._stop.is_set():
                    raise RuntimeError("the loader is closed") from None
                continue
            if isinstance(item, BaseException):
                self._stop.set()
                raise item
            return item

    def _prepare(self, plan: MicrobatchPlan) -> tuple[MicrobatchPlan, StepTensors]:
        """Returns the labels, and zeros of the shapes that plan and stage ask for: what is filled, or received into."""
        topology = self._topology
        receives = topology.tensor_rank != 0
        microbatches = self._microbatches(plan)
        device = topology.device if receives else torch.device("cpu")
        patches = labels = None
        if topology.is_first_stage:
            size = (len(microbatches), plan.tokens_per_microbatch, self._patch_size)
            patches = empty_patches(*size, topology.device)
        if topology.is_last_stage:
            labels = torch.from_numpy(self._read_labels(plan))
        shape = (len(microbatches), plan.tokens_per_microbatch, 3)
        return plan, StepTensors(patches, torch.zeros(shape, dtype=torch.int32, device=device), labels)

    def _share(self, tensors: StepTensors) -> StepTensors:
        """Brings the tensors to the device and to every rank of the tensor-parallel group."""
        device, group = self._topology.device, self._topology.tensor_group
        if device.type == "cuda" and tensors.patches is not None:
            # made on the decoder's stream: its memory must not be reused before this stream is done with it
            tensors.patches.record_stream(torch.cuda.current_stream())
        tensors.positions = tensors.positions.to(device, non_blocking=True)
        if self._topology.tensor_size > 1:
            source = dist.get_global_rank(group, 0)
            for tensor in tensors.travelling():
                if tensor.numel():
                    dist.broadcast(tensor, source, group=group)
        return tensors

    def _assemble(self, plan: MicrobatchPlan, tensors: StepTensors) -> list[Batch]:
        batches = []
        first_label = 0
        for i, microbatch in enumerate(self._microbatches(plan)):
            samples = plan.samples_of(microbatch)
            labels = {}
            if tensors.labels is not None:
                for index, chosen in self._by_source(plan, microbatch):
                    width = self._sources[index].shards.info.label_width
                    last_label = first_label + chosen.size * width
                    labels[self._names[index]] = tensors.labels[first_label:last_label].view(chosen.size, width)
                    first_label = last_label
            boundaries = np.concatenate([[0], np.cumsum(plan.num_tokens[samples])])
            batches.append(
                Batch(
                    positions=tensors.positions[i],
                    cu_seqlens=torch.from_numpy(boundaries).to(torch.int32),
                    source_index=torch.from_numpy(plan.source_index[samples]).to(torch.int32),
                    source_names=self._names,
                    sample_keys=tuple(self._key(plan, place) for place in samples),
                    sample_seeds=torch.from_numpy(plan.seeds[samples]).to(torch.int64),
                    patches=tensors.patches[i] if tensors.patches is not None else None,
                    labels=labels,
                )
            )
        return batches

    def _microbatches(self, plan: MicrobatchPlan) -> range:
        return plan.microbatches_of(self._topology.data_rank, self._topology.data_size)

    def _by_source(self, plan: MicrobatchPlan, microbatch: int) -> list[tuple[int, np.ndarray]]:
        """Returns (source, its samples in microbatch order) for every source, also for one without samples here."""
        samples = plan.samples_of(microbatch)
        return [(i, samples[plan.source_index[samples] == i]) for i in range(len(self._sources))]

    def _key(self, plan: MicrobatchPlan, place: int) -> str:
        return self._sources[plan.source_index[place]].shards.key(int(plan.rows[place]))


def count_samples(plan: MicrobatchPlan, names: Sequence[str], data_size: int) -> dict[str, np.ndarray]:
    """Returns source -> [replicas, microbatches of a replica] int64: how many samples of it each microbatch has.

    Args:
        plan: of the step.
        names: of the sources, in the planner's order.
        data_size: replicas; microbatch j is the (j // data_size)-th of replica j % data_size.
    """
    shape = (plan.num_microbatches // data_size, data_size)
    return {
        name: np.bincount(plan.microbatch_index[plan.source_index == index], minlength=plan.num_microbatches)
        .reshape(shape)
        .T
        for index, name in enumerate(names)
    }
