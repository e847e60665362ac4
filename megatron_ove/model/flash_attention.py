"""Packed attention by flash-attn's variable-length kernel: one call for all samples of a pack, of any lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ove.model.attention import PackedAttention, PatchSegments


class FlashPackedAttention(PackedAttention):
    """`PackedAttention` over `flash_attn.flash_attn_varlen_func`, in bf16 on a CUDA device.

    The same segments, padding included: its segments are short, and every token gets an output.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from flash_attn import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PatchSegments,
        **_: Any,
    ) -> Tensor:
        """Rotates queries and keys, then attends within segments.

        Args:
            query, key, value: [P, n/tp, d], heads sharded over the tensor group.
            packed_seq_params: the segments of the pack.

        Returns:
            [P, n/tp * d].

        Source: flash-attn 2, `flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, ..., deterministic)`; q, k, v [total, n, d], boundaries int32 on the device.
        """
        segments = packed_seq_params
        query, key = (self.rotation(x, segments) for x in (query, key))
        attended = self._attend(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.max_seqlen_q,
            segments.max_seqlen_kv,
            dropout_p=0.0,
            softmax_scale=self.softmax_scale,
            causal=False,
            # Its backward pass adds to the queries' gradients in any order unless told otherwise.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended.flatten(1)
