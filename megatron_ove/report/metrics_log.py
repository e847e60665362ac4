"""Reads `metrics.jsonl`: one JSON object a line, each of a step.

Lines of one step are put together: figures on held-out data have one of their own. A run that was cut and continued may
have logged a step twice and may end in half a line: the later figure of a step wins, an unfinished last line is left
out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_ove.errors import DataError

LOSS_PREFIX = "loss/"
CHANCE_PREFIX = "chance_loss/"
HELD_OUT_PREFIX, HELD_OUT_CHANCE = "held_out/", "chance_"


@dataclass(frozen=True)
class LossChange:
    """Mean loss over the first and the last `window_steps` steps of an objective."""

    first_loss: float
    last_loss: float
    window_steps: int

    @property
    def fall(self) -> float:
        """Share of the first loss that is gone; negative when the loss rose, 0 when there was none to lose."""
        return 1.0 - self.last_loss / self.first_loss if self.first_loss else 0.0


@dataclass(frozen=True)
class MetricsLog:
    """Rows of a run, sorted by step, each step once."""

    rows: Sequence[Mapping[str, float]]

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives with a loss, in the order they were first logged."""
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith(LOSS_PREFIX))
        return [name.removeprefix(LOSS_PREFIX) for name in names]

    @property
    def held_out(self) -> dict[str, list[str]]:
        """Objective -> its figures on held-out data that have a chance value, both in the order they were logged."""
        found: dict[str, dict[str, None]] = {}
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith(HELD_OUT_PREFIX))
        for name in names:
            objective, _, figure = name.removeprefix(HELD_OUT_PREFIX).rpartition("/")
            if f"{HELD_OUT_PREFIX}{objective}/{HELD_OUT_CHANCE}{figure}" in names:
                found.setdefault(objective, {})[figure] = None
        return {objective: list(figures) for objective, figures in found.items()}

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Returns (steps, values) of a metric; steps without it, or where it is not finite, are left out."""
        points = [(row["step"], row[name]) for row in self.rows if name in row and row[name] is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def loss_change(self, objective: str, window_steps: int = 20) -> LossChange:
        """Returns the mean loss over the first and the last `window_steps` steps; half the run if that is shorter.

        A logged row is the mean over the steps since the row before, and counts with that many steps.

        Raises:
            DataError: when the objective logged no finite loss.
        """
        steps, values = self.series(LOSS_PREFIX + objective)
        if not values:
            raise DataError(f"no finite loss of objective '{objective}' was logged, so there is nothing to compare")
        counts = [after - before for before, after in pairwise([0.0, *steps])]
        window = max(1, min(window_steps, int(steps[-1]) // 2))
        first = [(value, count) for step, value, count in zip(steps, values, counts, strict=True) if step <= window]
        last = [
            (value, count)
            for step, value, count in zip(steps, values, counts, strict=True)
            if step > steps[-1] - window
        ]
        return LossChange(_weighted_mean(first or [(values[0], 1.0)]), _weighted_mean(last), window)


def read_metrics(path: str | Path) -> MetricsLog:
    """Reads a metrics file.

    Raises:
        DataError: when the file is missing, holds no step, or a line other than the last is not JSON.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"{file} does not exist, so there is nothing to report; give the folder of a run that has trained"
        )
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    by_step: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the run was cut while writing it
            raise DataError(
                f"{file} line {number} is not JSON ({error}); the file was edited or damaged, restore it"
            ) from error
        by_step.setdefault(int(row["step"]), {}).update(row)
    if not by_step:
        raise DataError(f"{file} holds no finished step, so there is nothing to report; train at least one step")
    return MetricsLog([by_step[step] for step in sorted(by_step)])


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
