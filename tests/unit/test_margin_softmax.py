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


@pytest.mark.parametrize("value", [-1.0 - 1e-7, -1.0, 1.0, 1.0 + 1e-7])
def test_arcface_is_finite_at_the_ends(value):
    cosine = torch.tensor(value, requires_grad=True)
    logit = make(margin_type="arcface").target_logits(cosine)
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
    nothing = torch.full((1, 1), -math.inf)
    both = math.log(math.exp(0.1) + math.exp(0.6))
    expected = ((both - 0.1) + 2 * (both - 0.6)) / 3
    assert softmax.sample_losses(nothing, cosine, labels, None).item() == pytest.approx(expected)
    assert make(co_positives="masked").sample_losses(nothing, cosine, labels, None).item() == 0.0


def test_gradients_are_finite_when_nothing_is_left_to_compare_with():
    softmax = make(co_positives="masked")
    cosine = torch.tensor([[0.1, 0.0], [0.0, 0.0]], requires_grad=True)
    negatives = torch.full((2, 2), -math.inf, requires_grad=True)
    labels = torch.tensor([[3, -1], [-1, -1]])
    losses = softmax.sample_losses(negatives, cosine, labels, None)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert torch.isfinite(cosine.grad).all() and torch.isfinite(negatives.grad).all()
