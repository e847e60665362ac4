"""Checkpoints of the distributed optimizer with several padded gradient buckets: continued in the same and in every
other kind of layout, and how one is refused that was written before megatron-core's fault was repaired."""

from __future__ import annotations

import logging
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
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
BUCKETS = {"use_distributed_optimizer": True, **OVERLAP}
# Processes -> layouts in which one run goes on in turn. Every leg reads what the one before it has saved.
LEGS: list[tuple[int, dict[str, dict[str, Any]]]] = [
    (2, {"dp2": {"overlap_param_gather": False}, "dp2 again": {}}),
    (3, {"dp3": {}}),
    (4, {"dp4": {}, "tp2 x dp2": {**TP2, "sequence_parallel": True}, "pp2 x dp2": PP2, "interleaved": {**PP2, **VPP2}}),
    (1, {"one": {}}),
]
LEG_STEPS = 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def make_buckets_small() -> None:
    from megatron_ove.parallel import gradient_buckets

    gradient_buckets.bucket_size = lambda data_size: 10_000


def make_buckets_small_and_leave_the_fault() -> None:
    from megatron_ove.parallel import cpu_backend

    make_buckets_small()
    cpu_backend._repair_checkpoints_of_padded_buckets = lambda: None


def check_padding(trainer: Any, topology: Any) -> None:
    """On some rank a bucket that is padded has one after it."""
    buckets = trainer.chunks[0].buffers[0].buckets
    padded = sum(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buckets[:-1])
    count = torch.tensor(padded)
    dist.all_reduce(count)
    assert count > 0


def legs(layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**BUCKETS, **layout, "run": "run", "stop_after": LEG_STEPS} for name, layout in layouts.items()}


def test_a_run_goes_on_through_every_kind_of_layout(sources, tmp_path, capsys):
    num_steps = LEG_STEPS * sum(len(layouts) for _, layouts in LEGS)
    (expected,) = run_layouts(sources, tmp_path, 1, {"whole": {"stop_after": num_steps}}).values()
    for world_size, layouts in LEGS:
        records = run_layouts(
            sources, tmp_path, world_size, legs(layouts), prepare=make_buckets_small, change=check_padding
        )
    record = list(records.values())[-1]
    assert len(record.losses) == num_steps
    assert compare_losses(record, expected) < TOLERANCE
    assert main(["inspect", "--verify", str(tmp_path / "run")]) == 0
    assert f"{num_steps} of" in capsys.readouterr().out


def test_a_bf16_run_goes_on_to_the_bit(sources, tmp_path):
    layouts = {"cut": BUCKETS, "again": {**BUCKETS, "run": "cut"}, "whole": {**BUCKETS, "stop_after": 2 * LEG_STEPS}}
    layouts = {name: {"stop_after": LEG_STEPS, **layout} for name, layout in layouts.items()}
    records = run_layouts(
        sources, tmp_path, 2, layouts, precision="bf16", prepare=make_buckets_small, change=check_padding
    )
    assert len(records["again"].losses) == 2 * LEG_STEPS
    assert records["again"].losses == records["whole"].losses
    for name, weight in records["whole"].weights.items():
        assert weight.equal(records["again"].weights[name]), name


def launch(rank: int, world_size: int, data: dict[str, Any], seeing_rank: int | None = None) -> tuple[str, bool, list]:
    """Starts a run for two steps; returns the sentence it ends with, whether all ranks raise it, and what it logs.

    With `seeing_rank` this rank alone finds something wrong with the master weights.
    """
    from megatron_ove.optim.optimizer import EncoderOptimizer
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    make_buckets_small()
    if rank == seeing_rank:
        EncoderOptimizer.differing_master_weights = lambda self, state: "patch_embedding.weight"
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_ove.checkpoint").addHandler(handler)
    config = check(data)
    try:
        Trainer(config, initialize_topology(config.parallel, seed=config.seed)).run()
    except CheckpointError as error:
        return str(error), error.on_every_rank, messages
    return "", False, messages


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_with_the_fault_is_refused_and_can_start_a_new_run(sources, tmp_path, precision, capsys):
    layout = {**BUCKETS, "stop_after": LEG_STEPS}
    prepare = make_buckets_small_and_leave_the_fault
    run_layouts(sources, tmp_path, 2, {"run": layout}, precision=precision, prepare=prepare)
    path = tmp_path / "run/checkpoints/step_00000002"

    data = grid_config(sources, tmp_path / "run", BUCKETS, precision=precision, sample_rate=1.0)
    answers = run_distributed(launch, 2, data)
    assert [on_every_rank for _, on_every_rank, _ in answers] == [True, True]
    (sentence,) = {sentence for sentence, _, _ in answers}
    assert sentence.startswith(f"the checkpoint {path} cannot be continued: the master weights of ")
    assert " are not its weights, because an earlier version of this program saved it and let megatron-core" in sentence
    assert "(parallel.use_distributed_optimizer with several gradient buckets)" in sentence
    assert sentence.endswith(f"the weights are right, so start a new run with init_from: {path} and another run_dir")

    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", "--verify", str(path)]) == 2
    shown = capsys.readouterr().out
    assert "are not its weights, because an earlier" in shown and f"start a new one with init_from: {path}" in shown

    new = {**data, "run_dir": str(tmp_path / "new"), "init_from": str(path)}
    new["train"] = {**data["train"], "stop_after_steps": LEG_STEPS}
    for _ in range(2):  # its own checkpoint is a whole one
        sentence, _, messages = run_distributed(launch, 1, new)[0]
        assert sentence == ""
    assert not any("init_from" in message for message in messages)
    assert read_common_state(tmp_path / "new/checkpoints/step_00000004")["initialized_from"] == str(path)


def test_what_one_rank_sees_ends_the_run_on_all(sources, tmp_path):
    data = grid_config(
        sources, tmp_path / "run", {**BUCKETS, **PP2, "stop_after": 1}, precision="fp32", sample_rate=1.0
    )
    assert [sentence for sentence, _, _ in run_distributed(launch, 2, data)] == ["", ""]
    answers = run_distributed(launch, 2, data, 1)
    assert answers[0][0] == answers[1][0]
    assert "the master weights of patch_embedding.weight are not its weights" in answers[0][0]
