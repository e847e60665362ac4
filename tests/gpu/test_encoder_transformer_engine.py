"""Transformer Engine layers against local layers on one GPU: same function, same checkpoint keys, FP8 runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.convert.mapping import to_hf
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology, initialize_topology
from tests.support.tiny import make_batch, mixed_samples, tiny_encoder_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a CUDA device and Transformer Engine",
    ),
]

# Two bf16 implementations, each a few roundings of 4e-3 from the exact value.
BF16_TOLERANCE = 8e-2
# Sequence lengths and widths that FP8 matrix products accept are multiples of 16.
NUM_PATCHES = 128


@pytest.fixture(scope="module")
def cuda_topology() -> Iterator[ParallelTopology]:
    yield initialize_topology(ParallelConfig(device="cuda"), seed=0)
    destroy_topology()


def run(topology: ParallelTopology, layer_spec: str, fp8: str = "off") -> tuple[VisionEncoder, Tensor]:
    config = tiny_encoder_config(layer_spec=layer_spec, fp8=fp8)
    encoder = build_encoder(config, topology, dtype=torch.bfloat16, seed=3)
    pooled = encoder(make_batch(mixed_samples(), num_patches=NUM_PATCHES).to(topology.device)).pooled
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(topology.device)
    (pooled.float() * weights).sum().backward()
    return encoder, pooled.detach().float()


def test_equals_local_layers(cuda_topology: ParallelTopology) -> None:
    local, expected = run(cuda_topology, "local")
    engine, pooled = run(cuda_topology, "transformer_engine")
    assert (pooled - expected).abs().max() < BF16_TOLERANCE * expected.abs().max()
    gradients, wanted = (
        to_hf({name: parameter.grad.float() for name, parameter in encoder.named_parameters()}, encoder.encoder_config)
        for encoder in (engine, local)
    )
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = torch.maximum(gradient.abs().max(), 1e-2 * largest)
        assert (gradients[name] - gradient).abs().max() < BF16_TOLERANCE * scale, name
    keys = [{tensor.key for tensor in encoder.sharded_state_dict().values()} for encoder in (engine, local)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_runs(cuda_topology: ParallelTopology, recipe: str) -> None:
    encoder, pooled = run(cuda_topology, "transformer_engine", recipe)
    assert pooled.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
