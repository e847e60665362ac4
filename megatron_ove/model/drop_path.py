"""Stochastic depth: in training, a branch of a layer is left out for some segments and counts more for the others.

Which ones is a function of (the sample's seed, layer, branch) alone, so that every layout draws alike and a resumed run
goes on as it would have. The share of segments that lose a branch grows linearly from 0 at the first layer to
`encoder.drop_path` at the last. Source: Huang et al., "Deep networks with stochastic depth", 2016; per branch and
linear in depth as DeiT (Touvron et al., 2021) uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ove.parallel.random import mix64, unit_interval

# Keeps this use of a sample's seed apart from augmentation and label slots.
_PURPOSE = 0x64726F70  # "drop"
_ATTENTION, _MLP = range(2)


def draw_factors(
    seeds: Tensor, layers: range, *, num_layers: int, rate: float, lengths: Tensor, num_tokens: int
) -> dict[int, Tensor]:
    """Draws what each branch of some layers counts for every token.

    Args:
        seeds: [n] int64 on the CPU, of the segments' samples; segments of one sample share its draws.
        layers: of this chunk, counted over the whole model from 0.
        num_layers: of the whole model.
        rate: share of segments that lose a branch of the last layer.
        lengths: [n] int, tokens of each segment.
        num_tokens: P; tokens behind the segments are padding and keep every branch.

    Returns:
        Layer -> [2, P, 1, 1] fp32 on the CPU: 0, or 1 / (1 - the layer's rate).
    """
    factors = {}
    for layer in layers:
        share = rate * layer / max(1, num_layers - 1)
        if share == 0:
            continue
        draws = unit_interval(mix64(seeds[None], _PURPOSE, layer, torch.arange(2)[:, None]))  # [2, n]
        of_segments = torch.where(draws < share, 0.0, 1 / (1 - share))
        of_tokens = torch.ones(2, num_tokens)
        covered = of_segments.repeat_interleave(lengths.long(), dim=1)
        of_tokens[:, : covered.shape[1]] = covered
        factors[layer] = of_tokens[:, :, None, None]
    return factors


class DropPathLayer(TransformerLayer):
    """megatron-core's layer whose residual additions weigh the branch as the pack's segments say."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._factors: Tensor | None = None
        self.self_attn_bda = self._addition(_ATTENTION)
        self.mlp_bda = self._addition(_MLP)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As megatron-core's; `packed_seq_params` are `PatchSegments`."""
        drawn: Mapping[int, Tensor] = options["packed_seq_params"].branch_factors
        self._factors = drawn.get(self.layer_number - 1)
        return super().forward(*arguments, **options)

    def _addition(self, branch: int) -> Any:
        def choose(training: bool, fused: bool) -> Any:
            factors = self._factors
            if not training or factors is None:
                return get_bias_dropout_add(training, fused)
            return lambda x_with_bias, residual, _: residual + factors[branch] * _biased(*x_with_bias)

        return choose


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
