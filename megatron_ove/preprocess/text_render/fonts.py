"""Fonts for rendering, found in installed Python packages; nothing is downloaded and no system font is used.

Latin scripts: DejaVu and STIX, which ship with matplotlib. Japanese and traditional Chinese: IPAex Gothic, which ships
with matplotlib-fontja (IPA Font License).
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from megatron_ove.errors import DataError

_LATIN_FACES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
)
_EAST_ASIAN = frozenset({"ja", "zh-Hant"})


def is_east_asian(language: str) -> bool:
    """Tells whether `language` is written without spaces, in a font of its own."""
    return language in _EAST_ASIAN


@lru_cache(maxsize=16)
def font_paths(language: str) -> tuple[Path, ...]:
    """Returns the font files that can write `language`, always in the same order.

    Raises:
        DataError: the package that ships them is not installed.
    """
    if is_east_asian(language):
        return (_package_folder("matplotlib_fontja", "matplotlib-fontja", language) / "fonts" / "ipaexg.ttf",)
    folder = _package_folder("matplotlib", "matplotlib", language) / "mpl-data" / "fonts" / "ttf"
    return tuple(folder / name for name in _LATIN_FACES)


@lru_cache(maxsize=256)
def open_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Opens a font at `size` pixels; the basic layout engine makes glyph positions the same on every machine."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _package_folder(module: str, distribution: str, language: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"no font for language {language!r}: it ships with the Python package {distribution}, which is not "
            f"installed; run `pip install {distribution}` or leave {language!r} out"
        )
    return Path(spec.submodule_search_locations[0])
