"""Parts of the encoder on their own: plans of attention, rotation, initial values, and refused configurations."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ove.errors import ConfigError
from megatron_ove.model.attention import PADDING_SEGMENT, SegmentRun, build_segments, find_runs, split_runs
from megatron_ove.model.cpu_attention import attend
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.model.initialization import initial_value
from megatron_ove.model.kernels import EncoderKernels
from megatron_ove.model.linear import linear
from megatron_ove.model.rotary import inverse_frequencies, rotary_angles, rotate
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.tiny import codec_clip_sample, image_sample, make_pack, tiny_encoder_config


def build(topology: ParallelTopology, seed: int = 0, **changes: Any) -> VisionEncoder:
    return build_encoder(tiny_encoder_config(**changes), topology, dtype=torch.float32, seed=seed)


def test_neighbouring_equal_lengths_are_one_run() -> None:
    runs = find_runs([3, 3, 2, 3], start=10)
    assert runs == [SegmentRun(10, 2, 3), SegmentRun(16, 1, 2), SegmentRun(18, 1, 3)]
    assert [run.stop for run in runs] == [16, 18, 21]
    assert find_runs([], start=0) == []


def test_segments_cover_samples_and_padding() -> None:
    num_tokens = 5 + 2 * PADDING_SEGMENT + 7
    segments = build_segments(torch.tensor([0, 2, 5], dtype=torch.int32), torch.zeros(num_tokens, 32), torch.float32)
    bounds = [0, 2, 5, 5 + PADDING_SEGMENT, 5 + 2 * PADDING_SEGMENT, num_tokens]
    assert segments.cu_seqlens_q.tolist() == bounds and segments.cu_seqlens_q.dtype == torch.int32
    assert segments.max_seqlen_q == PADDING_SEGMENT
    assert segments.sample_runs == [SegmentRun(0, 1, 2), SegmentRun(2, 1, 3)]
    assert segments.padding_runs == [SegmentRun(5, 2, PADDING_SEGMENT), SegmentRun(5 + 2 * PADDING_SEGMENT, 1, 7)]


def test_segments_follow_the_angles_to_their_device() -> None:
    """Boundaries stay on the host, where they are read without waiting for the device."""
    angles = torch.zeros(8, 32, device="meta")
    segments = build_segments(torch.tensor([0, 3, 5], dtype=torch.int32), angles, torch.float32)
    assert segments.cu_seqlens_q.device.type == segments.cos.device.type == "meta"


@pytest.mark.parametrize("bounds", [[0, 3, 3], [0, 9], [0, 4, 2]])
def test_senseless_boundaries_are_refused(bounds: list[int]) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"cu_seqlens {bounds} does not describe non-empty samples within 8")
    ):
        build_segments(torch.tensor(bounds, dtype=torch.int32), torch.zeros(8, 32), torch.float32)


def test_frequencies_of_head_dim_64() -> None:
    time, height, width = inverse_frequencies(64, 10000.0)
    assert torch.allclose(time, 10.0 ** (-torch.arange(8) / 2))
    assert torch.allclose(height, 10.0 ** (-torch.arange(12) / 3)) and torch.equal(height, width)


def test_rotation_equals_mcores_unfused_packed_path() -> None:
    """The reference formula by megatron-core's own code: interleaved pairs, exact angles per packed token."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    class OneRank:
        def size(self) -> int:
            return 1

        def rank(self) -> int:
            return 0

    positions = torch.cat([codec_clip_sample(9, 3, 4)[1], image_sample(2, 3)[1]])
    angles = rotary_angles(positions, inverse_frequencies(32, 10000.0))
    assert angles.dtype == torch.float32 and torch.equal(angles[:, :16], angles[:, 16:])
    x = torch.randn(15, 2, 32)
    expected = _apply_rotary_pos_emb_thd(
        x, torch.tensor([0, 9, 15]), angles[:, None, None], rotary_interleaved=True, cp_group=OneRank()
    )
    assert torch.equal(rotate(x, angles.cos()[:, None], angles.sin()[:, None]), expected)


def test_batched_runs_equal_single_segments(topology: ParallelTopology) -> None:
    encoder = build(topology)
    samples = [image_sample(3, 4, seed=seed) for seed in range(4)]
    together = encoder(make_pack(samples)).pooled
    alone = torch.cat([encoder(make_pack([sample])).pooled for sample in samples])
    # fp32 through a matrix product of another size.
    assert torch.allclose(together, alone, atol=1e-5)


def test_attention_is_sdpa_scale() -> None:
    """The scale is head_dim^-0.5, torch's default."""
    q = torch.randn(1, 1, 4, 32)
    expected = torch.softmax(q @ q.mT * 32**-0.5, -1) @ q
    assert torch.allclose(F.scaled_dot_product_attention(q, q, q, scale=None), expected, atol=1e-6)


def test_initial_values_follow_the_published_rules(topology: ParallelTopology) -> None:
    encoder = build(topology, hidden_size=128, ffn_hidden_size=512)
    for name, value in encoder.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("in_proj_weight"):
            bound = (6 / (128 + 3 * 128)) ** 0.5
            assert 0.98 * bound < value.abs().max() <= bound
        else:
            wanted = 1.0 if name == "head.probe" else 0.02
            # 4 standard errors of a standard deviation over n values.
            assert value.std().item() == pytest.approx(wanted, rel=4 / (2 * value.numel()) ** 0.5), name


def test_initial_values_depend_on_seed_and_name_only(topology: ParallelTopology) -> None:
    first, again, other = (dict(build(topology, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.weight"], other["patch_embed.weight"])
    assert not torch.equal(
        first["decoder.layers.0.mlp.linear_fc1.weight"], first["decoder.layers.1.mlp.linear_fc1.weight"]
    )
    value = initial_value("head.probe", [1, 1, 64], seed=1, initializer_range=0.02)
    assert torch.equal(first["head.probe"], value)


def test_casting_does_not_round_the_normalisation(topology: ParallelTopology) -> None:
    encoder = build(topology).bfloat16()
    assert encoder.patch_embed._mean.dtype == torch.float32
    assert all(axis.dtype == torch.float32 for axis in encoder._frequencies)


def test_nothing_but_parameters_in_the_state(topology: ParallelTopology) -> None:
    encoder = build(topology)
    extra = [name for name in encoder.state_dict() if not name.endswith("_extra_state")]
    assert extra == [name for name, _ in encoder.named_parameters()] and not list(encoder.buffers())
    for name, parameter in encoder.named_parameters():
        assert hasattr(parameter, "tensor_model_parallel"), name


def test_first_chunk_needs_patches(topology: ParallelTopology) -> None:
    from dataclasses import replace

    pack = replace(make_pack([image_sample(2, 2)]), patches=None)
    with pytest.raises(ValueError, match="the first model chunk got a pack without patches"):
        build(topology)(pack)


def test_virtual_pipeline_never_batches_messages(topology: ParallelTopology) -> None:
    from dataclasses import replace

    from megatron_ove.model.transformer_config import build_transformer_config

    for size, overlaps in ((None, False), (2, True)):
        grid = replace(topology, pipeline_size=2, virtual_pipeline_size=size)
        config = build_transformer_config(tiny_encoder_config(), grid, dtype=torch.float32, kernels=EncoderKernels())
        assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (overlaps, not overlaps)


ERRORS = [
    (
        {"fp8": "delayed", "layer_spec": "auto"},
        "encoder.fp8 = delayed needs Transformer Engine layers, and this run uses local layers, which would ignore it "
        "in silence; install the gpu extra on a CUDA machine, or set encoder.fp8: off",
    ),
    (
        {"mcore_overrides": {"recompute_granularty": "full"}},
        "encoder.mcore_overrides.recompute_granularty is not a field of megatron-core's TransformerConfig, so it would "
        "have no effect; did you mean recompute_granularity?",
    ),
    (
        {"mcore_overrides": {"num_layers": 3}},
        "encoder.mcore_overrides.num_layers is decided by this project's own settings, and two places for one value "
        "would contradict each other; use the setting of the encoder or parallel section instead",
    ),
    (
        {"mcore_overrides": {"calculate_per_token_loss": True}},
        "encoder.mcore_overrides.calculate_per_token_loss would train wrongly without an error, because gradients "
        "would be summed over replicas instead of averaged; remove it",
    ),
    (
        {"mcore_overrides": {"deallocate_pipeline_outputs": True}},
        "encoder.mcore_overrides.deallocate_pipeline_outputs would train wrongly without an error, because a tensor "
        "would be freed while gloo may still be sending it; remove it",
    ),
    (
        {"mcore_overrides": {"num_query_groups": 1}},
        "encoder.mcore_overrides.num_query_groups would change what the encoder computes, and neither checkpoints nor "
        "exports would know; remove it",
    ),
    (
        {"mcore_overrides": {"fp8": "hybrid"}},
        "encoder.mcore_overrides.fp8 would bypass what is checked about the device and the shapes; use encoder.fp8",
    ),
    (
        {"mcore_overrides": {"recompute_granularity": "some"}},
        "megatron-core refuses the encoder configuration (encoder.mcore_overrides: recompute_granularity = 'some'): ",
    ),
    (
        {"layer_spec": "transformer_engine"},
        "encoder.layer_spec = transformer_engine, but this run is on the CPU and Transformer Engine needs CUDA; "
        "install the gpu extra on a machine with a CUDA device, or set encoder.layer_spec: auto to use local layers",
    ),
]


@pytest.mark.parametrize(("changes", "text"), ERRORS)
def test_refused_configurations(topology: ParallelTopology, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(topology, **changes)
    assert str(error.value).startswith(text)


def test_an_override_reaches_megatron_core(topology: ParallelTopology) -> None:
    encoder = build(topology, mcore_overrides={"distribute_saved_activations": True, "recompute_granularity": None})
    assert encoder.config.distribute_saved_activations


def test_weights_load_into_layers_with_extra_state(topology: ParallelTopology, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's linear layers insist on an extra state, which checkpoints leave out unless FP8 is on."""
    monkeypatch.setattr(torch.nn.LayerNorm, "get_extra_state", lambda self: torch.empty(0), raising=False)
    monkeypatch.setattr(torch.nn.LayerNorm, "set_extra_state", lambda self, state: None, raising=False)
    encoder, other = build(topology), build(topology, seed=1)
    assert any(name.endswith("_layernorm._extra_state") for name in encoder.state_dict())
    weights = {name: tensor.data for name, tensor in other.sharded_state_dict().items()}
    assert not any(name.endswith("_extra_state") for name in weights)
    encoder.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))
    del weights["patch_embed.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "patch_embed.weight"'):
        encoder.load_state_dict(weights)


@pytest.mark.parametrize("length", [256, 1100])
def test_attention_by_heads_equals_dense_attention(length: int) -> None:
    """bf16 on a CPU with few threads, one block and three; values lie among those of other tensors, as in a pack."""
    shape = 2, length, 3, 32
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(4, *shape, generator=generator).bfloat16()
    inputs = [packed[index].transpose(1, 2).detach().requires_grad_() for index in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = torch.softmax(exact[0] @ exact[1].transpose(2, 3) * 0.25, dim=-1)
    expected, gradient = weights @ exact[2], packed[3].transpose(1, 2)
    expected.backward(gradient.double())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        actual = attend(*inputs, 0.25)
        assert actual.grad_fn is not None and actual.grad_fn.name().startswith("_HeadByHead")
        actual.backward(gradient)
    finally:
        torch.set_num_threads(threads)
    pairs = [(actual, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    for ours, reference in pairs:
        assert ours is not None and reference is not None and ours.shape == reference.shape
        assert (ours.double() - reference).abs().max() < 2e-2 * reference.abs().max()


def test_attention_of_short_samples_and_of_fp32_is_torchs() -> None:
    for x in (torch.randn(1, 2, 300, 32), torch.randn(1, 2, 200, 32).bfloat16()):
        assert torch.equal(attend(x, x, x), F.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_map_and_its_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(7, 2, 40, generator=generator).to(dtype)
    tensors = [wide[..., :24], torch.randn(5, 24, generator=generator).to(dtype), torch.randn(5).to(dtype)]
    ours = [x.detach().requires_grad_() for x in tensors]  # the first one with gaps between its rows
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual, expected = linear(*ours), F.linear(*exact)
    actual.sum().backward()  # a gradient without memory of its own
    expected.sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, reference in [(actual, expected), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]:
        assert mine is not None and reference is not None and mine.dtype == dtype
        assert (mine.double() - reference).abs().max() < tolerance * reference.abs().max()


def test_runs_are_cut_once_and_may_leave_a_rest() -> None:
    x = torch.randn(9, 2, 3, requires_grad=True)
    first, second = split_runs(x, [SegmentRun(0, 2, 2), SegmentRun(4, 1, 3)])
    assert torch.equal(first, x[:4].view(2, 2, 2, 3).transpose(1, 2)) and torch.equal(
        second, x[4:7].transpose(0, 1)[None]
    )
    assert split_runs(x, []) == []
    (whole,) = split_runs(x, [SegmentRun(0, 3, 3)])
    assert torch.equal(whole, x.view(3, 3, 2, 3).transpose(1, 2))
    (2 * first.sum() + second.sum()).backward()
    assert torch.equal(x.grad[:, 0, 0], torch.tensor([2.0, 2, 2, 2, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotation_and_its_gradient_are_autograds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(5, 2, 64, generator=generator).to(dtype)
    x = packed[..., 16:48].detach().requires_grad_()  # with gaps, as queries lie among keys and values
    cos, sin = (torch.randn(5, 1, 32, generator=generator).to(dtype) for _ in range(2))
    y = x.detach().double().requires_grad_()
    swapped = torch.stack([-y[..., 1::2], y[..., 0::2]], dim=-1).flatten(-2)
    expected = y * cos.double() + swapped * sin.double()
    actual = rotate(x, cos, sin)
    gradient = torch.randn(5, 32, 2, generator=generator).to(dtype).transpose(1, 2)  # channels do not lie side by side
    actual.backward(gradient)
    expected.backward(gradient.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for mine, reference in ((actual, expected), (x.grad, y.grad)):
        assert mine is not None and reference is not None and mine.dtype == dtype
        assert (mine.double() - reference).abs().max() < tolerance * reference.abs().max()
