"""Checkpoints of the distributed optimizer with several padded gradient buckets: continued in the same and in every
other kind of layout, and how one is refused that was written before megatron-core's fault was repaired."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ove.checkpoint.manager import read_common_state
from megatron_ove.cli.main import main
from megatron_ove.errors import CheckpointError
from tests.support.distributed import run_distributed
from tests.support.layout_grid import compare_losses, grid_config, run_layouts
from tests.support.tiny_run import check, write_tiny_sources

TOLERANCE = 1e-5
TP2, PP2, VPP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"virtual_pipeline_model_parallel_size": 2},
)
BUCKETS = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
FOUR_RANKS = {
    "dp4": {"overlap_param_gather": False},
    "tp2 x dp2": {**TP2, "sequence_parallel": True},
    "pp2 x dp2": PP2,
    "interleaved": {**PP2, **VPP2},
}
# Processes and the layouts in which one run goes on in turn: every leg reads what the one before it has saved.
LEGS = [(4, FOUR_RANKS), (1, {"one": {}})]
MORE_LEGS = [(3, {"dp3": {}, "dp3 again": {}}), (2, {"dp2": {}, "pp2": PP2}), *LEGS]
LEG_STEPS = 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def make_buckets_small() -> None:
    from megatron_ove.parallel import gradient_buckets

    gradient_buckets.bucket_size = lambda data_size: 10_000


def check_padding(trainer: Any, topology: Any) -> None:
    """On some rank a bucket that is padded has one after it. A run named "faulty" saves as megatron-core does."""
    from megatron_ove.parallel import cpu_backend

    buckets = trainer.chunks[0].buffers[0].buckets
    count = torch.tensor(sum(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buckets[:-1]))
    dist.all_reduce(count)
    assert count > 0
    if trainer.config.run_dir.endswith("faulty"):
        (repaired,) = (entry for entry in cpu_backend._Installed.saved if entry[1].endswith("fully_reshardable"))
        setattr(*repaired)


@pytest.mark.parametrize("legs", [LEGS, pytest.param(MORE_LEGS, marks=pytest.mark.full)], ids=["some", "all"])
def test_a_run_goes_on_through_every_kind_of_layout(sources, tmp_path, capsys, legs):
    num_steps = LEG_STEPS * sum(len(layouts) for _, layouts in legs)
    for world_size, layouts in legs:
        runs = {name: {**BUCKETS, **layout, "run": "run", "stop_after": LEG_STEPS} for name, layout in layouts.items()}
        if world_size == 1:
            runs["whole"] = {"stop_after": num_steps, **BUCKETS}
        records = run_layouts(sources, tmp_path, world_size, runs, prepare=make_buckets_small, change=check_padding)
    assert len(records["one"].losses) == num_steps
    assert compare_losses(records["one"], records["whole"]) < TOLERANCE
    assert main(["inspect", "--verify", str(tmp_path / "run")]) == 0
    assert f"{num_steps} of" in capsys.readouterr().out


def launch(rank: int, world_size: int, launches: list[tuple[dict[str, Any], int | None]]) -> list[tuple[str, bool]]:
    """Starts runs in turn; returns the sentence that each ends with, and whether all ranks raise it.

    With a rank beside its configuration, this rank alone finds something wrong with the master weights.
    """
    from megatron_ove.optim.optimizer import DenseOptimizer
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    make_buckets_small()
    look, ends = DenseOptimizer.differing_master_weights, []
    topology = initialize_topology(check(launches[0][0]).parallel, seed=0)
    for data, seeing_rank in launches:
        if seeing_rank is not None:
            own = "final_norm.weight" if rank == seeing_rank else None
            DenseOptimizer.differing_master_weights = lambda self, state, own=own: own
        try:
            Trainer(check(data), topology).run()
            ends.append(("", False))
        except CheckpointError as error:
            ends.append((str(error), error.on_every_rank))
        DenseOptimizer.differing_master_weights = look
    return ends


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_whole_runs_go_on_to_the_bit_and_faulty_ones_are_refused(sources, tmp_path, precision, capsys):
    runs = {"cut": {}, "again": {"run": "cut"}, "whole": {"stop_after": 2 * LEG_STEPS}, "faulty": {}}
    runs = {name: {**BUCKETS, "stop_after": LEG_STEPS, **layout} for name, layout in runs.items()}
    options = {"precision": precision, "prepare": make_buckets_small, "change": check_padding}
    records = run_layouts(sources, tmp_path, 2, runs, **options)
    assert len(records["again"].losses) == 2 * LEG_STEPS
    assert records["again"].losses == records["whole"].losses
    for name, weight in records["whole"].weights.items():
        assert weight.equal(records["again"].weights[name]), name

    path = tmp_path / "faulty/checkpoints/step_00000002"
    faulty = grid_config(
        sources, tmp_path / "faulty", {**BUCKETS, "stop_after": 1}, precision=precision, sample_rate=1.0
    )
    new = {**faulty, "run_dir": str(tmp_path / "new"), "init_from": str(path)}
    first, *rest = zip(*run_distributed(launch, 2, [(faulty, None), (new, None), (new, None), (new, 1)]), strict=True)
    (sentence,) = set(first)
    assert sentence[1]
    assert sentence[0].startswith(f"the checkpoint {path} cannot be continued: the master weights of ")
    assert " are not its weights, because an earlier version of this program saved it and let mega" in sentence[0]
    assert "(parallel.use_distributed_optimizer with several gradient buckets)" in sentence[0]
    assert sentence[0].endswith(f"the weights are right, so start a new run with init_from: {path} and another run_dir")

    # A new run starts with its weights and goes on; where one rank sees something wrong, all end.
    assert rest[:2] == [(("", False), ("", False))] * 2
    assert read_common_state(tmp_path / "new/checkpoints/step_00000002")["initialized_from"] == str(path)
    (sentence,) = set(rest[2])
    assert sentence[1] and "the master weights of final_norm.weight are not its weights" in sentence[0]

    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", "--verify", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert main(["inspect", "--verify", str(path)]) == 2
    shown = capsys.readouterr().out
    assert "are not its weights, because an earlier" in shown and f"start a new one with init_from: {path}" in shown
