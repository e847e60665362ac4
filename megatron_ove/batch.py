"""`Batch`: one microbatch, the only thing that `data` and `model` share.

Everything is a bag of patches with positions: an image, a page, a codec-selected clip, sampled frames and a collage
differ only in which patches there are and where each one sits.

Shape letters: P patches of the microbatch after padding, p patch side, b samples, L stored labels of a source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch of one replica; identical on every tensor-parallel rank of a pipeline stage.

    Patches `cu_seqlens[-1]..P` are padding: zeros that must influence nothing. `b` may be 0.

    Attributes:
        positions: [P, 3] int32, (t, h, w) of each patch on its own grid; t of a video on the 64-frame grid.
        cu_seqlens: [b + 1] int32, sample boundaries in the patch dim. Always on the CPU: the host plans the attention
            with them, and reading them back would wait for the device in every forward.
        source_index: [b] int32, index into `source_names` of each sample. Always on the CPU, as are seeds and labels:
            objectives plan a step with them before the device has anything to do.
        source_names: every source of the run, in configuration order.
        sample_keys: b keys, for messages; may look each one up when it is read, so read those that a message needs.
        sample_seeds: [b] int64, a function of (seed, source, ordinal) only; objectives draw label slots from it.
        patches: [P, 3 * p * p] uint8, channel-major inside a patch (c, y, x); None off the first pipeline stage.
        labels: source name -> [b_source, L] int32, -1 = none, rows in microbatch order; empty off the last stage.
    """

    positions: Tensor
    cu_seqlens: Tensor
    source_index: Tensor
    source_names: tuple[str, ...]
    sample_keys: Sequence[str]
    sample_seeds: Tensor
    patches: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_patches(self) -> int:
        """P, padding included."""
        return self.positions.shape[0]

    def rows_of(self, source: str) -> Tensor:
        """Returns [b_source] int64: the samples of `source`, in microbatch order."""
        return torch.nonzero(self.source_index == self.source_names.index(source)).flatten()

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with patches and positions on `device` (asynchronous copy from pinned memory)."""
        patches = None if self.patches is None else self.patches.to(device, non_blocking=True)
        return replace(self, positions=self.positions.to(device, non_blocking=True), patches=patches)
