"""Sets of pictures of single words: strips with one word, and pages with several in places of their own.

Words are drawn evenly from a list, so a word's frequency gives nothing away: only reading finds it.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.text_render.canvas import Box, Canvas
from megatron_ove.preprocess.text_render.ink import TextInk, draw_ink
from megatron_ove.preprocess.text_render.looks import Look, draw_share
from megatron_ove.preprocess.text_render.picture import TextPicture, finish_picture
from megatron_ove.preprocess.text_render.picture_document import document_of_picture
from megatron_ove.preprocess.text_render.typefaces import Typeface

_SMALLEST_SIZE = 6  # pixels; below, letters cannot be told apart
_NUM_PLACES = 20  # tried for a word before it is left out of a page
_GAP = 2  # pixels between two words
_CHUNK = 64  # pictures that a process makes at a time


@dataclass(frozen=True)
class WordPicture:
    """A picture and the ids of `picture.words`, in the same order."""

    picture: TextPicture
    ids: tuple[int, ...]


@dataclass(frozen=True)
class WordPages:
    """A set of pictures of words; picture i is a pure function of these values and i.

    Attributes:
        words: the list; a word's id is its place.
        faces: typefaces to draw from; every word needs one that can write it.
        looks: looks to draw from.
        shares: of the looks, in their order; they need not add up to 1.
        seed: of the set.
        page_share: share of pages among the pictures; the others are strips with one word.
        max_words: a page has 1 to so many words, each number as often.
        strip, page: (width, height) in pixels.
    """

    words: tuple[str, ...]
    faces: tuple[Typeface, ...]
    looks: tuple[Look, ...]
    shares: tuple[float, ...]
    seed: int
    page_share: float = 0.25
    max_words: int = 6
    strip: tuple[int, int] = (112, 28)
    page: tuple[int, int] = (112, 112)

    def __post_init__(self) -> None:
        lost = [word for word in self.words if not word.strip() or not any(f.can_write(word) for f in self.faces)]
        if lost:
            raise DataError(
                f"{len(lost)} of the {len(self.words)} words cannot be written by any of the {len(self.faces)} "
                f"typefaces, e.g. '{lost[0]}'; take them out of the list or take other typefaces"
            )
        if not self.words or len(self.shares) != len(self.looks) or min(self.shares, default=0) <= 0:
            raise DataError(
                f"{len(self.words)} words, {len(self.looks)} looks and the shares {list(self.shares)} make no set; "
                "give at least one word, and a share above 0 for every look"
            )

    def make(self, index: int) -> WordPicture:
        """Draws picture `index`.

        Raises:
            DataError: a word does not fit even when written smallest.
        """
        random = np.random.default_rng((self.seed, index))
        look = self.looks[draw_share(self.shares, random)]
        is_page = random.random() < self.page_share
        num_words = min(int(random.integers(1, self.max_words + 1)), len(self.words)) if is_page else 1
        canvas = Canvas(*(self.page if is_page else self.strip))
        drawn = random.choice(len(self.words), num_words, replace=False)
        ids = [int(word) for word in drawn if self._place(canvas, self.words[word], look, random)]
        return WordPicture(finish_picture(canvas, look, random), tuple(ids))

    def _place(self, canvas: Canvas, word: str, look: Look, random: np.random.Generator) -> bool:
        """Writes a word where it touches no other; returns whether a place was found. An empty canvas has one."""
        face = self._draw_face(word, look, random)
        ink = _fitting_ink(word, face, int(random.integers(look.size[0], look.size[1] + 1)), canvas)
        width, height = ink.size
        for _ in range(_NUM_PLACES):
            left = _draw_step(random, look.place_step, canvas.width - width)
            top = _draw_step(random, look.place_step, canvas.height - height)
            box = (left - _GAP, top - _GAP, left + width + _GAP, top + height + _GAP)
            if not any(_overlap(box, other.box) for other in canvas.words):
                first = canvas.add(ink, left, top)
                canvas.mark_word(word, first, len(canvas.glyphs))
                canvas.mark_line(word, first, len(canvas.glyphs))
                return True
        return False

    def _draw_face(self, word: str, look: Look, random: np.random.Generator) -> Typeface:
        if look.first_typeface:
            return next(face for face in self.faces if face.can_write(word))
        while True:  # at least one can, see __post_init__
            face = self.faces[int(random.integers(len(self.faces)))]
            if face.can_write(word):
                return face


def _fitting_ink(word: str, face: Typeface, size: int, canvas: Canvas) -> TextInk:
    """Draws a word at `size`, or at the largest smaller size at which it fits: long words in wide faces get smaller."""
    for smaller in range(size, min(size, _SMALLEST_SIZE) - 1, -1):
        ink = draw_ink(word, face, smaller)
        if canvas.fits(ink, 0, 0):
            return ink
    raise DataError(
        f"the word '{word}' in {face.family} {face.style} does not fit a picture of {canvas.width} x {canvas.height} "
        f"pixels even at a size of {_SMALLEST_SIZE}; make the picture larger or take the word out"
    )


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _draw_step(random: np.random.Generator, step: int, room: int) -> int:
    """Returns a multiple of `step` up to `room`; 0 for step 0."""
    return step * int(random.integers(0, room // step + 1)) if step else 0


@dataclass(frozen=True)
class WordSample:
    """A picture of words as it is stored.

    Attributes:
        picture: JPEG.
        ids: of its words.
        document: what it says and where, the `json` member of a document; text in the order of the words.
    """

    picture: bytes
    ids: tuple[int, ...]
    document: bytes


def word_samples(recipe: WordPages, count: int, *, workers: int) -> Iterator[WordSample]:
    """Yields pictures 0 .. count - 1; the same for any number of `workers`.

    Raises:
        DataError: a word does not fit, or a worker process died.
    """
    make = functools.partial(_make_sample, recipe)
    workers = min(workers, -(-count // _CHUNK))
    if workers == 1:
        yield from map(make, range(count))
        return
    # Fresh interpreters, as in file_runs.py.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(make, range(count), chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died, most likely for lack of memory; {workers} were running: start again with "
                "fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not wanted


def _make_sample(recipe: WordPages, index: int) -> WordSample:
    made = recipe.make(index)
    return WordSample(made.picture.encode(), made.ids, document_of_picture(made.picture).encode())
