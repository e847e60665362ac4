"""Where a run's figures are kept: metrics.jsonl always, TensorBoard and Weights & Biases if configured.

Every row is keyed by the number of steps done. On a resume, rows after the checkpoint's step are removed first, so a
step appears once, whatever happened to the run.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import ConfigError
from megatron_ove.whole_file import write_whole

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


class MetricLogger(Protocol):
    """Takes one row of figures per report."""

    def log(self, row: Mapping[str, float]) -> None:
        """Records a row; `row["step"]` is the number of steps done."""
        ...

    def close(self) -> None:
        """Writes out what is buffered."""
        ...


class JsonLinesLogger:
    """metrics.jsonl: one JSON object a line, flushed at once."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Opens the file for appending, after dropping rows of steps beyond `resume_step` and a torn last line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_metrics(path, resume_step)
        self._stream = path.open("a", encoding="utf-8")

    def log(self, row: Mapping[str, float]) -> None:
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class TensorBoardLogger:
    """Event files in `tensorboard/`; events after the resumed step are purged."""

    def __init__(self, directory: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def log(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                self._writer.add_scalar(name, value, global_step=int(row["step"]), walltime=row["time"])

    def close(self) -> None:
        self._writer.close()


_WANDB_ID = "wandb_id"
"""File of the run folder."""


class WandbLogger:
    """One Weights & Biases run per run folder; a resumed run continues it."""

    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"tracking.wandb_project = {config.tracking.wandb_project} needs the package wandb, which is not "
                "installed; install it with pip install 'megatron_ove[wandb]', or set tracking.wandb_project: null"
            ) from error
        self._run: Any = wandb.init(
            project=config.tracking.wandb_project,
            name=config.name,
            dir=config.run_dir,
            id=_wandb_id(Path(config.run_dir)),
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path) -> str:
    """Returns what the run is called there: drawn once and kept in the run folder, since the same path may be another
    run on another machine or in a container."""
    path = run_dir / _WANDB_ID
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{secrets.token_hex(8)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def build_loggers(config: TrainConfig, *, resume_step: int) -> list[MetricLogger]:
    """Opens the configured loggers; call it on rank 0 only.

    Raises:
        ConfigError: a tracker is asked for that is not installed.
    """
    run_dir = Path(config.run_dir)
    loggers: list[MetricLogger] = [JsonLinesLogger(run_dir / METRICS_NAME, resume_step=resume_step)]
    if config.tracking.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard", resume_step=resume_step))
    if config.tracking.wandb_project is not None:
        loggers.append(WandbLogger(config))
    return loggers


def truncate_metrics(path: Path, step: int) -> None:
    """Keeps the rows of steps <= `step`; a line that is not JSON (cut by a crash) is dropped. Atomic."""
    if not path.exists():
        return
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        logger.info("Dropping %d rows after step %d from %s.", dropped, step, path)
        write_whole(path, "".join(line + "\n" for line in kept).encode())
