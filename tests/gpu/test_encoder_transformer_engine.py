"""The encoder on a GPU: every choice of kernels against plain ones, outputs and gradients, in bf16 and FP8.

The yardstick is the encoder in fp32 with plain kernels; plain bf16 is some way from it, and no other bf16 kernel may be
more than twice as far. FP8 has 3 or 2 bits of mantissa where bf16 has 7, so its limit is a fixed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ove.config.fp8 import FP8_RECIPES
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.errors import ConfigError
from megatron_ove.model.encoder import build_encoder, build_encoder_chunks
from megatron_ove.parallel.topology import ParallelTopology, destroy_topology, initialize_topology
from tests.support.encoder_parity import PLAIN, WIDTHS, Errors, Outcome, compare, copy_weights, run_encoder
from tests.support.tiny import make_pack, mixed_samples, tiny_encoder_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENGINE = {"layer_spec": "transformer_engine"}
KERNELS: dict[str, dict[str, Any]] = {
    "local layers, flash": {"layer_spec": "local", "attention_backend": "flash", "fused_kernels": False},
    "local layers, compiled rotation": {**PLAIN, "compile": True},
    "local layers, Apex norms": {**PLAIN, "fused_kernels": True},
    "Transformer Engine": ENGINE,
    "Transformer Engine, nothing fused": {**ENGINE, "fused_kernels": False},
    "Transformer Engine, sdpa": {**ENGINE, "attention_backend": "sdpa"},
    "Transformer Engine, flash": {**ENGINE, "attention_backend": "flash"},
    "Transformer Engine, selective recompute": {**ENGINE, "recompute": "selective"},
    "Transformer Engine, full recompute": {**ENGINE, "recompute": "full"},
}
# Relative L2 errors. One FP8 rounding is 2 to 4 % of a value; a few matrix products follow one another in each layer.
FP8_OUTPUT, FP8_GRADIENT = 0.15, 0.4


@pytest.fixture(scope="module")
def cuda_topology() -> Iterator[ParallelTopology]:
    yield initialize_topology(ParallelConfig(device="cuda"), seed=0)
    destroy_topology()


@pytest.fixture(scope="module")
def exact(cuda_topology: ParallelTopology) -> Outcome:
    return run_encoder(cuda_topology, torch.float32, **PLAIN)


@pytest.fixture(scope="module")
def bf16_errors(cuda_topology: ParallelTopology, exact: Outcome) -> Errors:
    return compare(run_encoder(cuda_topology, torch.bfloat16, **PLAIN), exact)


def run_or_skip(topology: ParallelTopology, **settings: Any) -> Outcome:
    try:
        return run_encoder(topology, torch.bfloat16, **settings)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_in_bf16(cuda_topology: ParallelTopology, exact: Outcome, bf16_errors: Errors, kernels: str) -> None:
    errors = compare(run_or_skip(cuda_topology, **KERNELS[kernels]), exact)
    assert errors.within(bf16_errors, 2.0), (errors, bf16_errors)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp8(cuda_topology: ParallelTopology, exact: Outcome, bf16_errors: Errors, recipe: str, recompute: str) -> None:
    errors = compare(run_or_skip(cuda_topology, **ENGINE, fp8=recipe, recompute=recompute), exact)
    assert errors.pooled < FP8_OUTPUT and max(errors.gradients.values()) < FP8_GRADIENT, errors
    assert errors.pooled > 1.5 * bf16_errors.pooled, "as exact as bf16: FP8 was not used"


def test_skipped_layers_are_more_exact(cuda_topology: ParallelTopology, exact: Outcome) -> None:
    """With all but one of four layers in bf16 the error shrinks."""
    whole = compare(run_or_skip(cuda_topology, **ENGINE, fp8="current"), exact)
    skips = {"fp8_skip_first_layers": 1, "fp8_skip_last_layers": 2}
    few = compare(run_or_skip(cuda_topology, **ENGINE, fp8="current", **skips), exact)
    assert few.pooled < 0.8 * whole.pooled


def test_one_checkpoint_for_both_kinds_of_layers(cuda_topology: ParallelTopology) -> None:
    encoders = []
    for layers in ("local", "transformer_engine"):
        config = tiny_encoder_config(**WIDTHS, layer_spec=layers)
        try:
            encoders.append(build_encoder(config, cuda_topology, dtype=torch.bfloat16, seed=len(encoders)))
        except ConfigError as error:
            pytest.skip(str(error))
    states = [
        {tensor.key: tensor.global_shape for tensor in encoder.sharded_state_dict().values()} for encoder in encoders
    ]
    assert states[0] == states[1]
    copy_weights(*encoders)
    pack = make_pack(mixed_samples()).to(cuda_topology.device)
    first, second = (encoder(pack).pooled.float() for encoder in encoders)
    assert (first - second).norm() < 0.03 * first.norm()


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_weight_gradients_added_by_the_matrix_product(cuda_topology: ParallelTopology, layers: str) -> None:
    """They land in the buffer that DistributedDataParallel gives each parameter, twice after two passes."""
    config = tiny_encoder_config(**WIDTHS, layer_spec=layers)
    try:
        (fused,) = build_encoder_chunks(config, cuda_topology, dtype=torch.bfloat16, seed=0, has_gradient_buffers=True)
    except ConfigError as error:
        pytest.skip(str(error))
    if not fused.config.gradient_accumulation_fusion:
        pytest.skip("Apex's fused_weight_gradient_mlp_cuda is not installed")
    plain = build_encoder(config, cuda_topology, dtype=torch.bfloat16, seed=0)
    for parameter in fused.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    pack = make_pack(mixed_samples(), num_patches=96).to(cuda_topology.device)
    for _ in range(2):
        plain(pack).pooled.float().sum().backward()
        fused(pack).pooled.float().sum().backward()
    for (name, parameter), (_, wanted) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        if name.endswith("linear_fc2.weight"):
            assert wanted.grad is not None
            assert (parameter.main_grad - wanted.grad.float()).norm() < 0.03 * wanted.grad.float().norm(), name
