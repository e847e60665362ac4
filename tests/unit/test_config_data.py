"""Sentences for mistakes in the data section."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ove.config.loader import config_from_dict, dump_config
from megatron_ove.config.yaml_file import parse_yaml
from megatron_ove.errors import ConfigError
from tests.unit.test_config import changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.sources.images.image_size", 225, "is not a multiple of encoder.patch_size = 14"),
        ("data.tokens_per_microbatch", 100, "can have 256 patches, more than data.tokens_per_microbatch = 100"),
        ("data.sources.more", {"kind": "ocr", "path": "x"}, "data.sources.more feeds no objective"),
        ("data.sources.images.image_size", [224, 225], "image_size = 225 is not a multiple of encoder.patch_size = 14"),
        (
            "data.sources.images.image_size",
            {"min": 224, "max": 576},
            "data.sources.images.image_size.max = 576 is not a multiple of encoder.patch_size = 14, so pixels at the "
            "edge would be lost; use 574",
        ),
        (
            "data.sources.images.image_size",
            {"min": 574, "max": 224},
            "data.sources.images.image_size: min = 574 is above max = 224, so the range holds no size; use min: 224 "
            "and max: 574",
        ),
        ("data.sources.images.image_size", {"min": 224}, "missing key 'data.sources.images.image_size.max': it has no"),
        ("data.sources.images.image_size", {"min": 2, "top": 3}, "unknown key 'data.sources.images.image_size.top'; k"),
        (
            "data.sources.images.image_size",
            {"min": 14, "max": 14 * 10**9},
            "data.sources.images.image_size.max = 14000000000 is not allowed: it should be less than or equal to 65535",
        ),
        (
            "data.sources.images.image_size",
            [],
            "data.sources.images.image_size is an empty list, but at least 1 value is needed; add one",
        ),
        ("objectives", {}, "objectives is an empty section, but at least 1 value is needed; add one"),
        ("data.sources.images.image_size", [224, 0], "image_size.1 = 0 is not allowed: it should be greater than 0"),
        (
            "data.sources.images.image_size",
            "big",
            "image_size = 'big' is a text, but a whole number is needed; correct",
        ),
        (
            "data.sources.images.image_size",
            [28, 1400],
            "can have 10000 patches, more than data.tokens_per_microbatch = 81",
        ),
        (
            "data.sources.images.aspect",
            "native",
            "aspect = 'native' is not one of the known values; use square or keep",
        ),
        (
            "data.sources.images.max_upscale",
            2.0,
            "max_upscale = 2 has no effect with aspect: square, which enlarges ever",
        ),
        (
            "data.sources.clips",
            {"kind": "video", "path": "x", "num_frames": {"min": 4, "max": 8}},
            "data.sources.clips.num_frames = {'min': 4, 'max': 8} is a section, but a whole number is needed; correct",
        ),
        (
            "data.sources.clips",
            {"kind": "video", "path": "x", "strategies": {"codec": 0.5, "frame_sampling": 0.5, "collage": 0.5}},
            "codec + frame_sampling + collage = 1.5, but they are shares of all clips and must add up to 1",
        ),
    ],
)
def test_wrong_value_gets_its_sentence(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(changed(path, value), "run.yaml")
    assert message in str(caught.value)
    assert "number" not in str(caught.value).split(" = ")[0], "a union's tag is no part of the path"


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (56, (56,)),
        ([28, 56, 28], (28, 56, 28)),
        ({"min": 28, "max": 70}, (28, 42, 56, 70)),
        ({"min": 28, "max": 28}, (28,)),
    ],
)
def test_sizes_of_images_survive_a_round_trip(size: Any, sizes: tuple[int, ...]) -> None:
    config = config_from_dict(changed("data.sources.images.image_size", size), "run.yaml")
    again = config_from_dict(parse_yaml(dump_config(config), "dumped"), "dumped")
    assert again == config
    source = again.data.sources["images"]
    assert source.list_sizes(14) == sizes  # type: ignore[union-attr]
    assert source.list_budgets(14) == tuple((side // 14) ** 2 for side in sizes)
