"""How much the demo does: the full form, and the fast one for continuous integration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSizes:
    """Amounts of input, classes and steps. Sizes of patches and pictures follow config.yaml."""

    images: int = 300
    pages: int = 72
    clips: int = 48
    image_clusters: int = 64
    clip_clusters: int = 24
    vocabulary: int = 600
    steps: int = 300

    @property
    def stop_at(self) -> int:
        """Step at which the run is cut short."""
        return self.steps // 2


FULL = DemoSizes()
FAST = DemoSizes(images=160, pages=32, clips=24, image_clusters=40, clip_clusters=12, vocabulary=400, steps=120)
