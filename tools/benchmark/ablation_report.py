"""Table and plot of the head ablation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ablation_heads import DEFAULT, PUBLISHED, VARIANTS, settings_of
from ablation_runs import FIGURES, PRECISION, SAMPLES, TIME, Run, RunKey, by_seed, median_seconds
from ablation_statistics import Interval, interval, paired_difference

_INTRODUCTION = """# Which class-center head teaches most

Small encoders (a perceptron with two hidden layers of 512, embeddings of 128; for `words` this project's ViT, 3 layers
of 96) are trained under each head on one CPU core and measured on held-out samples. `published` is the published method
in plain torch (`tools/benchmark/published_head.py`): 8 sets of 10 % of the classes (1 set for `words`, whose samples
have one label), a sample's other labels as negatives, logit 0 from the filter, a dense gradient of the sum over labels
clipped at 5, dense AdamW. All others are this package's head; a row says what it changes in the defaults.

- **top-1**: the nearest training sample has the query's true class (digits: shows the same digit).
- **neighbours**: one of the 10 nearest has it (digits: the share of the 10 that shows the same digit).
- **recall**: the share of the query's 10 nearest classes that are among the 10 nearest centers (words: whether its word
  is).
- **mAP** (words): mean average precision of the word when centers are ordered by their cosine with the query.

With `centering: embeddings` the head's running mean is taken away from embeddings before they are compared.

All figures x 100, after ± the 95 % t-interval over seeds. In brackets the *paired* difference to `published` (same
data, batches, labels and initial encoder) and its interval; **bold** = better by more than the interval, *italic* =
worse by more than it.

Data: `synthetic` = a mixture of clusters seen through a fixed non-linear map; `photos` = 12 x 12 patches of the
photographs in scikit-image and scikit-learn, classes = k-means clusters, truth = the nearest; `digits` = the 1,797
images of scikit-learn's `load_digits`, classes = k-means clusters, truth = the digit. Of real images the encoder sees a
random half of the pixels. `words` = pictures of one word, 20,000 for training and 1,000 held out in unseen typefaces,
class and truth = the word; neighbours are looked for among 2,000 training pictures. `pretrained`: the encoder has
learned to read as many other words before, with the settings of `small_embeddings`, and the mean of its embeddings was
taken into its last bias, so that they are not collinear at the start.
"""

_TIME_NOTE = """
Every variant is trained from the start, with a whole learning-rate schedule, for as many steps as it does in the
seconds that the default needs for its steps at equal samples (CPU time of one thread, without measurements; medians
over seeds). The encoder here is tiny, so the head is nearly all of a step; under a real encoder times are closer
together, and the tables at equal samples are the ones to read.
"""

_DEFAULT_NOTE = """
The same runs at equal samples, each row less `default`: paired differences x 100 and their intervals, marked as above.
"""
_TITLES = {"top1": "top-1", "neighbours": "neighbours", "recall": "recall", PRECISION: "mAP"}


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
    compared = [series for series in series_of(runs) if matching(runs, series, SAMPLES, DEFAULT)]
    if compared:
        parts.append("# Differences to the default\n" + _DEFAULT_NOTE)
    parts += [_default_table(series, runs) for series in compared]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def series_of(runs: Iterable[Run]) -> list[RunKey]:
    """Returns what was trained on, from what and for how long, in order of first appearance."""
    return list(dict.fromkeys(run.key.series for run in runs))


def matching(runs: Iterable[Run], series: RunKey, budget: str, variant: str) -> list[Run]:
    """Returns the runs with a variant's settings; none if it is by another name the default.

    At equal time the default's runs are those at equal samples.
    """
    settings = settings_of(variant, series.classes)
    if variant == DEFAULT:
        budget = SAMPLES
    elif settings == settings_of(DEFAULT, series.classes):
        return []
    return [run for run in runs if run.key.series == series and run.key.budget == budget and run.has(settings)]


def series_title(series: RunKey) -> str:
    """Names a series without its length, e.g. "words, 300 classes, initial range 0.05, pretrained"."""
    parts = [series.data, f"{series.classes:,} classes"]
    if series.initializer_range is not None:
        parts.append(f"initial range {series.initializer_range:g}")
    if series.pretrained_samples:
        parts.append("pretrained")
    return ", ".join(parts)


def _table(series: RunKey, runs: Sequence[Run], budget: str) -> str:
    steps = series.base_steps
    length = (
        f"{steps:,} steps of {series.batch_size} samples"
        if budget == SAMPLES
        else f"the default's time for {steps:,} steps"
    )
    figures = _figures_of(series, runs)
    titles = " | ".join(_TITLES[figure] for figure in figures)
    lines = [
        f"## {series_title(series)}, {length}\n",
        *_cosine_note(series, runs),
        f"| variant | changes in the defaults | {titles} | ms / step | steps | seeds |",
        "|---" * (5 + len(figures)) + "|",
    ]
    baseline = matching(runs, series, budget, PUBLISHED)
    for name, variant in VARIANTS.items():
        chosen = matching(runs, series, budget, name)
        if chosen:
            changes = ", ".join(f"`{key}: {value}`" for key, value in {**variant.head, **variant.optim}.items())
            cells = [_cell(chosen, baseline, figure) for figure in figures]
            pace = 1000 * median_seconds(chosen) / chosen[0].steps
            row = [f"`{name}`", changes or variant.title, *cells, f"{pace:.0f}", f"{chosen[0].steps:,}", len(chosen)]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def _default_table(series: RunKey, runs: Sequence[Run]) -> str:
    figures = _figures_of(series, runs)
    lines = [
        f"## {series_title(series)}, {series.base_steps:,} steps of {series.batch_size} samples\n",
        f"| variant - default | {' | '.join(_TITLES[figure] for figure in figures)} | seeds |",
        "|---" * (2 + len(figures)) + "|",
    ]
    baseline = matching(runs, series, SAMPLES, DEFAULT)
    for name in VARIANTS:
        chosen = matching(runs, series, SAMPLES, name)
        seeds = {run.key.seed for run in chosen} & {run.key.seed for run in baseline}
        if name != DEFAULT and seeds:
            cells = [_difference(by_seed(chosen, figure), by_seed(baseline, figure)) for figure in figures]
            lines.append(f"| `{name}` | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def _figures_of(series: RunKey, runs: Iterable[Run]) -> tuple[str, ...]:
    measured = next(run.points[-1]["figures"] for run in runs if run.key.series == series)
    return tuple(figure for figure in (*FIGURES, PRECISION) if figure in measured)


def _cosine_note(series: RunKey, runs: Iterable[Run]) -> list[str]:
    cosines = {run.key.seed: run.mean_cosine for run in runs if run.key.series == series}
    known = [cosine for cosine in cosines.values() if cosine is not None]
    if not known:
        return []
    return [f"Mean cosine of two embeddings before the first step: {sum(known) / len(known):.2f}.\n"]


def _cell(runs: Sequence[Run], baseline: Sequence[Run], figure: str) -> str:
    values, other = by_seed(runs, figure), by_seed(baseline, figure)
    text = _format(interval(list(values.values())))
    if not values.keys() & other.keys() or values == other:
        return text
    return f"{text} ({_difference(values, other)})"


def _difference(values: Mapping[int, float], other: Mapping[int, float]) -> str:
    difference = paired_difference(values, other)
    mark = {"better": "**", "worse": "*", "equal": ""}[difference.verdict]
    return f"{mark}{_format(difference, sign='+')}{mark}"


def _format(value: Interval, sign: str = "") -> str:
    width = "" if math.isnan(value.half_width) else f" ± {100 * value.half_width:.2f}"
    return f"{100 * value.mean:{sign}.2f}{width}"


def draw_plot(path: Path, runs: Sequence[Run]) -> None:
    """Draws, per data set, paired differences to the published method, and recall against samples and seconds.

    Nothing without runs of the published method.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_series = [series for series in series_of(runs) if matching(runs, series, SAMPLES, PUBLISHED)]
    if not all_series:
        return
    columns = len(FIGURES) + 1
    figure, axes = plt.subplots(
        len(all_series), columns, figsize=(4.2 * columns, 4.2 * len(all_series)), squeeze=False, layout="constrained"
    )
    for row, series in zip(axes, all_series, strict=True):
        for name, axis in zip(FIGURES, row, strict=False):
            _draw_differences(axis, series, runs, name)
        row[0].set_ylabel(series_title(series))
        row[0].set_yticklabels(_names(series, runs))
        _draw_curves(row[-1], series, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _names(series: RunKey, runs: Sequence[Run]) -> list[str]:
    return [name for name in VARIANTS if name != PUBLISHED and matching(runs, series, SAMPLES, name)]


def _draw_differences(axis: object, series: RunKey, runs: Sequence[Run], figure: str) -> None:
    baseline = by_seed(matching(runs, series, SAMPLES, PUBLISHED), figure)
    names = _names(series, runs)
    for place, name in enumerate(names):
        difference = paired_difference(by_seed(matching(runs, series, SAMPLES, name), figure), baseline)
        color = {"better": "tab:green", "worse": "tab:red", "equal": "tab:gray"}[difference.verdict]
        axis.errorbar(100 * difference.mean, place, xerr=100 * difference.half_width, fmt="o", color=color, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(
        yticks=range(len(names)), yticklabels=[], title=f"{figure} - published, x 100", ylim=(len(names) - 0.5, -0.5)
    )
    axis.grid(axis="x", alpha=0.3)


def _draw_curves(axis: object, series: RunKey, runs: Sequence[Run]) -> None:
    for name in (PUBLISHED, DEFAULT):
        chosen = matching(runs, series, SAMPLES, name)
        if chosen:
            moments = list(zip(*(run.points for run in chosen), strict=True))
            seconds = [sum(point["seconds"] for point in points) / len(points) for points in moments]
            recall = [100 * sum(point["figures"]["recall"] for point in points) / len(points) for points in moments]
            axis.plot(seconds, recall, marker="o", markersize=3, label=name)
    axis.set(title="recall, x 100", xlabel="seconds of training (points: equal samples)")
    axis.grid(alpha=0.3)
    axis.legend()
