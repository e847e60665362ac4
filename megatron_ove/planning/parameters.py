"""Parameters on a rank, and the buffers that megatron-core lays out for them: counted, not built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ove.parallel import gradient_buckets
from megatron_ove.planning.layout import Layout

# megatron-core's buffers under the distributed optimizer: parameters start at multiples of 64 elements, and a bucket's
# length is a multiple of 128 and of the number of data ranks.
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank.

    Attributes:
        name: as in `named_parameters()` of the chunk's encoder, or of an objective's modules.
        shape: this rank's share.
        is_sharded: whether each tensor-parallel rank holds its own part.
        sees_sequence: whether its gradient is a sum over the sequence that the tensor group shares under sequence
            parallelism.
    """

    name: str
    shape: tuple[int, ...]
    is_sharded: bool = False
    sees_sequence: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GradientBuffer:
    """The buffer of a chunk's gradients; under the distributed optimizer its parameters lie in one alike.

    Attributes:
        buckets: elements of each part that is reduced by itself, padding included.
        ranges: (start, stop) of each parameter, last parameter first.
    """

    buckets: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(self.buckets)

    def owned(self, data_rank: int, data_size: int) -> list[int]:
        """Returns how many elements of each parameter belong to a data rank's shares, for those that have any."""
        overlaps, bucket_start = [], 0
        for bucket in self.buckets:
            share = bucket // data_size
            first = bucket_start + data_rank * share
            overlaps += [min(stop, first + share) - max(start, first) for start, stop in self.ranges]
            bucket_start += bucket
        return [overlap for overlap in overlaps if overlap > 0]


def gradient_buffer(parameters: list[Parameter], layout: Layout, *, stage: int, chunk: int) -> GradientBuffer:
    """Lays parameters out as megatron-core does: in reverse order, aligned under the distributed optimizer.

    Where reduction overlaps with computation, the first chunk of the first stage has buckets: on the others there is
    time enough.
    """
    has_buckets = layout.overlaps_reduce and stage == 0 and chunk == 0
    bucket_size = gradient_buckets.bucket_size(layout.data) if has_buckets else None
    alignment = _PARAMETER_ALIGNMENT if layout.distributed_optimizer else 1
    bucket_alignment = math.lcm(layout.data, _BUCKET_ALIGNMENT) if layout.distributed_optimizer else 1
    end, bucket_start = 0, 0
    buckets: list[int] = []
    ranges: list[tuple[int, int]] = []
    for parameter in reversed(parameters):
        start = _round_up(end, alignment)
        end = start + parameter.size
        ranges.append((start, end))
        if parameter is parameters[0] or (bucket_size is not None and end - bucket_start >= bucket_size):
            end = _round_up(end, bucket_alignment)
            buckets.append(end - bucket_start)
            bucket_start = end
    return GradientBuffer(tuple(buckets), tuple(ranges))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
