"""The microbatch plan: exact shares, every sample once, the same samples for any layout."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.data.planner import MicrobatchPlanner
from megatron_ove.errors import ConfigError, DataError


@dataclass(frozen=True)
class FakeSource:
    name: str
    weight: float
    size: int
    largest: int = 16

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return 1 + (rows * 7 + (seeds & 3)) % self.largest


def planner(sources: list[FakeSource], batch: int = 12, tokens: int = 40, replicas: int = 1) -> MicrobatchPlanner:
    return MicrobatchPlanner(
        sources, seed=5, global_batch_size=batch, tokens_per_microbatch=tokens, microbatch_multiple=replicas
    )


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    batch=st.integers(12, 40),
    step=st.integers(0, 10**9),
)
def test_counts_are_exact_at_any_step(weights: list[float], batch: int, step: int) -> None:
    plan = planner([FakeSource(f"s{i}", w, 50) for i, w in enumerate(weights)], batch=batch)
    before, after = plan.samples_before(step), plan.samples_before(step + 1)
    assert sum(before) == step * batch
    assert sum(after) == (step + 1) * batch
    assert all(b <= a for b, a in zip(before, after, strict=True))
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - step * batch * weight / sum(weights)) <= len(weights) + 1e-9 * step * batch


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), batch=st.integers(1, 20), replicas=st.integers(1, 5), epochs=st.integers(1, 3))
def test_every_sample_of_an_epoch_exactly_once(size: int, batch: int, replicas: int, epochs: int) -> None:
    planned = planner([FakeSource("only", 1.0, size)], batch=batch, replicas=replicas)
    seen: list[np.ndarray] = []
    for step in range(-(-size * epochs // batch)):
        plan = planned.plan(step)
        for rank in range(replicas):
            for microbatch in plan.microbatches_of(rank, replicas):
                places = plan.samples_of(microbatch)
                seen.append(np.stack([plan.ordinals[places], plan.rows[places]], axis=1))
    delivered = np.concatenate(seen)
    delivered = delivered[np.argsort(delivered[:, 0])]
    assert np.array_equal(delivered[:, 0], np.arange(len(delivered))), "an ordinal is lost or doubled"
    for epoch in range(epochs):
        assert np.array_equal(np.sort(delivered[epoch * size : (epoch + 1) * size, 1]), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(replicas=st.integers(1, 6), step=st.integers(0, 1000), tokens=st.integers(16, 100))
def test_a_step_holds_the_same_samples_for_any_number_of_replicas(replicas: int, step: int, tokens: int) -> None:
    sources = [FakeSource("image", 2.0, 31), FakeSource("video", 1.0, 17, largest=9)]
    one = planner(sources, tokens=tokens).plan(step)
    many = planner(sources, tokens=tokens, replicas=replicas).plan(step)
    for name in ("source_index", "ordinals", "rows", "seeds", "num_tokens"):
        assert np.array_equal(getattr(one, name), getattr(many, name))
    assert many.num_microbatches % replicas == 0
    assert many.num_microbatches - one.num_microbatches < replicas
    shared = [set(many.microbatches_of(rank, replicas)) for rank in range(replicas)]
    assert set().union(*shared) == set(range(many.num_microbatches))
    assert sum(map(len, shared)) == many.num_microbatches


def test_microbatches_fit() -> None:
    plan = planner([FakeSource("image", 1.0, 100)], batch=50, tokens=32, replicas=4).plan(3)
    filled = np.bincount(plan.microbatch_index, weights=plan.num_tokens, minlength=plan.num_microbatches)
    assert filled.max() <= 32
    assert np.array_equal(plan.samples_of(1), np.sort(plan.samples_of(1)))


def test_a_plan_needs_no_history() -> None:
    sources = [FakeSource("image", 0.3, 31), FakeSource("ocr", 0.5, 40), FakeSource("video", 0.2, 17)]
    running = planner(sources)
    plans = [running.plan(step) for step in range(8)]
    resumed = planner(sources).plan(7)
    assert np.array_equal(resumed.rows, plans[7].rows)
    assert np.array_equal(resumed.seeds, plans[7].seeds)
    assert np.array_equal(resumed.microbatch_index, plans[7].microbatch_index)


def test_a_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a sample of data\.sources\.big has 16 patches, more than .* = 10; raise"):
        planner([FakeSource("big", 1.0, 64)], batch=64, tokens=10).plan(0)


def test_a_batch_too_small_for_the_sources_is_refused() -> None:
    sources = [FakeSource(f"s{i}", 1.0, 8) for i in range(3)]
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 1 is too small for 3 sources.*use at least 2"):
        planner(sources, batch=1)


def test_a_large_step_is_planned_in_little_time() -> None:
    sources = [FakeSource("image", 2.0, 400_000_000, 1), FakeSource("video", 1.0, 10**8, 2048)]
    planned = planner(sources, batch=20_000, tokens=8192, replicas=128)
    started = time.process_time()
    plan = planned.plan(12_345)
    assert plan.num_microbatches % 128 == 0
    assert time.process_time() - started < 1.0


@dataclass(frozen=True)
class DamagedSource(FakeSource):
    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return np.where(rows == 3, 0, 5)


def test_a_sample_without_patches_is_named() -> None:
    planned = planner([DamagedSource("pages", 1.0, 12)])
    with pytest.raises(DataError, match=r"sample 3 of data\.sources\.pages has 0 patches by its index, .*; copy"):
        planned.plan(0)
