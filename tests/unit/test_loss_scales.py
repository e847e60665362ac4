"""The one function behind exact loss accounting: the step's loss does not depend on layout or packing."""

from __future__ import annotations

import pytest
import torch

from megatron_ove.training.train_step import loss_scales

WEIGHTS = {"image": 1.0, "ocr": 2.5}


def step_gradient(split: list[list[list[tuple[str, float]]]]) -> tuple[float, float]:
    """Plays megatron-core: loss / num_microbatches per microbatch, gradients averaged over replicas.

    `split[replica][microbatch]` lists (objective, value) samples; a sample's loss is value * x. Returns the step's loss
    at x = 1 and its gradient with respect to x.
    """
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    counts = {name: sum(sample[0] == name for r in split for m in r for sample in m) for name in WEIGHTS}
    num_microbatches, data_size = len(split[0]), len(split)
    scales = loss_scales(WEIGHTS, counts, num_microbatches=num_microbatches, data_size=data_size)
    loss = torch.zeros((), dtype=torch.float64)
    for replica in split:
        for microbatch in replica:
            for name, value in microbatch:
                loss = loss + scales[name] * value * x / num_microbatches / data_size
    loss.backward()
    return float(loss.detach()), float(x.grad)


SAMPLES = [("image", 3.0), ("image", 5.0), ("ocr", 1.0), ("image", 4.0), ("ocr", 7.0), ("ocr", 2.0), ("ocr", 6.0)]
EXPECTED = 1.0 * (3 + 5 + 4) / 3 + 2.5 * (1 + 7 + 2 + 6) / 4


@pytest.mark.parametrize(
    "split",
    [
        [[SAMPLES]],
        [[SAMPLES[:3], SAMPLES[3:]]],
        [[SAMPLES[:1]], [SAMPLES[1:]]],
        [[SAMPLES[:2], SAMPLES[2:3]], [[], SAMPLES[3:]]],
        [[[]], [SAMPLES], [[]], [[]]],
    ],
)
def test_the_step_loss_is_the_weighted_mean_per_objective_for_every_layout(split):
    assert step_gradient(split) == pytest.approx((EXPECTED, EXPECTED), rel=1e-12)


def test_an_objective_without_samples_has_scale_zero():
    scales = loss_scales(WEIGHTS, {"image": 4, "ocr": 0}, num_microbatches=2, data_size=3)
    assert scales == {"image": 1.5, "ocr": 0.0}
