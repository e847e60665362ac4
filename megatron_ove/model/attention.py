"""Attention within the samples of a pack: each token sees the tokens of its own sample, in both directions.

`PatchSegments` is made once per forward and says where samples lie; layers get it as megatron-core's packed-sequence
parameters. Neighbouring samples of equal length go through one batched attention call. Padding is cut into short
segments of its own, so it costs little and never touches a real token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ove.model.cpu_attention import attend
from megatron_ove.model.rotary import rotate

# Tokens of one padding segment: small, because attention cost grows with its square.
PADDING_SEGMENT = 128


@dataclass(frozen=True)
class SegmentRun:
    """`count` neighbouring segments of `length` tokens each, starting at token `start`."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


@dataclass
class PatchSegments(PackedSeqParams):
    """Where the segments of a pack lie, and the rotary tables of its tokens.

    Attributes:
        angles: [P, d] fp32, rotary angles of every token.
        cos, sin: [P, 1, d], of the rotary angles, in the model's dtype.
        sample_runs: runs over the samples, one row of the pooled output per segment, in order.
        padding_runs: runs over the padding tokens.
        branch_factors: layer, from 0 -> [2, tokens of this rank, 1, 1], what its branches count; see `drop_path`.
    """

    angles: Tensor = None  # type: ignore[assignment]  # a dataclass that inherits defaults must go on with defaults
    cos: Tensor = None  # type: ignore[assignment]
    sin: Tensor = None  # type: ignore[assignment]
    sample_runs: list[SegmentRun] = field(default_factory=list)
    padding_runs: list[SegmentRun] = field(default_factory=list)
    branch_factors: dict[int, Tensor] = field(default_factory=dict)


def build_segments(cu_seqlens: Tensor, angles: Tensor, dtype: torch.dtype) -> PatchSegments:
    """Plans the attention of one microbatch.

    Args:
        cu_seqlens: [b + 1] int32 on the CPU, sample boundaries; tokens from `cu_seqlens[-1]` on are padding.
        angles: [P, d] fp32, rotary angles of every token, padding included.
        dtype: of queries and keys.

    Raises:
        ValueError: a sample without tokens, or samples that reach beyond the tokens.
    """
    bounds, num_tokens = cu_seqlens.tolist(), angles.shape[0]
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    if min(lengths, default=1) < 1 or bounds[-1] > num_tokens:
        raise ValueError(f"cu_seqlens {bounds} does not describe non-empty samples within {num_tokens} tokens")
    padding_lengths = cut_padding(num_tokens - bounds[-1])
    covering = torch.tensor([0, *lengths, *padding_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    covering = covering.to(angles.device, non_blocking=True)
    longest = max(lengths + padding_lengths, default=0)
    return PatchSegments(
        qkv_format="thd",
        cu_seqlens_q=covering,
        cu_seqlens_kv=covering,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        angles=angles,
        cos=angles.cos().to(dtype).unsqueeze(1),
        sin=angles.sin().to(dtype).unsqueeze(1),
        sample_runs=find_runs(lengths, start=0),
        padding_runs=find_runs(padding_lengths, start=bounds[-1]),
    )


def cut_padding(num_tokens: int) -> list[int]:
    """Returns the lengths of the short segments that padding is cut into."""
    rest = num_tokens % PADDING_SEGMENT
    return [PADDING_SEGMENT] * (num_tokens // PADDING_SEGMENT) + [rest] * (rest > 0)


def find_runs(lengths: list[int], *, start: int) -> list[SegmentRun]:
    """Groups neighbouring equal lengths; segments lie one after another from token `start` on."""
    runs: list[SegmentRun] = []
    for length in lengths:
        if runs and runs[-1].length == length:
            runs[-1] = SegmentRun(runs[-1].start, runs[-1].count + 1, length)
        else:
            runs.append(SegmentRun(start, 1, length))
        start += length
    return runs


def rotate_by_tables(x: Tensor, segments: PatchSegments) -> Tensor:
    """Returns queries or keys [P, n, d], turned by the tables of the pack."""
    return rotate(x, segments.cos, segments.sin)


class PackedAttention(MegatronModule):
    """megatron-core's `core_attention` over torch's scaled_dot_product_attention, for packed tokens."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        rotation: Callable[[Tensor, PatchSegments], Tensor] = rotate_by_tables,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.no_mask:
            raise ValueError(f"PackedAttention sees whole samples; it has no mask type {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.rotation = rotation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PatchSegments,
    ) -> Tensor:
        """Rotates queries and keys, then attends within segments.

        Args:
            query, key, value: [P, n/tp, d], heads sharded over the tensor group.
            packed_seq_params: the segments of the pack.

        Returns:
            [P, n/tp * d].
        """
        segments = packed_seq_params
        query, key = (self.rotation(x, segments) for x in (query, key))
        runs = [*segments.sample_runs, *segments.padding_runs]
        outputs = []
        for q, k, v in zip(*(split_runs(x, runs) for x in (query, key, value)), strict=True):
            attended = attend(q, k, v, self.softmax_scale)  # [count, n, length, d]
            outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def split_runs(x: Tensor, runs: Sequence[SegmentRun]) -> list[Tensor]:
    """Returns the tokens of each run as [count, n, length, d].

    One cut for all runs: its backward pass writes the gradient once, where a slice of each run would write zeros of the
    whole pack.

    Args:
        x: [P, n, d].
        runs: one after the other from token 0 on; they need not reach the end.
    """
    sizes = [run.count * run.length for run in runs]
    rest = x.shape[0] - sum(sizes)
    pieces = (x,) if sizes == [x.shape[0]] else x.split([*sizes, rest])
    return [
        piece.unflatten(0, (run.count, run.length)).transpose(1, 2)
        for piece, run in zip(pieces, runs, strict=False)  # the last piece may be what belongs to no run
    ]
