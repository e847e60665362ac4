"""OneVisionEncoderModel for transformers 4.57 and 5.x: a ViT for images and clips with 3-D rotary positions.

Self-contained: this file is shipped with every exported checkpoint and imports nothing but torch and transformers.
The model has no buffers. Rotary frequencies are made from the configuration in every forward, because buffers that are
not stored come back uninitialised from transformers 5.

Shape letters: B samples, S tokens of a sample, D hidden size, n heads, d head dim, T x Hp x Wp grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .configuration_onevision_encoder import OneVisionEncoderConfig

# Share of half a head's channels that turn with (time, height, width), in sixteenths.
_AXIS_SHARES = (4, 6, 6)


def _rotary_tables(config: OneVisionEncoderConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin) [B, 1, S, d] in `dtype`, of integer positions [B, S, 3] = (t, h, w); computed in fp32.

    Each axis has its own exponents, theta^(-i / n_axis); the second half of the channels repeats the first.
    """
    sixteenth = config.hidden_size // config.num_attention_heads // 2 // 16
    angles = []
    for axis, share in enumerate(_AXIS_SHARES):
        size = share * sixteenth
        exponents = torch.arange(size, dtype=torch.float32, device=positions.device) / size
        angles.append(positions[..., axis, None].float() * config.rope_theta**-exponents)
    half = torch.cat(angles, dim=-1)  # [B, S, d/2]
    full = torch.cat([half, half], dim=-1).unsqueeze(1)  # [B, 1, S, d]
    return full.cos().to(dtype), full.sin().to(dtype)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring channels [B, n, S, d].

    The table repeats by halves while pairs are neighbours, so the two members of a pair turn by different angles. That
    is not a rotation, but it is what the published weights were trained with.
    """
    even, odd = states[..., 0::2], states[..., 1::2]
    swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
    return states * cos + swapped * sin


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, implementation: str | None, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Full attention without a mask.

    Args:
        query: [B, n, Sq, d]; key and value: [B, n, S, d].
        implementation: "sdpa" or "eager" (None).
        dropout: of the attention weights.

    Returns:
        [B, Sq, n * d], and with eager attention the weights [B, n, Sq, S], else None.
    """
    weights = None
    if implementation == "sdpa":
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    elif implementation in ("eager", None):
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        attended = F.dropout(weights, p=dropout) @ value
    else:
        raise ValueError(f"attn_implementation = {implementation!r} is not supported; use 'sdpa' or 'eager'")
    return attended.transpose(1, 2).flatten(2), weights


def _build_norm(config: OneVisionEncoderConfig) -> nn.Module:
    norm = nn.RMSNorm if config.layer_norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layer_norm_eps)


class OneVisionEncoderEmbeddings(nn.Module):
    """Cuts frames into patches and embeds each; rows and columns of pixels that fill no patch are left out."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        side, width = config.patch_size, config.hidden_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=side, stride=side, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Maps [B, T, C, H, W] to [B, T * Hp * Wp, D], ordered by time, then row, then column."""
        weight = self.patch_embedding.weight
        embedded = self.patch_embedding(frames.flatten(0, 1).to(weight.dtype))  # [B*T, D, Hp, Wp]
        return embedded.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2]).flatten(1, 2)


class OneVisionEncoderMLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


class OneVisionEncoderAttention(nn.Module):
    """Self-attention over all tokens of a sample, with rotary positions on queries and keys."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        heads = self.config.num_attention_heads
        query, key, value = (
            project(states).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, n, S, d]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = _attend(query, key, value, implementation=self.config._attn_implementation, dropout=dropout)
        return self.out_proj(attended), weights


class OneVisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        self.self_attn = OneVisionEncoderAttention(config)
        self.layer_norm1 = _build_norm(config)
        self.mlp = OneVisionEncoderMLP(config)
        self.layer_norm2 = _build_norm(config)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.layer_norm1(states), cos, sin)
        states = states + attended
        return states + self.mlp(self.layer_norm2(states)), weights


class OneVisionEncoderStack(nn.Module):
    """The transformer layers."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OneVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, states: Tensor, cos: Tensor, sin: Tensor, *, keep_states: bool, keep_weights: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor | None, ...] | None]:
        """Returns the last layer's output, and if kept the input and every output, and the attention weights."""
        kept_states, kept_weights = [states], []
        for layer in self.layers:
            states, weights = layer(states, cos, sin)
            if keep_states:
                kept_states.append(states)
            if keep_weights:
                kept_weights.append(weights)
        return states, tuple(kept_states) if keep_states else None, tuple(kept_weights) if keep_weights else None


class OneVisionEncoderPoolingAttention(nn.Module):
    """Multi-head attention with query, key and value projections in one parameter."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Lets [B, 1, D] look at [B, S, D]; returns [B, 1, D]."""
        heads = self.config.num_attention_heads
        projected = (
            F.linear(states, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for states, weight, bias in zip(
                (query, tokens, tokens), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        attended, _ = _attend(*projected, implementation=self.config._attn_implementation, dropout=0.0)
        return self.out_proj(attended)


class OneVisionEncoderPoolingHead(nn.Module):
    """One vector per sample: a learned query attends to the tokens, then x + MLP(RMSNorm(x))."""

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = OneVisionEncoderPoolingAttention(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OneVisionEncoderMLP(config)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = self.attention(self.probe.expand(tokens.shape[0], -1, -1), tokens)  # [B, 1, D]
        return (pooled + self.mlp(self.norm(pooled))).squeeze(1)


class _Grid(NamedTuple):
    """Patches per time, row and column of each of `batch` samples, and frames of the grid that positions count on."""

    batch: int
    time: int
    rows: int
    columns: int
    position_frames: int

    @property
    def num_patches(self) -> int:
        return self.time * self.rows * self.columns


def _split_frames(pixel_values: Tensor, config: OneVisionEncoderConfig) -> tuple[Tensor, _Grid]:
    """Returns an image or clip batch as frames [B, T, C, H, W], and its grid."""
    shape, side = tuple(pixel_values.shape), config.patch_size
    if len(shape) not in (4, 5) or shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values has the shape {shape}, but [B, {config.num_channels}, H, W] (images) or "
            f"[B, {config.num_channels}, T, H, W] (clips) is needed"
        )
    is_clip = len(shape) == 5
    frames = (pixel_values if is_clip else pixel_values.unsqueeze(2)).transpose(1, 2)
    batch, time, _, height, width = frames.shape
    if min(height, width) < side or time == 0:
        raise ValueError(f"pixel_values has the shape {shape}, which holds no whole patch of {side} x {side} pixels")
    position_frames = (config.rope_temporal_size or time) if is_clip else 1
    return frames, _Grid(batch, time, height // side, width // side, position_frames)


def _choose_patches(visible_indices: Tensor | None, grid: _Grid) -> Tensor | None:
    """Returns the indices [B, S] of the patches to encode; None for all of them, in order."""
    if visible_indices is None:
        return None
    if visible_indices.dim() != 2 or visible_indices.shape[0] != grid.batch or visible_indices.shape[1] == 0:
        raise ValueError(
            f"visible_indices has the shape {tuple(visible_indices.shape)}, but [{grid.batch}, S] is needed, with the "
            "same number S > 0 of patches for every sample"
        )
    if visible_indices.shape[1] == grid.num_patches:
        return None
    _check_range(visible_indices, (grid.time, grid.rows, grid.columns), "patches in the picture")
    return visible_indices.long()


def _token_positions(
    visible_indices: Tensor | None, patch_positions: Tensor | None, num_tokens: int, grid: _Grid, device: torch.device
) -> Tensor:
    """Returns the place (t, h, w) of each encoded token, [B, S, 3]."""
    if patch_positions is not None:
        if tuple(patch_positions.shape) != (grid.batch, num_tokens, 3):
            raise ValueError(
                f"patch_positions has the shape {tuple(patch_positions.shape)}, but [{grid.batch}, {num_tokens}, 3] is "
                "needed: one (t, h, w) for each encoded patch"
            )
        return patch_positions
    if visible_indices is None:
        if grid.time > grid.position_frames:
            raise ValueError(
                f"the clip has {grid.time} frames, but rope_temporal_size = {grid.position_frames}, so the last ones "
                "have no position; pass fewer frames, or patch_positions"
            )
        visible_indices = torch.arange(num_tokens, device=device).expand(grid.batch, -1)
    else:
        _check_range(visible_indices, (grid.position_frames, grid.rows, grid.columns), "places on the position grid")
    frame, place = visible_indices // (grid.rows * grid.columns), visible_indices % (grid.rows * grid.columns)
    return torch.stack([frame, place // grid.columns, place % grid.columns], dim=-1)


def _check_range(indices: Tensor, sizes: tuple[int, int, int], things: str) -> None:
    limit = sizes[0] * sizes[1] * sizes[2]
    if torch.compiler.is_compiling():  # a graph cannot read values; a wrong one ends the run on the device
        torch._assert_async(((indices >= 0) & (indices < limit)).all(), f"visible_indices leaves the {limit} {things}")
        return
    low, high = (int(value) for value in indices.aminmax()) if indices.numel() else (0, 0)
    if low < 0 or high >= limit:
        raise ValueError(
            f"visible_indices reaches from {low} to {high}, but there are only {sizes[0]} x {sizes[1]} x {sizes[2]} = "
            f"{limit} {things}; count t * Hp * Wp + h * Wp + w there, or say with patch_positions where they sit"
        )


@torch.no_grad()
def _initialize(tensor: Tensor | None, draw: Callable[[Tensor], Any]) -> None:
    # transformers marks what it has loaded; 4.57 skips whole modules only, so each tensor is asked here.
    if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
        draw(tensor)


class OneVisionEncoderModel(PreTrainedModel):
    """Encodes images [B, C, H, W] and clips [B, C, T, H, W] of any size; not padded, so all samples of a batch have
    equally many tokens. Attention is "sdpa" (default; torch chooses its flash kernel where it can) or "eager".
    """

    config: OneVisionEncoderConfig
    config_class = OneVisionEncoderConfig
    base_model_prefix = "onevision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False
    _no_split_modules = ["OneVisionEncoderEmbeddings", "OneVisionEncoderLayer", "OneVisionEncoderPoolingHead"]

    def __init__(self, config: OneVisionEncoderConfig) -> None:
        super().__init__(config)
        self.embeddings = OneVisionEncoderEmbeddings(config)
        self.layernorm_pre = _build_norm(config)
        self.encoder = OneVisionEncoderStack(config)
        self.layernorm_post = _build_norm(config) if config.final_norm else None
        self.head = OneVisionEncoderPoolingHead(config) if config.use_head else None
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for its own attention code; ours asks the configuration in every forward

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _initialize(module.weight, lambda tensor: tensor.normal_(0.0, self.config.initializer_range))
            _initialize(module.bias, lambda tensor: tensor.zero_())
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            _initialize(module.weight, lambda tensor: tensor.fill_(1.0))
            _initialize(getattr(module, "bias", None), lambda tensor: tensor.zero_())
        elif isinstance(module, OneVisionEncoderPoolingAttention):
            _initialize(module.in_proj_weight, nn.init.xavier_uniform_)
            _initialize(module.in_proj_bias, lambda tensor: tensor.zero_())
        elif isinstance(module, OneVisionEncoderPoolingHead):
            _initialize(module.probe, lambda tensor: tensor.normal_(0.0, 1.0))

    def forward(
        self,
        pixel_values: Tensor,
        visible_indices: Tensor | None = None,
        patch_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encodes a batch.

        Args:
            pixel_values: [B, C, H, W] or [B, C, T, H, W], normalised; H and W are cut to multiples of the patch side.
            visible_indices: [B, S] integers t * Hp * Wp + h * Wp + w. With S < T * Hp * Wp they choose which patches
                are encoded. With S = T * Hp * Wp every patch is encoded in order, and they say where each one sits:
                for a clip on a grid of `rope_temporal_size` frames. None = every patch, at its own place.
            patch_positions: [B, S, 3] integers (t, h, w) of the tokens that are encoded, used as they are; they
                replace the places that `visible_indices` would give, but not its choice of patches.
            output_attentions: whether attention weights are returned; needs attn_implementation="eager".
            output_hidden_states: whether the input of the first layer and the output of every layer are returned.
            return_dict: False for a plain tuple.

        Returns:
            last_hidden_state [B, S, D] (after the final norm if there is a head), pooler_output [B, D] (None without
            head), hidden_states (layers + 1 times [B, S, D], before the final norm), attentions ([B, n, S, S] a layer).

        Raises:
            ValueError: shapes or indices that do not fit the picture.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_attentions and config._attn_implementation == "sdpa":
            raise ValueError("sdpa never forms attention weights; load the model with attn_implementation='eager'")
        frames, grid = _split_frames(pixel_values, config)
        states = self.layernorm_pre(self.embeddings(frames))  # [B, T*Hp*Wp, D]
        chosen = _choose_patches(visible_indices, grid)
        if chosen is not None:
            states = states.gather(1, chosen.unsqueeze(-1).expand(-1, -1, states.shape[-1]))  # [B, S, D]
        positions = _token_positions(visible_indices, patch_positions, states.shape[1], grid, states.device)
        cos, sin = _rotary_tables(config, positions, states.dtype)
        states, hidden_states, attentions = self.encoder(
            states, cos, sin, keep_states=output_hidden_states, keep_weights=output_attentions
        )
        if self.layernorm_post is not None:
            states = self.layernorm_post(states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=self.head(states) if self.head is not None else None,
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return output if return_dict else output.to_tuple()
