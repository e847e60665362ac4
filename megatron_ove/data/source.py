"""`DataSource`: what the loader asks of a source of samples. One subclass a kind: image, ocr, video."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
    def positions(self, row: int, seed: int) -> np.ndarray:
        """Returns [count_tokens, 3] int32 (t, h, w) of one sample's patches."""

    @abstractmethod
    def decode_into(self, rows: np.ndarray, seeds: np.ndarray, targets: Sequence[Tensor]) -> None:
        """Decodes samples.

        Args:
            rows: [n] int64 rows of the index.
            seeds: [n] int64 sample seeds.
            targets: n tensors [count_tokens, 3 * p * p] uint8 on `device` that receive the patches.

        Raises:
            DataError: a sample cannot be read or decoded; names it and its file.
        """
