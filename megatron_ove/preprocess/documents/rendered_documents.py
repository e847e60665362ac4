"""Pages that the page maker draws -> documents that know where each line, word and character stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ove.preprocess.documents.preparing import PreparedDocument
from megatron_ove.preprocess.text_render.looks import LOOKS, PRINTED, Look, draw_share
from megatron_ove.preprocess.text_render.page import draw_style, render_page
from megatron_ove.preprocess.text_render.passages import draw_passage, load_text
from megatron_ove.preprocess.text_render.picture import TextPicture
from megatron_ove.preprocess.text_render.picture_document import document_of_picture
from megatron_ove.preprocess.text_render.typefaces import Split, script_of, typefaces
from megatron_ove.shards.format import DOCUMENT_MEMBER, page_member

PAGE_LOOKS = {"printed": PRINTED, **LOOKS}
"""Looks of pages of running text by name; of scattered words only the places differ, which pages have of their own."""
_TITLE_SHARE = 0.7
_FULLNESS = (0.3, 1.3)
"""Of the text that would fill a page: some pages are nearly empty, and in some the passage does not end."""
_EM_AREA = 0.75
"""Least area that a character takes, lines apart, in squares of the font's size."""


@dataclass(frozen=True)
class PageNumber:
    """Which page of a set; goes to the workers."""

    number: int

    @property
    def key(self) -> str:
        return f"page{self.number:08d}"

    def __str__(self) -> str:
        return f"page {self.number}"


@dataclass(frozen=True)
class RenderedPages:
    """A set of pages of running text; page i is a pure function of these values and i.

    Attributes:
        languages: of the texts, each as often.
        looks: names among `PAGE_LOOKS`, to draw from.
        shares: of the looks, in their order; they need not add up to 1.
        size: (width, height) of the pages in pixels.
        split: which typefaces.
        seed: of the set.
    """

    languages: tuple[str, ...]
    looks: tuple[str, ...]
    shares: tuple[float, ...]
    size: tuple[int, int]
    split: Split
    seed: int

    def check(self) -> None:
        """Raises `DataError` if a language has no text or no typefaces in the split."""
        for language in self.languages:
            load_text(language)
            typefaces(script_of(language), self.split)

    def make(self, number: int) -> TextPicture:
        """Draws page `number`.

        Raises:
            DataError: not even a word fits.
        """
        random = np.random.default_rng((self.seed, number))
        language = self.languages[int(random.integers(len(self.languages)))]
        look = PAGE_LOOKS[self.looks[draw_share(self.shares, random)]]
        num_characters = self._room(look) * random.uniform(*_FULLNESS)
        passage = draw_passage(language, random, num_characters=max(1, int(num_characters)))
        style = draw_style(
            passage,
            random,
            width=self.size[0],
            height=self.size[1],
            look=look,
            faces=typefaces(script_of(language), self.split),
            has_title=bool(random.random() < _TITLE_SHARE),
        )
        return render_page(passage, style, seed=int(random.integers(1 << 31)))

    def _room(self, look: Look) -> float:
        """Returns how many characters a page of the smallest text has at most, about."""
        return self.size[0] * self.size[1] / (_EM_AREA * look.size[0] ** 2)

    def __call__(self, item: PageNumber) -> PreparedDocument:
        """Makes the members of a page; see `make`."""
        picture = self.make(item.number)
        members = {DOCUMENT_MEMBER: document_of_picture(picture).encode(), page_member(0): picture.encode()}
        return PreparedDocument(members)

    def worker(self) -> RenderedPages:
        """Returns what workers call, which is this itself: it is small and can be sent."""
        return self
