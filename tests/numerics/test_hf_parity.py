"""The exported modelling code against the plain reference and against the megatron-core encoder, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ove.convert.mapping import to_mcore
from megatron_ove.hf_model.modeling_onevision_encoder import OneVisionEncoderModel
from megatron_ove.model.encoder import build_encoder
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.hf_models import (
    hf_model,
    matched_model,
    normalized,
    random_pixels,
    reference_with_busy_weights,
    strip_of,
)
from tests.support.reference_encoder import ReferenceEncoder
from tests.support.tiny import PATCH_SIZE, grid_positions, make_pack, mixed_samples, tiny_encoder_config

# fp32 sums in different order over 4 layers, outputs of order 1; measured below 3e-6.
FP32_TOLERANCE = 1e-5
ATTENTIONS = ["sdpa", "eager"]


@pytest.fixture(scope="module")
def reference() -> ReferenceEncoder:
    return reference_with_busy_weights(tiny_encoder_config())


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(reference: ReferenceEncoder, request: pytest.FixtureRequest) -> OneVisionEncoderModel:
    return matched_model(reference, attention=request.param)


def assert_close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= FP32_TOLERANCE


def test_the_tests_weights_matter(reference: ReferenceEncoder) -> None:
    """Outputs are of order 1, so that the tolerance above means something."""
    pooled = reference(random_pixels(3, 12, 20, seed=1), grid_positions([0], 3, 5)).pooled
    assert pooled is not None and 0.1 < pooled.std().item() < 10


@torch.no_grad()
def test_images_every_hidden_state(reference: ReferenceEncoder, model: OneVisionEncoderModel) -> None:
    images = random_pixels(2, 3, 14, 23, seed=1)  # 2 and 3 pixels of the edges fill no patch
    output = model(normalized(images), output_hidden_states=True)
    expected = [reference(image, grid_positions([0], 3, 5)) for image in images]
    assert len(output.hidden_states) == reference.config.num_layers + 1
    for index, states in enumerate(output.hidden_states):
        assert_close(states, torch.stack([item.hidden_states[index] for item in expected]))
    assert_close(output.last_hidden_state, torch.stack([item.last_hidden_state for item in expected]))
    assert_close(output.pooler_output, torch.stack([item.pooled for item in expected]))


@torch.no_grad()
def test_clip_without_positions_counts_its_own_frames(
    reference: ReferenceEncoder, model: OneVisionEncoderModel
) -> None:
    clip = random_pixels(5, 3, 8, 13, seed=2)  # [T, C, H, W]
    expected = reference(clip, grid_positions(range(5), 2, 3))
    output = model(normalized(clip).transpose(0, 1)[None])
    assert_close(output.last_hidden_state[0], expected.last_hidden_state)
    assert_close(output.pooler_output[0], expected.pooled)


@torch.no_grad()
def test_sampled_frames_on_the_64_frame_grid(reference: ReferenceEncoder, model: OneVisionEncoderModel) -> None:
    """Equally many indices as patches: nothing is gathered, indices only say where each patch sits."""
    clip, times = random_pixels(4, 3, 8, 12, seed=3), [0, 21, 42, 63]
    positions = grid_positions(times, 2, 3).long()
    expected = reference(clip, positions)
    pixels = normalized(clip).transpose(0, 1)[None]
    indices = positions[:, 0] * 6 + positions[:, 1] * 3 + positions[:, 2]
    by_index = model(pixels, visible_indices=indices[None])
    by_position = model(pixels, patch_positions=positions[None])
    assert_close(by_index.last_hidden_state[0], expected.last_hidden_state)
    assert torch.equal(by_index.last_hidden_state, by_position.last_hidden_state)
    assert torch.equal(by_index.pooler_output, by_position.pooler_output)


@torch.no_grad()
def test_codec_patches_of_a_whole_clip(reference: ReferenceEncoder, model: OneVisionEncoderModel) -> None:
    """Fewer indices than patches: the indices choose, per sample, from the 64 frames."""
    clips = random_pixels(2, 64, 3, 8, 12, seed=4)
    indices = torch.stack(
        [torch.randperm(64 * 6, generator=torch.Generator().manual_seed(seed))[:17].sort().values for seed in (5, 6)]
    )
    positions = torch.stack([indices // 6, indices % 6 // 3, indices % 3], dim=-1)
    pixels = normalized(clips).transpose(1, 2)
    by_index = model(pixels, visible_indices=indices)
    by_both = model(pixels, visible_indices=indices, patch_positions=positions)
    assert torch.equal(by_index.last_hidden_state, by_both.last_hidden_state)
    for sample in range(2):
        cut = clips[sample].unflatten(2, (2, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5).reshape(64 * 6, -1)
        patches = cut[indices[sample]]  # [17, 3 * p * p]
        expected = reference(patches, positions[sample])
        assert_close(by_index.last_hidden_state[sample], expected.last_hidden_state)
        assert_close(by_index.pooler_output[sample], expected.pooled)
        strip = model(strip_of(patches, PATCH_SIZE), patch_positions=positions[sample : sample + 1])
        assert_close(strip.pooler_output[0], expected.pooled)


@torch.no_grad()
def test_masked_image(reference: ReferenceEncoder, model: OneVisionEncoderModel) -> None:
    image, indices = random_pixels(3, 12, 12, seed=7), torch.tensor([0, 4, 5, 8])
    cut = image.unflatten(1, (3, 4)).unflatten(3, (3, 4)).permute(1, 3, 0, 2, 4).reshape(9, -1)
    expected = reference(cut[indices], grid_positions([0], 3, 3)[indices])
    output = model(normalized(image)[None], visible_indices=indices[None])
    assert_close(output.last_hidden_state[0], expected.last_hidden_state)


@torch.no_grad()
def test_equal_to_the_megatron_encoder(
    reference: ReferenceEncoder, model: OneVisionEncoderModel, topology: ParallelTopology
) -> None:
    """Images, codec clips, sampled frames and collages, packed for ours and as strips for the exported one."""
    encoder = build_encoder(reference.config, topology, dtype=torch.float32, seed=0)
    encoder.load_state_dict(to_mcore(reference.state_dict(), reference.config))
    samples = mixed_samples()
    features = encoder(make_pack(samples, num_patches=96))
    bounds = features.cu_seqlens.tolist()
    for index, (patches, positions) in enumerate(samples):
        output = model(strip_of(patches, PATCH_SIZE), patch_positions=positions[None])
        assert_close(output.last_hidden_state[0], features.tokens[bounds[index] : bounds[index + 1], 0])
        assert_close(output.pooler_output[0], features.pooled[index])


@torch.no_grad()
def test_without_head() -> None:
    """Neither the final norm nor the head exists; the last hidden state is the last layer's output."""
    reference = reference_with_busy_weights(tiny_encoder_config(use_head=False))
    model = matched_model(reference)
    assert not [name for name in model.state_dict() if name.startswith(("layernorm_post", "head"))]
    image = random_pixels(3, 8, 12, seed=8)
    output = model(normalized(image)[None], output_hidden_states=True)
    assert output.pooler_output is None
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert_close(output.last_hidden_state[0], reference(image, grid_positions([0], 2, 3)).last_hidden_state)


@torch.no_grad()
def test_rms_norm_replaces_the_backbones_norms() -> None:
    model = hf_model(tiny_encoder_config(num_layers=1), layer_norm_type="rms_norm")
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.RMSNorm)]
    prefix = "encoder.layers.0.layer_norm"
    assert sorted(norms) == [f"{prefix}1", f"{prefix}2", "head.norm", "layernorm_post", "layernorm_pre"]
    states = model(torch.randn(1, 3, 8, 8), output_hidden_states=True).hidden_states[0]
    assert states.square().mean(-1).sub(1).abs().max() < 1e-3  # root mean square 1, mean not removed
    assert states.mean(-1).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_and_gradient_checkpointing(reference: ReferenceEncoder, attention: str) -> None:
    """Every parameter's gradient is the reference's, and stays bit-equal when activations are recomputed."""
    image = random_pixels(3, 8, 12, seed=9)
    model = matched_model(reference, attention=attention).train()
    weights = torch.randn(reference.config.hidden_size, generator=torch.Generator().manual_seed(10))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        (model(normalized(image)[None]).pooler_output[0] * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain, calls = gradients(), []
    model.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        recomputed = gradients()
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert len(calls) == 4  # each time once forward, once again in backward
    reference.zero_grad()
    (reference(image, grid_positions([0], 2, 3)).pooled * weights).sum().backward()
    for name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max().clamp_min(1e-3)
        assert ((plain[name] - parameter.grad).abs().max() / scale).item() <= FP32_TOLERANCE, name


@torch.no_grad()
def test_bf16_is_near_fp32(reference: ReferenceEncoder) -> None:
    image = normalized(random_pixels(3, 16, 16, seed=11))[None]
    for attention in ATTENTIONS:
        model = matched_model(reference, attention=attention)
        exact = model(image).pooler_output
        rounded = model.to(torch.bfloat16)(image).pooler_output
        assert rounded.dtype == torch.bfloat16
        # 8 bits of mantissa, 4e-3 a rounding, a dozen roundings on the way
        assert (rounded - exact).abs().max() <= 5e-2 * exact.abs().max()
