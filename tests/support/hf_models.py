"""HuggingFace models beside the plain reference: equal weights, equal inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.hf_model.configuration_onevision_encoder import OneVisionEncoderConfig
from megatron_ove.hf_model.modeling_onevision_encoder import OneVisionEncoderModel
from tests.support.reference_encoder import MEAN, STD, ReferenceEncoder


def hf_model(config: EncoderConfig, *, attention: str = "sdpa", **changes: Any) -> OneVisionEncoderModel:
    """An initialised model in evaluation mode; `changes` are keys of config.json."""
    values = {**to_hf_config(config, image_size=32, dtype=torch.float32), **changes}
    values = {name: value for name, value in values.items() if name not in ("architectures", "auto_map")}
    return OneVisionEncoderModel._from_config(
        OneVisionEncoderConfig(**values, attn_implementation=attention), attn_implementation=attention
    ).eval()


def reference_with_busy_weights(config: EncoderConfig) -> ReferenceEncoder:
    """A reference whose biases and norms are off their trivial start, so that none can be forgotten."""
    reference = ReferenceEncoder(config, seed=21)
    generator = torch.Generator().manual_seed(22)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return reference.eval()


def matched_model(reference: ReferenceEncoder, *, attention: str = "sdpa") -> OneVisionEncoderModel:
    """The HuggingFace model with the reference's weights."""
    model = hf_model(reference.config, attention=attention)
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


def random_pixels(*shape: int, seed: int) -> Tensor:
    """uint8 pixels."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normalized(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, height, width] -> fp32 as models take it."""
    return (pixels.float() / 255 - MEAN[0]) / STD[0]


def strip_of(patches: Tensor, patch_size: int) -> Tensor:
    """uint8 patches [S, 3 * p * p] side by side: [1, 3, p, S * p], normalized."""
    return normalized(patches.view(-1, 3, patch_size, patch_size)).permute(1, 2, 0, 3).reshape(1, 3, patch_size, -1)
