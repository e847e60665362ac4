"""Between megatron-core's parameters and the published names: complete, exact, clear when something does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.convert.mapping import check_state, hf_shapes, mcore_shapes, to_hf, to_mcore
from megatron_ove.errors import CheckpointError
from megatron_ove.model.parameter_names import canonical_name, global_name, transformer_engine_name
from tests.support.reference_encoder import ReferenceEncoder
from tests.support.tiny import tiny_encoder_config

# name: (hidden, layers, heads, mlp), parameters, of which pooling head, tensors. As published.
PUBLISHED = {
    "base": ((768, 12, 12, 3072), 92_595_456, 7_086_336, 207),
    "large": ((1024, 24, 16, 4096), 315_509_760, 12_594_176, 399),
    "huge": ((1280, 32, 20, 5120), 650_110_720, 19_674_880, 527),
}


def random_state(config: EncoderConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_shapes(config).items()}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    (hidden, layers, heads, ffn), parameters, in_head, tensors = PUBLISHED[size]
    config = EncoderConfig(hidden_size=hidden, num_layers=layers, num_attention_heads=heads, ffn_hidden_size=ffn)
    with torch.device("meta"):
        state = ReferenceEncoder(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == hf_shapes(config)
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert sum(tensor.numel() for name, tensor in state.items() if name.startswith("head.")) == in_head
    assert sum(torch.Size(shape).numel() for shape in mcore_shapes(config).values()) == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_head", [True, False])
def test_round_trip_is_bit_exact(dtype: torch.dtype, use_head: bool) -> None:
    config = tiny_encoder_config(use_head=use_head)
    state = random_state(config, dtype)
    ours = to_mcore(state, config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == mcore_shapes(config)
    back = to_hf(ours, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in state.items())
    assert all(tensor.is_contiguous() for tensor in [*ours.values(), *back.values()])


def test_fused_projection_keeps_heads_together() -> None:
    config = tiny_encoder_config()  # 2 heads of 32
    state = random_state(config)
    fused = to_mcore(state, config)["decoder.layers.1.self_attention.linear_qkv.bias"]
    q, k, v = (state[f"encoder.layers.1.self_attn.{name}_proj.bias"] for name in "qkv")
    assert torch.equal(fused, torch.cat([q[:32], k[:32], v[:32], q[32:], k[32:], v[32:]]))


def test_transformer_engine_names_are_understood() -> None:
    config = tiny_encoder_config()
    state = random_state(config)
    engine = {transformer_engine_name(name): tensor for name, tensor in to_mcore(state, config).items()}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in engine
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_bias" in engine
    assert "decoder.layers.0.input_layernorm.weight" not in engine
    engine["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(1)
    back = to_hf(engine, config)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert {canonical_name(transformer_engine_name(name)) for name in mcore_shapes(config)} == set(mcore_shapes(config))


def test_global_name_counts_layers_of_the_whole_model() -> None:
    name = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert global_name(name, 4) == "decoder.layers.5.input_layernorm.weight"
    assert global_name("head.mlp.fc1.weight", 4) == "head.mlp.fc1.weight"
    assert (
        global_name("module.decoder.layers.0.mlp.linear_fc1.bias", 2) == "module.decoder.layers.2.mlp.linear_fc1.bias"
    )


def test_every_difference_is_named_in_one_sentence() -> None:
    config = tiny_encoder_config()
    state = random_state(config)
    del state["head.probe"], state["layernorm_pre.bias"]
    state["head.extra"] = torch.zeros(1)
    state["layernorm_post.weight"] = torch.zeros(65)
    with pytest.raises(CheckpointError) as error:
        to_mcore(state, config)
    assert str(error.value) == (
        "the HuggingFace state does not fit this encoder configuration: it misses layernorm_pre.bias, head.probe, and "
        "has unknown head.extra, and has layernorm_post.weight of shape [65] instead of [64]; use the configuration it "
        "was made with (hidden size, layers, heads, patch size, use_head)"
    )


def test_long_lists_are_counted() -> None:
    with pytest.raises(CheckpointError, match=r"misses w0, w1, w2, w3 and 6 more; use"):
        check_state({}, {f"w{index}": (1,) for index in range(10)}, what="the state")


def test_state_of_a_deeper_encoder_is_refused() -> None:
    state = to_mcore(random_state(tiny_encoder_config(num_layers=5)), tiny_encoder_config(num_layers=5))
    with pytest.raises(CheckpointError, match=r"the encoder state does not fit .* has unknown decoder\.layers\.4\."):
        to_hf(state, tiny_encoder_config())
