"""Transformer Engine's attention on rotated queries and keys. Imported only where Transformer Engine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_ove.model.attention import PatchSegments


class EngineAttention(TEDotProductAttention):
    """megatron-core's wrapper of Transformer Engine's attention, which rotates queries and keys first.

    The rotation is done here, from tables made once per forward: megatron-core's packed path would slice the angles
    segment by segment with a host sync each. Which kernel runs is Transformer Engine's choice, which it takes from
    NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN; megatron-core reads its own `attention_backend` setting in
    language models only.
    """

    def __init__(self, *args: Any, rotation: Callable[[Tensor, PatchSegments], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotation = rotation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PatchSegments,
        **kwargs: Any,
    ) -> Tensor:
        """Takes [P, n/tp, d] each; returns [P, n/tp * d]."""
        query, key = (self.rotation(x, packed_seq_params) for x in (query, key))
        return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
