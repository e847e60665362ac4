"""Clips: strategies drawn per sample, positions of each, and pixels exactly those of a plain decode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ove.config.data import VideoSourceConfig
from megatron_ove.data.sources.clips import CODEC, COLLAGE, FRAME_SAMPLING, VideoSource
from megatron_ove.data.synthetic import build_mosaic, write_synthetic_shard_set
from megatron_ove.errors import DataError
from megatron_ove.shards.shard_set import ShardSet
from tests.support.patch_pictures import read_patches

FRAMES, ROWS, COLUMNS = 64, 3, 4
PER_FRAME = ROWS * COLUMNS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_shard_set(
        tmp_path_factory.mktemp("clips") / "set",
        kind="video",
        num_samples=6,
        grid_height=ROWS,
        grid_width=COLUMNS,
        selected_patches=40,
    )


def clips(directory: Path, **options: object) -> VideoSource:
    config = VideoSourceConfig.model_validate({"kind": "video", "path": "unused", "max_patches": 30, **options})
    device = torch.device("cpu")
    return VideoSource("clips", config, shards=ShardSet.open(directory), patch_size=14, device=device, num_threads=1)


def only(strategy: int) -> dict[str, object]:
    names = ("codec", "frame_sampling", "collage")
    return {"strategies": {name: float(i == strategy) for i, name in enumerate(names)}}


def decode(source: VideoSource, row: int, seed: int) -> torch.Tensor:
    rows, seeds = np.array([row]), np.array([seed])
    target = torch.zeros(int(source.count_tokens(rows, seeds)[0]), 588, dtype=torch.uint8)
    source.decode_into(rows, seeds, [target])
    return target


def plain(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_strategies_have_the_configured_shares(directory: Path) -> None:
    source = clips(directory, strategies={"codec": 0.5, "frame_sampling": 0.375, "collage": 0.125})
    counts = np.bincount(source.strategies(np.arange(8000) * 7919), minlength=3) / 8000
    assert counts == pytest.approx([0.5, 0.375, 0.125], abs=0.02)
    for strategy in (CODEC, FRAME_SAMPLING, COLLAGE):
        assert set(clips(directory, **only(strategy)).strategies(np.arange(500)).tolist()) == {strategy}


def test_one_frame_of_every_bin(directory: Path) -> None:
    source = clips(directory)
    drawn = np.stack([source.frames(seed) for seed in range(600)])
    assert (drawn // 8 == np.arange(8)).all()
    assert all(set(drawn[:, i] % 8) == set(range(8)) for i in range(8)), "every frame of a bin can be drawn"


def test_codec_patches_are_the_stored_ones(directory: Path) -> None:
    source = clips(directory, **only(CODEC))
    # clip 0 stores 40 and is thinned to max_patches: 3 of every 4, over all of its time; clip 2 stores 20
    for row, chosen in ((0, [i for i in range(40) if i % 4 != 3]), (2, list(range(20)))):
        stored = np.load(io.BytesIO(source.shards.read(row, "positions.npy")))
        assert np.array_equal(source.positions(row, 1), stored[chosen])
        mosaic = plain(source.shards.read(row, "codec.jpg"))
        patches = decode(source, row, 1)
        assert patches.shape == (len(chosen), 588)
        for i, place in enumerate(chosen):
            y, x = place // 16 * 14, place % 16 * 14
            assert np.array_equal(read_patches(patches[i : i + 1], 1, 1).numpy(), mosaic[y : y + 14, x : x + 14])


def test_sampled_frames_are_the_stored_ones_at_their_place(directory: Path) -> None:
    source = clips(directory, **only(FRAME_SAMPLING))
    patches, positions, frames = decode(source, 3, 9), source.positions(3, 9), source.frames(9)
    assert patches.shape[0] == len(positions) == 8 * PER_FRAME
    for i, frame in enumerate(frames):
        part = slice(i * PER_FRAME, (i + 1) * PER_FRAME)
        expected = plain(source.shards.read(3, f"frame{frame:02d}.jpg"))
        assert np.array_equal(read_patches(patches[part], ROWS, COLUMNS).numpy(), expected)
        assert (positions[part, 0] == frame).all()
        assert positions[part, 1:].tolist() == [[h, w] for h in range(ROWS) for w in range(COLUMNS)]


def test_a_collage_is_one_tall_picture_of_the_same_frames(directory: Path) -> None:
    collage, sampled = clips(directory, **only(COLLAGE)), clips(directory, **only(FRAME_SAMPLING))
    assert torch.equal(decode(collage, 3, 9), decode(sampled, 3, 9))
    positions = collage.positions(3, 9)
    assert (positions[:, 0] == 0).all()
    frame, row = np.divmod(np.arange(8 * PER_FRAME) // COLUMNS, ROWS)
    assert np.array_equal(positions[:, 1], ROWS * frame + row)
    assert np.array_equal(positions[:, 2], np.arange(8 * PER_FRAME) % COLUMNS)


def test_frames_and_budgets_of_a_list_are_drawn_per_sample(directory: Path) -> None:
    source = clips(directory, num_frames=(4, 16, 64, 64), max_patches=(10, 25))
    rows, seeds = np.zeros(4000, np.int64), np.arange(4000)
    counts, strategies = source.count_tokens(rows, seeds), source.strategies(seeds)
    sizes, numbers = np.unique(counts[strategies == CODEC], return_counts=True)
    assert sizes.tolist() == [10, 25]
    assert numbers / numbers.sum() == pytest.approx([0.5, 0.5], abs=0.04)
    sizes, numbers = np.unique(counts[strategies != CODEC], return_counts=True)
    assert sizes.tolist() == [4 * PER_FRAME, 16 * PER_FRAME, 64 * PER_FRAME]
    assert numbers / numbers.sum() == pytest.approx([0.25, 0.25, 0.5], abs=0.04), "listed twice is drawn twice as often"
    for seed in range(12):
        row = seed % 6
        (count,) = source.count_tokens(np.array([row]), np.array([seed]))
        positions = source.positions(row, seed)
        assert len(positions) == count
        assert np.array_equal(np.lexsort(positions.T[::-1]), np.arange(count)), "in (t, h, w) order, each once"
        assert decode(source, row, seed).any(dim=1).all(), "a patch was not written"
    whole = next(seed for seed in range(99) if counts[seed] == 64 * PER_FRAME)
    assert source.frames(whole).tolist() == list(range(64))


def test_mixed_strategies_decode_together(directory: Path) -> None:
    source = clips(directory)
    rows, seeds = np.array([0, 1, 2, 3, 4, 5] * 3), np.arange(18)
    assert set(source.strategies(seeds).tolist()) == {CODEC, FRAME_SAMPLING, COLLAGE}
    counts = source.count_tokens(rows, seeds)
    assert counts.tolist() == [len(source.positions(int(r), int(s))) for r, s in zip(rows, seeds, strict=True)]
    targets = [torch.zeros(int(count), 588, dtype=torch.uint8) for count in counts]
    source.decode_into(rows, seeds, targets)
    for row, seed, target in zip(rows, seeds, targets, strict=True):
        assert torch.equal(target, decode(source, int(row), int(seed)))


def test_positions_that_do_not_fit_the_index_are_named(directory: Path) -> None:
    source = clips(directory, **only(CODEC))
    source.shards.columns["num_patches"] = source.shards.num_patches + 1
    text = r"sample 'video000001' \(number 1\) of .* has 40 selected patches, but its index says 41"
    with pytest.raises(DataError, match=text):
        source.positions(1, 0)


def test_a_mosaic_is_padded_with_grey() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (18, 14, 14, 3), np.uint8)
    mosaic = build_mosaic(patches)
    assert mosaic.shape == (28, 224, 3)
    assert np.array_equal(mosaic[14:, 14:28], patches[17])
    assert (mosaic[14:, 28:] == 128).all()
