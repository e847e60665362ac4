"""Pictures of single words for the head ablation: few classes, few samples, and an encoder that has to learn to read.

Strips of 112 x 28 pixels, black on white, half of them in one typeface, size and place, half of them in any of the
faces with the word on a whole number of patches (looks `fixed` and `aligned`): what a small encoder reads soonest.
Training pictures use the faces of training, held-out ones unseen siblings of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_ove.preprocess.text_render.looks import LOOKS
from megatron_ove.preprocess.text_render.passages import draw_word_list
from megatron_ove.preprocess.text_render.typefaces import Split, typefaces
from megatron_ove.preprocess.text_render.word_pages import WordPages

WORDS_TRAIN, WORDS_HELD_OUT = 20_000, 1_000
_LANGUAGES = ("de", "en", "es", "fr", "it", "pt")
_WORDS_OF_A_LANGUAGE = 300
"""Of 3 to 8 letters; none of the texts has many more."""
_HELD_OUT_SEED = 2**31
"""Added to a set's seed, so that no held-out picture is drawn with the numbers of a training picture."""


def word_list(num_words: int, seed: int, *, others: bool = False) -> tuple[str, ...]:
    """Draws words evenly from those of six languages.

    Args:
        num_words: how many.
        seed: of the drawing.
        others: as many words that the list of this seed and length does not hold, to train an encoder beforehand.

    Raises:
        ValueError: there are fewer.
    """
    known = _known_words()
    first = num_words if others else 0
    if first + num_words > len(known):
        raise ValueError(
            f"{first + num_words} different words are needed, but the texts give {len(known)}; take fewer --classes"
        )
    return tuple(np.random.default_rng(seed).permutation(known)[first : first + num_words].tolist())


def word_pictures(words: tuple[str, ...], count: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Draws pictures of words, each word as likely as any other.

    Args:
        words: a word's class is its place.
        count: n.
        split: of the typefaces: "train", or "siblings" for held-out pictures.
        seed: of all pictures.

    Returns:
        [n, 28, 112] uint8 grey levels, [n] int64 classes.
    """
    looks = (LOOKS["fixed"], LOOKS["aligned"])
    recipe = WordPages(
        words=words,
        faces=typefaces("latin", split),
        looks=looks,
        shares=(1.0,) * len(looks),
        seed=seed + (0 if split == "train" else _HELD_OUT_SEED),
        page_share=0.0,
    )
    made = [recipe.make(index) for index in range(count)]
    # Black on white, so one channel says everything. Not through JPEG: at quality 90 it would only cost time.
    pixels = np.stack([one.picture.picture[..., 0] for one in made])
    return torch.from_numpy(pixels), torch.tensor([one.ids[0] for one in made])


@lru_cache(maxsize=1)
def _known_words() -> list[str]:
    """Returns the words that some face of every split used here can write, sorted."""
    words = {word for language in _LANGUAGES for word in draw_word_list(language, _WORDS_OF_A_LANGUAGE)}
    splits: tuple[Split, ...] = ("train", "siblings")
    faces = [typefaces("latin", split) for split in splits]
    return sorted(word for word in words if all(any(face.can_write(word) for face in split) for split in faces))
