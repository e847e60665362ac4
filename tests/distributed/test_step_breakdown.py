"""The phases of real steps: they add up, slowness shows up where it belongs, waiting ranks wait in communication.

Time is made up, so every figure is known exactly and a busy machine changes none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.fake_clock import FakeClock
from tests.support.tiny_run import check, tiny_config, write_tiny_sources

USUAL_S, DELAY_S = 1.0, 8.0
"""Seconds that each phase takes on each rank in every step, and how much longer the slow one takes."""

Row = dict[str, float]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wait: Callable[[], None]) -> torch.Tensor:
        ctx.wait = wait
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.wait()
        return gradient, None


def train(rank: int, world_size: int, data: dict[str, Any], slow: Mapping[int, tuple[str, int]]) -> list[float]:
    """Trains; step s is slow in phase `slow[s][0]` on rank `slow[s][1]`; returns each step's seconds by our clock."""
    from megatron_ove.outputs import VisionFeatures
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.build_model import model_of
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    clock = FakeClock(Path(f"{config.run_dir}.clock"), rank, world_size)
    clock.drive(trainer.timers)
    spent: set[tuple[int, str]] = set()
    seconds: list[float] = []

    def wait(phase: str) -> None:
        step = trainer.state.step + 1
        if (step, phase) in spent:  # once a step, not once a microbatch
            return
        spent.add((step, phase))
        clock.spend(USUAL_S)
        if slow.get(step) == (phase, rank):
            clock.keep_waiting(DELAY_S)

    def before(owner: Any, name: str, phase: str) -> None:
        call = getattr(owner, name)

        def slowed(*args: Any, **kwargs: Any) -> Any:
            wait(phase)
            return call(*args, **kwargs)

        object.__setattr__(owner, name, slowed)

    before(trainer.loader, "load_step", "data")
    before(trainer.optimizer, "step", "optimizer")
    encoder = model_of(trainer.chunks[-1]).encoder
    encode = encoder.forward

    def slow_encoder(pack: Any) -> Any:
        wait("forward")
        output = encode(pack)
        if isinstance(output, VisionFeatures):
            pooled = _SlowBackward.apply(output.pooled, lambda: wait("backward"))
            return replace(output, pooled=pooled)
        return _SlowBackward.apply(output, lambda: wait("backward"))

    object.__setattr__(encoder, "forward", slow_encoder)
    if trainer.objectives is not None:
        head = trainer.objectives.forward

        def slow_head(features: VisionFeatures, *args: Any) -> Any:
            pooled = _SlowBackward.apply(features.pooled, lambda: wait("head"))
            return head(replace(features, pooled=pooled), *args)

        trainer.objectives.forward = slow_head  # type: ignore[method-assign]
    one_step = trainer._one_step

    def clocked(*args: Any) -> Any:
        started = clock.now()
        result = one_step(*args)
        seconds.append(clock.now() - started)
        return result

    trainer._one_step = clocked  # type: ignore[method-assign]
    trainer.run()
    return seconds


def run(
    sources: dict[str, str], run_dir: Path, world_size: int, parallel: dict[str, Any], slow: dict[int, tuple[str, int]]
) -> tuple[list[list[float]], list[Row]]:
    loop = {"num_steps": max(slow) + 1, "global_batch_size": 16, "precision": "fp32", "log_interval_steps": 1}
    data = tiny_config(sources, run_dir, parallel={"timeout_s": 60, **parallel}, train=loop)
    seconds = run_distributed(train, world_size, data, slow, timeout_s=120)
    return seconds, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def phases(row: Row, prefix: str) -> Row:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def test_the_slow_phase_of_a_step_is_the_one_that_is_slow_and_all_add_up(sources, tmp_path):
    names = ("data", "forward", "backward", "head", "optimizer")
    slow = {step: (phase, 0) for step, phase in enumerate(names, 2)}
    (seconds,), rows = run(sources, tmp_path / "run", 1, {}, slow)
    assert "phase_s_max/forward" not in rows[0]  # one rank: the mean is the slowest
    for step, (clocked, row) in enumerate(zip(seconds, rows, strict=True), start=1):
        expected = dict.fromkeys(names, USUAL_S) | {"communication": 0.0, "other": 0.0}
        if step in slow:
            expected[slow[step][0]] += DELAY_S
        assert phases(row, "phase_s/") == expected
        assert row["step_time_s"] == clocked == sum(expected.values())
        assert phases(row, "phase_share/") == pytest.approx({name: s / clocked for name, s in expected.items()})


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"use_distributed_optimizer": True}),
    ],
    ids=["pp2", "pp2_vpp2", "tp2_sp", "dp2"],
)
def test_a_rank_that_waits_for_a_slow_one_communicates(sources, tmp_path, world_size, parallel):
    """Also under the interleaved schedule, which waits outside all of megatron-core's own timers."""
    slow = {2: ("forward", 1), 3: ("backward", 1)}
    seconds, rows = run(sources, tmp_path / "run", world_size, parallel, slow)
    for step, row in enumerate(rows, start=1):
        mean, largest = phases(row, "phase_s/"), phases(row, "phase_s_max/")
        # Heads are on the last stage.
        head = USUAL_S / parallel.get("pipeline_model_parallel_size", 1)
        expected = dict.fromkeys(("data", "forward", "backward", "optimizer"), USUAL_S)
        expected |= {"head": head, "communication": 0.0, "other": 0.0}
        slowest = {**expected, "head": USUAL_S}
        if step in slow:  # one of the two ranks was slow in the phase, and the other one waited for it
            for name in (slow[step][0], "communication"):
                expected[name] += DELAY_S / 2
                slowest[name] += DELAY_S
        assert (mean, largest) == (expected, slowest)
        assert sum(mean.values()) == sum(rank[step - 1] for rank in seconds) / world_size


def train_counted(rank: int, world_size: int, data: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Trains with a known peak rate; returns the tokens, squared lengths and samples of this rank's batches by step."""
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    trainer = Trainer(config, initialize_topology(config.parallel, seed=config.seed), peak_rate=1e9)
    counts, load_step = [], trainer.loader.load_step

    def counted(step: int) -> Any:
        loaded = load_step(step)
        lengths = torch.cat([batch.main.cu_seqlens.diff() for batch in loaded.batches])
        counts.append((int(lengths.sum()), int(lengths.square().sum()), len(lengths)))
        return loaded

    trainer.loader.load_step = counted  # type: ignore[method-assign]
    trainer.run()
    return counts


def test_rates_count_what_all_replicas_encode(sources, tmp_path):
    loop = {"num_steps": 4, "global_batch_size": 16, "precision": "fp32", "log_interval_steps": 2}
    data = tiny_config(sources, tmp_path, parallel={"timeout_s": 60}, train=loop)
    ranks = run_distributed(train_counted, 2, data)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    hidden, ffn, layers, area = 64, 96, 4, 3 * 14**2
    for index, row in enumerate(rows):
        steps = [rank[step] for rank in ranks for step in (2 * index, 2 * index + 1)]
        tokens, squares, samples = (sum(one[place] for one in steps) for place in range(3))
        assert samples == 2 * 16
        # Products of two operations: forward once, backward twice; the embedding of patches has no gradient to pass on.
        products = 3 * layers * (tokens * (4 * hidden**2 + 2 * hidden * ffn) + 2 * squares * hidden)
        products += 3 * (tokens * (2 * hidden**2 + 2 * hidden) + samples * (hidden**2 + 2 * hidden * ffn))
        products += 2 * tokens * area * hidden
        expected = 2 * products / 2 / row["step_time_s"] / 2  # by steps and devices
        assert row["tflops_per_device"] == pytest.approx(expected / 1e12, rel=1e-9)
        assert row["mfu"] == pytest.approx(expected / 1e9, rel=1e-9)
