"""Pages: the whole page, its aspect kept, within the budget, never blown up."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ove.config.data import OcrSourceConfig
from megatron_ove.data.native_size import native_grids
from megatron_ove.data.sources.pages import OcrSource
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import ShardWriter
from tests.support.id_shards import encode
from tests.support.patch_pictures import read_patches


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000), budget=st.integers(1, 4096))
def test_grids_fit_the_budget_and_are_not_blown_up(height: int, width: int, budget: int) -> None:
    ((rows, columns),) = native_grids(np.array([height]), np.array([width]), 14, budget).tolist()
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= budget
    assert rows - max(1, height / 14) < 1, "stretched by a patch or more"
    assert columns - max(1, width / 14) < 1


@settings(max_examples=300, deadline=None)
@example(height=637, width=663, budget=625)  # 24.5 x 25.5 patches: either way of rounding is half a patch off each side
@given(height=st.integers(200, 8000), width=st.integers(200, 8000), budget=st.integers(256, 4096))
def test_grids_keep_the_aspect_and_use_the_budget(height: int, width: int, budget: int) -> None:
    ((rows, columns),) = native_grids(np.array([height]), np.array([width]), 14, budget).tolist()
    distortion = (rows / columns) / (height / width)
    # Rounding may have made the shorter side larger by a patch.
    assert max(distortion, 1 / distortion) <= 1 + 1 / (min(rows, columns) - 1), "more than a patch of the shorter side"
    if height * width > budget * 196:
        assert rows * columns >= budget - rows - columns


@pytest.mark.parametrize(
    ("height", "width", "budget", "grid"),
    [
        (1400, 1000, 10_000, (100, 71)),  # fits: its own size, rounded to patches
        (10, 10, 64, (1, 1)),
        (20_000, 10, 64, (64, 1)),
        (10, 20_000, 64, (1, 64)),
        (300, 300, 16, (4, 4)),
        (300, 300, 15, (3, 4)),  # rounding gives 4 x 4; either side may give way
        (600, 300, 15, (5, 3)),
    ],
)
def test_known_grids(height: int, width: int, budget: int, grid: tuple[int, int]) -> None:
    assert tuple(native_grids(np.array([height]), np.array([width]), 14, budget)[0]) == grid


def test_a_page_is_seen_whole_and_unmirrored(tmp_path: Path) -> None:
    page = cv2.resize(np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8), (140, 200))
    turned = cv2.resize(page, (98, 70))
    with ShardWriter(tmp_path / "set", kind="ocr", num_classes=4, label_width=1) as writer:
        writer.add("large", {"jpg": encode(page)}, np.array([0]))
        writer.add("small", {"jpg": encode(turned)}, np.array([0]))
    config = OcrSourceConfig.model_validate({"kind": "ocr", "path": "unused", "max_patches": 40})
    shards = ShardSet.open(tmp_path / "set")
    pages = OcrSource("pages", config, shards=shards, patch_size=14, device=torch.device("cpu"), num_threads=1)
    rows, seeds = np.array([0, 1]), np.array([5, 6])
    assert pages.count_tokens(rows, seeds).tolist() == [8 * 5, 5 * 7]
    targets = [torch.zeros(count, 588, dtype=torch.uint8) for count in (40, 35)]
    pages.decode_into(rows, seeds, targets)
    expected = cv2.resize(page, (5 * 14, 8 * 14), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(read_patches(targets[0], 8, 5).numpy() - expected).mean() < 3
    assert np.array_equal(read_patches(targets[1], 5, 7).numpy(), turned), "a page of whole patches is not touched"
    positions = pages.positions(0, 5)
    assert positions.shape == (40, 3)
    assert positions[-1].tolist() == [0, 7, 4]


def test_budgets_of_a_list_are_drawn_per_sample(tmp_path: Path) -> None:
    page = cv2.resize(np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8), (420, 560))
    with ShardWriter(tmp_path / "set", kind="ocr", num_classes=4, label_width=1) as writer:
        writer.add("page", {"jpg": encode(page)}, np.array([0]))
    config = OcrSourceConfig.model_validate({"kind": "ocr", "path": "unused", "max_patches": (40, 2000)})
    shards = ShardSet.open(tmp_path / "set")
    pages = OcrSource("pages", config, shards=shards, patch_size=14, device=torch.device("cpu"), num_threads=1)
    rows, seeds = np.zeros(1000, np.int64), np.arange(1000)
    counts = pages.count_tokens(rows, seeds)
    assert set(counts.tolist()) == {7 * 5, 40 * 30}
    assert (counts == 35).mean() == pytest.approx(0.5, abs=0.05)
    small, large = (int(np.flatnonzero(counts == count)[0]) for count in (35, 1200))
    targets = [torch.zeros(count, 588, dtype=torch.uint8) for count in (35, 1200)]
    pages.decode_into(np.zeros(2, np.int64), np.array([small, large]), targets)
    assert np.array_equal(read_patches(targets[1], 40, 30).numpy(), page)
    expected = cv2.resize(page, (5 * 14, 7 * 14), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(read_patches(targets[0], 7, 5).numpy() - expected).mean() < 3
    assert pages.positions(0, small)[-1].tolist() == [0, 6, 4]
