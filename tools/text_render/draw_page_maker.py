"""Draws the picture of docs/page_maker.md: what the page maker makes, with the boxes and glyph masks it knows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ove.preprocess.text_render.looks import LOOKS
from megatron_ove.preprocess.text_render.page import draw_style, render_page
from megatron_ove.preprocess.text_render.passages import draw_passage, draw_word_list
from megatron_ove.preprocess.text_render.picture import TextPicture
from megatron_ove.preprocess.text_render.typefaces import Split, script_of, typefaces
from megatron_ove.preprocess.text_render.word_pages import WordPages
from megatron_ove.preprocess.tool_arguments import run_tool, whole_number

_GAP = 6
_COLUMNS = 7
_SPLITS: tuple[Split, ...] = ("train", "siblings", "families")
_DESK = 205  # grey level between the pictures
_BOXES = {"lines": (30, 110, 220), "words": (220, 60, 40)}
_LANGUAGES = ("en", "zh-Hant")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--seed", type=whole_number(0), default=5, help="default: %(default)s")
    return parser


def _with_boxes(picture: TextPicture) -> np.ndarray:
    """Returns [height, width, 3]: the picture with the boxes of its lines and words."""
    shown = picture.picture.copy()
    height, width = shown.shape[:2]
    for name, colour in _BOXES.items():
        for piece in getattr(picture, name):
            left, top, right, bottom = piece.box  # drawn around the ink, so one pixel further out
            left, top = max(left - 1, 0), max(top - 1, 0)
            right, bottom = min(right, width - 1), min(bottom, height - 1)
            shown[[top, bottom], left : right + 1] = colour
            shown[top : bottom + 1, [left, right]] = colour
    return shown


def _glyph_colours(picture: TextPicture) -> np.ndarray:
    """Returns [height, width, 3]: every glyph's pixels in a colour of its own, as strong as its ink."""
    colours = np.random.default_rng(0).integers(0, 200, (len(picture.glyphs), 3))
    strength = picture.coverage[..., None] / 255
    return (255 + (colours[picture.glyph_map] - 255) * strength).astype(np.uint8)


def _row(pictures: list[np.ndarray]) -> np.ndarray:
    """Puts pictures side by side."""
    height = max(len(picture) for picture in pictures)
    padded = [np.pad(p, ((0, height - len(p)), (0, _GAP), (0, 0)), constant_values=_DESK) for p in pictures]
    return np.concatenate(padded, axis=1)


def _work(arguments: argparse.Namespace) -> None:
    words, seed = draw_word_list("en", 300), arguments.seed
    rows: list[np.ndarray] = []
    for number, look in enumerate(LOOKS.values()):
        strips = WordPages(words, typefaces("latin", "train"), (look,), (1.0,), seed + number, page_share=0.0)
        rows.append(_row([strips.make(index).picture.picture for index in range(_COLUMNS)]))
    for number, split in enumerate(_SPLITS, seed):
        pages = WordPages(words, typefaces("latin", split), (LOOKS["degraded"],), (1.0,), number, page_share=1.0)
        pictures = [pages.make(index).picture for index in range(_COLUMNS)]
        rows.append(_row([_with_boxes(p) if index % 2 else p.picture for index, p in enumerate(pictures)]))
    random, printed = np.random.default_rng(seed), []
    for number, language in enumerate(_LANGUAGES, seed):
        passage = draw_passage(language, random, num_characters=500)
        page = render_page(passage, draw_style(passage, random, width=272, height=260), seed=number)
        printed += [_with_boxes(page), _glyph_colours(page)] if language == "en" else [_with_boxes(page)]
    rows.append(_row(printed))
    for number, language in enumerate(("fr", "ja"), seed):
        passage = draw_passage(language, random, num_characters=100)
        faces = typefaces(script_of(language), "train")
        style = draw_style(passage, random, width=816, height=44, look=LOOKS["degraded"], faces=faces, has_title=False)
        rows.append(_row([render_page(passage, style, seed=number).picture]))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=_DESK) for row in rows]
    sheet = Image.fromarray(np.concatenate(padded))
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(arguments.output, optimize=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
