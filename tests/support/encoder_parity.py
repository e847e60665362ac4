"""How far an encoder of other kernels is from plain ones, measured by how far plain bf16 is from fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ove.convert.mapping import to_hf, to_mcore
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.model.parameter_names import canonical_name
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.tiny import codec_clip_sample, make_pack, mixed_samples, tiny_encoder_config

# Widths and tokens that every FP8 recipe can multiply.
WIDTHS = {"hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512}
NUM_TOKENS = 256
PLAIN = {"layer_spec": "local", "attention_backend": "sdpa", "fused_kernels": False}


@dataclass(frozen=True)
class Outcome:
    """One forward and backward pass.

    Attributes:
        pooled: [b, h] fp32 on the CPU.
        gradients: published name -> fp32 on the CPU.
    """

    pooled: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative L2 errors: of the pooled embeddings, and of the gradient as one long vector, by part of the model."""

    pooled: float
    gradients: dict[str, float]

    def within(self, limit: Errors, factor: float) -> bool:
        """Whether every error is at most `factor` times the same one of `limit`."""
        return self.pooled <= factor * limit.pooled and all(
            error <= factor * limit.gradients[name] for name, error in self.gradients.items()
        )


def run_encoder(topology: ParallelTopology, dtype: torch.dtype, **settings: Any) -> Outcome:
    """Builds an encoder with fixed weights, none at its trivial start, and does one pass over mixed samples.

    Raises:
        ConfigError: these kernels are not to be had here.
    """
    config = tiny_encoder_config(**{**WIDTHS, **settings})
    encoder = build_encoder(config, topology, dtype=dtype, seed=3)
    _move_parameters(encoder)
    samples = [*mixed_samples(), codec_clip_sample(130, 8, 8, seed=9)]
    pooled = encoder(make_pack(samples, num_patches=NUM_TOKENS).to(topology.device)).pooled
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(topology.device)
    (pooled.float() * weights).sum().backward()
    gradients = {name: _gradient(parameter).float().cpu() for name, parameter in encoder.named_parameters()}
    return Outcome(pooled.detach().float().cpu(), to_hf(gradients, config))


def compare(found: Outcome, exact: Outcome) -> Errors:
    """Returns the errors of an outcome."""
    parts: dict[str, tuple[float, float]] = {}
    for name, wanted in exact.gradients.items():
        words = name.removeprefix("encoder.").split(".")
        part = ".".join(words[:2])  # "layers.0", "head.attention", ...
        error, size = parts.get(part, (0.0, 0.0))
        difference = found.gradients[name] - wanted
        parts[part] = (error + float(difference.square().sum()), size + float(wanted.square().sum()))
    gradients = {part: (error / size) ** 0.5 for part, (error, size) in parts.items()}
    pooled = float((found.pooled - exact.pooled).norm() / exact.pooled.norm())
    return Errors(pooled, gradients)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _move_parameters(encoder: VisionEncoder) -> None:
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            seed = sum(canonical_name(name).encode())
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter += (0.05 * noise).to(parameter)


def copy_weights(source: VisionEncoder, target: VisionEncoder) -> None:
    """Gives one encoder the weights of another, whatever the layers of both, by way of the published names."""
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("_extra_state")}
    ours = to_mcore(to_hf(state, source.encoder_config), target.encoder_config)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(ours[canonical_name(name)])
