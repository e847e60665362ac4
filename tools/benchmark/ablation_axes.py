"""Plot of the head ablation's axes: held-out figures over the batch size and over the number of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ablation_heads import VARIANTS
from ablation_report import matching, series_of, series_title
from ablation_runs import FIGURES, SAMPLES, Run, RunKey, by_seed
from ablation_statistics import interval

Panel = tuple[str, dict[int, RunKey]]
"""Title, and value on the axis -> series."""


def axes_path(plot: Path) -> Path:
    """Returns the file for this plot beside the one for differences."""
    return plot.with_stem(f"{plot.stem}_axes")


def panels_of(runs: Iterable[Run]) -> list[tuple[str, list[Panel]]]:
    """Returns the axes and the panels of each: series that differ in nothing but the value on the axis.

    Batch sizes are compared at an equal number of samples, numbers of classes at an equal length of training.
    """
    series = series_of(runs)
    return [
        ("batch size", _panels(series, _but_for_batch_size, lambda key: key.batch_size)),
        ("classes", _panels(series, lambda key: replace(key, classes=0), lambda key: key.classes)),
    ]


def _but_for_batch_size(key: RunKey) -> RunKey:
    return replace(key, batch_size=1, base_steps=key.samples)


def _panels(
    series: Sequence[RunKey], rest_of: Callable[[RunKey], RunKey], value_of: Callable[[RunKey], int]
) -> list[Panel]:
    alike: dict[RunKey, dict[int, RunKey]] = {}
    for one in series:
        alike.setdefault(rest_of(one), {})[value_of(one)] = one
    found = []
    for rest, members in alike.items():
        if len(members) > 1:
            title = series_title(rest) if rest.classes else rest.data
            length = f"{rest.samples:,} samples" if rest.batch_size == 1 else f"batch size {rest.batch_size}"
            found.append((f"{title}, {length}", dict(sorted(members.items()))))
    return found


def draw_axes(path: Path, runs: Sequence[Run]) -> None:
    """Draws a row a panel and a column a figure, one line a variant; nothing if no axis has two values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(axis, *panel) for axis, panels in panels_of(runs) for panel in panels]
    if not rows:
        return
    columns = len(FIGURES)
    figure, places = plt.subplots(
        len(rows), columns, figsize=(4.2 * columns, 3.6 * len(rows)), squeeze=False, layout="constrained"
    )
    for (axis, title, members), row in zip(rows, places, strict=True):
        for name, place in zip(FIGURES, row, strict=True):
            _draw_lines(place, members, runs, name)
            place.set(xscale="log", xlabel=axis, title=f"{name}, x 100")
            place.set_xticks(list(members), [f"{value:,}" for value in members], minor=False)
            place.minorticks_off()
            place.grid(alpha=0.3)
        row[0].set_ylabel(title, fontsize="small")
        row[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_lines(place: object, members: dict[int, RunKey], runs: Sequence[Run], figure: str) -> None:
    """Draws means and 95 % intervals over seeds of the variants that were run at two values at least."""
    for index, variant in enumerate(VARIANTS):
        found = {value: by_seed(matching(runs, series, SAMPLES, variant), figure) for value, series in members.items()}
        found = {value: interval(list(of_seeds.values())) for value, of_seeds in found.items() if of_seeds}
        if len(found) > 1:
            place.errorbar(
                list(found),
                [100 * one.mean for one in found.values()],
                yerr=[100 * one.half_width for one in found.values()],
                label=variant,
                color=f"C{index % 10}",
                marker="os^vD"[index // 10 % 5],
                markersize=4,
                capsize=3,
            )
