"""FP8 scaling history across launches: kept by `fp8: delayed`, begun anew by a run that turns to it, dropped else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources


def train_with_history(rank: int, world_size: int, data: dict[str, Any]) -> int:
    """Trains one launch whose norms have an extra state, as Transformer Engine's layers do; counts those restored."""
    import torch

    from megatron_ove.model import encoder
    from megatron_ove.model.kernels import EncoderKernels
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    restored = []
    encoder.resolve_kernels = lambda *args, **kwargs: EncoderKernels()  # the CPU has no FP8, only what belongs to it
    torch.nn.LayerNorm.get_extra_state = lambda self: torch.full((3,), 7, dtype=torch.uint8)
    torch.nn.LayerNorm.set_extra_state = lambda self, state: restored.append(state.tolist())
    config = check(data)
    Trainer(config, initialize_topology(config.parallel, seed=config.seed)).run()
    assert all(state == [7, 7, 7] for state in restored)
    return len(restored)


def test_scaling_history(tmp_path: Path) -> None:
    sources = write_tiny_sources(tmp_path / "sources")

    def launch(fp8: str) -> int:
        train = {"num_steps": 8, "stop_after_steps": 1, "global_batch_size": 8, "precision": "bf16"}
        data = tiny_config(sources, tmp_path / "run", encoder={"fp8": fp8}, train=train)
        return run_distributed(train_with_history, 1, data)[0]

    norms = 2 * 4 + 1  # in 4 layers and after them; the one before is outside of what Transformer Engine makes
    assert launch("off") == 0
    assert launch("delayed") == 0
    assert launch("delayed") in (norms, norms + 1)
    assert launch("current") == 0
