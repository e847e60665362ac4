"""Weights of another run or of an imported model, as the start of a new run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.checkpoint.manifest import checkpoints_at
from megatron_ove.checkpoint.trust import require_data
from megatron_ove.errors import CheckpointError

logger = logging.getLogger(__name__)


def find_start(given: str | Path, *, verify: Literal["full", "sizes"]) -> Path:
    """Returns the checkpoint that `init_from` names; collective over all ranks.

    Args:
        given: a checkpoint; or a run folder or its `checkpoints` folder, of which the newest usable one is taken.
        verify: whether every checksum is compared, or file names and sizes only.

    Raises:
        CheckpointError: on all ranks, when there is no usable one.
    """
    given = Path(given)
    manager = CheckpointManager(given, keep=1, verify=verify)
    path, skipped = manager.first_usable(lambda: checkpoints_at(given))
    problems = [problem if other == given else f"{other.name}: {problem}" for other, problem in skipped]
    if path is None:
        raise CheckpointError(
            f"init_from = {given} cannot be used: {'; '.join(problems) or 'it holds no checkpoint'}; name a run that "
            "has saved one, a finished checkpoint folder, or one made by megatron-ove convert import",
            on_every_rank=True,
        )
    if dist.get_rank() == 0:
        for problem in problems:
            logger.warning("init_from = %s: skipping %s; looking for an older one.", given, problem)
    return path


def load_start(path: str | Path, state: ShardedStateDict, *, given: str) -> StateDict:
    """Fills `state` with weights of a checkpoint and reads nothing else of it; collective.

    Args:
        path: any whole checkpoint that holds them, whatever layout wrote it; see `find_start`.
        state: sharded state; tensors of another dtype than the stored ones are converted.
        given: what `init_from` says, for messages.

    Raises:
        CheckpointError: on all ranks, when it cannot be read.
    """
    try:
        require_data(path, looks_at_objects=False)  # these are not read
    except CheckpointError as error:
        raise CheckpointError(f"init_from = {given}: {error}", on_every_rank=True) from error
    try:
        # Of stacked layers, some may be wanted and others not, which the check of access would take for a mistake.
        loaded: Any = dist_checkpointing.load(state, str(path), validate_access_integrity=False)
        return loaded
    except (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"init_from = {given}: {path} cannot be read ({error}); use another checkpoint, or other parts",
            on_every_rank=True,
        ) from error
