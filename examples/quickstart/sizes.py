"""How much the demo does: the full form, the fast one for continuous integration, and a tiny one for its own test."""

from __future__ import annotations

from dataclasses import dataclass

PAGE_SIDE = 320
"""Pixels; within 256 patches a page is seen at 224, where its letters are still about a patch high."""


@dataclass(frozen=True)
class DemoSizes:
    """Amounts of input, classes and steps; sizes of patches and pictures are those of config.yaml."""

    images: int = 320
    held_out_images: int = 64
    pages: int = 96
    held_out_pages: int = 24
    clips: int = 60
    image_clusters: int = 64
    clip_clusters: int = 60
    vocabulary: int = 400
    steps: int = 260

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
            f"--pages={self.pages}",
            f"--held-out-pages={self.held_out_pages}",
            f"--page-width={PAGE_SIDE}",
            f"--page-height={PAGE_SIDE}",
            f"--clips={self.clips}",
        ]


SIZES = {
    "full": DemoSizes(),
    "fast": DemoSizes(
        images=160,
        held_out_images=32,
        pages=40,
        held_out_pages=12,
        clips=30,
        image_clusters=40,
        clip_clusters=30,
        vocabulary=300,
        steps=100,
    ),
    "tiny": DemoSizes(
        images=40,
        held_out_images=10,
        pages=10,
        held_out_pages=4,
        clips=10,
        image_clusters=12,
        clip_clusters=10,
        vocabulary=150,
        steps=12,
    ),
}
