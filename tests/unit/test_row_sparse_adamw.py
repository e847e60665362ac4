"""AdamW on chunks of rows: torch's AdamW for every row on its own, and the compact moments by their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ove.optim.row_sparse_adamw import adamw_rows_

SETTINGS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.05}
ROWS, WIDTH = 7, 5


class Table:
    """Weights, moments and counts, updated through gather and scatter as a head does it."""

    def __init__(self, num_rows: int = ROWS, *, has_mean: bool = True, by_row: bool = False, **settings: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(num_rows, WIDTH, generator=generator)
        self.mean = torch.zeros_like(self.weight) if has_mean else None
        self.square = torch.zeros(num_rows, 1 if by_row else WIDTH)
        self.count = torch.zeros(num_rows, dtype=torch.int32)
        self._by_row = by_row
        self._settings: dict[str, Any] = SETTINGS | settings

    def update(self, rows: Tensor, gradient: Tensor) -> None:
        count, square, weight = self.count[rows] + 1, self.square[rows], self.weight[rows]
        mean = None if self.mean is None else self.mean[rows]
        gradient_square = gradient.square().mean(1, keepdim=True) if self._by_row else gradient.square()
        result = adamw_rows_(
            weight,
            mean,
            square,
            count,
            gradient=gradient.clone(),
            gradient_square=gradient_square,
            **self._settings,
        )
        assert result is weight
        self.weight[rows], self.square[rows], self.count[rows] = weight, square, count
        if mean is not None and self.mean is not None:
            self.mean[rows] = mean


def torch_adamw(weight: Tensor, **settings: float) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    used = SETTINGS | settings
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=used["lr"],
        betas=(used["beta1"], used["beta2"]),
        eps=used["epsilon"],
        weight_decay=used["weight_decay"],
    )
    return parameter, optimizer


def noise(step: int, num_rows: int = ROWS) -> Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("settings", [{}, {"beta1": 0.0}, {"beta2": 0.0}, {"weight_decay": 0.0, "epsilon": 0.1}])
def test_equals_torch_adamw_when_every_row_is_active(settings: dict[str, float]) -> None:
    table = Table(**settings)
    parameter, optimizer = torch_adamw(table.weight, **settings)
    used = SETTINGS | settings
    for step in range(20):
        table.update(torch.arange(ROWS), noise(step))
        parameter.grad = noise(step)
        optimizer.step()
    torch.testing.assert_close(table.weight, parameter.detach(), rtol=1e-5, atol=1e-6)
    state = optimizer.state[parameter]
    assert table.mean is not None
    # What is kept is torch's moment after the correction for its bias.
    torch.testing.assert_close(table.mean, state["exp_avg"] / (1 - used["beta1"] ** 20), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.square, state["exp_avg_sq"] / (1 - used["beta2"] ** 20), rtol=1e-5, atol=1e-6)
    assert table.count.tolist() == [20] * ROWS


def test_a_row_that_comes_late_starts_like_a_fresh_one() -> None:
    """Each row is its own AdamW: rows active in different steps equal separate optimizers."""
    table = Table(2)
    references = [torch_adamw(table.weight[row : row + 1]) for row in range(2)]
    for step in range(12):
        rows = torch.tensor([0, 1] if step % 4 == 3 else [0])
        gradient = noise(step, len(rows))
        table.update(rows, gradient)
        for row in rows.tolist():
            parameter, optimizer = references[row]
            parameter.grad = gradient[row : row + 1]
            optimizer.step()
    expected = torch.cat([parameter.detach() for parameter, _ in references])
    torch.testing.assert_close(table.weight, expected, rtol=1e-6, atol=1e-7)
    assert table.count.tolist() == [12, 3]


def test_the_first_update_has_full_size_whatever_the_gradient() -> None:
    for gradient in (1e-6, 1.0, 1e6):
        table = Table(1, weight_decay=0.0, epsilon=1e-30)
        before = table.weight.clone()
        table.update(torch.tensor([0]), torch.full((1, WIDTH), gradient))
        torch.testing.assert_close(before - table.weight, torch.full((1, WIDTH), SETTINGS["lr"]), rtol=1e-5, atol=0)


def test_one_second_moment_per_row_is_the_mean_of_its_squares() -> None:
    """By a plain float64 definition, with and without a first moment."""
    beta1, beta2, lr = SETTINGS["beta1"], SETTINGS["beta2"], SETTINGS["lr"]
    for has_mean in (True, False):
        table = Table(has_mean=has_mean, by_row=True)
        weight = table.weight.double()
        mean, square = torch.zeros_like(weight), torch.zeros(ROWS, dtype=torch.float64)
        for step in range(1, 11):
            gradient = noise(step).double()
            table.update(torch.arange(ROWS), noise(step))
            mean = beta1 * mean + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient.square().sum(1) / WIDTH
            followed = mean / (1 - beta1**step) if has_mean else gradient
            root = (square / (1 - beta2**step)).sqrt()[:, None]
            weight = weight * (1 - lr * SETTINGS["weight_decay"]) - lr * followed / (root + SETTINGS["epsilon"])
        torch.testing.assert_close(table.weight.double(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(table.square[:, 0].double(), square / (1 - beta2**10), rtol=1e-5, atol=0)


def test_without_a_first_moment_every_gradient_is_followed_as_it_is() -> None:
    """That is AdamW with beta1 = 0."""
    table, reference = Table(has_mean=False), Table(beta1=0.0)
    for step in range(5):
        for each in (table, reference):
            each.update(torch.arange(ROWS), noise(step))
    torch.testing.assert_close(table.weight, reference.weight, rtol=1e-6, atol=1e-7)


def test_a_row_without_gradient_only_decays() -> None:
    """Also in its first update, where the second moment is 0."""
    for by_row in (True, False):
        table = Table(by_row=by_row)
        before = table.weight.clone()
        table.update(torch.arange(ROWS), torch.zeros(ROWS, WIDTH))
        torch.testing.assert_close(table.weight, before * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]))


def test_counts_far_beyond_the_correction_stay_exact() -> None:
    table = Table(1, has_mean=False)
    table.count[:] = 2_000_000_000
    table.update(torch.tensor([0]), torch.ones(1, WIDTH))
    torch.testing.assert_close(table.square, torch.full((1, WIDTH), 1 - SETTINGS["beta2"]))


def test_no_row_is_allowed() -> None:
    table = Table()
    before = table.weight.clone()
    table.update(torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH))
    assert torch.equal(table.weight, before)
