"""Table and plot of the head ablation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ablation_heads import DEFAULT, PUBLISHED, VARIANTS, settings_of
from ablation_runs import FIGURES, SAMPLES, TIME, Run, RunKey, by_seed, median_seconds
from ablation_statistics import Interval, interval, paired_difference

_INTRODUCTION = """# Which class-center head teaches most

Small encoders (a perceptron with two hidden layers of 512, embeddings of 128) are trained under each head on one CPU
core and measured on held-out samples. `published` is the published method in plain torch
(`tools/benchmark/published_head.py`): 8 sets of 10 % of the classes, a sample's other labels as negatives, logit 0 from
the filter, a dense gradient of the sum over labels clipped at 5, dense AdamW. All others are this package's head; a row
says what it changes in the defaults.

- **top-1**: the nearest training sample has the query's true class (digits: shows the same digit).
- **neighbours**: one of the 10 nearest has it (digits: the share of the 10 that shows the same digit).
- **recall**: the share of the query's 10 nearest classes that are among the 10 nearest centers.

All figures x 100, after ± the 95 % t-interval over seeds. In brackets the *paired* difference to `published` (same
data, batches, labels and initial encoder) and its interval; **bold** = better by more than the interval, *italic* =
worse by more than it.

Data: `synthetic` = a mixture of clusters seen through a fixed non-linear map; `photos` = 12 x 12 patches of the
photographs in scikit-image and scikit-learn, classes = k-means clusters, truth = the nearest; `digits` = the 1,797
images of scikit-learn's `load_digits`, classes = k-means clusters, truth = the digit. Of real images the encoder sees a
random half of the pixels.
"""

_TIME_NOTE = """
Every variant is trained from the start, with a whole learning-rate schedule, for as many steps as it does in the
seconds that the default needs for its steps at equal samples (CPU time of one thread, without measurements; medians
over seeds). The encoder here is tiny, so the head is nearly all of a step; under a real encoder times are closer
together, and the tables at equal samples are the ones to read.
"""

Series = tuple[str, int, int, int]


def write_markdown(path: Path, runs: Sequence[Run], plot: Path | None) -> None:
    """Writes one table per data set and budget."""
    parts = [_INTRODUCTION]
    if plot is not None:
        parts.append(f"![Differences to the published method, and curves]({plot.name})\n")
    for series in series_of(runs):
        parts.append(_table(series, runs, SAMPLES))
    timed = series_of(run for run in runs if run.key.budget == TIME)
    if timed:
        parts.append("# At equal time\n" + _TIME_NOTE)
    parts += [_table(series, runs, TIME) for series in timed]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def series_of(runs: Iterable[Run]) -> list[Series]:
    """Returns what was trained on and for how long, in order of first appearance."""
    return list(dict.fromkeys(_series(run.key) for run in runs))


def _series(key: RunKey) -> Series:
    return key.data, key.classes, key.base_steps, key.batch_size


def _matching(runs: Iterable[Run], series: Series, budget: str, variant: str) -> list[Run]:
    """The runs with a variant's settings; none if it is by another name the default.

    At equal time the default's runs are those at equal samples.
    """
    settings = settings_of(variant, series[1])
    if variant == DEFAULT:
        budget = SAMPLES
    elif settings == settings_of(DEFAULT, series[1]):
        return []
    return [run for run in runs if (_series(run.key), run.key.budget, run.settings) == (series, budget, settings)]


def _table(series: Series, runs: Sequence[Run], budget: str) -> str:
    data, classes, steps, batch_size = series
    length = (
        f"{steps:,} steps of {batch_size} samples" if budget == SAMPLES else f"the default's time for {steps:,} steps"
    )
    lines = [
        f"## {data}, {classes:,} classes, {length}\n",
        "| variant | changes in the defaults | top-1 | neighbours | recall | ms / step | steps | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baseline = _matching(runs, series, budget, PUBLISHED)
    for name, variant in VARIANTS.items():
        chosen = _matching(runs, series, budget, name)
        if chosen:
            changes = ", ".join(f"`{key}: {value}`" for key, value in {**variant.head, **variant.optim}.items())
            cells = [_cell(chosen, baseline, figure) for figure in FIGURES]
            pace = 1000 * median_seconds(chosen) / chosen[0].steps
            row = [f"`{name}`", changes or variant.title, *cells, f"{pace:.0f}", f"{chosen[0].steps:,}", len(chosen)]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[Run], baseline: Sequence[Run], figure: str) -> str:
    values, other = by_seed(runs, figure), by_seed(baseline, figure)
    text = _format(interval(list(values.values())))
    if not values.keys() & other.keys() or values == other:
        return text
    difference = paired_difference(values, other)
    mark = {"better": "**", "worse": "*", "equal": ""}[difference.verdict]
    return f"{text} ({mark}{_format(difference, sign='+')}{mark})"


def _format(value: Interval, sign: str = "") -> str:
    width = "" if math.isnan(value.half_width) else f" ± {100 * value.half_width:.2f}"
    return f"{100 * value.mean:{sign}.2f}{width}"


def draw_plot(path: Path, runs: Sequence[Run]) -> None:
    """Draws, per data set, paired differences to the published method, and recall against samples and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_series = series_of(runs)
    columns = len(FIGURES) + 1
    figure, axes = plt.subplots(
        len(all_series), columns, figsize=(4.2 * columns, 4.2 * len(all_series)), squeeze=False, layout="constrained"
    )
    for row, series in zip(axes, all_series, strict=True):
        for name, axis in zip(FIGURES, row, strict=False):
            _draw_differences(axis, series, runs, name)
        row[0].set_ylabel(f"{series[0]}, {series[1]:,} classes")
        row[0].set_yticklabels(_names(series, runs))
        _draw_curves(row[-1], series, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _names(series: Series, runs: Sequence[Run]) -> list[str]:
    return [name for name in VARIANTS if name != PUBLISHED and _matching(runs, series, SAMPLES, name)]


def _draw_differences(axis: object, series: Series, runs: Sequence[Run], figure: str) -> None:
    baseline = by_seed(_matching(runs, series, SAMPLES, PUBLISHED), figure)
    names = _names(series, runs)
    for place, name in enumerate(names):
        difference = paired_difference(by_seed(_matching(runs, series, SAMPLES, name), figure), baseline)
        color = {"better": "tab:green", "worse": "tab:red", "equal": "tab:gray"}[difference.verdict]
        axis.errorbar(100 * difference.mean, place, xerr=100 * difference.half_width, fmt="o", color=color, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(
        yticks=range(len(names)), yticklabels=[], title=f"{figure} - published, x 100", ylim=(len(names) - 0.5, -0.5)
    )
    axis.grid(axis="x", alpha=0.3)


def _draw_curves(axis: object, series: Series, runs: Sequence[Run]) -> None:
    for name in (PUBLISHED, DEFAULT):
        chosen = _matching(runs, series, SAMPLES, name)
        if chosen:
            moments = list(zip(*(run.points for run in chosen), strict=True))
            seconds = [sum(point["seconds"] for point in points) / len(points) for points in moments]
            recall = [100 * sum(point["figures"]["recall"] for point in points) / len(points) for points in moments]
            axis.plot(seconds, recall, marker="o", markersize=3, label=name)
    axis.set(title="recall, x 100", xlabel="seconds of training (points: equal samples)")
    axis.grid(alpha=0.3)
    axis.legend()
