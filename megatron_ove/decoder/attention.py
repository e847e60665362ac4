"""Causal attention within the texts of a pack, and the cache of keys and values with which texts are written.

Texts of equal length that lie next to one another go through one batched call; padding is short texts of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ove.model.attention import SegmentRun, cut_padding, find_runs, split_runs


@dataclass
class TextSegments(PackedSeqParams):
    """Where the texts of a pack lie, and the rotary tables of its tokens.

    Attributes:
        positions: [T] int64, place of every token in its text, on the device.
        cos, sin: [T, 1, d], in the model's dtype; None of a decoder without rotary positions.
        runs: over all texts and the padding behind them.
        cache: what is kept of keys and values while texts are written.
    """

    positions: Tensor = None  # type: ignore[assignment]  # a dataclass that inherits defaults must go on with defaults
    cos: Tensor | None = None
    sin: Tensor | None = None
    runs: list[SegmentRun] = field(default_factory=list)
    cache: KeyValueCache | None = None


def build_text_segments(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> TextSegments:
    """Plans the attention of a pack of texts; without rotary tables.

    Args:
        cu_seqlens: [t + 1] int32 on the CPU, boundaries of texts; tokens from `cu_seqlens[-1]` on are padding.
        num_tokens: T, padding included.
        device: of the decoder.
    """
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)] + cut_padding(num_tokens - bounds[-1])
    covering = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts = covering[:-1].long().repeat_interleave(torch.tensor(lengths))
    longest = max(lengths)
    covering = covering.to(device, non_blocking=True)
    return TextSegments(
        qkv_format="thd",
        cu_seqlens_q=covering,
        cu_seqlens_kv=covering,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=(torch.arange(num_tokens) - starts).to(device, non_blocking=True),
        runs=find_runs(lengths, start=0),
    )


def text_rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [T, 1, d] of positions [T]; channel i pairs with channel i + d / 2 (Su et al., 2021, as
    Llama and Qwen2 lay it out)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = (positions[:, None].float() * theta**-exponents).repeat(1, 2).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries or keys [T, n, d] by the tables [T, 1, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KeyValueCache:
    """Keys and values of texts that are being written: per layer [t, g/tp, room, d], filled up to `lengths`.

    Attributes:
        lengths: [t] int64 on the device, tokens that each text has.
        room: most tokens of a text.
        is_reading: whether the present pass brings whole texts; later ones bring a token of each.
    """

    def __init__(self, lengths: Tensor, room: int) -> None:
        self.lengths, self.room = lengths, room
        self.is_reading = True
        self._counts = lengths.tolist()
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def store_texts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Takes keys and values [T, g/tp, d] of whole texts, one after the other; what follows them is padding."""
        shape = (len(self._counts), key.shape[1], self.room, key.shape[2])
        for kept, new in ((self._keys, key), (self._values, value)):
            kept[layer] = new.new_zeros(shape)
            for row, text in enumerate(new[: sum(self._counts)].split(self._counts)):
                kept[layer][row, :, : len(text)] = text.transpose(0, 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Adds one token of each text and lets it look back: queries [t, n/tp, d] -> [t, n/tp * d]."""
        rows = torch.arange(len(self.lengths), device=query.device)
        self._keys[layer][rows, :, self.lengths] = key
        self._values[layer][rows, :, self.lengths] = value
        is_seen = torch.arange(self.room, device=query.device) <= self.lengths[:, None]
        attended = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            self._keys[layer],
            self._values[layer],
            attn_mask=is_seen[:, None, None],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.flatten(1)


class CausalPackedAttention(MegatronModule):
    """megatron-core's `core_attention`: each token sees itself and what comes before it in its own text."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"CausalPackedAttention looks back only; it has no mask type {attn_mask_type}")
        self.layer_number, self.softmax_scale = layer_number, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: TextSegments,
        **_: Any,
    ) -> Tensor:
        """Rotates queries and keys, then attends.

        Args:
            query: [T, n/tp, d].
            key, value: [T, g/tp, d], each for n / g neighbouring heads of queries.
            packed_seq_params: the texts of the pack.

        Returns:
            [T, n/tp * d].
        """
        segments = packed_seq_params
        if segments.cos is not None and segments.sin is not None:
            query, key = (rotate_halves(x, segments.cos, segments.sin) for x in (query, key))
        cache = segments.cache
        if cache is not None and not cache.is_reading:
            return cache.attend(self.layer_number, query, key, value, self.softmax_scale)
        if cache is not None:
            cache.store_texts(self.layer_number, key, value)
        return self._attend(query, key, value, segments)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, segments: TextSegments) -> Tensor:
        pieces = zip(*(split_runs(x, segments.runs) for x in (query, key, value)), strict=True)
        attended = [
            F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            .transpose(1, 2)
            .flatten(0, 1)
            .flatten(1)
            for q, k, v in pieces
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class FlashCausalAttention(CausalPackedAttention):
    """The same over `flash_attn.flash_attn_varlen_func`, in bf16 on a CUDA device: one call for all texts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from flash_attn import flash_attn_varlen_func

        self._varlen = flash_attn_varlen_func

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, segments: TextSegments) -> Tensor:
        attended = self._varlen(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.max_seqlen_q,
            segments.max_seqlen_kv,
            dropout_p=0.0,
            softmax_scale=self.softmax_scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended.flatten(1)
