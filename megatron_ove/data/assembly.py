"""From a decoded share to the microbatches that a rank is given: boundaries and labels, then patches and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ove.batch import Batch
from megatron_ove.data.patchify import empty_patches
from megatron_ove.data.shard_index import ShardSet
from megatron_ove.data.shard_validation import bad_label, label_sentence
from megatron_ove.data.source import DataSource
from megatron_ove.data.step_decoder import DecodedShare
from megatron_ove.data.step_share import StepShare
from megatron_ove.errors import DataError

if TYPE_CHECKING:
    from megatron_ove.parallel.topology import ParallelTopology


def room_for(share: StepShare, topology: ParallelTopology, patch_size: int) -> DecodedShare:
    """Returns what a rank that does not decode receives into."""
    size = (share.num_microbatches, share.plan.tokens_per_microbatch)
    patches = empty_patches(*size, patch_size, topology.device) if topology.is_first_stage else None
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
    decoded: DecodedShare, positions: Tensor, bad: np.ndarray, sources: Sequence[DataSource], *, has_labels: bool
) -> tuple[Batch, ...]:
    """Returns the microbatches of a share; patches and positions may still be filled in.

    Args:
        decoded: the share.
        positions: [m, P, 3] int32 behind the batches, on the device.
        bad: [x] int64, samples of the share that could not be read: they get no labels.
        sources: in the planner's order.
        has_labels: whether labels are read; they are needed on the last stage.

    Raises:
        DataError: a label is out of range.
    """
    share, patches, names = decoded.share, decoded.patches, tuple(source.name for source in sources)
    is_bad = np.zeros(len(share.places), dtype=bool)
    is_bad[bad] = True
    shard_sets = tuple(source.shards for source in sources)
    batches = []
    for i in range(share.num_microbatches):
        samples = share.of_microbatch(i)
        source_index, rows = share.source_index[samples], share.rows[samples]
        boundaries = np.concatenate([[0], np.cumsum(share.num_patches[samples])])
        labels = {}
        if has_labels:
            for index, name in enumerate(names):
                chosen = source_index == index
                labels[name] = _read_labels(shard_sets[index], rows[chosen], is_bad[samples][chosen])
        batches.append(
            Batch(
                positions=positions[i],
                cu_seqlens=torch.from_numpy(boundaries).to(torch.int32),
                source_index=torch.from_numpy(source_index).to(torch.int32),
                source_names=names,
                sample_keys=SampleKeys(shard_sets, source_index, rows),
                sample_seeds=torch.from_numpy(share.seeds[samples]).to(torch.int64),
                patches=patches[i] if patches is not None else None,
                labels=labels,
            )
        )
    return tuple(batches)


def _read_labels(shards: ShardSet, rows: np.ndarray, is_bad: np.ndarray) -> Tensor:
    labels = np.array(shards.labels[rows], dtype=np.int32)
    problem = bad_label(labels, shards.info.num_classes)
    if problem is not None:
        key = shards.key(int(rows[problem[0]]))
        raise DataError(label_sentence(problem[1], key, shards.directory, shards.info.num_classes))
    labels[is_bad] = -1
    return torch.from_numpy(labels)


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
