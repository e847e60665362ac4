"""What the head benchmark says: a table, a JSON file, a plot."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from head_contenders import OURS, Workload
from head_rounds import Measurement, Schedule
from head_traffic import active_rows

REFERENCE = "published"
SWEEP_LABELS = {"classes": "classes", "batch": "samples of a microbatch"}
HEADER = (
    "contender",
    "ms a step",
    "CPU ms",
    "steps/s",
    "peak GB",
    "GB moved",
    "times faster",
    "part of memory",
    "part of bytes",
)


def summarize(results: Mapping[str, Measurement]) -> dict[str, dict[str, Any]]:
    """Returns contender -> figures and ratios.

    `ratio_time_vs_published` is the published head's time over the contender's (25 = 25 times as fast);
    `ratio_memory_vs_published` and `ratio_bytes_vs_published` are the contender's over the published head's.
    """
    reference = results.get(REFERENCE)
    reference = None if reference is None or reference.missing else reference
    return {name: _summarize(result, reference) for name, result in results.items()}


def _summarize(result: Measurement, reference: Measurement | None) -> dict[str, Any]:
    if result.missing:
        return {"missing": result.missing, "bytes_moved": result.moved_bytes}
    seconds = result.median_seconds
    summary: dict[str, Any] = {
        "seconds": seconds,
        "steps_per_second": 1 / seconds,
        "cpu_seconds": statistics.median(result.cpu_seconds),
        "all_seconds": result.seconds,
        "peak_memory_bytes": result.peak_bytes,
        "bytes_moved": result.moved_bytes,
        "ratio_time_vs_published": None,
        "ratio_memory_vs_published": None,
        "ratio_bytes_vs_published": None,
    }
    if reference is not None:
        summary["ratio_time_vs_published"] = reference.median_seconds / seconds
        summary["ratio_memory_vs_published"] = result.peak_bytes / max(1, reference.peak_bytes)
        summary["ratio_bytes_vs_published"] = result.moved_bytes / reference.moved_bytes
    return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table."""
    rows = [HEADER]
    for name, figures in summary.items():
        if "missing" in figures:
            rows.append((name, figures["missing"], *("" for _ in HEADER[2:])))
            continue
        rows.append(
            (
                name,
                f"{1000 * figures['seconds']:,.4g}",
                f"{1000 * figures['cpu_seconds']:,.4g}",
                f"{figures['steps_per_second']:,.3g}",
                f"{figures['peak_memory_bytes'] / 1e9:.3f}",
                f"{figures['bytes_moved'] / 1e9:.3g}",
                *(_ratio(figures[f"ratio_{kind}_vs_published"]) for kind in ("time", "memory", "bytes")),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def describe_setting(work: Workload, schedule: Schedule) -> str:
    """Returns one line about what is measured."""
    memory = "CPU threads of each rank" if schedule.device == "cpu" else "CUDA; CPU threads of each rank"
    drawn = f"{work.labels_per_step} of {work.stored_labels} labels"
    return (
        f"{work.num_classes:,} classes x {work.embedding_size}, {work.batch_size} samples, {drawn}, "
        f"{work.microbatches} microbatch(es) a step; {schedule.ranks} rank(s), {memory}: {schedule.threads}; "
        f"median of {schedule.rounds} x {schedule.steps} steps in turns, allocator {schedule.allocator}"
    )


def describe_machine() -> dict[str, Any]:
    """Returns what a figure depends on besides the code."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "load_at_end": os.getloadavg()[0],
    }


def expected_rows(names: Sequence[str], work: Workload) -> dict[str, int]:
    """Returns how many classes are active in a step of each of ours."""
    return {name: round(active_rows(name, work)) for name in names if name in OURS}


def spread(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns contender -> largest / smallest time over a sweep; 1.0 is flat."""
    times: dict[str, list[float]] = {}
    for point in points:
        for name, figures in point["contenders"].items():
            if "seconds" in figures:
                times.setdefault(name, []).append(figures["seconds"])
    return {name: max(values) / min(values) for name, values in times.items() if len(values) > 1}


def plot(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str) -> None:
    """Draws time against each swept quantity, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweeps), figsize=(6.4 * len(sweeps), 4.8), squeeze=False, sharey=True)
    for panel, (kind, points) in zip(panels[0], sweeps.items(), strict=True):
        names = list(dict.fromkeys(name for point in points for name in point["contenders"]))
        for name in names:
            known = [point for point in points if "seconds" in point["contenders"].get(name, {})]
            values = [point["value"] for point in known]
            milliseconds = [1000 * point["contenders"][name]["seconds"] for point in known]
            panel.plot(values, milliseconds, marker="o", markersize=4, label=name)
        panel.set(xscale="log", yscale="log", xlabel=SWEEP_LABELS[kind])
        panel.grid(alpha=0.3, which="both")
    lowest, highest = panels[0][0].get_ylim()
    panels[0][0].set_ylim(lowest / 2, highest * 2)  # a flat line shall look flat
    panels[0][0].set_ylabel("ms a step")
    panels[0][-1].legend(fontsize="small")
    figure.suptitle(title, fontsize="small", wrap=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
