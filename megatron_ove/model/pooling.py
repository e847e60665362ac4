"""One embedding per sample: a learned query attends to the sample's tokens, then a residual MLP.

Replicated over the tensor group: every rank holds the whole head and all tokens, so each has the complete gradient.
Parameter names are the published ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.model.attention import SegmentRun, split_runs
from megatron_ove.model.linear import linear


def heads_of_width(width: int) -> int:
    """Returns attention heads for a module that is told its width only: of about 64 channels each, whatever divides."""
    return next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0)


class AttentionPoolingHead(nn.Module):
    """Multi-head attention with one learned query per segment, then x + MLP(RMSNorm(x)).

    Source: SigLIP 2's pooling head as the OneVision-Encoder uses it; its norm is RMSNorm although the backbone's is
    LayerNorm, and the query has no residual.
    """

    def __init__(self, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.hidden_size
        placement = {"device": device, "dtype": dtype}
        self.num_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, hidden, **placement))
        # Only a holder of the parameters: its own forward knows no segments.
        self.attention = nn.MultiheadAttention(hidden, self.num_heads, batch_first=True, **placement)
        self.norm = nn.RMSNorm(hidden, eps=config.layer_norm_epsilon, **placement)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(hidden, config.ffn_hidden_size, **placement),
                "fc2": nn.Linear(config.ffn_hidden_size, hidden, **placement),
            }
        )

    def forward(self, tokens: Tensor, runs: list[SegmentRun]) -> Tensor:
        """Pools each segment.

        Args:
            tokens: [P, h], replicated over the tensor group.
            runs: the samples' segments; [] gives [0, h], still connected to every parameter.

        Returns:
            [b, h].
        """
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        hidden = tokens.shape[-1]
        query = F.linear(self.probe[0], weight[:hidden], bias[:hidden])  # [1, h]
        key_value = linear(tokens, weight[hidden:], bias[hidden:])  # [P, 2h]
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)) for x in (query, key_value[:, :hidden], key_value[:, hidden:])
        )  # [1 or P, n, d]
        pooled = [(query[:0] + key[:0] + value[:0]).flatten(1)]  # [0, h]: gradients exist, and are 0, without samples
        for keys, values in zip(split_runs(key, runs), split_runs(value, runs), strict=True):
            queries = query.unsqueeze(2).expand(len(keys), -1, -1, -1)  # [count, n, 1, d]
            attended = F.scaled_dot_product_attention(queries, keys, values)
            pooled.append(attended.flatten(1))  # [count, h]
        attended = self.attention.out_proj(torch.cat(pooled))  # [b, h]
        return attended + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm(attended))))
