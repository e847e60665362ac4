"""The OneVision-Encoder in plain PyTorch: one sample at a time, dense attention, published names. The definition of
right for every test; written for reading, from the published rules, with nothing of megatron in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.config.encoder import EncoderConfig

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@dataclass
class ReferenceOutput:
    """Of one sample: hidden states after the pre-norm and after every layer [S, h], the last one normed, the pooled."""

    hidden_states: list[Tensor] = field(default_factory=list)
    last_hidden_state: Tensor | None = None
    pooled: Tensor | None = None


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """[S, 3] (t, h, w) -> [S, head_dim]: 4:6:6 split over the axes, each with its own exponents; the table repeats."""
    unit = head_dim // 32
    angles = []
    for axis, size in enumerate((4 * unit, 6 * unit, 6 * unit)):
        exponents = torch.arange(size, dtype=torch.float32) / size
        angles.append(torch.outer(positions[:, axis].float(), theta ** (-exponents)))
    table = torch.cat(angles, dim=1)
    return torch.cat([table, table], dim=1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """[n, S, d]: neighbouring channels (a, b) -> (-b, a) times sin, while the table repeats half by half."""
    cos, sin = table.cos().to(x.dtype), table.sin().to(x.dtype)
    turned = torch.empty_like(x)
    turned[..., 0::2] = -x[..., 1::2]
    turned[..., 1::2] = x[..., 0::2]
    return x * cos + turned * sin


class SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = (
            projection(x).view(x.shape[0], self.num_heads, -1).transpose(0, 1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, table), apply_rotary(k, table)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        return self.out_proj((weights @ v).transpose(0, 1).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="none"))


class Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, table: Tensor, factors: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        x = x + factors[0] * self.self_attn(self.layer_norm1(x), table)
        return x + factors[1] * self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, hidden))
        self.attention = nn.MultiheadAttention(hidden, config.num_attention_heads, batch_first=True)
        self.norm = nn.RMSNorm(hidden, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[None]
        pooled = self.attention(self.probe, tokens, tokens, need_weights=False)[0]
        return (pooled + self.mlp(self.norm(pooled)))[0, 0]


class ReferenceEncoder(nn.Module):
    """The whole encoder; its state dict has exactly the published names and shapes."""

    def __init__(self, config: EncoderConfig, seed: int = 0) -> None:
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.config = config
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch, bias=False)
        self.layernorm_pre = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        if config.use_head:
            self.layernorm_post = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
            self.head = PoolingHead(config)
        if self.layernorm_pre.weight.device.type != "meta":
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Linear and convolution N(0, 0.02) and bias 0, norms 1 and 0, probe N(0, 1), in_proj Xavier-uniform."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            elif name == "head.attention.in_proj_weight":
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                std = 1.0 if name == "head.probe" else self.config.initializer_range
                parameter.normal_(0, std, generator=generator)

    def forward(
        self, picture: Tensor, positions: Tensor, factors: Sequence[tuple[float, float]] | None = None
    ) -> ReferenceOutput:
        """Encodes one sample.

        Args:
            picture: uint8, patches [S, 3 * p * p] or pixels [3, H, W] or [T, 3, H, W] (edges beyond a patch are cut).
            positions: [S, 3] integer (t, h, w).
            factors: of each layer, what its attention and its MLP count; None = 1.
        """
        patch = self.config.patch_size
        pixels = picture.view(-1, 3, patch, patch) if picture.dim() == 2 else picture.view(-1, *picture.shape[-3:])
        pixels = (pixels.float() / 255 - MEAN) / STD
        grid = self.embeddings.patch_embedding(pixels.to(self.layernorm_pre.weight.dtype))  # [T, h, H/p, W/p]
        x = self.layernorm_pre(grid.flatten(2).transpose(1, 2).flatten(0, 1))  # [S, h], row-major in t, h, w
        output = ReferenceOutput(hidden_states=[x])
        table = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        for number, layer in enumerate(self.encoder.layers):
            x = layer(x, table, factors[number] if factors else (1.0, 1.0))
            output.hidden_states.append(x)
        output.last_hidden_state = self.layernorm_post(x) if self.config.use_head else x
        output.pooled = self.head(output.last_hidden_state) if self.config.use_head else None
        return output

    def encode(self, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Returns [b, h], the pooled embeddings of (picture, positions) samples."""
        return torch.stack([self(picture, positions).pooled for picture, positions in samples])
