"""`DataSource`: what the loader asks of a source of samples. One subclass a kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ove.data.patchify import grid_positions
from megatron_ove.data.read_ahead import MemberReader
from megatron_ove.data.windows import Windows
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import SourceTexts


@dataclass(frozen=True)
class Segments:
    """The segments of n samples, one sample's after the other's.

    Attributes:
        counts: [n] int64, segments of each sample, at least 1.
        lengths: [s] int64, patches of each segment.
        grids: [s, 3] int32, (t, h, w) of segments that are full grids in row-major order, 0 in all three of others.
    """

    counts: np.ndarray
    lengths: np.ndarray
    grids: np.ndarray

    @classmethod
    def of_pictures(cls, sizes: np.ndarray) -> Segments:
        """Returns one segment a sample, full grids of one frame; `sizes` is [n, 2] patches (h, w)."""
        grids = np.concatenate([np.ones((len(sizes), 1)), sizes], axis=1).astype(np.int32)
        return cls(np.ones(len(sizes), dtype=np.int64), sizes.astype(np.int64).prod(axis=1), grids)

    @property
    def tokens(self) -> np.ndarray:
        """[n] int64, patches of each sample."""
        if len(self.counts) == len(self.lengths):
            return self.lengths
        starts = np.cumsum(self.counts) - self.counts
        return np.add.reduceat(self.lengths, starts) if len(starts) else self.lengths


class DataSource(ABC):
    """A shard set, seen as bags of patches. Everything random follows from a sample's seed.

    Rows and seeds are [n] int64 everywhere: rows of the index, and what samples are drawn with.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        shards: ShardSet,
        *,
        patch_size: int,
        device: torch.device,
        num_threads: int,
    ) -> None:
        """Takes over an opened shard set.

        Args:
            name: name in the configuration.
            weight: share of a step's samples, relative to other sources.
            shards: where the samples are.
            patch_size: p.
            device: where pictures are decoded.
            num_threads: decoding threads.
        """
        self.name = name
        self.weight = weight
        self.shards = shards
        self.patch_size = patch_size
        self.device = device
        self.num_threads = num_threads
        self._texts: dict[str, SourceTexts] = {}

    @property
    def size(self) -> int:
        return len(self.shards)

    def texts(self, fingerprint: str) -> SourceTexts:
        """Returns the samples' texts as cached token ids of a tokenizer.

        Raises:
            DataError: a set of the source has no such cache; one sentence a line.
        """
        if fingerprint not in self._texts:
            self._texts[fingerprint] = SourceTexts.open(self.shards.directories, fingerprint)
        return self._texts[fingerprint]

    @abstractmethod
    def segments(self, rows: np.ndarray, seeds: np.ndarray) -> Segments:
        """Returns the segments of samples; the index suffices."""

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Returns the patches, [n] int64, of samples."""
        return self.segments(rows, seeds).tokens

    def windows(self, rows: np.ndarray, seeds: np.ndarray) -> Windows | None:
        """Returns which part of its picture each sample shows, and how large, so that what objectives know about
        places in it (boxes, masks) can move along; None where samples are no windows of pictures."""
        del rows, seeds
        return None

    @abstractmethod
    def picture_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        """Returns the (row, member) that `decode_into` reads for samples."""

    def position_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        """Returns the (row, member) that `positions` reads; none where positions follow from the index."""
        del rows, seeds
        return []

    def positions(self, row: int, seed: int, read: MemberReader | None = None) -> np.ndarray:
        """Returns [count_tokens, 3] int32 (t, h, w) of one sample's patches; by default those of its segments' grids.

        Args:
            row: of the index.
            seed: of the sample.
            read: returns the members that `position_members` names; None = they are read from the shards now.

        Raises:
            DataError: what is stored of them cannot be read; names the sample.
        """
        del read
        grids = self.segments(np.array([row]), np.array([seed])).grids.tolist()
        return np.concatenate([grid_positions(h, w, frame=frame) for t, h, w in grids for frame in range(t)])

    @abstractmethod
    def decode_into(
        self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor], read: MemberReader | None = None
    ) -> dict[int, str]:
        """Decodes samples.

        Args:
            rows: of the index.
            seeds: of the samples.
            targets: n tensors [count_tokens, 3 * p * p] uint8 on `device` that receive the patches.
            read: returns the members that `picture_members` names; None = they are read from the shards now.

        Returns:
            What cannot be read or decoded: place in `rows` -> a sentence that names the sample and its file. Their
            targets are in no particular state.
        """
