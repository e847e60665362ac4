"""Typefaces for rendering, found in installed Python packages; nothing is downloaded and no system font is used.

Families differ in their letterforms, styles of a family (bold, italic) much less. So an encoder that reads is tested on
two kinds of faces that its training pages never use: siblings, whose family has other members in training, and families
without a member in training. Licences: docs/page_maker.md.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from megatron_ove.errors import DataError

Script = Literal["latin", "greek", "cyrillic", "japanese", "chinese"]
Split = Literal["train", "siblings", "families"]

_EAST_ASIAN: dict[str, Script] = {"ja": "japanese", "zh-Hant": "chinese"}


@dataclass(frozen=True)
class Typeface:
    """One font file.

    Attributes:
        path: the file.
        family: e.g. "DejaVu Serif".
        style: member of the family, e.g. "Bold Italic".
        scripts: it can write their usual letters; whether a certain text, `can_write` says.
        split: "train", or how unseen it is: "siblings" (other members of its family are in training) or "families".
    """

    path: Path
    family: str
    style: str
    scripts: tuple[Script, ...]
    split: Split

    def can_write(self, text: str) -> bool:
        """Tells whether the face has a glyph of its own for every character of `text`; spaces need none."""
        return self.missing(text) is None

    def missing(self, text: str) -> str | None:
        """Returns the first character of `text` that the face cannot write, or None."""
        characters = _characters(self.path)
        return next((c for c in text if c not in characters and not c.isspace()), None)

    def open(self, size: int) -> ImageFont.FreeTypeFont:
        """Opens the font at `size` pixels; the basic layout makes glyph positions the same on every machine."""
        return _open(self.path, size)


@dataclass(frozen=True)
class _Family:
    """A family as its package ships it; the mappings are style -> file name, for each split."""

    name: str
    distribution: str
    module: str
    folder: str
    scripts: tuple[Script, ...]
    train: Mapping[str, str]
    siblings: Mapping[str, str]
    families: Mapping[str, str]


def _family(
    name: str,
    distribution: str,
    folder: str,
    pattern: str,
    *,
    train: str = "",
    siblings: str = "",
    families: str = "",
    scripts: tuple[Script, ...] = ("latin",),
) -> _Family:
    """Describes a family; the splits are lists "Regular=file part, ..." and `pattern` makes a file name of the part."""
    styles = [
        {style: pattern.format(part) for style, part in (entry.split("=") for entry in text.split(", ") if entry)}
        for text in (train, siblings, families)
    ]
    return _Family(name, distribution, distribution.replace("-", "_"), folder, scripts, *styles)


_MATPLOTLIB = ("matplotlib", "mpl-data/fonts/ttf")
_EUROPEAN: tuple[Script, ...] = ("latin", "greek", "cyrillic")
_FAMILIES = (
    _family(
        *("DejaVu Sans", *_MATPLOTLIB, "DejaVuSans{}.ttf"),
        train="Regular=, Bold=-Bold, Italic=-Oblique",
        siblings="Bold Italic=-BoldOblique",
        scripts=_EUROPEAN,
    ),
    _family(
        *("DejaVu Sans Mono", *_MATPLOTLIB, "DejaVuSansMono{}.ttf"),
        train="Regular=, Bold=-Bold",
        siblings="Bold Italic=-BoldOblique",
        scripts=_EUROPEAN,
    ),
    _family(
        *("DejaVu Serif", *_MATPLOTLIB, "DejaVuSerif{}.ttf"),
        train="Regular=, Bold=-Bold, Italic=-Italic",
        siblings="Bold Italic=-BoldItalic",
        scripts=_EUROPEAN,
    ),
    _family(
        *("STIX General", *_MATPLOTLIB, "STIXGeneral{}.ttf"),
        train="Regular=, Bold=Bol, Bold Italic=BolIta",
        siblings="Italic=Italic",
        scripts=_EUROPEAN,
    ),
    _family(  # its letters are those of ASCII only
        *("Computer Modern", *_MATPLOTLIB, "cm{}10.ttf"),
        train="Roman=r, Bold=b, Typewriter=tt",
        siblings="Italic=ti, Sans=ss",
    ),
    _family(
        *("PT Serif", "fontpkg-pt-serif", "files", "PT_Serif-Web-{}.ttf"),
        train="Regular=Regular, Bold=Bold, Italic=Italic",
        siblings="Bold Italic=BoldItalic",
        scripts=("latin", "cyrillic"),
    ),
    _family(
        *("Arvo", "fontpkg-arvo", "files", "Arvo-{}.ttf"),
        train="Regular=Regular, Bold=Bold",
        siblings="Italic=Italic",
    ),
    _family(
        *("Barlow Condensed", "fontpkg-barlow-condensed", "files", "BarlowCondensed-{}.ttf"),
        train="Regular=Regular, Semi Bold=SemiBold, Medium Italic=MediumItalic",
        siblings="Bold Italic=BoldItalic",
    ),
    _family(
        *("Kalam", "fontpkg-kalam", "files", "Kalam-{}.ttf"),
        train="Regular=Regular, Bold=Bold",
        siblings="Light=Light",
    ),
    _family(
        *("PT Sans", "fontpkg-pt-sans", "files", "PT_Sans-Web-{}.ttf"),
        families="Regular=Regular, Bold=Bold, Italic=Italic",
        scripts=("latin", "cyrillic"),
    ),
    _family(
        *("Crimson Text", "fontpkg-crimson-text", "files", "CrimsonText-{}.ttf"),
        families="Regular=Regular, Bold=Bold, Italic=Italic",
    ),
    _family(
        *("Space Mono", "fontpkg-space-mono", "files", "SpaceMono-{}.ttf"),
        families="Regular=Regular, Bold=Bold, Italic=Italic",
    ),
    _family(*("Delius", "fontpkg-delius", "files", "{}-Regular.ttf"), families="Regular=Delius"),
    _family(
        *("IPAex Gothic", "matplotlib-fontja", "fonts", "{}.ttf"),
        train="Regular=ipaexg",
        scripts=("japanese", "chinese"),
    ),
)


def is_east_asian(language: str) -> bool:
    """Tells whether `language` is written without spaces, in a font of its own."""
    return language in _EAST_ASIAN


def script_of(language: str) -> Script:
    """Returns the script that `language`, one of the texts' languages, is written in."""
    return _EAST_ASIAN.get(language, "latin")


@lru_cache(maxsize=64)
def typefaces(script: Script, split: Split | None = None) -> tuple[Typeface, ...]:
    """Lists the typefaces of a script, always in the same order.

    Args:
        script: the faces have its usual letters.
        split: "train", "siblings" or "families" (see `Typeface`); None = all.

    Raises:
        DataError: a package that ships some of them is not installed (a shorter list would make other pages of the
            same seed), or the script has no face in that split.
    """
    found = []
    for family in _FAMILIES:
        for of_split in ("train", "siblings", "families"):
            files: Mapping[str, str] = getattr(family, of_split)
            if script not in family.scripts or split not in (None, of_split) or not files:
                continue
            folder = _package_folder(family) / family.folder
            for style, file in files.items():
                found.append(Typeface(folder / file, family.name, style, family.scripts, of_split))
    if not found:
        raise DataError(
            f"there is no typeface of the script {script} among the {split}, because all that the installed packages "
            "ship are in training; use the typefaces of training"
        )
    return tuple(found)


def _package_folder(family: _Family) -> Path:
    spec = importlib.util.find_spec(family.module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the typeface {family.name} ships with the Python package {family.distribution}, which is not installed; "
            f"run `pip install {family.distribution}`"
        )
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=1024)
def _open(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=128)
def _characters(path: Path) -> frozenset[str]:
    """Returns the characters that the font file has a glyph for.

    Computer Modern puts glyphs of TeX's encoding under other characters (a dash under "{"), so a glyph whose name
    means another character does not count. Marks that stand above a letter do not either: the basic layout would not
    put them there.
    """
    from fontTools import agl
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        glyphs = font.getBestCmap() or {}
    characters = {chr(code): agl.toUnicode(name) for code, name in glyphs.items()}
    return frozenset(
        character
        for character, meant in characters.items()
        if not unicodedata.combining(character) and (not meant or _plain(meant) == _plain(character))
    )


def _plain(text: str) -> str:
    """Makes equal what looks equal, such as the Greek letter omega and the sign of the ohm."""
    return unicodedata.normalize("NFKC", text)
