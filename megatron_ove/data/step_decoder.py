"""`StepDecoder`: a replica's share of a step, from shards to patches and positions, as far as a stage needs them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ove.data.bad_samples import KnownBad
from megatron_ove.data.patchify import empty_patches
from megatron_ove.data.planner import MicrobatchPlan
from megatron_ove.data.read_ahead import MemberReader, ReadAhead, StepReads
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.step_share import StepShare, share_of
from megatron_ove.errors import DataError, MegatronOveError

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology


@dataclass
class DecodedShare:
    """What a rank has of its replica's share of a step; on ranks that do not decode, what it will receive into.

    Attributes:
        share: which samples.
        patches: [m, P, 3 * p * p] uint8 on the device; None where nobody looks at pixels.
        positions: [m, P, 3] int32 on the CPU; None on ranks that receive them.
        problems: place among the share's samples -> why it could not be read here.
    """

    share: StepShare
    patches: Tensor | None
    positions: Tensor | None
    problems: dict[int, str] = field(default_factory=dict)


class StepPlanner(Protocol):
    """What decoding needs to know of planning."""

    def plan(self, step: int) -> MicrobatchPlan:
        """Returns the plan of a step, counted from 0."""
        ...


class StepDecoder:
    """Decodes step after step; the members of the next step are read meanwhile. For one thread."""

    def __init__(
        self,
        planner: StepPlanner,
        sources: Sequence[DataSource],
        topology: ParallelTopology,
        *,
        patch_size: int,
        has_pixels: bool,
        read_threads: int,
        end_step: int | None,
        known_bad: KnownBad,
    ) -> None:
        """
        Args:
            planner: of all steps.
            sources: in the planner's order.
            topology: which share this rank decodes.
            patch_size: p.
            has_pixels: whether patches are decoded, or positions only.
            read_threads: reads at a time.
            end_step: nothing is read for this step and later ones; None = there is no last one.
            known_bad: samples that are not even tried.
        """
        self._planner = planner
        self._sources = tuple(sources)
        self._topology = topology
        self._patch_size, self._has_pixels = patch_size, has_pixels
        self._end_step = end_step
        self._known_bad = known_bad
        self._reads = ReadAhead([source.shards for source in sources], read_threads)
        self._begun: dict[int, tuple[StepShare, np.ndarray, StepReads]] = {}
        self._stream: torch.cuda.Stream | None = None

    def decode(self, step: int) -> DecodedShare:
        """Returns this replica's share of a step; steps come in order.

        Raises:
            ConfigError, DataError: the step cannot be planned.
        """
        device = self._topology.device
        if device.type == "cuda" and self._stream is None:
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            share, is_known, reads = self._begin(step)
            if self._end_step is None or step + 1 < self._end_step:
                self._begin_ahead(step + 1)
            decoded = self._decode(share, is_known, reads)
            if self._stream is not None:
                self._stream.synchronize()
        return decoded

    def close(self) -> None:
        """Gives up what is being read ahead."""
        for _, _, reads in self._begun.values():
            reads.cancel()
        self._reads.close()

    def _begin_ahead(self, step: int) -> None:
        """Begins a step; leaves it alone if that fails: the error belongs to the step, and is met again there."""
        with suppress(MegatronOveError):
            self._begun = {step: self._begin(step)}

    def _begin(self, step: int) -> tuple[StepShare, np.ndarray, StepReads]:
        """Plans a step and starts reading it, unless that was done while the step before was decoded."""
        if step in self._begun:
            return self._begun.pop(step)
        topology = self._topology
        share = share_of(self._planner.plan(step), topology.data_rank, topology.data_size)
        is_known = find_known(share, self._known_bad, [source.name for source in self._sources])
        wanted: list[tuple[int, int, str]] = []
        for index, source, chosen in self._by_source(share, ~is_known):
            rows, seeds = share.rows[chosen], share.seeds[chosen]
            members = source.position_members(rows, seeds)
            if self._has_pixels:
                members = members + source.picture_members(rows, seeds)
            wanted += [(index, row, member) for row, member in members]
        return share, is_known, self._reads.start(wanted)

    def _decode(self, share: StepShare, is_known: np.ndarray, reads: StepReads) -> DecodedShare:
        topology, size = self._topology, (share.num_microbatches, share.plan.tokens_per_microbatch)
        patches = empty_patches(*size, self._patch_size, topology.device) if self._has_pixels else None
        decoded = DecodedShare(share, patches, torch.zeros(*size, 3, dtype=torch.int32))
        decoded.problems = dict.fromkeys(np.flatnonzero(is_known).tolist(), "")
        for index, source, chosen in self._by_source(share, ~is_known):
            read = reads.reader_of(index)
            usable = self._write_positions(decoded, source, chosen, read)
            if patches is not None and usable.size:
                targets = [patches[place] for place in places_of(share, usable)]
                found = source.decode_into(share.rows[usable], share.seeds[usable], targets, read)
                decoded.problems |= {int(usable[i]): reason for i, reason in found.items()}
        if topology.device.type == "cuda":
            assert decoded.positions is not None
            decoded.positions = decoded.positions.pin_memory()
        return decoded

    @staticmethod
    def _write_positions(
        decoded: DecodedShare, source: DataSource, chosen: np.ndarray, read: MemberReader
    ) -> np.ndarray:
        """Fills in positions; returns the samples of `chosen` that have some."""
        share, usable = decoded.share, []
        assert decoded.positions is not None
        places = zip(
            chosen.tolist(),
            share.rows[chosen].tolist(),
            share.seeds[chosen].tolist(),
            places_of(share, chosen),
            strict=True,
        )
        for sample, row, seed, place in places:
            try:
                positions = source.positions(row, seed, read)
            except DataError as error:
                decoded.problems[sample] = str(error)
                continue
            decoded.positions[place] = torch.from_numpy(positions)
            usable.append(sample)
        return np.array(usable, dtype=np.int64)

    def _by_source(self, share: StepShare, is_chosen: np.ndarray) -> list[tuple[int, DataSource, np.ndarray]]:
        source_index = share.source_index
        found = ((i, np.flatnonzero(is_chosen & (source_index == i))) for i in range(len(self._sources)))
        return [(i, self._sources[i], chosen) for i, chosen in found if chosen.size]


def find_known(share: StepShare, known: KnownBad, names: Sequence[str]) -> np.ndarray:
    """Returns [n] bool: which of the share's samples are recorded as bad in this step."""
    bad = known.get(share.plan.step, frozenset())
    is_known = np.zeros(len(share.places), dtype=bool)
    for name, ordinal in bad:
        if name in names:
            is_known |= (share.source_index == names.index(name)) & (share.ordinals == ordinal)
    return is_known


def places_of(share: StepShare, samples: np.ndarray) -> list[tuple[int, slice]]:
    """Returns where each of `samples` lies: its microbatch, and its patches there."""
    begins, lengths = share.first_patch[samples], share.num_patches[samples]
    return [
        (microbatch, slice(begin, begin + length))
        for microbatch, begin, length in zip(
            share.microbatch[samples].tolist(), begins.tolist(), lengths.tolist(), strict=True
        )
    ]
