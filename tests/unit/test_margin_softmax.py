"""Margins and filter as plain functions: values, slopes, and behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ove.heads.margin_softmax import MarginSoftmax


def make(**options):
    defaults = {
        "margin_type": "cosface",
        "margin": 0.3,
        "logit_scale": 8.0,
        "interclass_filter": 0.75,
        "interclass_filter_mode": "zero",
        "co_positives": "negative",
    }
    return MarginSoftmax(**(defaults | options))


def test_cosface_subtracts_the_margin():
    assert make().target_logits(torch.tensor(0.5)).item() == pytest.approx(8 * 0.2)


def test_arcface_adds_the_angle_with_its_true_slope():
    cosine = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64, requires_grad=True)
    logits = make(margin_type="arcface").target_logits(cosine)
    angle = torch.arccos(cosine)
    torch.testing.assert_close(logits, 8 * torch.cos(angle + 0.3))
    (slope,) = torch.autograd.grad(logits.sum(), cosine)
    torch.testing.assert_close(slope, 8 * torch.sin(angle + 0.3) / torch.sin(angle))
    assert (slope - 8).abs().max() > 1  # a straight-through margin would have the slope 8 everywhere


def test_combined_multiplies_adds_and_subtracts_with_its_true_slope():
    cosine = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64, requires_grad=True)
    logits = make(margin_type="combined", combined_margin=(1.2, 0.1, 0.25)).target_logits(cosine)
    angle = torch.arccos(cosine)
    torch.testing.assert_close(logits, 8 * (torch.cos(1.2 * angle + 0.1) - 0.25))
    (slope,) = torch.autograd.grad(logits.sum(), cosine)
    torch.testing.assert_close(slope, 8 * 1.2 * torch.sin(1.2 * angle + 0.1) / torch.sin(angle))


@pytest.mark.parametrize(
    ("combined", "plain"),
    [((1.0, 0.0, 0.3), {"margin_type": "cosface"}), ((1.0, 0.3, 0.0), {"margin_type": "arcface"})],
)
def test_combined_has_the_other_two_as_special_cases(combined, plain):
    cosine = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
    logits = make(margin_type="combined", combined_margin=combined).target_logits(cosine)
    torch.testing.assert_close(logits, make(**plain).target_logits(cosine), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [-1.0 - 1e-7, -1.0, 1.0, 1.0 + 1e-7])
@pytest.mark.parametrize("margin_type", ["arcface", "combined"])
def test_angles_are_finite_at_the_ends(margin_type, value):
    cosine = torch.tensor(value, requires_grad=True)
    logit = make(margin_type=margin_type, combined_margin=(1.0, 0.3, 0.0)).target_logits(cosine)
    logit.backward()
    assert math.isfinite(logit.item()) and math.isfinite(cosine.grad.item())
    assert logit.item() == pytest.approx(8 * math.copysign(math.cos(0.3), value), abs=0.02)


def test_filter_modes():
    cosine = torch.tensor([0.2, 0.76, -0.9])
    assert make().negative_logits(cosine).tolist() == pytest.approx([1.6, 0.0, -7.2])
    masked = make(interclass_filter_mode="mask").negative_logits(cosine)
    assert masked[1] == -math.inf and masked[0] == pytest.approx(1.6)
    assert make(interclass_filter=1.0).negative_logits(torch.tensor([1.0001])).item() == pytest.approx(8.0008)


def test_a_class_stored_twice_counts_once_and_never_against_itself():
    softmax = make(margin=0.0, interclass_filter=1.0, logit_scale=1.0)
    labels = torch.tensor([[4, 9, 9, -1]])
    cosine = torch.tensor([[0.1, 0.6, 0.6, 0.0]])
    nothing = torch.full((1, 4), -math.inf)
    both = math.log(math.exp(0.1) + math.exp(0.6))
    expected = ((both - 0.1) + 2 * (both - 0.6)) / 3
    assert softmax.sample_losses(nothing, cosine, labels, None).item() == pytest.approx(expected)
    assert make(co_positives="masked").sample_losses(nothing, cosine, labels, None).item() == 0.0


def test_a_co_positive_counts_what_its_class_set_says():
    softmax = make(margin=0.0, interclass_filter=1.0, logit_scale=1.0)
    labels, cosine = torch.tensor([[4, 9]]), torch.tensor([[0.1, 0.6]])
    nothing = torch.full((1, 2), -math.inf)
    weights = torch.tensor([[[1.0, 2.5], [0.0, 1.0]]])  # label 9 counts 2.5 in slot 0; label 4 is not in slot 1's set
    expected = (math.log(math.exp(0.1) + 2.5 * math.exp(0.6)) - 0.1) / 2
    assert softmax.sample_losses(nothing, cosine, labels, weights).item() == pytest.approx(expected)
    cosine.requires_grad_()
    softmax.sample_losses(nothing, cosine, labels, weights).sum().backward()
    assert torch.isfinite(cosine.grad).all()


def test_the_filter_also_takes_out_co_positives():
    labels, cosine = torch.tensor([[4, 9]]), torch.tensor([[0.1, 0.8]])
    nothing = torch.full((1, 2), -math.inf)
    losses = {}
    for mode, exponential in (("zero", 1.0), ("mask", 0.0)):
        softmax = make(margin=0.0, interclass_filter_mode=mode, logit_scale=2.0)
        losses[mode] = softmax.sample_losses(nothing, cosine, labels, None).item()
        first = math.log(math.exp(0.2) + exponential) - 0.2
        second = math.log(math.exp(1.6) + math.exp(0.2)) - 1.6
        assert losses[mode] == pytest.approx((first + second) / 2, rel=1e-5)
    assert make().filtered_exponential == 1.0 and make(interclass_filter_mode="mask").filtered_exponential == 0.0


def test_sums_are_float64_where_a_sum_of_exponentials_could_pass_fp32():
    for scale, expected in (
        (64.0, torch.float32),
        (72.0, torch.float32),
        (72.1, torch.float64),
        (500.0, torch.float64),
    ):
        dtype = make(logit_scale=scale).sum_dtype
        assert dtype == expected
        # All of two million classes of a table right on the embedding, and rounding of the cosine.
        assert math.log(2e6) + scale * (1 + 1e-6) < math.log(torch.finfo(dtype).max)


def test_gradients_are_finite_when_nothing_is_left_to_compare_with():
    softmax = make(co_positives="masked")
    cosine = torch.tensor([[0.1, 0.0], [0.0, 0.0]], requires_grad=True)
    negatives = torch.full((2, 2), -math.inf, requires_grad=True)
    labels = torch.tensor([[3, -1], [-1, -1]])
    losses = softmax.sample_losses(negatives, cosine, labels, None)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert torch.isfinite(cosine.grad).all() and torch.isfinite(negatives.grad).all()
