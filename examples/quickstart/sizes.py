"""How much the demo does: the full form, the fast one for continuous integration, and a tiny one for its own test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSizes:
    """Amounts of input, classes and steps; sizes of patches and pictures are those of config.yaml.

    Attributes:
        cards: pictures of one to three words to train on; `read_cards` of them are labelled by OCR, the others by what
            they were made of.
        held_out_cards: in the typefaces of training, and as many in others.
        card_words: words that cards are made of.
        vocabulary: most words of a user's own pages.
    """

    images: int = 320
    held_out_images: int = 64
    cards: int = 4000
    read_cards: int = 96
    held_out_cards: int = 150
    card_words: int = 100
    clips: int = 60
    image_clusters: int = 64
    clip_clusters: int = 60
    vocabulary: int = 400
    steps: int = 160

    @property
    def stop_at(self) -> int:
        """Step at which the run is cut short."""
        return self.steps // 2

    @property
    def log_interval(self) -> int:
        """Steps between logged rows: about 60 rows, and whole ones within the 20 steps that are compared."""
        return max(1, self.steps // 60)

    def input_options(self) -> list[str]:
        """Returns the amounts as options of make_demo_input.py."""
        return [
            f"--images={self.images}",
            f"--held-out-images={self.held_out_images}",
            "--pages=0",
            "--held-out-pages=0",
            f"--cards={self.cards}",
            f"--held-out-cards={self.held_out_cards}",
            f"--card-words={self.card_words}",
            f"--clips={self.clips}",
        ]


SIZES = {
    "full": DemoSizes(),
    "fast": DemoSizes(
        images=160,
        held_out_images=32,
        cards=1500,
        read_cards=40,
        held_out_cards=80,
        clips=30,
        image_clusters=40,
        clip_clusters=30,
        vocabulary=300,
        steps=100,
    ),
    "tiny": DemoSizes(
        images=40,
        held_out_images=10,
        cards=60,
        read_cards=12,
        held_out_cards=16,
        card_words=30,
        clips=10,
        image_clusters=12,
        clip_clusters=10,
        vocabulary=150,
        steps=12,
    ),
}
