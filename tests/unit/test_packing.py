"""Packing: valid for any sizes, at most 3 % padding on the demo's mixture and on one of native sizes, equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.config.loader import config_from_dict, load_config
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.packing import Budget, deal_longest_first, pack_first_fit_decreasing, pack_samples
from megatron_ove.data.planner import MicrobatchPlan, MicrobatchPlanner, planner_of
from megatron_ove.data.sampler import draw_choice, draw_uniform
from megatron_ove.errors import ConfigError
from megatron_ove.planning.packing_report import measure_packing, nearby_budgets
from tests.support.distributed import repository_root

MOST_PADDING = 0.03
PATCH = 14


def naive_first_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    free: list[int] = []
    result = np.empty(sizes.size, np.int64)
    for item in np.argsort(-sizes, kind="stable"):
        place = next((i for i, room in enumerate(free) if room >= sizes[item]), len(free))
        if place == len(free):
            free.append(capacity)
        free[place] -= int(sizes[item])
        result[item] = place
    return result


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=80), extra=st.integers(0, 60))
def test_first_fit_equals_the_textbook_loop(sizes: list[int], extra: int) -> None:
    values, capacity = np.array(sizes), 50 + extra
    assert np.array_equal(pack_first_fit_decreasing(values, capacity), naive_first_fit_decreasing(values, capacity))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60), bins=st.integers(1, 20))
def test_dealing_equals_the_textbook_loop(sizes: list[int], bins: int) -> None:
    values = np.array(sizes)
    loads, expected = np.zeros(bins, int), np.empty(len(sizes), int)
    for item in np.argsort(-values, kind="stable"):
        expected[item] = loads.argmin()
        loads[expected[item]] += values[item]
    assert np.array_equal(deal_longest_first(values, bins), expected)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=80), extra=st.integers(0, 60), multiple=st.integers(1, 7)
)
def test_a_packing_is_valid_and_costly_microbatches_come_first(sizes: list[int], extra: int, multiple: int) -> None:
    values, capacity = np.array(sizes), 50 + extra
    packing = pack_samples(values, capacity=capacity, multiple=multiple)
    loads = np.bincount(packing.microbatch_index, values, packing.num_microbatches)
    assert packing.longest == loads.max() <= capacity
    assert packing.num_microbatches % multiple == 0
    needed = pack_first_fit_decreasing(values, capacity).max() + 1
    assert needed <= packing.num_microbatches < needed + multiple
    squares = np.bincount(packing.microbatch_index, values**2, packing.num_microbatches)
    assert (np.diff(squares) <= 0).all()


def test_where_dealing_overfills_first_fit_stays() -> None:
    sizes = np.array([3, 3, 2, 2, 2])  # dealt out: 3 + 2 + 2 and 3 + 2
    assert np.bincount(deal_longest_first(sizes, 2), sizes).max() == 7
    packing = pack_samples(sizes, capacity=6, multiple=1)
    assert (packing.num_microbatches, packing.longest) == (2, 6)


@dataclass(frozen=True)
class SizedSource:
    """A source whose samples have the sizes that `count` gives."""

    name: str
    weight: float
    count: Any
    size: int = 10**6

    def count_tokens(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return self.count(rows, seeds)


def constant(tokens: int) -> Any:
    return lambda rows, _: np.full(len(rows), tokens)


def demo_mixture() -> tuple[TrainConfig, list[SizedSource]]:
    """Images of 64 patches, pages and clips of 256, 32 in a step; some clips have moved less."""
    sizes = ["train.global_batch_size=32", "data.tokens_per_microbatch=2560"]
    config = load_config(repository_root() / "examples/quickstart/config.yaml", sizes)
    weights = {"images": 2.0, "pages": 1.0, "clips": 1.0}
    clips = lambda rows, seeds: np.where((rows % 6 == 0) & (draw_uniform(seeds, 0) < 0.5), 192, 256)  # noqa: E731
    sources = {"images": constant(64), "pages": constant(256), "clips": clips}
    return config, [SizedSource(name, weight, sources[name]) for name, weight in weights.items()]


def native_mixture(budget: int, batch: int) -> tuple[TrainConfig, list[SizedSource]]:
    """Images of 224-576 px at their aspect, pages as they are, clips of 2,048 patches or of 4-64 frames of 224 px."""
    data: dict[str, Any] = {
        "name": "native",
        "run_dir": "unused",
        "encoder": {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 64},
        "objectives": {
            name: {"kind": "partial_fc", "source": name, "num_classes": 9} for name in ("images", "pages", "clips")
        },
        "data": {
            "tokens_per_microbatch": budget,
            "sources": {
                "images": {
                    **{"kind": "image", "path": "unused", "aspect": "keep", "weight": 2.0},
                    "image_size": {"min": 224, "max": 574},
                },
                "pages": {"kind": "ocr", "path": "unused", "max_patches": [1024, 2048]},
                "clips": {"kind": "video", "path": "unused", "weight": 2.0, "num_frames": [4, 8, 16, 32, 64]},
            },
        },
        "train": {"num_steps": 10, "global_batch_size": batch},
    }
    config = config_from_dict(data, "native")
    images, pages, clips = config.data.sources.values()

    def picture(budgets: tuple[int, ...]) -> Any:
        def count(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
            height, width = (np.rint(200 + 1400 * draw_uniform(rows, place)) for place in (7, 8))
            return native_grids(height, width, PATCH, draw_choice(budgets, seeds, 0)).prod(axis=1)

        return count

    def clip(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        frames = draw_choice(clips.num_frames, seeds, 1)  # type: ignore[union-attr]
        return np.where(draw_uniform(seeds, 0) < 0.5, 2048, 256 * frames)

    counts = (picture(images.list_budgets(PATCH)), picture(pages.list_budgets(PATCH)), clip)
    return config, [SizedSource(n, s.weight, c) for (n, s), c in zip(config.data.sources.items(), counts, strict=True)]


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_the_demo_mixture_has_little_padding(replicas: int) -> None:
    config, sources = demo_mixture()
    figures = measure_packing(config, sources, budget=2560, replicas=replicas, num_steps=50)
    assert figures.padding <= MOST_PADDING
    assert figures.attention_imbalance <= 0.1


@pytest.mark.parametrize(
    ("replicas", "batch", "budget"), [(1, 128, 20480), (8, 1280, 20480), (128, 20_480, 20480), (8, 1280, 32768)]
)
def test_a_mixture_of_native_sizes_has_little_padding(replicas: int, batch: int, budget: int) -> None:
    config, sources = native_mixture(budget, batch)
    figures = measure_packing(config, sources, budget=budget, replicas=replicas, num_steps=3 if replicas > 8 else 10)
    assert figures.padding <= MOST_PADDING
    assert figures.attention_imbalance <= 0.12, "clips of 64 frames are a microbatch of their own"


def plan_of(config: TrainConfig, sources: list[SizedSource], **data: Any) -> MicrobatchPlan:
    changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
    return planner_of(changed, sources, data_size=4).plan(0)


def test_microbatches_are_cut_to_the_fullest_one_unless_their_shape_is_fixed() -> None:
    config, sources = demo_mixture()
    trimmed, fixed = plan_of(config, sources), plan_of(config, sources, trim_padding=False)
    assert (trimmed.num_microbatches, trimmed.tokens_per_microbatch) == (4, 1280)
    assert trimmed.padding_share <= MOST_PADDING
    assert fixed.tokens_per_microbatch == 2560
    assert fixed.padding_share == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(trimmed.microbatch_index, fixed.microbatch_index)


def test_the_length_is_what_ranks_and_fp8_can_divide() -> None:
    config, sources = native_mixture(20480, 64)
    encoder = config.encoder.model_copy(update={"fp8": "blockwise"})
    parallel = config.parallel.model_copy(update={"tensor_model_parallel_size": 3, "sequence_parallel": True})
    odd = config.model_copy(update={"encoder": encoder, "parallel": parallel})
    assert plan_of(config, sources).tokens_per_microbatch % 64 == 0
    assert plan_of(odd, sources).tokens_per_microbatch % (3 * 128) == 0


def test_an_interleaved_pipeline_gets_microbatches_in_groups() -> None:
    config, sources = native_mixture(20480, 64)
    pipeline = {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}
    interleaved = config.model_copy(update={"parallel": config.parallel.model_copy(update=pipeline)})
    assert plan_of(interleaved, sources).num_microbatches % 12 == 0


def test_a_budget_changes_microbatches_but_no_sample() -> None:
    config, sources = native_mixture(20480, 256)
    plans = [plan_of(config, sources, tokens_per_microbatch=budget) for budget in (16384, 32768)]
    assert plans[0].num_microbatches > plans[1].num_microbatches
    for name in ("source_index", "ordinals", "rows", "seeds", "num_tokens"):
        assert np.array_equal(getattr(plans[0], name), getattr(plans[1], name))


def test_nearby_budgets_hold_the_largest_sample() -> None:
    assert nearby_budgets(2560, largest=256, multiple=1) == [1280, 1920, 2560, 3200, 3840, 5120]
    assert nearby_budgets(2560, largest=2000, multiple=1) == [2560, 3200, 3840, 5120]
    assert all(budget % 384 == 0 for budget in nearby_budgets(3840, largest=1, multiple=3))


def test_a_sample_beyond_the_budget_is_refused() -> None:
    planner = MicrobatchPlanner(
        [SizedSource("big", 1.0, constant(16))],
        **{"seed": 0, "global_batch_size": 4, "tokens_per_microbatch": 10, "microbatch_multiple": 1},
    )
    with pytest.raises(ConfigError, match=r"a sample of data\.sources\.big has 16 patches, more than .* = 10; raise"):
        planner.plan(0)


@pytest.mark.parametrize("text_capacity", [4096, 2600])
@pytest.mark.parametrize("num_samples", [128, 1024])
def test_two_budgets_are_kept_with_few_more_microbatches(num_samples: int, text_capacity: int) -> None:
    """Pages of one to six tiles with log-normal texts."""
    random = np.random.default_rng(num_samples)
    tiles = random.integers(1, 7, num_samples) * 256
    texts = np.clip(random.lognormal(5, 1, num_samples), 0, text_capacity).astype(np.int64)
    packing = pack_samples(tiles, capacity=8192, multiple=1, others=[Budget(texts, text_capacity)])
    assert np.bincount(packing.microbatch_index, weights=tiles).max() <= 8192
    assert np.bincount(packing.microbatch_index, weights=texts).max() <= text_capacity
    alone = [
        pack_samples(tiles, capacity=8192, multiple=1),
        pack_samples(texts + 1, capacity=text_capacity + 1, multiple=1),
    ]
    assert packing.num_microbatches <= 1.01 * max(one.num_microbatches for one in alone) + 1


def test_a_sample_that_takes_nothing_of_a_budget_is_packed_as_before() -> None:
    sizes = np.random.default_rng(5).integers(1, 100, 300)
    nothing = Budget(np.zeros(300, dtype=np.int64), 10)
    plain, other = (pack_samples(sizes, capacity=256, multiple=4, others=some) for some in ((), (nothing,)))
    assert other.num_microbatches == plain.num_microbatches
