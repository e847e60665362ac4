"""The memory of a plan as a picture: one stacked bar for each pipeline stage, and the line it must stay under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ove.errors import ConfigError
from megatron_ove.planning.memory import COMPONENTS
from megatron_ove.planning.plan import Plan

_GIB = 2**30
# Okabe and Ito's colours, which colour-blind readers can tell apart, and grey.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#F0E442", "#999999", "#CC79A7")


def draw_plan(plan: Plan, path: Path) -> Path:
    """Writes the picture; its kind follows the file's ending (png, svg, pdf).

    Raises:
        ConfigError: the ending is of no kind of picture that can be drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 2.5 + 0.9 * len(plan.ranks)), 4.8), layout="constrained")
    if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise ConfigError(
            f"--picture {path} ends in '{path.suffix}', which is no kind of picture that can be drawn; use .png, .svg "
            "or .pdf"
        )
    axes = figure.subplots()
    places, below = range(len(plan.ranks)), [0.0] * len(plan.ranks)
    for name, colour in zip(COMPONENTS, _COLOURS, strict=True):
        heights = [one.memory.by_component()[name] / _GIB for one in plan.ranks]
        if any(heights):
            axes.bar(places, heights, bottom=below, width=0.6, color=colour, label=name.replace("_", " "))
            below = [base + height for base, height in zip(below, heights, strict=True)]
    _draw_limit(axes, plan, highest=max(below))
    axes.set_xticks(places, [f"stage {one.stage}\nrank {one.rank}" for one in plan.ranks])
    axes.set_xlim(-0.5, len(plan.ranks) - 0.5)
    axes.set_ylabel("memory, GiB")
    layout = plan.layout
    axes.set_title(
        f"{plan.config.name}: tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}", fontsize=10
    )
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_limit(axes: Any, plan: Plan, *, highest: float) -> None:
    """Draws the line of what is usable, or says where it would be if the bars were too small beside it."""
    usable = plan.device.usable / _GIB
    text = f"usable on {plan.device.name}: {usable:.0f} GiB"
    if highest < usable / 3:
        axes.set_ylim(0, 1.2 * highest)
        axes.text(-0.45, 1.18 * highest, f"{text} (above the picture)", fontsize=8, va="top")
        return
    axes.axhline(usable, color="black", linestyle="--", linewidth=1)
    axes.text(-0.45, usable, text, fontsize=8, va="bottom")
