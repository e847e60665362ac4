"""After training: exports, figures, summary.json and the page."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cards import CardReading
from measures import HeldOut, Model, embed_held_out, export_difference, load_model, retrieval_figures
from phases import DemoError, say
from pictures import STAGES, card_section, clip_section, neighbour_section, page_section
from preprocessing import Preprocessing
from training import checkpoint_dir

from megatron_ove import __version__
from megatron_ove.config.train import TrainConfig
from megatron_ove.convert.hf_export import export_checkpoint
from megatron_ove.evaluation.embedding import SampleSettings
from megatron_ove.rejects import count_rejects
from megatron_ove.report.metrics_log import MetricsLog, read_metrics
from megatron_ove.report.run_report import write_run_report
from megatron_ove.report.sections import EXTRAS_FILE, ReportExtras, Section, StepMarker, TableBlock, write_extras
from megatron_ove.shards.shard_set import ShardSet

MAX_EXPORT_DIFFERENCE = 1e-5  # fp32, absolute; embeddings are of order 1
LOSS_WINDOW_STEPS = 20
_PACKAGES = (
    "torch",
    "megatron-core",
    "nvidia-dali-cuda130",
    "transformers",
    "rapidocr",
    "onnxruntime",
    "faiss-cpu",
    "av",
)
# figure of summary.json -> (the measure that is shown, its words)
_SHOWN = {
    "page_to_words": ("first_right", "held-back page: the first word read is on it"),
    "new_typefaces_to_words": ("first_right", "the same in typefaces never seen"),
    "image_to_clusters": ("recall_at_{labels}", "image → its clusters, recall@{labels}"),
    "clip_to_other_cut": ("recall_at_1", "clip → another cut of it, recall@1"),
}


@dataclass(frozen=True)
class Results:
    """What was measured: figures per stage, what they were computed from, and the export difference."""

    figures: Mapping[str, Mapping[str, Mapping[str, float]]]
    held_out: Mapping[str, HeldOut]
    models: Mapping[str, Model]
    export_difference: Mapping[str, float]

    def shown(self) -> Iterator[tuple[str, float, float, float | None]]:
        """Yields (words, before, after, chance or None) of the figures that people are shown."""
        num_labels = self.held_out[STAGES[1]].images.labels.shape[1]
        for name, (measure, words) in _SHOWN.items():
            if name not in self.figures[STAGES[1]]:
                continue
            key = measure.format(labels=num_labels)
            before, after = (self.figures[stage][name] for stage in STAGES)
            chance = after.get(f"chance_{key}")
            yield words.format(labels=num_labels), before[key], after[key], chance


def export_run(run_dir: Path, num_steps: int) -> dict[str, tuple[Path, Path]]:
    """Exports the untrained and the trained encoder; returns stage -> (export folder, checkpoint)."""
    exports = {}
    for stage, step in zip(STAGES, (0, num_steps), strict=True):
        checkpoint = checkpoint_dir(run_dir, step)
        folder = export_checkpoint(checkpoint, run_dir / "export" / ("initial" if step == 0 else "trained"))
        exports[stage] = (folder, checkpoint)
        say(f"      {folder}")
    return exports


def evaluate_run(run_dir: Path, config: TrainConfig, exports: Mapping[str, tuple[Path, Path]]) -> Results:
    """Compares the export with the trained model, and training with no training.

    Raises:
        DemoError: the export gives other embeddings than the trained model.
    """
    settings = sample_settings(config)
    data = run_dir / "data"
    one_of_each = {kind: ShardSet.open(data / kind / "held_out") for kind in ("images", "pages", "clips")}
    difference = export_difference(*exports[STAGES[1]], one_of_each, settings)
    largest = max(difference.values())
    say(f"      export against trained model: largest difference {largest:.1e}")
    if not largest <= MAX_EXPORT_DIFFERENCE:
        raise DemoError(
            f"the export's embeddings differ from the trained model's by {largest:.1e}, more than "
            f"{MAX_EXPORT_DIFFERENCE:.0e}; this is a defect of megatron_ove: please report it with "
            f"{run_dir / 'console.log'}"
        )
    models, held_out, figures = {}, {}, {}
    for stage, (folder, checkpoint) in exports.items():
        models[stage] = load_model(folder, checkpoint, list(config.objectives), config.encoder.patch_size)
        held_out[stage] = embed_held_out(models[stage], data, settings)
        figures[stage] = retrieval_figures(held_out[stage], models[stage])
    results = Results(figures, held_out, models, difference)
    for words, before, after, _ in results.shown():
        say(f"      {words}: {before:.3f} -> {after:.3f}")
        if not after > before:
            say("      training did not improve this; with so little data that can happen: see README.md")
    return results


def sample_settings(config: TrainConfig) -> SampleSettings:
    """Returns the sizes that training used."""
    sources = config.data.sources
    return SampleSettings(
        patch_size=config.encoder.patch_size,
        image_size=sources["images"].image_size,  # type: ignore[union-attr]
        max_patches=sources["pages"].max_patches,  # type: ignore[union-attr]
    )


def write_summary(
    run_dir: Path,
    config: TrainConfig,
    results: Results,
    *,
    reading: CardReading,
    stopped_at: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Writes summary.json and returns it."""
    log = read_metrics(run_dir / "metrics.jsonl")
    difference = results.export_difference
    summary = {
        "steps": config.train.num_steps,
        "samples": int(log.rows[-1]["samples"]),
        "stopped_at_step": stopped_at,
        "heads": {name: _head(log, config, name) for name in config.objectives},
        "seconds": dict(seconds),
        "total_seconds": round(sum(seconds.values()), 1),
        "retrieval": {stage.split()[0]: results.figures[stage] for stage in STAGES},
        "export_difference": max(difference.values()),
        "export_differences": dict(difference),
        "rejects": count_rejects(run_dir / "rejects.jsonl"),
        "cards_read_by_ocr": asdict(reading),
        "data": _data(run_dir),
        "versions": {"megatron_ove": __version__, "python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }
    path = run_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def write_page(
    run_dir: Path, config: TrainConfig, results: Results, preprocessing: Preprocessing, summary: Mapping[str, Any]
) -> Path:
    """Writes the extras of the report and the report; returns its path."""
    folder = run_dir / Path(EXTRAS_FILE).parent
    shown = [
        [words, f"{before:.2f}", f"{after:.2f}", "" if chance is None else f"{chance:.2f}"]
        for words, before, after, chance in results.shown()
    ]
    extras = ReportExtras(
        title="Quick start: images, pages and clips in one encoder",
        introduction="A small encoder with every part of the large one, trained from nothing for "
        f"{summary['steps']} steps on two processes, cut short half-way and resumed. Its labels were made by the tools "
        "of this repository; no label was given by hand.",
        highlights=[(f"{before} → {after}", words) for words, before, after, _ in shown]
        + [
            (f"{summary['total_seconds'] / 60:.1f} min", "all phases"),
            (f"{summary['samples']:,}", f"samples in {summary['steps']} steps"),
            (f"{summary['export_difference']:.0e}", "export against trained model, largest difference"),
        ],
        markers=[StepMarker(step=summary["stopped_at_step"], label="cut, resumed")],
        sections=[
            Section(
                title="Before and after training",
                text="On data that training never saw: other crops of photographs, other cards or pages, other cuts "
                "of clips.",
                blocks=[TableBlock(header=["held-out", "before", "after", "by chance"], rows=shown)],
            ),
            *_page_sections(preprocessing, folder, results),
            clip_section(preprocessing.labels / "clips_train", folder),
            neighbour_section(preprocessing.data, folder, results.held_out),
            Section(title="Time", blocks=[_time_table(summary["seconds"])]),
        ],
    )
    write_extras(run_dir, extras)
    return write_run_report(run_dir)


def _page_sections(preprocessing: Preprocessing, folder: Path, results: Results) -> list[Section]:
    """Cards and the words read on them; of a user's pages one, with its boxes."""
    if preprocessing.has_cards:
        return [card_section(preprocessing.data, folder, results.held_out, results.models)]
    lines = preprocessing.labels / "pages_held_out.jsonl"
    return [page_section(lines, folder, results.held_out, results.models, preprocessing.words())]


def _time_table(seconds: Mapping[str, float]) -> TableBlock:
    rows = [[name, f"{value:.0f}"] for name, value in seconds.items()]
    return TableBlock(header=["phase", "seconds"], rows=[*rows, ["together", f"{sum(seconds.values()):.0f}"]])


def _head(log: MetricsLog, config: TrainConfig, name: str) -> dict[str, float]:
    change = log.loss_change(name, LOSS_WINDOW_STEPS)
    weights = {source: section.weight for source, section in config.data.sources.items()}
    share = sum(weights[source] for source in config.objectives[name].sources) / sum(weights.values())
    return {
        "first_loss": round(change.first_loss, 4),
        "last_loss": round(change.last_loss, 4),
        "fall": round(change.fall, 4),
        "steps": config.train.num_steps,
        "samples": math.floor(share * config.train.global_batch_size * config.train.num_steps),
        "num_classes": config.objectives[name].num_classes,
    }


def _data(run_dir: Path) -> dict[str, dict[str, int]]:
    sets = {
        kind: [ShardSet.open(run_dir / "data" / kind / split) for split in ("train", "held_out")]
        for kind in ("images", "pages", "clips")
    }
    return {
        kind: {"train": len(train), "held_out": len(held_out), "num_classes": train.info.num_classes}
        for kind, (train, held_out) in sets.items()
    }
