"""Configuration of OneVisionEncoderModel: keys and defaults of the published encoder.

Self-contained: this file is shipped with every exported checkpoint and imports nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# The rotary channels are split 4 : 6 : 6 over time, height and width, counted in sixteenths of half a head.
_HEAD_DIM_MULTIPLE = 32


class OneVisionEncoderConfig(PretrainedConfig):
    """Sizes and options of the encoder.

    Args:
        hidden_size: width of the token stream.
        intermediate_size: width of the MLP between fc1 and fc2.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads; hidden_size / num_attention_heads must be a multiple of 32.
        num_channels: channels of the pictures.
        image_size: side of the pictures trained on; kept for information, any size can be encoded.
        patch_size: side of a patch in pixels.
        hidden_act: activation of every MLP; "gelu" is the exact one (erf).
        layer_norm_eps: epsilon of every norm, the pooling head's included.
        layer_norm_type: "layer_norm" or "rms_norm"; the pooling head's norm is always an RMSNorm.
        attention_dropout: dropout of attention weights while training.
        initializer_range: standard deviation of linear and convolution weights at the start.
        rope_theta: base of the rotary frequencies.
        rope_temporal_size: frames of the temporal grid that `visible_indices` of a video count on; None = the
            video's own number of frames.
        use_head: whether the model has its attention-pooling head.
        final_norm: whether tokens pass a norm behind the last layer; None = where there is a head, as published.
    """

    model_type = "onevision_encoder"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        image_size: int = 448,
        patch_size: int = 14,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        layer_norm_type: str = "layer_norm",
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        rope_theta: float = 10000.0,
        rope_temporal_size: int | None = 64,
        use_head: bool = True,
        final_norm: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % _HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"hidden_size / num_attention_heads = {hidden_size} / {num_attention_heads} is not a multiple of "
                f"{_HEAD_DIM_MULTIPLE}, which the split of the rotary channels over time, height and width needs; "
                "change one of the two"
            )
        if layer_norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"layer_norm_type = {layer_norm_type!r} is unknown; use 'layer_norm' or 'rms_norm'")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.layer_norm_type = layer_norm_type
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.rope_theta = rope_theta
        self.rope_temporal_size = rope_temporal_size
        self.use_head = use_head
        self.final_norm = use_head if final_norm is None else final_norm
