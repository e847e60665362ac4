"""Embeds the samples of a shard set with any encoder, in index order and without augmentation.

Samples go through training's own sources with the chance taken out: an image whole at a square size, a page at its own
shape within a patch budget, a clip as its selected patches. The encoder is a callable from a `Batch` to pooled
embeddings, so a checkpoint's model and an exported HuggingFace model are embedded by the same code.

Shape letters: p patch side, b samples of a batch, n samples embedded, e embedding, L stored labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.data.sources.base import DataSource
from megatron_ove.errors import ConfigError, DataError
from megatron_ove.kinds import load_kinds
from megatron_ove.shards.shard_set import ShardSet

EncoderCallable = Callable[[Batch], Tensor]
"""Batch -> [b, e] pooled embeddings, replicated."""


@dataclass(frozen=True)
class SampleSettings:
    """How samples become patches.

    Attributes:
        patch_size: side of a patch in pixels; that of the encoder.
        image_size: side of the square an image is resized to; a multiple of patch_size.
        max_patches: most patches of a page, and most selected patches of a clip.
        tokens_per_batch: patches embedded together at most (a larger sample goes alone).
        num_threads: decoding threads.
    """

    patch_size: int = 14
    image_size: int = 224
    max_patches: int = 1024
    tokens_per_batch: int = 4096
    num_threads: int = 2


@dataclass(frozen=True)
class EmbeddedSet:
    """Embeddings of a shard set.

    Attributes:
        keys: n sample keys.
        embeddings: [n, e] fp32 on the CPU, as the encoder gave them.
        labels: [n, L] int32 on the CPU, -1 = none.
    """

    keys: tuple[str, ...]
    embeddings: Tensor
    labels: Tensor


def embed_shard_set(
    encoder: EncoderCallable,
    shards: ShardSet,
    settings: SampleSettings,
    *,
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
) -> EmbeddedSet:
    """Embeds a shard set, or the samples at `indices` of it, in that order.

    Raises:
        DataError: a sample cannot be read or decoded.
        ConfigError: sizes that do not fit the shard set.
    """
    chosen = np.arange(len(shards)) if indices is None else np.asarray(indices, dtype=np.int64)
    batches = iterate_batches(shards, settings, chosen, torch.device(device))
    rows = [encoder(batch).float().cpu() for batch in batches]
    stored = np.array(shards.labels[chosen], dtype=np.int32)
    labels = torch.from_numpy(stored if stored.shape[1] else np.full((len(chosen), 1), -1, np.int32))
    return EmbeddedSet(tuple(shards.key(int(i)) for i in chosen), torch.cat(rows), labels)


def iterate_batches(
    shards: ShardSet, settings: SampleSettings, indices: np.ndarray, device: torch.device
) -> Iterator[Batch]:
    """Yields batches of whole samples in the order of `indices`, without padding and without labels."""
    source = evaluation_source(shards, settings, device)
    seeds = np.zeros(len(indices), dtype=np.int64)
    counts = source.count_tokens(indices, seeds)
    start = 0
    while start < len(indices):
        fitting = int((np.cumsum(counts[start:]) <= settings.tokens_per_batch).sum())
        stop = start + max(1, fitting)
        yield _make_batch(source, indices[start:stop], counts[start:stop])
        start = stop


def evaluation_source(shards: ShardSet, settings: SampleSettings, device: torch.device) -> DataSource:
    """Returns a training source whose draws have one outcome: the whole picture unmirrored; a clip's selected patches.

    Raises:
        ConfigError: an image size that is not whole patches, or clips stored with another patch size.
    """
    info, patch = shards.info, settings.patch_size
    path = str(shards.directory)
    if info.frames and info.patch_size != patch:
        raise ConfigError(
            f"{path} stores patches of {info.patch_size} px, but the encoder wants {patch} px, and stored patches "
            "cannot be cut anew; select the patches again with the encoder's patch size"
        )
    kinds = load_kinds()
    kind = kinds.source_of_shards(info.kind)
    assert kind.whole_samples is not None
    section = kind.whole_samples(path, settings.image_size, settings.max_patches)
    for place, sentence in section.check_patches(patch):
        raise ConfigError(f"{place} {sentence}")
    return kind.build(
        "evaluation",
        section.without_chance(),
        shards=shards,
        patch_size=patch,
        device=device,
        num_threads=settings.num_threads,
    )


def _make_batch(source: DataSource, rows: np.ndarray, counts: np.ndarray) -> Batch:
    bounds = np.concatenate([[0], np.cumsum(counts)])
    width = 3 * source.patch_size**2
    patches = torch.zeros(int(bounds[-1]), width, dtype=torch.uint8, device=source.device)
    targets = [patches[start:stop] for start, stop in pairwise(bounds)]
    seeds = np.zeros(len(rows), dtype=np.int64)
    for sentence in source.decode_into(rows, seeds, targets).values():
        raise DataError(sentence)
    positions = np.concatenate([source.positions(int(row), 0) for row in rows])
    segments = source.segments(rows, seeds)
    pack = PatchPack(
        positions=torch.from_numpy(positions).to(source.device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(segments.lengths)])).to(torch.int32),
        grids=torch.from_numpy(segments.grids),
        sample=torch.from_numpy(np.repeat(np.arange(len(rows)), segments.counts)).to(torch.int32),
        patches=patches,
    )
    samples = Samples(
        source_names=(source.name,),
        source=torch.zeros(len(rows), dtype=torch.int32),
        row=torch.from_numpy(rows),
        seed=torch.from_numpy(seeds),
        is_valid=torch.ones(len(rows), dtype=torch.bool),
        keys=tuple(source.shards.key(int(row)) for row in rows),
    )
    return Batch({MAIN_PACK: pack}, samples)
