"""Stochastic depth against the dense reference: the same branches of the same segments, in value and every gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ove.model.drop_path import draw_factors
from megatron_ove.parallel.random import mix64, unit_interval
from megatron_ove.parallel.topology import ParallelTopology
from tests.numerics.test_encoder_reference import (
    FP32_TOLERANCE,
    build_pair,
    compare_gradients,
    output_weights,
    relative_error,
)
from tests.support.tiny import make_pack, mixed_samples

RATE, LAYERS = 0.6, 4
SEEDS = torch.tensor([7, 7, 2**62 + 5, -3, 11, 12])
"""Two segments of one sample; any 64 bits."""


def expected_factors(seed: int) -> list[tuple[float, float]]:
    """What each layer's branches count, drawn one number at a time."""
    factors = []
    for layer in range(LAYERS):
        share = RATE * layer / (LAYERS - 1)
        draws = [float(unit_interval(mix64(np.int64(seed), 0x64726F70, layer, branch))) for branch in range(2)]
        factors.append(tuple(0.0 if draw < share else 1 / (1 - share) for draw in draws))
    return factors


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_branches_are_left_out_as_drawn(topology: ParallelTopology, recompute: str) -> None:
    reference, encoder = build_pair(topology, drop_path=RATE, recompute=recompute)
    samples = mixed_samples()
    pack = replace(make_pack(samples, num_patches=sum(len(sample[1]) for sample in samples) + 40), seeds=SEEDS)
    features = encoder(pack)
    expected = [
        reference(*sample, expected_factors(seed)) for sample, seed in zip(samples, SEEDS.tolist(), strict=True)
    ]
    assert any(0.0 in pair for seed in SEEDS.tolist() for pair in expected_factors(seed))
    for index, output in enumerate(expected):
        assert relative_error(features.pooled[index], output.pooled) < FP32_TOLERANCE
    weights = output_weights(len(samples), features.pooled.shape[1])
    (features.pooled * weights).sum().backward()
    (torch.stack([output.pooled for output in expected]) * weights).sum().backward()
    compare_gradients(reference, encoder, FP32_TOLERANCE)


def test_nothing_is_left_out_in_evaluation(topology: ParallelTopology) -> None:
    reference, encoder = build_pair(topology, drop_path=RATE)
    samples = mixed_samples()
    found = encoder.eval()(make_pack(samples)).pooled
    assert relative_error(found, reference.encode(samples)) < FP32_TOLERANCE


def test_shares_grow_with_depth_and_the_mean_is_kept() -> None:
    seeds = torch.arange(20_000)
    options = {"num_layers": 5, "rate": 0.4, "lengths": torch.ones(20_000), "num_tokens": 20_003}
    factors = draw_factors(seeds, range(5), **options)
    assert list(factors) == [1, 2, 3, 4]
    for layer, drawn in factors.items():
        assert (drawn[:, 20_000:] == 1).all()  # padding
        dropped = (drawn[:, :20_000] == 0).float().mean(dim=(1, 2, 3))
        assert torch.allclose(dropped, torch.full((2,), 0.1 * layer), atol=0.015)
        assert drawn[:, :20_000].mean().item() == pytest.approx(1, abs=0.02)
    both = (factors[4][0] == 0) & (factors[4][1] == 0)
    assert both[:20_000].float().mean().item() == pytest.approx(0.16, abs=0.015)  # independent branches
    half = draw_factors(seeds, range(3, 5), **options)
    assert list(half) == [3, 4] and all(torch.equal(half[layer], factors[layer]) for layer in half)
