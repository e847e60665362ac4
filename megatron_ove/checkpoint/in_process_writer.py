"""Writes megatron-core's torch_dist format from the training process itself.

megatron-core's own writer forks one process per file and talks to them through a manager process that re-imports the
main script. With a full disk or a missing package its parent waits for ever, and a killed trainer leaves the manager
behind. torch's writer produces the same files without other processes, and tells every rank when one of them failed.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class InProcessSaveStrategy(SaveShardedStrategy):
    """Save strategy "torch_dist" version 1, one file per rank; megatron-core's loader reads it."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Writes the main replica of every shard; collective over all ranks.

        Raises:
            torch.distributed.checkpoint.api.CheckpointException: on every rank, if writing failed on any.
        """
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            # More threads would lose their exceptions inside torch; ranks write in parallel anyway.
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )

    def can_handle_sharded_objects(self) -> bool:
        return True
