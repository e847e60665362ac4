"""The page of a run, drawn from its folder alone.

Always there: loss per objective, learning rate, throughput, gradient norm, health of the embeddings, data wait, where
the time of a step goes (metrics.jsonl), rejects (rejects.jsonl, rejects/), the resolved configuration. Added when
present: figures on held-out data (metrics.jsonl); headings, pictures and rankings of `report/extras.json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_ove.data.bad_samples import FOLDER_NAME as BAD_SAMPLES_FOLDER
from megatron_ove.data.bad_samples import read_bad_samples
from megatron_ove.rejects import count_rejects
from megatron_ove.report.blocks import draw_header, draw_page, draw_section, draw_table
from megatron_ove.report.curves import Level, Marker, format_number, line_chart
from megatron_ove.report.metrics_log import (
    CHANCE_PREFIX,
    HELD_OUT_CHANCE,
    HELD_OUT_PREFIX,
    LOSS_PREFIX,
    MetricsLog,
    read_metrics,
)
from megatron_ove.report.sections import EXTRAS_FILE, ReportExtras, read_extras
from megatron_ove.report.time_use import time_use

_COLORS = [f"var(--series-{number})" for number in range(1, 6)]
# metric, title, unit, start the axis at zero
_COMMON_CURVES = [
    ("lr", "Learning rate", "", True),
    ("samples_per_s", "Throughput", "samples / s", True),
    ("tokens_per_s", "Throughput", "patches / s", True),
    ("grad_norm", "Gradient norm", "encoder, before clipping", True),
    ("data_wait_share", "Waiting for data", "share of step time", True),
    ("padding_share", "Padding", "share of patches", True),
]
# metric of a head, title, unit; the axis starts at zero
_HEAD_CURVES = [
    ("grad_norm", "Gradient norm", "class centers"),
    ("effective_rank", "Effective rank", "directions in which embeddings vary"),
    ("mean_cosine", "Mean cosine", "between different samples"),
]


def write_run_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run.

    Args:
        run_dir: folder with metrics.jsonl; config.resolved.yaml, rejects.jsonl, rejects/ and report/extras.json are
            used if there.
        output: the HTML file; default `<run_dir>/report.html`.

    Returns:
        Absolute path of the page.

    Raises:
        DataError: no usable metrics.jsonl, or extras that name a missing picture.
    """
    folder = Path(run_dir)
    log, extras = read_metrics(folder / "metrics.jsonl"), read_extras(folder)
    title = extras.title or f"Run {folder.resolve().name}"
    parts = [
        draw_header(title, extras.introduction, extras.highlights),
        _curves(log, extras),
        _held_out(log, extras),
        time_use(log),
    ]
    parts += [draw_section(section, (folder / EXTRAS_FILE).parent) for section in extras.sections]
    parts += [_rejects(folder), _configuration(folder)]
    target = Path(output) if output else folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw_page(title, parts), encoding="utf-8")
    return target.resolve()


def _curves(log: MetricsLog, extras: ReportExtras) -> str:
    markers = [Marker(marker.step, marker.label) for marker in extras.markers]
    charts = [
        line_chart(
            *log.series(LOSS_PREFIX + name),
            title=f"Loss: {name}",
            markers=markers,
            level=_level(log, CHANCE_PREFIX + name),
            color=_COLORS[i % len(_COLORS)],
        )
        for i, name in enumerate(log.objectives)
    ]
    for metric, title, unit, from_zero in _COMMON_CURVES:
        steps, values = log.series(metric)
        if values:
            smooth = metric != "lr"
            charts.append(
                line_chart(steps, values, title=title, unit=unit, smooth=smooth, from_zero=from_zero, markers=markers)
            )
    charts += _head_charts(log, markers)
    return (
        f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div>{_loss_table(log)}'
        '<p class="quiet">Thin: every logged step. Bold: running mean. Dashed: a head that knows nothing.</p></section>'
    )


def _head_charts(log: MetricsLog, markers: Sequence[Marker]) -> list[str]:
    return [
        line_chart(
            *log.series(f"{metric}/{name}"),
            title=f"{title}: {name}",
            unit=unit,
            from_zero=True,
            markers=markers,
            color=_COLORS[i % len(_COLORS)],
        )
        for metric, title, unit in _HEAD_CURVES
        for i, name in enumerate(log.objectives)
        if log.series(f"{metric}/{name}")[1]
    ]


def _held_out(log: MetricsLog, extras: ReportExtras) -> str:
    if not log.held_out:
        return ""
    markers = [Marker(marker.step, marker.label) for marker in extras.markers]
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(log.objectives)}
    charts = [
        line_chart(
            *log.series(f"{HELD_OUT_PREFIX}{name}/{figure}"),
            title=f"{figure.replace('_', ' ').capitalize()}: {name}",
            smooth=False,
            from_zero=True,
            markers=markers,
            level=_level(log, f"{HELD_OUT_PREFIX}{name}/{HELD_OUT_CHANCE}{figure}"),
            color=colors.get(name, _COLORS[0]),
        )
        for name, figures in log.held_out.items()
        for figure in figures
    ]
    return (
        f"<section><h2>On held-out data</h2><p>Where the labels of samples that the run does not train on stand among "
        f'all classes, by the cosine of their centers.</p><div class="charts">{"".join(charts)}</div>'
        '<p class="quiet">Dashed: a random order of the classes.</p></section>'
    )


def _level(log: MetricsLog, name: str) -> Level | None:
    _, values = log.series(name)
    return Level(values[-1], "chance") if values else None


def _loss_table(log: MetricsLog) -> str:
    rows, window = [], 0
    for name in log.objectives:
        change = log.loss_change(name)
        window = change.window_steps
        rows.append([name, f"{change.first_loss:.3f}", f"{change.last_loss:.3f}", f"{-100 * change.fall:+.1f} %"])
    if not rows:
        return ""
    header = ["loss", f"first {window} steps", f"last {window} steps", "change"]
    return draw_table(header, rows)


def _rejects(folder: Path) -> str:
    path = folder / "rejects.jsonl"
    in_training = Counter(sample.source for sample in read_bad_samples(folder))
    parts = []
    if counts := count_rejects(path):
        rows = [[stage, format_number(count)] for stage, count in sorted(counts.items())]
        parts.append(draw_table(["step", "records left out"], rows, f"File and reason of each: {path.resolve()}"))
    elif path.exists():
        parts.append("<p>Nothing was left out: every input file could be used.</p>")
    if in_training:
        rows = [[source, format_number(count)] for source, count in sorted(in_training.items())]
        place = f"Step, sample and reason of each: {(folder / BAD_SAMPLES_FOLDER).resolve()}"
        parts.append(draw_table(["source", "samples that could not be read in training"], rows, place))
    return f"<section><h2>Rejects</h2>{''.join(parts)}</section>" if parts else ""


def _configuration(folder: Path) -> str:
    path = folder / "config.resolved.yaml"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    summary = "<summary>Every value of the run, defaults included</summary>"
    return f"<section><h2>Configuration</h2><details>{summary}<pre>{text}</pre></details></section>"
