"""The encoder in plain PyTorch, as a model hub has it: equal samples in a dense batch. What ours is compared with.

Separate q, k, v and output projections; attention is `eager` (scores, softmax and weights as whole tensors, as the
published model is when it is built from a configuration) or `sdpa` (torch's scaled_dot_product_attention, which the
published model does not offer). Parameter names and mathematics are the published ones.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.config.encoder import EncoderConfig

Attention = Literal["eager", "sdpa"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Returns fp32 [..., 3, H, W] of uint8 pixels, normalised as CLIP does."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, fp32 [..., d], of (t, h, w) positions [..., 3]: shares 4 : 6 : 6, then repeated."""
    unit, angles = head_dim // 32, []
    for axis, share in enumerate((4, 6, 6)):
        exponents = torch.arange(share * unit, dtype=torch.float32, device=positions.device) / (share * unit)
        angles.append(positions[..., axis, None].float() * theta**-exponents)
    table = torch.cat(angles + angles, dim=-1)
    return table.cos(), table.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [b, n, S, d]: channel pairs (a, b) become (-b, a) and are multiplied by the sines, [b, 1, S, d]."""
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attend(nn.Module):
    """Multi-head self-attention over whole samples."""

    def __init__(self, config: EncoderConfig, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.attention = config.num_attention_heads, attention
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, S, h] -> [b, S, h]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if self.attention == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: EncoderConfig, attention: Attention) -> None:
        super().__init__()
        self.self_attn = Attend(config, attention)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, S, h] -> [b, S, h]."""
        x = x + self.self_attn(self.layer_norm1(x), cos, sin)
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """A learned query attends to a sample's tokens; residual MLP."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, S, h] -> [b, h]."""
        probe = self.probe.expand(len(tokens), -1, -1)
        pooled = self.attention(probe, tokens, tokens, need_weights=False)[0]
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled[:, 0]


class PlainVit(nn.Module):
    """The whole encoder for a dense batch of equal samples.

    Source: OneVision-Encoder, model_factory/vit_ov_encoder.py, by its description.
    """

    def __init__(self, config: EncoderConfig, attention: Attention) -> None:
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.config = config
        self.embeddings = nn.ModuleDict(
            {"patch_embedding": nn.Conv2d(3, hidden, kernel_size=patch, stride=patch, bias=False)}
        )
        self.layernorm_pre = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(config, attention) for _ in range(config.num_layers))}
        )
        self.layernorm_post = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.head = PoolingHead(config)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Encodes a batch.

        Args:
            pixels: [b, T, 3, H, W], normalised; frames are folded into the batch and their patches joined, in order.
            positions: [b, S, 3] integers, (t, h, w) of the S = T * H/p * W/p patches.

        Returns:
            [b, h], pooled.
        """
        conv, layers = cast(nn.Conv2d, self.embeddings["patch_embedding"]), cast(nn.ModuleList, self.encoder["layers"])
        grid = conv(pixels.flatten(0, 1).to(conv.weight.dtype))  # [b * T, h, H/p, W/p]
        x = self.layernorm_pre(grid.flatten(2).transpose(1, 2).reshape(len(pixels), -1, grid.shape[1]))  # [b, S, h]
        cos, sin = (table[:, None] for table in rotary_tables(positions, self.config.head_dim, self.config.rope_theta))
        for layer in layers:
            x = layer(x, cos, sin)
        return self.head(self.layernorm_post(x))
