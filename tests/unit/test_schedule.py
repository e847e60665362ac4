"""The learning-rate schedule at its corners: first step, end of warm-up, end of decay, and after a resume."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megatron_ove.config.optim import ScheduleConfig
from megatron_ove.optim.schedule import learning_rate


def rates(num_steps: int = 100, **fields: object) -> list[float]:
    schedule = ScheduleConfig(**fields)
    return [learning_rate(schedule, base_lr=2.0, step=step, num_steps=num_steps) for step in range(num_steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "constant"])
def test_warm_up_starts_small_and_ends_at_the_base_rate(kind):
    values = rates(kind=kind, warmup_steps=9)
    assert values[0] == pytest.approx(2.0 / 10)  # not 0, and not the base rate
    assert values[8] == pytest.approx(2.0 * 9 / 10)
    assert values[9] == 2.0
    assert all(later > earlier for earlier, later in pairwise(values[:10]))


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "constant"])
def test_without_warm_up_the_first_step_has_the_base_rate(kind):
    assert rates(kind=kind)[0] == 2.0


@pytest.mark.parametrize(
    ("kind", "half"),
    [("cosine", 0.5), ("linear", 0.5), ("polynomial", 0.25), ("constant", 1.0)],
)
def test_half_way_value(kind, half):
    assert rates(kind=kind, power=2.0)[50] == pytest.approx(2.0 * half)


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial"])
def test_decay_ends_at_the_floor_and_stays_there(kind):
    values = rates(kind=kind, min_lr_ratio=0.1, decay_steps=60, warmup_steps=5)
    assert values[60] == pytest.approx(0.2)
    assert values[61:] == pytest.approx([0.2] * 40)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values[5:]))


def test_cosine_is_the_cosine():
    values = rates(kind="cosine", warmup_steps=20)
    assert values[40] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 20 / 80)))


def test_no_jump_anywhere():
    values = rates(kind="cosine", warmup_steps=10)
    assert max(abs(b - a) for a, b in pairwise(values)) < 2.0 / 10


def test_warm_up_longer_than_the_run_is_still_defined():
    values = rates(num_steps=4, warmup_steps=10)
    assert values == pytest.approx([2.0 * (s + 1) / 11 for s in range(5)])
