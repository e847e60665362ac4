"""`StepLoader`: a step's microbatches, decoded once per replica, prepared a step ahead, sent where it is needed.

Three threads. One on the first rank of each tensor-parallel group reads and decodes, some steps ahead. One on every
rank prepares the step after the present one: it agrees with the replica's other ranks on samples that could not be
read, assembles the microbatches and runs the host half of the objectives; its exchanges use process groups of their
own. The main thread broadcasts inside the tensor-parallel group. Everything that follows from plan and index (segments,
seeds, inputs of objectives, all sizes) is computed or read by every rank itself, so only patches and positions travel:
at most one broadcast each a step. Pipeline stages read for themselves what they need: patches on the first, inputs on
the last, positions everywhere.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.data.assembly import Collate, assemble_batches, device_positions, fill_in, room_for
from megatron_ove.data.background import BackgroundSteps
from megatron_ove.data.bad_samples import BadSample, KnownBad, record_bad_samples
from megatron_ove.data.planner import MicrobatchPlanner
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.step_decoder import DecodedShare, StepDecoder, places_of
from megatron_ove.data.step_share import StepShare, count_samples, share_of

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for the step that is being decoded."""

PrepareStep = Callable[[int, Sequence[Batch], Mapping[str, np.ndarray]], Any]
"""(step, this replica's microbatches, source -> samples [replicas, microbatches]) -> what the training step gets."""


@dataclass(frozen=True)
class LoadedStep:
    """One step of one replica.

    Attributes:
        batches: its microbatches, equally many on every replica, the same on every rank of a tensor-parallel group.
        prepared: what `prepare` made of them; None without it.
        num_bad: samples of this replica that could not be read and count as empty.
    """

    batches: tuple[Batch, ...]
    prepared: Any
    num_bad: int


@dataclass(frozen=True)
class _PreparedStep:
    """A step without its pixels.

    Attributes:
        step: the step as the trainer gets it; patches and positions are filled in later.
        patches: [m, P, 3 * p * p] uint8 behind the batches, on the device; None where nobody looks at pixels.
        positions: [m, P, 3] int32 behind the batches, on the device.
        host_positions: what to fill in; None where they are in place, or received.
        bad_places: what to leave empty.
    """

    step: LoadedStep
    patches: Tensor | None
    positions: Tensor
    host_positions: Tensor | None
    bad_places: list[tuple[int, slice]]


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
        read_threads: int,
        run_dir: str | Path,
        start_step: int,
        end_step: int | None = None,
        known_bad: KnownBad | None = None,
        collate: Collate | None = None,
        prepare: PrepareStep | None = None,
        last_stage_has_pixels: bool = False,
    ) -> None:
        """Starts loading at `start_step`.

        Args:
            planner: of all steps; the same on every rank.
            sources: in the planner's order.
            topology: which part of a step this rank gets.
            patch_size: p.
            prefetch_steps: steps that are decoded, or being decoded, besides the one that is prepared.
            read_threads: reads at a time.
            run_dir: where samples that cannot be read are recorded.
            start_step: first step that will be asked for; a resumed run passes its next step and needs nothing else.
            end_step: steps of the run; None = no last one.
            known_bad: samples that count as unreadable without being tried, the same on every rank.
            collate: makes the inputs of objectives, on the last stage; None = there are none.
            prepare: called on every rank a step ahead in a thread; may use the topology's host groups.
            last_stage_has_pixels: whether patches are wanted there too; the first stage always has them.
        """
        self._planner = planner
        self._sources = tuple(sources)
        self._names = tuple(source.name for source in sources)
        self._topology = topology
        self._patch_size = patch_size
        self._run_dir = run_dir
        self._known_bad = known_bad or {}
        self._collate, self._prepare = collate, prepare
        self._has_pixels = topology.is_first_stage or (topology.is_last_stage and last_stage_has_pixels)
        self._next_step = start_step
        steps = {"first_step": start_step, "end_step": end_step}
        self._decoder: StepDecoder | None = None
        self._decoding: BackgroundSteps[DecodedShare] | None = None
        if topology.tensor_rank == 0:
            self._decoder = StepDecoder(
                planner,
                sources,
                topology,
                patch_size=patch_size,
                has_pixels=self._has_pixels,
                read_threads=read_threads,
                end_step=end_step,
                known_bad=self._known_bad,
            )
            self._decoding = BackgroundSteps(
                self._decoder.decode, **steps, ahead=prefetch_steps, finishes=False, name="step-decoder"
            )
        self._preparing = BackgroundSteps(self._prepare_step, **steps, ahead=1, finishes=True, name="step-preparer")
        atexit.register(self.close)  # an interpreter that ends under a decoding thread can crash

    @property
    def source_sizes(self) -> dict[str, int]:
        """Source name -> number of samples: with the seed and the step, what decides the order."""
        return {source.name: source.size for source in self._sources}

    def load_step(self, step: int) -> LoadedStep:
        """Returns this replica's microbatches of a step, in order. Collective over the tensor-parallel group.

        Args:
            step: the step after the last one asked for, or `start_step`.

        Returns:
            Batches with patches and positions on the topology's device and the rest on the CPU.

        Raises:
            DataError: a label is out of range, an index is damaged, or what cannot be read cannot be recorded.
        """
        if step != self._next_step:
            raise ValueError(f"step {step} was asked for, but steps come in order and the next is {self._next_step}")
        prepared = self._preparing.take()
        fill_in(prepared.patches, prepared.positions, prepared.host_positions, prepared.bad_places, self._topology)
        self._next_step += 1
        return prepared.step

    def close(self) -> None:
        """Ends the threads and closes the shards. May be called more than once."""
        atexit.unregister(self.close)
        has_ended = self._preparing.stop(_CLOSE_TIMEOUT_S)  # first: it may wait for the decoder
        if self._decoding is not None and self._decoder is not None:
            has_ended = self._decoding.stop(_CLOSE_TIMEOUT_S) and has_ended
            self._decoder.close()
        if not has_ended:
            logger.warning(
                "the loading threads are still busy after %g s; the process ends without them", _CLOSE_TIMEOUT_S
            )
            return
        for source in self._sources:
            source.shards.close()

    # -- preparing thread ---------------------------------------------------------------------------------------------

    def _prepare_step(self, step: int) -> _PreparedStep:
        topology, device = self._topology, self._topology.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        decoded = self._decoding.take() if self._decoding is not None else self._room_for(step)
        share = decoded.share
        bad = self._agree_on_bad(decoded)
        positions = device_positions(decoded, device)
        batches = assemble_batches(decoded, positions, bad, self._sources, self._collate)
        counts = count_samples(share.plan, self._names, topology.data_size)
        return _PreparedStep(
            LoadedStep(batches, self._prepare(step, batches, counts) if self._prepare else None, len(bad)),
            decoded.patches,
            positions,
            decoded.positions if decoded.positions is not positions else None,
            places_of(share, bad),
        )

    def _room_for(self, step: int) -> DecodedShare:
        topology = self._topology
        share = share_of(self._planner.plan(step), topology.data_rank, topology.data_size)
        return room_for(share, self._patch_size, topology.device, has_pixels=self._has_pixels)

    def _agree_on_bad(self, decoded: DecodedShare) -> np.ndarray:
        """Returns the share's samples, ascending, that any rank of the replica could not read; records new ones."""
        group = self._topology.replica_host_group
        flags = torch.zeros(len(decoded.share.places), dtype=torch.uint8)  # 1: recorded already, 2: new
        for sample, reason in decoded.problems.items():
            flags[sample] = 2 if reason else 1
        if group.size() > 1 and flags.numel():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        if bool((flags == 2).any()):
            reasons = [decoded.problems]
            if group.size() > 1:
                reasons = [{} for _ in range(group.size())]
                dist.all_gather_object(reasons, decoded.problems, group=group)
            if group.rank() == 0:
                self._record(decoded.share, {k: v for part in reversed(reasons) for k, v in part.items() if v})
        return flags.nonzero().flatten().numpy()

    def _record(self, share: StepShare, reasons: Mapping[int, str]) -> None:
        samples = []
        for place, reason in sorted(reasons.items()):
            source = self._sources[share.source_index[place]]
            row = int(share.rows[place])
            ordinal, number = int(share.ordinals[place]), share.plan.step + 1
            samples.append(BadSample(number, source.name, ordinal, row, source.shards.key(row), reason))
        path = record_bad_samples(self._run_dir, self._topology.data_rank, samples)
        logger.warning(
            "Step %d goes on without %d of its samples, which stand in %s; the first: %s.",
            share.plan.step + 1,
            len(samples),
            path,
            samples[0].reason,
        )
