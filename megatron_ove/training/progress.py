"""What a person sees while a run goes: a live line on a terminal, one plain line per report elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)

_SHOWN_PHASES = {
    **{"fwd": "forward", "bwd": "backward", "head": "head", "opt": "optimizer", "comm": "communication"},
    "other": "other",
}
_HELD_OUT_FIGURES = {"mean_average_precision": "mAP", "first_right": "first right", "recall_at_10": "recall at 10"}
_PLAIN_FIGURES = {"loss": "loss", "character_error_rate": "character errors", "exact": "exact", "cosine": "cosine"}
"""Figures of objectives that chance is not compared with."""


class ProgressDisplay:
    """Shows steps, loss per objective, throughput, gradient norm, and where the time of a step goes.

    On a terminal: a bar with the times, and below it the figures, which wrap where the terminal is narrow.
    """

    def __init__(self, *, num_steps: int, start_step: int, console: Console | None = None) -> None:
        """
        Args:
            num_steps: length of the run.
            start_step: steps done before this launch.
            console: where to draw; standard error by default.
        """
        console = console or Console(file=sys.stderr)
        self._num_steps = num_steps
        self._live: Live | None = None
        if console.is_terminal:
            times = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=40), *times)
            self._task = self._bar.add_task("train", total=num_steps, completed=start_step)
            self._figures, self._held_out = Text("first step ..."), Text()
            self._live = Live(Group(self._bar, self._figures, self._held_out), console=console, refresh_per_second=4)
            self._live.start()

    def step_done(self, step: int) -> None:
        """Moves the bar; `step` is the number of steps done."""
        if self._live is not None:
            self._bar.update(self._task, completed=step)

    def report(self, row: Mapping[str, float]) -> None:
        """Shows a row of figures. On a terminal the line goes to the log file only."""
        figures = describe_row(row)
        if self._live is not None:
            self._figures.plain = figures
        level = logging.DEBUG if self._live is not None else logging.INFO
        logger.log(level, "step %d/%d  %s", int(row["step"]), self._num_steps, figures)

    def report_held_out(self, row: Mapping[str, float]) -> None:
        """Shows a row of figures on held-out data. On a terminal they stay below the others until the next ones."""
        figures = describe_held_out(row)
        if self._live is not None:
            self._held_out.plain = f"step {int(row['step'])}: {figures}"
        level = logging.DEBUG if self._live is not None else logging.INFO
        logger.log(level, "step %d/%d  %s", int(row["step"]), self._num_steps, figures)

    def close(self) -> None:
        """Leaves the last figures standing and gives the terminal back."""
        if self._live is not None:
            self._live.stop()


def describe_held_out(row: Mapping[str, float]) -> str:
    """Returns one line with the figures on held-out data of each objective, those of chance in brackets."""
    parts = []
    for place in (name.removesuffix("/samples") for name in row if name.endswith("/samples")):
        figures = [
            f"{text} {row[f'{place}/{name}']:.3f} ({row[f'{place}/chance_{name}']:.2g})"
            for name, text in _HELD_OUT_FIGURES.items()
            if f"{place}/{name}" in row
        ]
        figures += [
            f"{text} {row[f'{place}/{name}']:.3f}" for name, text in _PLAIN_FIGURES.items() if f"{place}/{name}" in row
        ]
        counts = f"{int(row[f'{place}/samples'])} samples"
        if row[f"{place}/bad_samples"]:
            counts += f", {int(row[f'{place}/bad_samples'])} unreadable"
        parts.append(", ".join([f"{place.removeprefix('held_out/')} {', '.join(figures)}".strip(), counts]))
    return f"held out (chance in brackets): {'; '.join(parts)}; {row['held_out_s']:.1f} s"


def describe_row(row: Mapping[str, float]) -> str:
    """Returns one line with the figures of a report that are there."""
    parts = []
    if "loss" in row:
        losses = [f"{name.removeprefix('loss/')} {row[name]:.3f}" for name in row if name.startswith("loss/")]
        parts.append(f"loss {row['loss']:.4f}" + (f" ({', '.join(losses)})" if losses else ""))
    formats = (
        ("grad_norm", "grad norm {:.3g}"),
        ("lr", "lr {:.2e}"),
        ("samples_per_s", "{:.1f} samples/s"),
        ("tokens_per_s", "{:.0f} tokens/s"),
    )
    parts += [text.format(row[name]) for name, text in formats if name in row]
    if "data_wait_share" in row:
        parts.append(f"data wait {100 * row['data_wait_share']:.0f} %")
    if "phase_share/forward" in row:
        shares = "/".join(f"{100 * row[f'phase_share/{phase}']:.0f}" for phase in _SHOWN_PHASES.values())
        parts.append(f"{'/'.join(_SHOWN_PHASES)} {shares} %")
    if row.get("refused_steps"):
        parts.append(f"refused steps {int(row['refused_steps'])}")
    if row.get("bad_samples"):
        parts.append(f"unreadable samples {int(row['bad_samples'])}")
    return "  ".join(parts)
