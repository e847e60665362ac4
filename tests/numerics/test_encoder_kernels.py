"""Every combination of kernels computes what the plain ones do: outputs, gradients, checkpoint keys, recomputation.

The CUDA packages are replaced by plain torch with their signatures (tests/support/fused_kernels.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ove.convert.mapping import to_hf
from megatron_ove.model.attention import PackedAttention
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.model.flash_attention import FlashPackedAttention
from megatron_ove.model.kernels import EncoderKernels
from megatron_ove.model.parameter_names import transformer_engine_name
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.fused_kernels import use_kernels
from tests.support.tiny import make_pack, mixed_samples, tiny_encoder_config

ENGINE = "transformer_engine"
KERNELS = {
    "flash": EncoderKernels(attention="flash"),
    "compiled": EncoderKernels(rotation="compiled"),
    "engine layers": EncoderKernels(layers=ENGINE, attention="sdpa"),
    "engine layers and rotation, flash": EncoderKernels(layers=ENGINE, attention="flash", rotation=ENGINE),
}
# Sums in another order, over 4 layers in fp32; measured 2e-6 of the largest element.
TOLERANCE = 1e-5


def build(topology: ParallelTopology, **changes: Any) -> VisionEncoder:
    return build_encoder(tiny_encoder_config(**changes), topology, dtype=torch.float32, seed=3)


def step(encoder: VisionEncoder, *, num_patches: int | None = 200) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns pooled [b, h] and every gradient under its published name."""
    features = encoder(make_pack(mixed_samples(), num_patches=num_patches))
    weights = torch.randn(features.pooled.shape, generator=torch.Generator().manual_seed(0))
    (features.pooled * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return features.pooled.detach(), to_hf(gradients, encoder.encoder_config)


@pytest.mark.parametrize("num_patches", [None, 200])
@pytest.mark.parametrize("kernels", KERNELS)
def test_equals_the_plain_kernels(
    topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch, kernels: str, num_patches: int | None
) -> None:
    expected, wanted = step(build(topology), num_patches=num_patches)
    use_kernels(monkeypatch, KERNELS[kernels])
    pooled, gradients = step(build(topology), num_patches=num_patches)
    assert (pooled - expected).abs().max() < TOLERANCE * expected.abs().max()
    floor = 1e-3 * max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() < TOLERANCE * max(gradient.abs().max(), floor), name


@pytest.mark.parametrize("kernels", ["flash", "engine layers and rotation, flash"])
def test_bf16(topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    pack = make_pack(mixed_samples(), num_patches=96)
    expected = build_encoder(tiny_encoder_config(), topology, dtype=torch.float32, seed=3)(pack).pooled
    use_kernels(monkeypatch, KERNELS[kernels])
    pooled = build_encoder(tiny_encoder_config(), topology, dtype=torch.bfloat16, seed=3)(pack).pooled
    assert pooled.dtype == torch.bfloat16
    assert (pooled.float() - expected).abs().max() < 5e-2 * expected.abs().max()


def test_a_checkpoint_serves_both_kinds_of_layers(topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with either, read with the other: the same keys, and the same function afterwards."""
    local, pack = build(topology), make_pack(mixed_samples())
    with torch.no_grad():
        for parameter in local.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    use_kernels(monkeypatch, KERNELS["engine layers"])
    engine = build_encoder(tiny_encoder_config(), topology, dtype=torch.float32, seed=4)
    # The Transformer Engine names of megatron-core 0.16.1 with Transformer Engine 2.11, seen on a built model.
    names = {name for name, _ in engine.named_parameters() if name.startswith("decoder.layers.2.")}
    assert names == {f"decoder.layers.2.{name}" for name in ENGINE_NAMES}
    assert {transformer_engine_name(name) for name, _ in local.named_parameters()} == {
        name for name, _ in engine.named_parameters()
    }
    for writer, reader in ((local, engine), (engine, local)):
        written, read = ({tensor.key: (name, tensor) for name, tensor in model.sharded_state_dict().items()}
                         for model in (writer, reader))  # fmt: skip
        assert written.keys() == read.keys()
        shapes = [{key: tensor.global_shape for key, (_, tensor) in state.items()} for state in (written, read)]
        assert shapes[0] == shapes[1]
    stored = stored_tensors(local)
    engine.load_state_dict({name: stored[key] for name, key in keys_of(engine).items()})
    assert torch.allclose(engine(pack).pooled, local(pack).pooled, rtol=1e-5, atol=1e-6)


ENGINE_NAMES = [
    *(f"self_attention.linear_qkv.{name}" for name in ("weight", "bias", "layer_norm_weight", "layer_norm_bias")),
    *(f"mlp.linear_fc1.{name}" for name in ("weight", "bias", "layer_norm_weight", "layer_norm_bias")),
    *(f"{module}.{name}" for module in ("self_attention.linear_proj", "mlp.linear_fc2") for name in ("weight", "bias")),
]


def keys_of(encoder: VisionEncoder) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter name -> (key in the checkpoint, place in its stacked tensor)."""
    return {name: (tensor.key, tensor.global_offset) for name, tensor in encoder.sharded_state_dict().items()}


def stored_tensors(encoder: VisionEncoder) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    return {(tensor.key, tensor.global_offset): tensor.data for tensor in encoder.sharded_state_dict().values()}


def test_only_delayed_scaling_stores_its_history(topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.LayerNorm, "get_extra_state", lambda self: torch.empty(0), raising=False)
    monkeypatch.setattr(torch.nn.LayerNorm, "set_extra_state", lambda self, state: None, raising=False)
    use_kernels(monkeypatch, EncoderKernels())
    for recipe, stores in (("off", False), ("current", False), ("mxfp8", False), ("delayed", True)):
        names = build(topology, layer_spec="auto", fp8=recipe).sharded_state_dict()
        assert any(name.endswith("_extra_state") for name in names) == stores, recipe


@pytest.mark.parametrize("kernels", [EncoderKernels(), KERNELS["flash"], KERNELS["engine layers"]])
@pytest.mark.parametrize(("recompute", "calls"), [("none", 1), ("selective", 2), ("full", 2)])
def test_recompute_runs_attention_again(
    topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch, kernels: EncoderKernels, recompute: str, calls: int
) -> None:
    """In every layer; linear layers only run again when whole layers do. What comes out stays the same to the bit."""
    use_kernels(monkeypatch, kernels)
    expected, wanted = step(build(topology))
    counts = {"attention": 0, "linear": 0}
    encoder = build(topology, recompute=recompute)
    for module in encoder.modules():
        if type(module) in (PackedAttention, FlashPackedAttention):
            module.register_forward_pre_hook(lambda *_: counts.update(attention=counts["attention"] + 1))
        if type(module).__name__ == "MLP":
            module.register_forward_pre_hook(lambda *_: counts.update(linear=counts["linear"] + 1))
    pooled, gradients = step(encoder)
    assert counts == {"attention": 4 * calls, "linear": 4 * (2 if recompute == "full" else 1)}
    assert torch.equal(pooled, expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())
