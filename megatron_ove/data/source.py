"""`DataSource`: what the loader asks of a source of samples. One subclass a kind: image, ocr, video."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_ove.data.read_ahead import MemberReader
from megatron_ove.data.shard_index import ShardSet


class DataSource(ABC):
    """A shard set, seen as bags of patches. Everything random follows from a sample's seed."""

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

    @property
    def size(self) -> int:
        return len(self.shards)

    @abstractmethod
    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Returns the patches, [n] int64, of samples `rows` drawn with `seeds`, both [n] int64; the index suffices."""

    @abstractmethod
    def picture_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        """Returns the (row, member) that `decode_into` reads for samples `rows` drawn with `seeds`, both [n] int64."""

    def position_members(self, rows: np.ndarray, seeds: np.ndarray) -> list[tuple[int, str]]:
        """Returns the (row, member) that `positions` reads; none where positions follow from the index."""
        del rows, seeds
        return []

    @abstractmethod
    def positions(self, row: int, seed: int, read: MemberReader | None = None) -> np.ndarray:
        """Returns [count_tokens, 3] int32 (t, h, w) of one sample's patches.

        Args:
            row: of the index.
            seed: of the sample.
            read: returns the members that `position_members` names; None = they are read from the shards now.

        Raises:
            DataError: what is stored of them cannot be read; names the sample.
        """

    @abstractmethod
    def decode_into(
        self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor], read: MemberReader | None = None
    ) -> dict[int, str]:
        """Decodes samples.

        Args:
            rows: [n] int64 rows of the index.
            seeds: [n] int64 sample seeds.
            targets: n tensors [count_tokens, 3 * p * p] uint8 on `device` that receive the patches.
            read: returns the members that `picture_members` names; None = they are read from the shards now.

        Returns:
            What cannot be read or decoded: place in `rows` -> a sentence that names the sample and its file. Their
            targets are in no particular state.
        """
