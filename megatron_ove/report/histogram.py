"""Histograms as inline SVG, like the charts of `curves.py`: no script, no external resource."""

from __future__ import annotations

from html import escape

from megatron_ove.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, format_number, round_ticks
from megatron_ove.report.set_statistics import Bar, Distribution

_GAP = 1.5
_MOST_NAMED = 8
"""Values that are written below bars of one value each; there is no room for more."""


def draw_histogram(distribution: Distribution) -> str:
    """Returns a <figure> element; each bar says its count to the pointer, and the least and greatest to readers."""
    bars = distribution.bars
    ticks = [tick for tick in round_ticks(0, max(bar.count for bar in bars), 4) if tick == int(tick)]
    base, step = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / len(bars)
    scale = (base - TOP) / ticks[-1]
    parts = []
    for tick in ticks:
        y = base - tick * scale
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, "end", format_number(tick)))
    for i, bar in enumerate(bars):
        height = max(bar.count * scale, 0.8 if bar.count else 0)  # one of a million is still there
        parts.append(
            f'<rect class="bar" x="{LEFT + i * step + _GAP / 2:.1f}" y="{base - height:.1f}" '
            f'width="{max(step - _GAP, 0.5):.1f}" height="{height:.1f}"><title>'
            f"{escape(_named(distribution, i))}: {bar.count:,}</title></rect>"
        )
    for i, anchor in _labels(bars):
        edge = {"start": LEFT + i * step, "middle": LEFT + (i + 0.5) * step, "end": LEFT + (i + 1) * step}[anchor]
        value = bars[i].high if anchor == "end" else bars[i].low
        more = " and more" if anchor == "end" and distribution.is_open else ""
        parts.append(_text(edge, base + 15, anchor, format_number(value) + more))
    span = f"{format_number(distribution.minimum)} to {format_number(distribution.maximum)}"
    alt = f"Histogram of {distribution.name}: {span}, median {format_number(distribution.median)}"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT - 12}" role="img" aria-label="{escape(alt)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{escape(distribution.name)}</figcaption>{svg}</figure>'


def _labels(bars: tuple[Bar, ...]) -> list[tuple[int, str]]:
    """Returns (bar, side) of what is written below: each value where they are few, else both ends and the middle."""
    last = len(bars) - 1
    if last < _MOST_NAMED and all(bar.low == bar.high for bar in bars):
        return [(i, "middle") for i in range(last + 1)]
    return [(0, "start"), *([((last + 1) // 2, "start")] if last > 1 else []), (last, "end")]


def _named(distribution: Distribution, place: int) -> str:
    bar = distribution.bars[place]
    low, high = format_number(bar.low), format_number(bar.high)
    if distribution.is_open and place == len(distribution.bars) - 1:
        return f"{low} and more"
    return low if low == high else f"{low} to {high}"


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
