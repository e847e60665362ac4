"""`TextPack`: the texts of a microbatch as the decoder reads them, and what of the encoder's tokens goes where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import PatchPack, Samples
from megatron_ove.config.text_generation import BridgeConfig
from megatron_ove.decoder.bridge import count_image_tokens, token_rows
from megatron_ove.objectives.text_generation.text_layout import TextLayout
from megatron_ove.parallel.host_tensors import host_tensor
from megatron_ove.parallel.row_blocks import concatenate_ranges


@dataclass(frozen=True)
class TextPack:
    """Texts of a microbatch, one after the other; made on the host, the same on every tensor-parallel rank.

    Attributes:
        token_ids: [T] int64; image slots hold any token. Tokens behind the last text are padding.
        cu_seqlens: [t + 1] int32, always on the CPU: boundaries of the texts.
        bridge_rows: tokens of the encoder that the bridge reads, see `decoder/bridge.py`.
        picture_lengths: tokens of each picture that the bridge reads.
        image_slots: [I] int64, where the bridge's image tokens go.
        predicting: [A] int64, tokens whose next token is part of an answer.
        order: which of the texts that were given each one is.
        num_lost: tokens that were cut.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    bridge_rows: Tensor
    picture_lengths: list[int]
    image_slots: Tensor
    predicting: Tensor
    order: list[int]
    num_lost: int

    def to(self, device: torch.device) -> TextPack:
        """Returns the pack with what the device reads on it."""
        names = ("token_ids", "bridge_rows", "image_slots", "predicting")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def build_text_pack(
    layouts: Sequence[tuple[int, TextLayout]],
    pack: PatchPack,
    bridge: BridgeConfig,
    *,
    filler: int,
    multiple: int,
    device: torch.device,
) -> TextPack:
    """Puts texts one after the other, shortest first, so that those of equal length are neighbours.

    Args:
        layouts: (place of the sample in the microbatch, its text); at least one image token stands before each.
        pack: the microbatch's patches.
        bridge: how many image tokens a picture becomes.
        filler: token that stands at image slots and in the padding.
        multiple: T is a multiple of this, and at least that much.
        device: of the decoder.
    """
    pictures = Pictures(pack, bridge)
    sizes = [len(layout.before) + pictures.count_of(sample) + len(layout.rest) for sample, layout in layouts]
    order = np.argsort(sizes, kind="stable").tolist()
    ids: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    predicting: list[np.ndarray] = []
    start = 0
    for i in order:
        sample, layout = layouts[i]
        images = start + len(layout.before)
        count = pictures.count_of(sample)
        ids += [np.array(layout.before, dtype=np.int64), np.full(count, filler, dtype=np.int64), layout.rest]
        slots.append(np.arange(images, images + count))
        predicting.append(images + count - 1 + np.flatnonzero(layout.is_answer))
        start += sizes[i]
    ids.append(np.full(-start % multiple if start else multiple, filler, dtype=np.int64))
    chosen = [layouts[i][0] for i in order]
    bounds = np.cumsum([0, *(sizes[i] for i in order)])
    return TextPack(
        token_ids=host_tensor(np.concatenate(ids), device),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        bridge_rows=host_tensor(pictures.rows_of(chosen), device),
        picture_lengths=pictures.lengths_of(chosen),
        image_slots=host_tensor(_joined(slots), device),
        predicting=host_tensor(_joined(predicting), device),
        order=order,
        num_lost=sum(layout.num_lost for _, layout in layouts),
    )


class Pictures:
    """The pictures of a microbatch's samples: what they become in the decoder's input."""

    def __init__(self, pack: PatchPack, bridge: BridgeConfig) -> None:
        self._bridge = bridge
        bounds = pack.cu_seqlens.numpy().astype(np.int64)
        self._firsts, self._lengths, self._grids = bounds[:-1], np.diff(bounds), pack.grids.numpy()
        self._counts = count_image_tokens(bridge, self._lengths, self._grids)
        sample = pack.sample.numpy()
        places = np.arange(int(sample[-1]) + 2 if len(sample) else 1)
        self._first_segment = np.searchsorted(sample, places)

    def count_of(self, sample: int) -> int:
        """Returns the image tokens of a sample."""
        return int(self._counts[self._first_segment[sample] : self._first_segment[sample + 1]].sum())

    def rows_of(self, samples: Sequence[int]) -> np.ndarray:
        """Returns what the bridge reads of samples, one after the other."""
        segments = self._segments_of(samples)
        return token_rows(self._bridge, self._firsts[segments], self._lengths[segments], self._grids[segments])

    def lengths_of(self, samples: Sequence[int]) -> list[int]:
        """Returns the tokens of each picture of samples."""
        return self._lengths[self._segments_of(samples)].tolist()

    def _segments_of(self, samples: Sequence[int]) -> np.ndarray:
        chosen = np.asarray(samples, dtype=np.int64)
        starts, stops = self._first_segment[chosen], self._first_segment[chosen + 1]
        return concatenate_ranges(starts, stops - starts)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def readable_samples(samples: Samples, *sources: str) -> list[int]:
    """Returns the places of samples of these sources that could be read."""
    chosen = samples.of(*sources)
    return chosen[samples.is_valid[chosen]].tolist()
