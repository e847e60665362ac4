"""Cards of one to three large words, from which a small encoder learns to read within minutes."""

from __future__ import annotations

from megatron_ove.preprocess.text_render.looks import Look
from megatron_ove.preprocess.text_render.passages import draw_word_list
from megatron_ove.preprocess.text_render.typefaces import Split, typefaces
from megatron_ove.preprocess.text_render.word_pages import WordPages

CARD_SPLITS: dict[str, Split] = {"train": "train", "held_out": "train", "new_typefaces": "siblings"}
"""Folder of cards -> the typefaces they are written in. Held-out cards are others in the typefaces of training."""

# Words stand at multiples of two patches of 14 pixels: where a letter lies in a patch takes longest to learn to
# ignore, and there are minutes only.
_LOOK = Look(size=(16, 18), place_step=28)
_STRIP, _CARD, _MOST_WORDS = (112, 28), (112, 84), 3


def card_maker(split: str, num_words: int, seed: int) -> WordPages:
    """Returns the maker of a split's cards: strips of one word and cards of one to three; words are drawn evenly.

    Args:
        split: a key of `CARD_SPLITS`.
        num_words: of the vocabulary, the same for all splits and seeds.
        seed: of the demo's input.
    """
    return WordPages(
        words=draw_word_list("en", num_words),
        faces=typefaces("latin", CARD_SPLITS[split]),
        looks=(_LOOK,),
        shares=(1.0,),
        seed=1000 * seed + list(CARD_SPLITS).index(split),
        page_share=0.25,
        max_words=_MOST_WORDS,
        strip=_STRIP,
        page=_CARD,
    )
