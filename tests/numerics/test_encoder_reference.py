"""The megatron-core encoder against the plain PyTorch definition: every layer's output and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.convert.mapping import to_hf, to_mcore
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.reference_encoder import ReferenceEncoder
from tests.support.tiny import (
    Sample,
    codec_clip_sample,
    collage_sample,
    image_sample,
    make_pack,
    mixed_samples,
    sampled_frames_sample,
    tiny_encoder_config,
)

# fp32 sums in different order over 4 layers; measured 1e-6 relative to the largest element of a tensor.
FP32_TOLERANCE = 5e-6
# bf16 keeps 8 bits: 4e-3 per rounding, a dozen roundings on the way.
BF16_TOLERANCE = 5e-2

KINDS = {
    "images": [image_sample(3, 5, seed=1), image_sample(5, 3, seed=2), image_sample(7, 2, seed=3)],
    "codec_clip": [codec_clip_sample(23, 4, 5, seed=4), codec_clip_sample(9, 4, 5, seed=5)],
    "sampled_frames": [sampled_frames_sample(4, 2, 3, seed=6)],
    "collage": [collage_sample(4, 3, 2, seed=7)],
    "mixed": mixed_samples(),
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest element of what is expected."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def build_pair(topology: ParallelTopology, **changes: object) -> tuple[ReferenceEncoder, VisionEncoder]:
    """Both encoders with the same weights; every bias and norm moved off its trivial start."""
    config = tiny_encoder_config(**changes)
    reference = ReferenceEncoder(config, seed=11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    encoder = build_encoder(config, topology, dtype=torch.float32, seed=0)
    encoder.load_state_dict(to_mcore(reference.state_dict(), config))
    return reference, encoder


def output_weights(num_samples: int, hidden: int) -> Tensor:
    return torch.randn(num_samples, hidden, generator=torch.Generator().manual_seed(13))


def hidden_states(encoder: VisionEncoder) -> list[Tensor]:
    """Fills with the input of the first layer and the output of every layer, [P, h], on the next forward."""
    states: list[Tensor] = []
    encoder.decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append(kwargs["hidden_states"].squeeze(1)), with_kwargs=True
    )
    for layer in encoder.decoder.layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output[0].squeeze(1)))
    return states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 300])
def test_every_layer_and_every_gradient(topology: ParallelTopology, kind: str, padding: int) -> None:
    reference, encoder = build_pair(topology)
    samples = KINDS[kind]
    pack = make_pack(samples, num_patches=sum(len(positions) for _, positions in samples) + padding)
    states = hidden_states(encoder)
    features = encoder(pack)
    expected = [reference(*sample) for sample in samples]
    bounds = pack.cu_seqlens.tolist()
    for index, output in enumerate(expected):
        rows = slice(bounds[index], bounds[index + 1])
        for depth, state in enumerate(states):
            assert relative_error(state[rows], output.hidden_states[depth]) < FP32_TOLERANCE, f"layer {depth}"
        assert relative_error(features.tokens[rows, 0], output.last_hidden_state) < FP32_TOLERANCE
        assert relative_error(features.pooled[index], output.pooled) < FP32_TOLERANCE
    weights = output_weights(len(samples), features.pooled.shape[1])
    (features.pooled * weights).sum().backward()
    (torch.stack([output.pooled for output in expected]) * weights).sum().backward()
    compare_gradients(reference, encoder, FP32_TOLERANCE)


def compare_gradients(reference: ReferenceEncoder, encoder: VisionEncoder, tolerance: float) -> None:
    gradients = to_hf({name: parameter.grad for name, parameter in encoder.named_parameters()}, reference.config)
    largest = max(parameter.grad.abs().max().item() for parameter in reference.parameters())
    for name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max()
        # The key bias has no gradient in exact arithmetic (softmax ignores a shift only for unrotated keys, so here
        # it has a small one); a floor relative to the largest gradient keeps rounding noise from being compared.
        floor = 1e-4 * largest
        error = (gradients[name] - parameter.grad).abs().max() / max(scale.item(), floor)
        assert error < tolerance, f"{name}: {error:.1e}"


def test_pixels_are_patches(topology: ParallelTopology) -> None:
    """An image of pixels through the convolution equals its patches through the linear map; the odd edge is cut."""
    reference, encoder = build_pair(topology)
    patch = reference.config.patch_size
    pixels = torch.randint(0, 256, (3, 3 * patch + 2, 5 * patch + 1), dtype=torch.uint8)
    positions = image_sample(3, 5)[1]
    grid = pixels[:, : 3 * patch, : 5 * patch].unflatten(2, (5, patch)).unflatten(1, (3, patch))  # [3, hp, p, wp, p]
    patches = grid.permute(1, 3, 0, 2, 4).reshape(15, -1)
    expected = reference(pixels, positions)
    features = encoder(make_pack([(patches, positions)]))
    assert relative_error(features.pooled[0], expected.pooled) < FP32_TOLERANCE
    normalised = (patches.view(15, 3, -1).float() / 255 - _clip("MEAN")) / _clip("STD")
    again = encoder(make_pack_of_floats(normalised.flatten(1), positions))
    assert torch.equal(again.pooled, features.pooled)


def _clip(name: str) -> Tensor:
    from tests.support import reference_encoder

    return getattr(reference_encoder, name).view(1, 3, 1)


def make_pack_of_floats(patches: Tensor, positions: Tensor) -> PatchPack:
    from dataclasses import replace

    return replace(make_pack([(torch.zeros_like(patches, dtype=torch.uint8), positions)]), patches=patches)


def test_padding_and_company_change_nothing(topology: ParallelTopology) -> None:
    """A sample's embedding depends neither on the samples packed with it nor on what the padding holds."""
    _, encoder = build_pair(topology)
    samples = KINDS["mixed"]
    alone = torch.cat([encoder(make_pack([sample])).pooled for sample in samples])
    padded = make_pack(samples, num_patches=400)
    together = encoder(padded).pooled
    assert relative_error(together, alone) < FP32_TOLERANCE
    bounds = padded.cu_seqlens.tolist()
    padded.patches[bounds[-1] :] = 255
    padded.positions[bounds[-1] :] = 7
    assert torch.equal(encoder(padded).pooled, together)


def test_empty_microbatch_gives_exact_zero_gradients(topology: ParallelTopology) -> None:
    _, encoder = build_pair(topology)
    features = encoder(make_pack([], num_patches=256))
    assert features.pooled.shape == (0, 64) and features.tokens.shape == (256, 1, 64)
    features.pooled.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_gradients_of_tokens(topology: ParallelTopology) -> None:
    """A loss on the tokens, without the pooling head, sends the same gradients back."""
    reference, encoder = build_pair(topology, use_head=False)
    samples = KINDS["mixed"]
    features = encoder(make_pack(samples))
    assert features.pooled is None
    expected = torch.cat([reference(*sample).last_hidden_state for sample in samples])
    assert relative_error(features.tokens[:, 0], expected) < FP32_TOLERANCE
    weights = output_weights(*expected.shape)
    (features.tokens[:, 0] * weights).sum().backward()
    (expected * weights).sum().backward()
    compare_gradients(reference, encoder, FP32_TOLERANCE)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(topology: ParallelTopology, recompute: str) -> None:
    outputs = []
    for mode in ("none", recompute):
        _, encoder = build_pair(topology, recompute=mode)
        features = encoder(make_pack(KINDS["mixed"], num_patches=128))
        (features.pooled * output_weights(*features.pooled.shape)).sum().backward()
        outputs.append((features.pooled, {name: parameter.grad for name, parameter in encoder.named_parameters()}))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(outputs[0][1][name], gradient) for name, gradient in outputs[1][1].items())


def test_bf16(topology: ParallelTopology) -> None:
    reference, exact = build_pair(topology)
    encoder = build_encoder(reference.config, topology, dtype=torch.bfloat16, seed=0)
    encoder.load_state_dict(exact.state_dict())
    samples: list[Sample] = KINDS["mixed"]
    features = encoder(make_pack(samples, num_patches=96))
    assert features.pooled.dtype == torch.bfloat16
    assert relative_error(features.pooled.float(), reference.encode(samples)) < BF16_TOLERANCE
    features.pooled.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_epsilon_reaches_every_norm(topology: ParallelTopology) -> None:
    """With an epsilon as large as the variances, a norm that kept its default would stand out."""
    reference, encoder = build_pair(topology, layer_norm_epsilon=0.1)
    sample = image_sample(3, 5)
    expected = reference(*sample)
    features = encoder(make_pack([sample]))
    assert relative_error(features.tokens[:, 0], expected.last_hidden_state) < FP32_TOLERANCE
    assert relative_error(features.pooled[0], expected.pooled) < FP32_TOLERANCE
