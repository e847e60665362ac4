"""Where the time of a step goes: shares stacked over the run, and a table of seconds by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from megatron_ove.report.blocks import draw_table
from megatron_ove.report.curves import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, format_number, round_ticks, thin
from megatron_ove.report.metrics_log import MetricsLog

WIDTH = 720
SECONDS, SLOWEST = "phase_s/", "phase_s_max/"


def time_use(log: MetricsLog) -> str:
    """Returns the section, "" for a run that did not log it."""
    phases = [
        name.removeprefix(SECONDS)
        for name in dict.fromkeys(key for row in log.rows for key in row)
        if name.startswith(SECONDS)
    ]
    rows = [row for row in log.rows if all(SECONDS + phase in row for phase in phases)]
    if not phases:
        return ""
    shares: dict[str, Sequence[float]] = {}
    steps: Sequence[float] = []
    totals = [sum(row[SECONDS + phase] for phase in phases) for row in rows]
    for phase in phases:
        values = [row[SECONDS + phase] / total for row, total in zip(rows, totals, strict=True)]
        steps, shares[phase] = thin([row["step"] for row in rows], values, MAX_POINTS)
    return (
        '<section><h2>Where the time goes</h2><div class="charts">'
        f"{stacked_shares(steps, shares, title='Share of step time')}</div>{_table(log, phases)}"
        '<p class="quiet">Mean over ranks. Communication includes waiting for other ranks and for pipeline stages.'
        "</p></section>"
    )


def stacked_shares(steps: Sequence[float], shares: Mapping[str, Sequence[float]], *, title: str) -> str:
    """Draws areas that add up to 100 %.

    Args:
        steps: ascending x values.
        shares: name -> value at each step, drawn from the bottom; together 1 at each step.
        title: heading; also in the text alternative, with the mean of each share.

    Returns:
        A <figure> element with its legend.
    """
    first, last = steps[0], steps[-1]
    if len(steps) == 1:  # one row is a bar
        steps, last = [first, first + 1], first + 1
        shares = {name: [values[0]] * 2 for name, values in shares.items()}

    def x_of(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y_of(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts, legend, below = [], [], [0.0] * len(steps)
    for number, (name, values) in enumerate(shares.items(), start=1):
        above = [base + value for base, value in zip(below, values, strict=True)]
        outline = [*zip(steps, above, strict=True), *zip(reversed(steps), reversed(below), strict=True)]
        path = "M" + "L".join(f"{x_of(step):.1f} {y_of(share):.1f}" for step, share in outline) + "Z"
        parts.append(f'<path style="fill:var(--series-{number})" d="{path}"/>')
        legend.append(f'<span><i style="background:var(--series-{number})"></i>{escape(name)}</span>')
        below = above
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for tick in round_ticks(first, last, 6):
        if first <= tick <= last and tick == int(tick):
            place = f'x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 15}"'
            parts.append(f'<text {place} text-anchor="middle">{format_number(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    means = ", ".join(f"{name} {100 * sum(values) / len(values):.0f} %" for name, values in shares.items())
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {means}")}">'
        f"{''.join(parts)}</svg>"
    )
    return (
        f'<figure class="chart whole"><figcaption>{escape(title)}</figcaption>{svg}'
        f'<p class="legend">{"".join(legend)}</p></figure>'
    )


def _table(log: MetricsLog, phases: Sequence[str]) -> str:
    seconds = {phase: _mean(log, SECONDS + phase) for phase in phases}
    slowest = {phase: _mean(log, SLOWEST + phase) for phase in phases}
    step_time = sum(value for value in seconds.values() if value is not None)
    has_ranks = any(value is not None for value in slowest.values())
    rows = []
    for phase in phases:
        value = seconds[phase] or 0.0
        row = [phase, f"{1000 * value:.1f}", f"{100 * value / step_time:.1f} %"]
        rows.append(row + [f"{1000 * (slowest[phase] or 0.0):.1f}"] * has_ranks)
    rows.append(["whole step", f"{1000 * step_time:.1f}", "100 %", *[""] * has_ranks])
    header = ["phase", "ms a step", "share", *["ms a step, slowest rank"] * has_ranks]
    return draw_table(header, rows)


def _mean(log: MetricsLog, name: str) -> float | None:
    """Returns the mean over steps; a logged row counts with the steps since the row before."""
    steps, values = log.series(name)
    counts = [after - before for before, after in pairwise([0.0, *steps])]
    return sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts) if values else None
