"""`Batch`: one microbatch, the only thing that `data`, `model` and `objectives` share.

Everything is a bag of patches with positions: an image, a page, a codec-selected clip, sampled frames and a collage
differ only in which patches there are and where each one sits. A pack holds patches; what attends to itself in it is a
segment; a sample owns one segment or several neighbouring ones (pages of a document, tiles of a page). Pixels are dear
to move and travel; what else an objective needs, its `collate` makes on the host of the ranks that need it.

Shape letters: P patches of a pack after padding, p patch side, n segments, b samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

MAIN_PACK = "main"
"""The pack that the encoder of the run sees."""


@dataclass(frozen=True)
class PatchPack:
    """Patches of a microbatch, segment after segment; identical on every tensor-parallel rank of a pipeline stage.

    Patches `cu_seqlens[-1]..P` are padding: zeros that must influence nothing. `n` may be 0.

    Attributes:
        positions: [P, 3] int32, (t, h, w) of each patch on its own grid; t of a video on the 64-frame grid.
        cu_seqlens: [n + 1] int32, segment boundaries in the patch dim. Always on the CPU: the host plans the attention
            with them, and reading them back would wait for the device in every forward.
        grids: [n, 3] int32 on the CPU, (t, h, w) patches of segments that are full grids in row-major order; 0 in all
            three of others, like selected patches of a clip.
        sample: [n] int32 on the CPU, ascending: the sample that each segment belongs to.
        patches: [P, 3 * p * p] uint8, channel-major inside a patch (c, y, x); None where nobody looks at pixels.
        seeds: [n] int64 on the CPU, the seed of each segment's sample; None = nothing is drawn for it.
    """

    positions: Tensor
    cu_seqlens: Tensor
    grids: Tensor
    sample: Tensor
    patches: Tensor | None = None
    seeds: Tensor | None = None

    @classmethod
    def of_whole_samples(cls, positions: Tensor, cu_seqlens: Tensor, patches: Tensor | None = None) -> PatchPack:
        """Returns a pack of samples with one segment each, of which no grid is known."""
        count = len(cu_seqlens) - 1
        grids, sample = torch.zeros(count, 3, dtype=torch.int32), torch.arange(count, dtype=torch.int32)
        return cls(positions, cu_seqlens, grids, sample, patches)

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_patches(self) -> int:
        """P, padding included."""
        return self.positions.shape[0]

    def to(self, device: torch.device) -> PatchPack:
        """Returns the pack with patches and positions on `device` (asynchronous copy from pinned memory)."""
        patches = None if self.patches is None else self.patches.to(device, non_blocking=True)
        return replace(self, positions=self.positions.to(device, non_blocking=True), patches=patches)


@dataclass(frozen=True)
class Samples:
    """What the b samples of a microbatch are. Tensors are on the CPU: objectives plan a step with them before the
    device has anything to do.

    Attributes:
        source_names: every source of the run, in configuration order.
        source: [b] int32, index into `source_names`.
        row: [b] int64, row in the index of its source.
        seed: [b] int64, a function of (seed, source, ordinal) only; everything drawn for a sample follows from it.
        is_valid: [b] bool; False = it could not be read, its patches are zeros, and it must teach nothing.
        keys: b keys, for messages; may look each one up when it is read, so read those that a message needs.
    """

    source_names: tuple[str, ...]
    source: Tensor
    row: Tensor
    seed: Tensor
    is_valid: Tensor
    keys: Sequence[str]

    @classmethod
    def of_one_source(cls, name: str, keys: Sequence[str], seeds: Tensor | None = None) -> Samples:
        """Returns readable samples of one source, which lie in its first rows; without seeds theirs are 0."""
        count = len(keys)
        return cls(
            source_names=(name,),
            source=torch.zeros(count, dtype=torch.int32),
            row=torch.arange(count),
            seed=torch.zeros(count, dtype=torch.int64) if seeds is None else seeds,
            is_valid=torch.ones(count, dtype=torch.bool),
            keys=keys,
        )

    def __len__(self) -> int:
        return self.source.shape[0]

    def of(self, *sources: str) -> Tensor:
        """Returns [m] int64: the samples of these sources, in microbatch order; a held-out set has the first only."""
        known = [self.source_names.index(name) for name in sources if name in self.source_names]
        chosen = torch.tensor(known, dtype=torch.int32)
        return torch.nonzero(torch.isin(self.source, chosen)).flatten()


@dataclass(frozen=True)
class Batch:
    """One microbatch of one replica.

    Attributes:
        packs: name -> patches; `MAIN_PACK` is always there.
        samples: what each sample is.
        inputs: objective -> what its `collate` returned; empty off the last pipeline stage.
    """

    packs: Mapping[str, PatchPack]
    samples: Samples
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> PatchPack:
        return self.packs[MAIN_PACK]

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its packs on `device`; samples and inputs are the same objects."""
        return replace(self, packs={name: pack.to(device) for name, pack in self.packs.items()})
