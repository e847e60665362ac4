"""Row-sparse AdamW: torch's AdamW on the active rows, nothing at all on the others."""

from __future__ import annotations

import torch

from megatron_ove.optim.row_sparse_adamw import row_sparse_adamw_

SETTINGS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.05}


def make_table(num_rows=7, width=5):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_rows, width, generator=generator)
    return weight, torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros(num_rows, dtype=torch.int32)


def torch_adamw(weight):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=SETTINGS["lr"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["epsilon"],
        weight_decay=SETTINGS["weight_decay"],
    )
    return parameter, optimizer


def test_equals_torch_adamw_when_every_row_is_active():
    weight, *state = make_table()
    parameter, optimizer = torch_adamw(weight)
    rows = torch.arange(len(weight))
    for step in range(20):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        row_sparse_adamw_(weight, *state, rows=rows, gradient=gradient.clone(), **SETTINGS)
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state[0], optimizer.state[parameter]["exp_avg"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(state[1], optimizer.state[parameter]["exp_avg_sq"], rtol=1e-6, atol=1e-8)
    assert state[2].tolist() == [20] * 7


def test_rows_without_a_part_keep_every_bit():
    weight, *state = make_table()
    every_row = torch.arange(len(weight))
    row_sparse_adamw_(weight, *state, rows=every_row, gradient=torch.ones_like(weight), **SETTINGS)
    before = [tensor.clone() for tensor in (weight, *state)]
    row_sparse_adamw_(weight, *state, rows=torch.tensor([5, 2]), gradient=torch.ones(2, 5), **SETTINGS)
    idle, active = torch.tensor([0, 1, 3, 4, 6]), torch.tensor([2, 5])
    for old, new in zip(before, (weight, *state), strict=True):
        assert torch.equal(old[idle], new[idle])
        assert (old[active] != new[active]).all()


def test_a_row_that_comes_late_starts_like_a_fresh_one():
    """Each row is its own AdamW: rows active in different steps equal separate optimizers."""
    weight, *state = make_table(2)
    references = [torch_adamw(weight[row : row + 1]) for row in range(2)]
    for step in range(12):
        rows = torch.tensor([0, 1] if step % 4 == 3 else [0])
        gradient = torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(step))
        row_sparse_adamw_(weight, *state, rows=rows, gradient=gradient.clone(), **SETTINGS)
        for row in rows.tolist():
            parameter, optimizer = references[row]
            parameter.grad = gradient[row : row + 1]
            optimizer.step()
    expected = torch.cat([parameter.detach() for parameter, _ in references])
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    assert state[2].tolist() == [12, 3]


def test_no_active_row_is_allowed():
    weight, *state = make_table()
    before = weight.clone()
    none = torch.empty(0, dtype=torch.int64)
    row_sparse_adamw_(weight, *state, rows=none, gradient=torch.empty(0, 5), **SETTINGS)
    assert torch.equal(weight, before)
