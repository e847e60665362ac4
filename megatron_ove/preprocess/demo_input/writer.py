"""Writes one demo file; what to draw follows from the file's path and the seed alone, so any process may draw it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ove.preprocess.demo_input.cards import CARD_SPLITS, card_maker
from megatron_ove.preprocess.demo_input.clips import draw_scene, write_clip
from megatron_ove.preprocess.demo_input.images import draw_variant
from megatron_ove.preprocess.photographs import photograph_names
from megatron_ove.preprocess.pictures import encode_jpeg
from megatron_ove.preprocess.text_render.page import draw_style, render_page
from megatron_ove.preprocess.text_render.passages import draw_passage, languages
from megatron_ove.whole_file import write_whole

SPLITS = ("train", "held_out")
_PAGE_CHARACTERS = 900  # more than any page holds


@dataclass(frozen=True)
class DemoSizes:
    """How much to make.

    Clips are one scene each, cut in two: frames for training, later frames held out. As many cards as are held out are
    made in typefaces that no other card has.
    """

    images: int = 320
    held_out_images: int = 64
    pages: int = 64
    held_out_pages: int = 24
    cards: int = 0
    held_out_cards: int = 0
    card_words: int = 100
    clips: int = 48
    page_width: int = 448
    page_height: int = 448
    clip_frames: int = 96
    held_out_clip_frames: int = 72
    seed: int = 0

    def as_record(self) -> dict[str, int]:
        return asdict(self)


def demo_files(root: Path, sizes: DemoSizes) -> list[Path]:
    """Returns the files to draw; a training clip stands for both cuts of its scene."""
    return list(_files(root, sizes))


def _files(root: Path, sizes: DemoSizes) -> Iterator[Path]:
    names, codes = photograph_names(), languages()
    counts = {"train": (sizes.images, sizes.pages), "held_out": (sizes.held_out_images, sizes.held_out_pages)}
    for split, (images, pages) in counts.items():
        for index in range(images):
            yield root / split / "images" / f"{names[index % len(names)]}_{index:04d}.jpg"
        for index in range(pages):
            yield root / split / "pages" / f"{codes[index % len(codes)]}_{index:04d}.jpg"
    for split in CARD_SPLITS:
        for index in range(sizes.cards if split == "train" else sizes.held_out_cards):
            yield root / split / "cards" / f"card_{index:05d}.jpg"
    for index in range(sizes.clips):
        yield root / "train" / "clips" / f"{names[index % len(names)]}_{index:04d}.mp4"


class DemoWriter:
    """Draws the file at a path of `demo_files`."""

    def __init__(self, root: Path, sizes: DemoSizes) -> None:
        self._root, self._sizes = root, sizes
        self._cards = {split: card_maker(split, sizes.card_words, sizes.seed) for split in CARD_SPLITS}

    def __call__(self, path: Path) -> dict[str, Any] | None:
        """Writes the file; returns the ground truth of a page or card, and None for others."""
        split, kind = path.parent.parent.name, path.parent.name
        name, index = path.stem.rsplit("_", 1)
        place = zlib.crc32(path.relative_to(self._root).as_posix().encode())
        random = np.random.default_rng([self._sizes.seed, place])
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "images":
            write_whole(path, encode_jpeg(draw_variant(name, random)))
            return None
        if kind == "pages":
            return self._write_page(path, split, name, random, place)
        if kind == "cards":
            return self._write_card(path, split, int(index))
        self._write_cuts(path, int(index), random)
        return None

    def _write_card(self, path: Path, split: str, index: int) -> dict[str, Any]:
        card = self._cards[split].make(index).picture
        write_whole(path, card.encode())
        return {
            "file": str(path.relative_to(self._root)),
            "split": split,
            "words": [{"text": word.text, "box": word.box} for word in card.words],
        }

    def _write_page(
        self, path: Path, split: str, language: str, random: np.random.Generator, seed: int
    ) -> dict[str, Any]:
        passage = draw_passage(language, random, num_characters=_PAGE_CHARACTERS)
        style = draw_style(passage, random, width=self._sizes.page_width, height=self._sizes.page_height)
        page = render_page(passage, style, seed=seed)
        write_whole(path, page.encode())
        return {
            "file": str(path.relative_to(self._root)),
            "split": split,
            "language": language,
            "lines": [{"text": line.text, "box": line.box} for line in page.lines],
            "words": [{"text": word.text, "box": word.box} for word in page.words],
        }

    def _write_cuts(self, path: Path, index: int, random: np.random.Generator) -> None:
        """Writes both cuts of a scene; training and held-out cuts of a scene have different codecs."""
        first = self._sizes.clip_frames
        frames = list(draw_scene(index, random, num_frames=first + self._sizes.held_out_clip_frames))
        other = self._root / "held_out" / "clips" / path.name
        other.parent.mkdir(parents=True, exist_ok=True)
        x264_first = index % 2 == 0
        for target, cut, codec in (
            (path, frames[:first], "libx264" if x264_first else "libx265"),
            (other, frames[first:], "libx265" if x264_first else "libx264"),
        ):
            partial = target.with_name(target.name + ".tmp")
            write_clip(partial, cut, codec)  # type: ignore[arg-type]
            partial.replace(target)


def write_truth(root: Path, pages: list[dict[str, Any]]) -> None:
    """Writes page_truth.jsonl: the lines of every page, and the words of every page and card, with their boxes."""
    write_whole(root / "page_truth.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pages).encode())
