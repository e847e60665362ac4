"""Line charts as inline SVG: no script, no font, no external resource; colours come from the page's CSS variables.

A noisy metric is drawn twice: thin as logged, bold smoothed. Axes carry few round numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210  # user units; the SVG scales with its column
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 14, 34
MAX_DOTS = 30  # so few points are also drawn one by one; a single one would not be seen otherwise
MAX_POINTS = 600  # a longer curve is thinned by averaging neighbours; more than about 2 points a unit cannot be seen


@dataclass(frozen=True)
class Marker:
    """A vertical line at a step, e.g. where the run was stopped and continued."""

    step: float
    label: str


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line at a value, e.g. what chance gives."""

    value: float
    label: str


def line_chart(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    title: str,
    unit: str = "",
    smooth: bool = True,
    from_zero: bool = False,
    markers: Sequence[Marker] = (),
    level: Level | None = None,
    color: str = "var(--series-1)",
) -> str:
    """Draws one metric over steps.

    Args:
        steps: ascending x values.
        values: finite y values, as many as steps.
        title: heading; also in the text alternative, with first and last value.
        unit: what the y axis counts.
        smooth: also draw an exponential mean over about 5 % of the points.
        from_zero: start the y axis at 0.
        markers: vertical lines.
        level: a horizontal line, which the axis reaches; also in the text alternative.
        color: any CSS colour.

    Returns:
        A <figure> element.
    """
    if not values:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="quiet">not logged</p></figure>'
    steps, values = thin(steps, values, MAX_POINTS)
    curve = smoothed(values, max(1.0, 0.05 * len(values))) if smooth else list(values)
    shown = [*values, level.value] if level else values
    ticks = round_ticks(0.0, max(shown) or 1.0, 4) if from_zero else round_ticks(min(shown), max(shown), 4)
    low, high = min(ticks[0], *shown), max(ticks[-1], *shown)
    first, last = steps[0], steps[-1]

    def x_of(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[float]) -> str:
        return "M" + "L".join(f"{x_of(s):.1f} {y_of(v):.1f}" for s, v in zip(steps, points, strict=True))

    parts = [_horizontal(y_of(tick), tick) for tick in ticks]
    inner = [tick for tick in round_ticks(first, last, 4) if first <= tick <= last and tick == int(tick)]
    parts += [_text(x_of(tick), HEIGHT - BOTTOM + 15, "middle", format_number(tick)) for tick in inner]
    parts += [_marker(x_of(m.step), m.label) for m in markers if first <= m.step <= last]
    if level:
        parts.append(_level(y_of(level.value), level))
    if smooth:
        parts.append(f'<path class="raw" style="stroke:{color}" d="{path(values)}"/>')
    parts.append(f'<path class="curve" style="stroke:{color}" d="{path(curve)}"/>')
    if len(values) <= MAX_DOTS:
        points = zip(steps, values, strict=True)
        parts += [f'<circle style="fill:{color}" cx="{x_of(s):.1f}" cy="{y_of(v):.1f}" r="2.5"/>' for s, v in points]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "end", "step"))
    span = f"steps {format_number(first)} to {format_number(last)}"
    alt = f"{title} over {span}: from {curve[0]:.3g} to {curve[-1]:.3g} {unit}".strip()
    if level:
        alt += f", {level.label} {level.value:.3g}"
    caption = escape(title) + (f' <span class="quiet">{escape(unit)}</span>' if unit else "")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{svg}</figure>'


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean over about `span` values, without the usual pull towards the first value."""
    keep = 1.0 - 1.0 / max(1.0, span)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + value, keep * weight + 1.0
        result.append(mean / weight)
    return result


def thin(steps: Sequence[float], values: Sequence[float], limit: int) -> tuple[list[float], list[float]]:
    """Averages runs of neighbours so that at most `limit` points remain."""
    size = math.ceil(len(values) / limit)
    starts = range(0, len(values), size)
    return (
        [sum(steps[i : i + size]) / len(steps[i : i + size]) for i in starts],
        [sum(values[i : i + size]) / len(values[i : i + size]) for i in starts],
    )


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` multiples of 1, 2, 2.5 or 5 times a power of ten that enclose [low, high]."""
    if high <= low:
        spread = abs(low) * 0.5 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def format_number(value: float) -> str:
    """Short form for axes and tables: 1200 -> 1,200; 0.00025 -> 2.5e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _horizontal(y: float, value: float) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 6, y + 4, "end", format_number(value))


def _marker(x: float, label: str) -> str:
    line = f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + _text(x + 4, TOP + 8, "start", label)


def _level(y: float, level: Level) -> str:
    line = f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(WIDTH - RIGHT, y - 4, "end", f"{level.label} {format_number(level.value)}")


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
