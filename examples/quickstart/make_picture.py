"""Draws the picture of the top-level README from a finished demo run: cards read, a clip's patches, the falling losses.

python examples/quickstart/make_picture.py [RUN_DIR] [OUTPUT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image, ImageOps

from megatron_ove.report.curves import smoothed
from megatron_ove.report.metrics_log import LOSS_PREFIX, MetricsLog, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "image_clusters": "images: their nearest clusters",
    "page_words": "pages: their words",
    "clip_clusters": "clips: their nearest clusters",
}
COLORS = ("#1f6fb2", "#c2571a", "#14785a")


def main(run_dir: Path, output: Path) -> None:
    """Writes the picture."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    right = summary["retrieval"]["after"]["page_to_words"]["first_right"]
    figure = plt.figure(figsize=(12, 4.3), dpi=110)
    grid = figure.add_gridspec(1, 3, width_ratios=[0.72, 1.0, 1.05], left=0.01, right=0.985, top=0.88, bottom=0.12)
    grid.update(wspace=0.12)
    cards = _folded(Image.open(run_dir / "report/cards_held_out_after.png"))
    _show(figure.add_subplot(grid[0]), cards, f"Cards never seen: {right:.0%} of first words right")
    clip = Image.open(run_dir / "report/clip_sheet.jpg")
    _show(figure.add_subplot(grid[1]), clip, "A clip: only lit patches are used")
    _curves(figure.add_subplot(grid[2]), read_metrics(run_dir / "metrics.jsonl"))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    picture = Image.open(output).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)  # a third of the size, looks the same


def _folded(picture: Image.Image) -> Image.Image:
    """Returns a wide picture with its right half below its left half, and no white below either."""
    middle = picture.width // 2
    halves = [picture.crop((0, 0, middle, picture.height)), picture.crop((middle, 0, 2 * middle, picture.height))]
    heights = [ImageOps.invert(half.convert("L")).getbbox()[3] for half in halves]
    folded = Image.new("RGB", (middle, sum(heights)), "white")
    folded.paste(halves[0], (0, 0))
    folded.paste(halves[1].crop((0, 0, middle, heights[1])), (0, heights[0]))
    return folded


def _show(axes: Axes, picture: Image.Image, title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.axis("off")


def _curves(axes: Axes, log: MetricsLog) -> None:
    for name, color in zip(log.objectives, COLORS, strict=False):
        steps, values = log.series(LOSS_PREFIX + name)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, 5), color=color, linewidth=2, label=TITLES.get(name, name))
    axes.set_title("Loss of each head", fontsize=10.5, loc="left")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dde1e5", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    defaults = [ROOT / "runs/quickstart", ROOT / "docs/images/quickstart.png"]
    main(*(arguments + defaults[len(arguments) :]))
