"""`SampleReader`: what objectives ask about the samples of a microbatch, on the host, while it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import Samples
from megatron_ove.data.sources.base import DataSource
from megatron_ove.data.windows import Windows
from megatron_ove.errors import DataError
from megatron_ove.shards.documents import Document
from megatron_ove.shards.opening import bad_label, label_sentence
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import SourceTexts

logger = logging.getLogger(__name__)

_READING_THREADS = 8
"""For texts of a microbatch, which are small: what takes time is the way to the disk."""


class SampleReader:
    """Reads indexes and members of a run's shard sets; for `collate` of objectives, which runs in a loader's thread."""

    def __init__(self, sources: Sequence[DataSource]) -> None:
        self._sources: Mapping[str, DataSource] = {source.name: source for source in sources}

    def labels(self, samples: Samples, *sources: str) -> Tensor:
        """Returns the stored labels of all samples of some sources.

        Returns:
            [m, L] int32 in microbatch order, -1 = none; L is that of the widest source. Samples that could not be read
            have none.

        Raises:
            DataError: a label is no class of its shard set.
        """
        sources = tuple(name for name in sources if name in self._sources)
        chosen = samples.of(*sources)
        source, rows = samples.source[chosen].numpy(), samples.row[chosen].numpy()
        width = max(self._sources[name].shards.labels.shape[1] for name in sources)
        labels = np.full((len(rows), width), -1, dtype=np.int32)
        for name in sources:
            shards, mine = self._sources[name].shards, source == samples.source_names.index(name)
            stored = np.array(shards.labels[rows[mine]], dtype=np.int32)
            problem = bad_label(stored, shards.info.num_classes)
            if problem is not None:
                key = shards.key(int(rows[mine][problem[0]]))
                raise DataError(label_sentence(problem[1], key, shards.directory, shards.info.num_classes))
            labels[mine, : stored.shape[1]] = stored
        labels[~samples.is_valid[chosen].numpy()] = -1
        return torch.from_numpy(labels)

    def windows(self, source: str, rows: Tensor, seeds: Tensor) -> Windows | None:
        """Returns which part of its picture each sample shows; None where samples are no windows of pictures.

        Args:
            source: name.
            rows: [m] int64, of the source's index.
            seeds: [m] int64, of the samples.
        """
        return self._sources[source].windows(rows.numpy(), seeds.numpy())

    def documents(self, source: str, rows: Tensor) -> list[Document]:
        """Returns what is written in documents; some are read at a time.

        Args:
            source: name.
            rows: [m] int64, of the source's index.

        Raises:
            DataError: one cannot be read; names the sample.
        """
        shards = self._sources[source].shards
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            return list(pool.map(shards.read_document, rows.tolist()))

    def readable_documents(self, source: str, rows: Tensor) -> list[Document | None]:
        """As `documents`, with None for one that cannot be read, after a warning that says why: whoever learns from it
        leaves it out."""
        shards = self._sources[source].shards

        def read(row: int) -> Document | None:
            try:
                return shards.read_document(row)
            except DataError as error:
                logger.warning("data.sources.%s: %s; it teaches nothing", source, error)
                return None

        with ThreadPoolExecutor(_READING_THREADS) as pool:
            return list(pool.map(read, rows.tolist()))

    def texts(self, source: str, fingerprint: str) -> SourceTexts:
        """Returns the texts of a source as token ids of the tokenizer with this fingerprint."""
        return self._sources[source].texts(fingerprint)

    def shards(self, source: str) -> ShardSet:
        """Returns the shard set of a source, for its members and columns."""
        return self._sources[source].shards
