"""Storage and update of class centers: norms that are always true, compact moments, stochastic rounding, idle rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.heads.active_classes import ActiveRows
from megatron_ove.heads.center_update import CenterUpdate
from megatron_ove.heads.row_gradient import DenseRowGradient
from megatron_ove.heads.sampled_softmax import ActiveTable

ROWS, SIZE = 10, 6
STORAGE = [
    {"weight_dtype": weight, "first_moment": first, "second_moment": second, "update": update}
    for weight, first, second, update in [
        ("float32", "float32", "element", "row_sparse"),
        ("float32", "none", "row", "row_sparse"),
        ("float32", "bfloat16", "row", "dense"),
        ("bfloat16", "float32", "element", "dense"),
        ("bfloat16", "bfloat16", "row", "row_sparse"),
        ("bfloat16", "none", "row", "dense"),
    ]
]


def make(first_row: int = 0, num_rows: int = ROWS, *, scale: float = 1.0, **options: Any) -> CenterUpdate:
    optim = ClassCenterOptimConfig(**options)
    update = CenterUpdate(optim, first_row, num_rows, SIZE, seed=5, chunk_size=3, device=torch.device("cpu"))
    whole = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(2)) * scale
    update.fill([(0, whole[first_row : first_row + num_rows])])
    return update


def apply(update: CenterUpdate, rows: Tensor, gradient: Tensor, lr: float) -> None:
    """One update of rows of this shard by a gradient [r, e]."""
    held = DenseRowGradient(torch.empty(len(rows), SIZE), None, compute_dtype=torch.float32)
    held.total.copy_(gradient * update.norms[rows][:, None])  # as with respect to rows of norm 1
    active = ActiveRows(rows, torch.ones(len(rows), 1))
    table = ActiveTable(update.weight, update.norms, active, held, None, torch.float32, chunk_size=3)
    update.apply(table, gradient.square().sum(1), torch.tensor(1.0), lr)


def noise(step: int, num_rows: int = ROWS) -> Tensor:
    return torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(50 + step))


def everything(update: CenterUpdate) -> dict[str, Tensor]:
    state = {"weight": update.weight, "square": update.square, "steps": update.steps, "norms": update.norms}
    if update.mean is not None:
        state["mean"] = update.mean
    return {name: tensor[:-1].clone() for name, tensor in state.items()}


@pytest.mark.parametrize("storage", STORAGE)
def test_norms_are_always_those_of_the_stored_weights(storage):
    update = make(**storage)
    for step, rows in enumerate([[0, 3, 4, 9], [], [1], list(range(ROWS))]):
        apply(update, torch.tensor(rows, dtype=torch.int64), noise(step, len(rows)), 0.1)
        true = torch.linalg.vector_norm(update.weight[:-1].double(), dim=1)
        torch.testing.assert_close(update.norms[:-1].double(), true, rtol=1e-6, atol=0)
    update.weight[2:5] = 0.5
    update.measure_norms()
    torch.testing.assert_close(update.norms[2:5], torch.full((3,), 0.5 * SIZE**0.5))


def test_a_row_of_zeros_can_be_divided_by_its_norm():
    update = make()
    update.weight[3] = 0
    update.measure_norms()
    assert update.norms[3] > 0
    apply(update, torch.tensor([3]), torch.zeros(1, SIZE), 0.1)
    assert torch.isfinite(update.weight).all() and update.norms[3] > 0


@pytest.mark.parametrize("storage", STORAGE)
def test_idle_rows_keep_every_bit_or_drift_as_asked(storage):
    update = make(**storage)
    apply(update, torch.arange(ROWS), noise(0), 0.1)
    before = everything(update)
    active = torch.tensor([2, 5])
    apply(update, active, noise(1, 2), 0.1)
    after = everything(update)
    idle = torch.tensor([0, 1, 3, 4, 6, 7, 8, 9])
    for name in before:
        assert (before[name][active] != after[name][active]).any(), name
        same = torch.equal(before[name][idle], after[name][idle])
        assert same == (storage["update"] == "row_sparse"), name
    assert after["steps"][idle].unique().tolist() == [1 if storage["update"] == "row_sparse" else 2]


def test_a_dense_update_is_torch_adamw_with_a_dense_gradient():
    options = {"update": "dense", "first_moment": "float32", "second_moment": "element", "weight_decay": 0.1}
    update = make(**options)
    parameter = torch.nn.Parameter(update.weight[:-1].clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(12):
        rows = torch.tensor([[0, 7], [], [1, 2, 3, 4, 5, 6, 8, 9], [3]][step % 4], dtype=torch.int64)
        gradient = noise(step, len(rows))
        apply(update, rows, gradient, 0.05)
        parameter.grad = torch.zeros(ROWS, SIZE).index_copy_(0, rows, gradient)
        optimizer.step()
    state = optimizer.state[parameter]
    torch.testing.assert_close(update.weight[:-1], parameter.detach(), rtol=1e-4, atol=1e-5)
    assert update.mean is not None
    torch.testing.assert_close(update.mean[:-1], state["exp_avg"] / (1 - 0.9**12), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(update.square[:-1], state["exp_avg_sq"] / (1 - 0.999**12), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("storage", STORAGE)
def test_an_update_does_not_depend_on_how_rows_are_sharded(storage):
    """Bit for bit, stochastic rounding included."""
    whole = make(**storage)
    parts = [make(first, 5, **storage) for first in (0, 5)]
    for step, rows in enumerate([[0, 3, 4, 9], [5, 6], list(range(ROWS))]):
        gradient = noise(step)
        apply(whole, torch.tensor(rows), gradient[rows], 0.1)
        for part, first in zip(parts, (0, 5), strict=True):
            mine = [row for row in rows if first <= row < first + 5]
            apply(part, torch.tensor(mine, dtype=torch.int64) - first, gradient[mine], 0.1)
    for name, tensor in everything(whole).items():
        joined = torch.cat([everything(part)[name] for part in parts])
        assert torch.equal(tensor, joined), name


def test_stochastic_rounding_keeps_the_mean():
    """Steps of a twentieth of the distance between neighbours: nearest rounding would lose them all."""
    update = make(weight_dtype="bfloat16", first_moment="none", second_moment="element", weight_decay=0.0, beta2=0.0)
    update.weight[:-1] = torch.where(update.weight[:-1] > 0, 1.25, -1.25)
    update.measure_norms()
    start = update.weight[:-1].float()
    num_updates, unit, share = 800, 2.0**-7, 0.05  # neighbours of 1.25 are 2^-7 apart
    for _ in range(num_updates):
        apply(update, torch.arange(ROWS), torch.ones(ROWS, SIZE), unit * share)  # moves by the rate with these options
    moved = (start - update.weight[:-1].float()) / unit
    # A walk of N steps of 0 or 1 with chance 1/20: deviation sqrt(38); less over 60 of them.
    deviation = (num_updates * share * (1 - share)) ** 0.5
    assert (moved - num_updates * share).abs().max() < 5 * deviation
    assert abs(float(moved.mean()) - num_updates * share) < 4 * deviation / (ROWS * SIZE) ** 0.5
    assert moved.std() > deviation / 2  # elements are not all rounded alike


def test_values_that_bf16_holds_are_not_rounded_away():
    update = make(weight_dtype="bfloat16", first_moment="none", weight_decay=0.0)
    before = update.weight.clone()
    for _ in range(20):
        apply(update, torch.arange(ROWS), torch.zeros(ROWS, SIZE), 0.1)
    assert torch.equal(update.weight, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_storage_is_what_the_options_say(dtype):
    update = make(weight_dtype=dtype, first_moment=dtype, second_moment="row")
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    assert update.weight.dtype == expected and update.mean is not None and update.mean.dtype == expected
    assert update.square.shape == (ROWS + 1, 1)
    update = make(first_moment="none", second_moment="element")
    assert update.mean is None and update.square.shape == (ROWS + 1, SIZE)


def test_a_shard_without_rows_can_be_updated():
    for update_form in ("row_sparse", "dense"):
        update = make(4, 0, update=update_form)
        apply(update, torch.empty(0, dtype=torch.int64), torch.empty(0, SIZE), 0.1)
        assert update.weight.shape == (1, SIZE)
