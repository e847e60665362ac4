"""Images: window and mirroring follow the sample's seed, pixels equal an independent resize."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from megatron_ove.config.data import ImageSourceConfig
from megatron_ove.data.patchify import write_patches
from megatron_ove.data.picture_decoder import _chunks
from megatron_ove.data.sources.images import ImageSource, draw_sides, draw_windows
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import ShardWriter
from tests.support.id_shards import encode
from tests.support.patch_pictures import read_patches

CPU = torch.device("cpu")
PATCH = 14


def config(**options: object) -> ImageSourceConfig:
    return ImageSourceConfig.model_validate({"kind": "image", "path": "unused", "image_size": 56, **options})


def smooth_picture(seed: int, height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def source(directory: Path, pictures: list[np.ndarray], settings: ImageSourceConfig) -> ImageSource:
    with ShardWriter(directory, kind="image", num_classes=4, label_width=1) as writer:
        for i, picture in enumerate(pictures):
            writer.add(f"p{i}", {"jpg": encode(picture)}, np.array([0]))
    shards = ShardSet.open(directory)
    return ImageSource("photos", settings, shards=shards, patch_size=14, device=CPU, num_threads=1)


def decode(images: ImageSource, rows: list[int], seeds: list[int]) -> torch.Tensor:
    count = int(images.count_tokens(np.array(rows[:1]), np.array(seeds[:1]))[0])
    target = torch.zeros(len(rows), count, 588, dtype=torch.uint8)
    images.decode_into(np.array(rows), np.array(seeds), list(target))
    return target


def test_patches_are_channel_major() -> None:
    picture = torch.arange(28 * 42 * 3, dtype=torch.int32).to(torch.uint8).view(28, 42, 3)
    patches = torch.zeros(6, 588, dtype=torch.uint8)
    write_patches(picture, patches, 14)
    weight = torch.randn(5, 3, 14, 14, dtype=torch.float64)
    expected = torch.conv2d(picture.permute(2, 0, 1)[None].double(), weight, stride=14)  # [1, 5, 2, 3]
    torch.testing.assert_close(patches.double() @ weight.flatten(1).T, expected[0].flatten(1).T)
    assert torch.equal(read_patches(patches, 2, 3), picture)
    first = torch.zeros(4, 588, dtype=torch.uint8)
    write_patches(picture, first, 14)
    assert torch.equal(first, patches[:4])


def test_pixels_equal_an_independent_crop_and_resize(tmp_path: Path) -> None:
    pictures = [smooth_picture(i, 90 + 30 * i, 160 - 20 * i) for i in range(4)]
    images = source(tmp_path / "set", pictures, config())
    seeds = [11, 22, 33, 44]
    heights, widths = (np.array([p.shape[axis] for p in pictures]) for axis in (0, 1))
    windows = draw_windows(heights, widths, np.array(seeds), config(), PATCH)
    assert set(windows.mirror.tolist()) == {0, 1}, "seeds must cover both"
    for patches, picture, corner, extent, mirror in zip(
        decode(images, [0, 1, 2, 3], seeds), pictures, windows.corner, windows.extent, windows.mirror, strict=True
    ):
        cut = picture[corner[0] : corner[0] + extent[0], corner[1] : corner[1] + extent[1]]
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float(), (56, 56), mode="bicubic", antialias=True
        )[0].permute(1, 2, 0)
        expected = expected.flip(1) if mirror else expected
        difference = (read_patches(patches, 4, 4).float() - expected.clamp(0, 255)).abs()
        assert difference.mean() < 1.0, "another window or mirroring"
        assert difference.max() < 10, "the two cubic kernels differ (a = -0.5 or -0.75), by this much at most"


def test_a_sample_is_the_same_alone_and_in_any_company(tmp_path: Path) -> None:
    pictures = [smooth_picture(i, 100, 120) for i in range(5)]
    images = source(tmp_path / "set", pictures, config())
    together = decode(images, [0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    turned = decode(images, [4, 2, 0], [5, 3, 1])
    assert torch.equal(turned, together[[4, 2, 0]])
    assert not torch.equal(decode(images, [0], [9])[0], together[0]), "another seed is another window"


def test_without_augmentation_the_whole_picture_is_seen(tmp_path: Path) -> None:
    picture = smooth_picture(0, 56, 56)
    images = source(
        tmp_path / "set", [picture], config(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip_probability=0.0)
    )
    assert np.array_equal(read_patches(decode(images, [0], [3])[0], 4, 4).numpy(), picture)
    assert images.positions(0, 3).tolist()[:6] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0], [0, 1, 1]]


RANGE = {"min": 28, "max": 84}


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(60, 3000), width=st.integers(60, 3000), seed=st.integers(0, 2**63 - 1), upscale=st.floats(1, 4)
)
def test_a_kept_aspect_is_within_a_patch_and_the_cap(height: int, width: int, seed: int, upscale: float) -> None:
    settings_ = config(image_size=RANGE, aspect="keep", max_upscale=upscale, crop_aspect=(0.5, 2.0))
    windows = draw_windows(np.array([height]), np.array([width]), np.array([seed]), settings_, PATCH)
    ((rows, columns),), ((tall, wide),) = windows.size / PATCH, windows.extent / PATCH
    (side,) = draw_sides(np.array([seed]), settings_, PATCH) // PATCH
    assert rows * columns <= side**2
    scale = min(upscale, np.sqrt(side**2 / (tall * wide)))
    assert rows <= max(1, tall * scale + 0.51)
    assert columns <= max(1, wide * scale + 0.51)
    if min(rows, columns) > 1:
        assert max(rows / columns, columns / rows) == pytest.approx(
            max(tall / wide, wide / tall), rel=1.5 / min(rows, columns)
        )
        assert rows * columns > min(side**2, tall * wide * upscale**2) - rows - columns, "the cap is not made use of"


def test_sizes_of_lists_and_ranges_are_drawn_equally_often() -> None:
    seeds = np.arange(6000)
    for size, expected in (((28, 56, 56), [28, 56, 56]), (RANGE, [28, 42, 56, 70, 84]), (56, [56])):
        sides = draw_sides(seeds, config(image_size=size), PATCH)
        values, counts = np.unique(sides, return_counts=True)
        assert values.tolist() == sorted(set(expected))
        assert counts / 6000 == pytest.approx([expected.count(v) / len(expected) for v in values], abs=0.03)
    plain, listed = (draw_windows(seeds, seeds + 9, seeds, config(image_size=s), PATCH) for s in (56, (28, 56)))
    assert np.array_equal(plain.corner, listed.corner), "a list changes sizes only"
    assert np.array_equal(plain.mirror, listed.mirror)


@pytest.mark.parametrize("aspect", ["square", "keep"])
def test_every_size_is_counted_and_decoded_exactly(tmp_path: Path, aspect: str) -> None:
    pictures = [smooth_picture(i, 60 + 45 * i, 200 - 30 * i) for i in range(5)]
    settings_ = config(image_size=RANGE, aspect=aspect)
    images = source(tmp_path / "set", pictures, settings_)
    rows, seeds = np.arange(25) % 5, np.arange(25) * 77 + 1
    counts = images.count_tokens(rows, seeds)
    assert len(set(counts.tolist())) > 4
    targets = [torch.zeros(int(count), 588, dtype=torch.uint8) for count in counts]
    images.decode_into(rows, seeds, targets)
    heights, widths = (np.array([pictures[row].shape[axis] for row in rows]) for axis in (0, 1))
    windows = draw_windows(heights, widths, seeds, settings_, PATCH)
    for i, row in enumerate(rows):
        (top, left), (tall, wide), (height, width) = windows.corner[i], windows.extent[i], windows.size[i]
        positions = images.positions(int(row), int(seeds[i]))
        assert positions.tolist() == [[0, y, x] for y in range(height // PATCH) for x in range(width // PATCH)]
        cut = torch.from_numpy(pictures[row][top : top + tall, left : left + wide].copy()).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(
            cut.float(), (int(height), int(width)), mode="bicubic", antialias=True
        )[0].permute(1, 2, 0)
        expected = expected.flip(1) if windows.mirror[i] else expected
        decoded = read_patches(targets[i], height // PATCH, width // PATCH)
        assert (decoded.float() - expected.clamp(0, 255)).abs().mean() < 1.0, (row, height, width)


def test_a_picture_of_native_size_is_not_resized(tmp_path: Path) -> None:
    picture = smooth_picture(0, 42, 98)
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "flip_probability": 0.0, "aspect": "keep"}
    images = source(tmp_path / "set", [picture], config(image_size=84, **whole))
    target = torch.zeros(3 * 7, 588, dtype=torch.uint8)
    images.decode_into(np.array([0]), np.array([3]), [target])
    assert np.array_equal(read_patches(target, 3, 7).numpy(), picture)


def test_a_rotated_photo_is_seen_upright_in_the_window_that_was_drawn(tmp_path: Path) -> None:
    upright = smooth_picture(3, 120, 90)
    exif = Image.Exif()
    exif[0x112] = 6  # "turn by 90 degrees clockwise to see it upright"
    stored = encode(np.ascontiguousarray(np.rot90(upright)), "JPEG", exif=exif, quality=95, subsampling=0)
    images = []
    for name, data in (("turned", stored), ("upright", encode(upright))):
        with ShardWriter(tmp_path / name, kind="image", num_classes=4, label_width=1) as writer:
            writer.add("p", {"jpg": data}, np.array([0]))
        shards = ShardSet.open(tmp_path / name)
        photos = ImageSource("photos", config(), shards=shards, patch_size=14, device=CPU, num_threads=1)
        images.append(decode(photos, [0, 0], [5, 6]).float())
    assert (images[0] - images[1]).abs().mean() < 2.5, "JPEG noise only"


def test_pictures_are_decoded_in_bounded_groups() -> None:
    assert list(_chunks(np.full(150, 1000))) == [(0, 64), (64, 128), (128, 150)]
    large = 40 * 2**20
    assert list(_chunks(np.array([1, large, large, 9, 9]))) == [(0, 2), (2, 5)]
    assert list(_chunks(np.array([100 * 2**20, 5]))) == [(0, 1), (1, 2)]
    assert list(_chunks(np.empty(0, int))) == []


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    seed=st.integers(-(2**63), 2**63 - 1),
    low=st.floats(0.05, 1.0),
    aspect=st.floats(0.2, 1.0),
)
def test_windows_lie_inside_the_picture(height: int, width: int, seed: int, low: float, aspect: float) -> None:
    settings_ = config(crop_area=(low, 1.0), crop_aspect=(aspect, 1 / aspect))
    windows = draw_windows(np.array([height]), np.array([width]), np.array([seed]), settings_, PATCH)
    assert (windows.corner >= 0).all()
    assert (windows.extent >= 1).all()
    assert (windows.corner + windows.extent <= [height, width]).all()
    rounding = 1 / height + 1 / width
    assert low - rounding <= windows.extent.prod() / (height * width) <= 1


def test_windows_cover_their_ranges() -> None:
    seeds = np.arange(4000)
    size = np.full(4000, 1000)
    windows = draw_windows(size, size, seeds, config(), PATCH)
    area = windows.extent.prod(axis=1) / 1e6
    aspect = windows.extent[:, 1] / windows.extent[:, 0]
    assert (area.min(), area.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.0, abs=0.01))
    assert (aspect.min(), aspect.max()) == (pytest.approx(0.8, abs=0.02), pytest.approx(1.25, abs=0.02))
    assert windows.mirror.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(area, windows.mirror)[0, 1]) < 0.05


def test_an_undecodable_picture_is_named(tmp_path: Path) -> None:
    images = source(tmp_path / "set", [smooth_picture(i, 60, 60) for i in range(5)], config())
    offset = images.shards.index.place(3, "jpg")[0]
    with (tmp_path / "set" / "shards" / "000000.tar").open("r+b") as stream:
        stream.seek(offset + 100)
        stream.write(b"\0" * 400)
    expected = decode(images, [0, 1, 4], [1, 2, 4])
    count = int(images.count_tokens(np.array([0]), np.array([1]))[0])
    targets = list(torch.zeros(4, count, 3 * PATCH**2, dtype=torch.uint8))
    problems = images.decode_into(np.array([0, 1, 3, 4]), np.array([1, 2, 3, 4]), targets)
    assert list(problems) == [2]
    assert re.match(
        r"the picture of sample 'p3' \(number 3\) of .*000000\.tar cannot be decoded, although", problems[2]
    )
    assert torch.equal(torch.stack([targets[0], targets[1], targets[3]]), expected.view(3, count, -1)), "as without it"
    assert decode(images, [0], [1]).any(), "the next call must work again"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crop_area": (0.5, 1.5)}, r"crop_area = \(0\.5, 1\.5\) is no range within 0 \.\. 1"),
        ({"crop_area": (0.9, 0.7)}, r"crop_area = \(0\.9, 0\.7\) is no range"),
        ({"crop_aspect": (0.0, 1.0)}, r"crop_aspect = \(0\.0, 1\.0\) is no range of positive"),
    ],
)
def test_ranges_are_checked(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        config(**options)
