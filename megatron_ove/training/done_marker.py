"""`run_dir/done`: the run has reached `train.num_steps`. An exit status cannot say that: a stopped run has 0 too.

Rank 0 writes it after the last save and removes it when a launch trains on, so that a launch script can rely on it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_ove.checkpoint.manifest import checkpoint_name
from megatron_ove.whole_file import write_whole

DONE_FILE_NAME = "done"


def mark_done(run_dir: Path, *, step: int, config_text: str) -> None:
    """Says that the run is finished.

    Args:
        run_dir: folder of the run.
        step: steps done.
        config_text: the resolved configuration.
    """
    content = json.dumps({"step": step, "config_sha256": _sha256(config_text)}) + "\n"
    write_whole(run_dir / DONE_FILE_NAME, content.encode())


def unmark_done(run_dir: Path) -> None:
    """Takes it back, because the run is trained further."""
    (run_dir / DONE_FILE_NAME).unlink(missing_ok=True)


def is_done(run_dir: Path, *, num_steps: int, config_text: str) -> bool:
    """Whether this very configuration has been trained to `num_steps` and the result is still there.

    A run whose configuration differs in anything, or whose last checkpoint has been deleted, is not done: the usual
    start then continues it, begins anew, or says what does not fit.
    """
    try:
        marker = json.loads((run_dir / DONE_FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(marker, dict)
        and type(marker.get("step")) is int
        and marker["step"] >= num_steps
        and marker.get("config_sha256") == _sha256(config_text)
        and (run_dir / "checkpoints" / checkpoint_name(marker["step"])).is_dir()
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
