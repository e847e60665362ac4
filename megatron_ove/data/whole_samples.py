"""A source with the chance taken out, for looking at what an encoder has learned."""

from __future__ import annotations

from typing import assert_never

from megatron_ove.config.data import (
    ImageSourceConfig,
    OcrSourceConfig,
    SourceConfig,
    VideoSourceConfig,
    VideoStrategies,
    list_choices,
)


def without_chance(config: SourceConfig) -> SourceConfig:
    """Returns the section whose draws have one outcome: whole pictures, not mirrored; a clip's selected patches.

    Where the section lists several sizes it is the largest.
    """
    match config:
        case ImageSourceConfig():
            return config.model_copy(
                update={
                    "image_size": max(size for _, size in config.named_sizes()),
                    "crop_area": (1.0, 1.0),
                    "crop_aspect": (1.0, 1.0),
                    "flip_probability": 0.0,
                }
            )
        case OcrSourceConfig():
            return config.model_copy(update={"max_patches": max(list_choices(config.max_patches))})
        case VideoSourceConfig():
            selected_only = VideoStrategies(codec=1.0, frame_sampling=0.0, collage=0.0)
            most = max(list_choices(config.max_patches))
            return config.model_copy(update={"strategies": selected_only, "max_patches": most})
        case _:
            assert_never(config)
