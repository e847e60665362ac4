"""Encoder weights of another run or of an imported model, as the start of a new run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ove.checkpoint.compatibility import architecture_differences
from megatron_ove.checkpoint.manager import read_common_state
from megatron_ove.checkpoint.manifest import structural_problem
from megatron_ove.errors import CheckpointError


def load_encoder_weights(path: str | Path, state: ShardedStateDict, *, encoder: Mapping[str, Any]) -> StateDict:
    """Fills `state` with the encoder weights of a checkpoint and reads nothing else of it; collective.

    Args:
        path: any checkpoint that holds the encoder, whatever layout wrote it.
        state: the encoder's sharded state; tensors of another dtype than the stored ones are converted.
        encoder: the encoder's configuration, as plain values.

    Raises:
        CheckpointError: on all ranks, when the folder is not a whole checkpoint or holds another architecture.
    """
    path = Path(path)
    problem = structural_problem(path)
    if problem is not None:
        raise CheckpointError(
            f"init_from = {path} cannot be used: {problem}; name a finished checkpoint folder, or one made by "
            "megatron-ove convert import",
            on_every_rank=True,
        )
    differences = list(architecture_differences(read_common_state(path)["config"]["encoder"], encoder))
    if differences:
        raise CheckpointError(
            f"init_from = {path} holds another encoder: {'; '.join(differences)}; set the fields as they are there",
            on_every_rank=True,
        )
    try:
        loaded: Any = dist_checkpointing.load(state, str(path))
        return loaded
    except (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"init_from = {path} cannot be read ({error}); use another checkpoint",
            on_every_rank=True,
        ) from error
