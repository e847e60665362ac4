"""Effective rank and mean cosine of embeddings against their definitions in float64, and what collapse looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ove.heads.embedding_health import MOST_SAMPLES, embedding_health


def figures(embeddings: Tensor) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in embedding_health(embeddings).items()}


def directions(num_samples: int, size: int, *, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_samples)
    return normalize(torch.randn(num_samples, size, generator=generator) * spread + torch.ones(size), dim=1)


@pytest.mark.parametrize(("num_samples", "size"), [(2, 5), (7, 40), (60, 12)])
def test_figures_are_those_of_the_definition(num_samples: int, size: int) -> None:
    x = directions(num_samples, size)
    covariance = torch.cov(x.double().T)
    expected_rank = covariance.trace() ** 2 / (covariance @ covariance).trace()
    cosines = x.double() @ x.double().T
    others = cosines[~torch.eye(num_samples, dtype=torch.bool)]
    got = figures(x)
    assert got["effective_rank"] == pytest.approx(float(expected_rank), rel=1e-4)
    assert got["mean_cosine"] == pytest.approx(float(others.mean()), abs=1e-6)
    assert 1 - 1e-4 <= got["effective_rank"] <= min(num_samples - 1, size) + 1e-4


def test_collapse_shows() -> None:
    same = directions(1, 16).expand(50, -1)
    assert figures(same)["mean_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert figures(torch.ones(8, 4) / 2) == {"mean_cosine": 1.0, "effective_rank": 0.0}
    line = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert figures(line) == pytest.approx({"mean_cosine": -1 / 3, "effective_rank": 1.0}, rel=1e-5)
    assert figures(torch.eye(6))["effective_rank"] == pytest.approx(5.0)


def test_only_the_first_samples_are_looked_at_and_one_alone_counts_nothing() -> None:
    x = directions(MOST_SAMPLES + 40, 8).requires_grad_()
    sums = embedding_health(x)
    assert not any(total.requires_grad for total, _ in sums.values())
    assert all(float(count) == MOST_SAMPLES for _, count in sums.values())
    assert figures(x) == figures(x[:MOST_SAMPLES])
    for few in (x[:0], x[:1]):
        assert all((float(total), float(count)) == (0, 0) for total, count in embedding_health(few).values())
