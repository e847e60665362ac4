"""The finished runs of the head ablation: a JSON file that grows run by run, so that an interrupted series goes on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ove.config.regions import RegionConfig

FIGURES = ("top1", "neighbours", "recall")
PRECISION = "precision"
"""A fourth figure, of samples with one label only."""
SAMPLES, TIME = "samples", "time"
_ADDED_OPTIONS = {
    "head": {"centering": "none", "level": "sample", "regions": RegionConfig().model_dump(mode="json")},
}
"""Options that heads of stored runs did not have yet, with the value that says what they did."""
_LATER_FIELDS = ("initializer_range", "pretrained_samples", "mean_cosine")
"""Fields that records do not have where they hold nothing."""


@dataclass(frozen=True)
class RunKey:
    """What a run was made on; two runs with equal keys and settings of the head would give the same figures.

    Attributes:
        budget: SAMPLES = `base_steps` steps; TIME = as many as take the seconds that the default needs for those.
        base_steps: of the runs at equal samples.
        initializer_range: standard deviation of a fresh ViT's weights; None = the perceptron.
        pretrained_samples: that the encoder saw beforehand, of other words; 0 = it was fresh.
    """

    data: str
    classes: int
    seed: int
    batch_size: int
    base_steps: int
    budget: str = SAMPLES
    initializer_range: float | None = None
    pretrained_samples: int = 0

    @property
    def series(self) -> RunKey:
        """What runs of one table have in common."""
        return replace(self, seed=0, budget=SAMPLES)

    @property
    def samples(self) -> int:
        """Samples of the runs at equal samples."""
        return self.base_steps * self.batch_size


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        variant: name at the time; what counts are the settings.
        steps: that were done.
        settings: of the head, as plain data.
        points: held-out figures along training: {"samples", "seconds", "figures": {name: value}}.
        environment: hardware and versions.
        mean_cosine: of two held-out embeddings before the first step; None = made when it was not recorded yet.
    """

    key: RunKey
    variant: str
    steps: int
    settings: Mapping[str, Any]
    points: list[dict[str, Any]]
    environment: Mapping[str, Any] = field(default_factory=dict)
    mean_cosine: float | None = None

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether the run was made with these settings of the head."""
        stored = dict(self.settings)
        for part, options in _ADDED_OPTIONS.items():
            if part in stored:
                stored[part] = options | stored[part]
        return stored == settings

    @property
    def seconds(self) -> float:
        """CPU seconds of training, without measurements."""
        return float(self.points[-1]["seconds"])

    def final(self, figure: str) -> float:
        """Returns a held-out figure after the last step."""
        return float(self.points[-1]["figures"][figure])


class RunFile:
    """All runs that were ever written to a JSON file; a variant that has other settings by now is not found."""

    def __init__(self, path: Path) -> None:
        self._path = path
        stored = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        self.runs = [Run(**{**record, "key": RunKey(**record["key"])}) for record in stored]

    def find(self, key: RunKey, settings: Mapping[str, Any]) -> Run | None:
        """Returns the run of a key if it was made with these settings."""
        return next((run for run in self.runs if run.key == key and run.has(settings)), None)

    def add(self, run: Run) -> None:
        """Writes a run at once."""
        self.runs.append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        lines = ",\n".join(json.dumps(_record(run), separators=(",", ":")) for run in self.runs)
        partial.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")
        partial.replace(self._path)


def _record(run: Run) -> dict[str, Any]:
    record = asdict(run)
    for part in (record, record["key"]):
        for name in _LATER_FIELDS:
            if name in part and not part[name]:
                del part[name]
    return record


def median_seconds(runs: Iterable[Run]) -> float:
    """Returns the median training time of runs, CPU seconds."""
    return statistics.median(run.seconds for run in runs)


def by_seed(runs: Iterable[Run], figure: str) -> dict[int, float]:
    """Returns seed -> held-out figure."""
    return {run.key.seed: run.final(figure) for run in runs}
