"""From a decoded share to the microbatches that a rank is given: segments and inputs, then patches and positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.data.patchify import empty_patches
from megatron_ove.data.sample_reader import SampleReader
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.step_decoder import DecodedShare
from megatron_ove.data.step_share import StepShare
from megatron_ove.parallel.row_blocks import concatenate_ranges
from megatron_ove.shards.shard_set import ShardSet

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology

Collate = Callable[[Samples, PatchPack, SampleReader], Mapping[str, Any]]
"""(samples of a microbatch, its pack, what reads about them) -> objective name -> inputs; runs in a loader's thread."""


def room_for(share: StepShare, patch_size: int, device: torch.device, *, has_pixels: bool) -> DecodedShare:
    """Returns what a rank that does not decode receives into."""
    size = (share.num_microbatches, share.plan.tokens_per_microbatch)
    patches = empty_patches(*size, patch_size, device) if has_pixels else None
    return DecodedShare(share, patches, None)


def device_positions(decoded: DecodedShare, device: torch.device) -> Tensor:
    """Returns [m, P, 3] int32 on the device: what was decoded if it lies there, else room for it."""
    share, positions = decoded.share, decoded.positions
    if positions is None or device.type == "cuda":
        return torch.zeros(
            share.num_microbatches, share.plan.tokens_per_microbatch, 3, dtype=torch.int32, device=device
        )
    return positions


def assemble_batches(
    decoded: DecodedShare, positions: Tensor, bad: np.ndarray, sources: Sequence[DataSource], collate: Collate | None
) -> tuple[Batch, ...]:
    """Returns the microbatches of a share; patches and positions may still be filled in.

    Args:
        decoded: the share.
        positions: [m, P, 3] int32 behind the batches, on the device.
        bad: [x] int64, samples of the share that could not be read.
        sources: in the planner's order.
        collate: returns the inputs of a microbatch; None where there are no objectives.

    Raises:
        DataError: what objectives need cannot be used, like a label that is out of range.
    """
    share, patches, names = decoded.share, decoded.patches, tuple(source.name for source in sources)
    is_valid = np.ones(len(share.places), dtype=bool)
    is_valid[bad] = False
    shard_sets = tuple(source.shards for source in sources)
    reader = SampleReader(sources)
    counts, lengths, grids = _segments_of(share, sources)
    first_segment = np.concatenate([[0], np.cumsum(counts)])
    batches = []
    for i in range(share.num_microbatches):
        mine = share.of_microbatch(i)
        source, rows = share.source_index[mine], share.rows[mine]
        samples = Samples(
            source_names=names,
            source=torch.from_numpy(source).to(torch.int32),
            row=torch.from_numpy(rows).to(torch.int64),
            seed=torch.from_numpy(share.seeds[mine]).to(torch.int64),
            is_valid=torch.from_numpy(is_valid[mine]),
            keys=SampleKeys(shard_sets, source, rows),
        )
        segments = slice(first_segment[mine[0]], first_segment[mine[-1] + 1]) if len(mine) else slice(0)
        pack = PatchPack(
            positions=positions[i],
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[segments])])).to(torch.int32),
            grids=torch.from_numpy(grids[segments]),
            sample=torch.from_numpy(np.repeat(np.arange(len(mine)), counts[mine])).to(torch.int32),
            patches=patches[i] if patches is not None else None,
            seeds=samples.seed.repeat_interleave(torch.from_numpy(counts[mine])),
        )
        batches.append(Batch({MAIN_PACK: pack}, samples, collate(samples, pack, reader) if collate else {}))
    return tuple(batches)


def _segments_of(share: StepShare, sources: Sequence[DataSource]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the segments of a share in its order: how many each sample has, [n], their lengths, [s], and grids."""
    counts = np.empty(len(share.places), dtype=np.int64)
    found = []
    for index, source in enumerate(sources):
        chosen = np.flatnonzero(share.source_index == index)
        segments = source.segments(share.rows[chosen], share.seeds[chosen])
        counts[chosen] = segments.counts
        found.append((chosen, segments))
    firsts = np.cumsum(counts) - counts
    lengths, grids = np.empty(counts.sum(), dtype=np.int64), np.empty((counts.sum(), 3), dtype=np.int32)
    for chosen, segments in found:
        places = concatenate_ranges(firsts[chosen], segments.counts)
        lengths[places], grids[places] = segments.lengths, segments.grids
    return counts, lengths, grids


def fill_in(
    patches: Tensor | None,
    positions: Tensor,
    host_positions: Tensor | None,
    bad_places: Sequence[tuple[int, slice]],
    topology: ParallelTopology,
) -> None:
    """Brings patches and positions into their tensors on every rank of the tensor-parallel group; collective over it.

    Args:
        patches: [m, P, 3 * p * p] uint8 on the device; None off the first stage.
        positions: [m, P, 3] int32 on the device.
        host_positions: what to fill in; None where they are in place, or received.
        bad_places: what to leave empty: microbatch, and patches in it.
        topology: this rank's place.
    """
    if patches is not None and patches.device.type == "cuda":
        # made on the decoder's stream: its memory must not be reused before this stream is done with it
        patches.record_stream(torch.cuda.current_stream())
    if host_positions is not None:
        positions.copy_(host_positions, non_blocking=True)
    for microbatch, place in bad_places:
        positions[microbatch, place] = 0
        if patches is not None:
            patches[microbatch, place] = 0
    if topology.tensor_size > 1:
        source = dist.get_global_rank(topology.tensor_group, 0)
        for tensor in (patches, positions):
            if tensor is not None and tensor.numel():
                dist.broadcast(tensor, source, group=topology.tensor_group)


class SampleKeys(Sequence[str]):
    """Keys of a microbatch's samples, each looked up when it is read: each may be a cold page of a large index."""

    def __init__(self, shard_sets: Sequence[ShardSet], source_index: np.ndarray, rows: np.ndarray) -> None:
        self._shard_sets = shard_sets
        self._source_index = source_index
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return tuple(self[place] for place in range(*i.indices(len(self))))
        return self._shard_sets[int(self._source_index[i])].key(int(self._rows[i]))
