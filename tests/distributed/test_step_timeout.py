"""The short timeout of steps: held by every group, lifted for saves, and a sentence where it runs out."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megatron_ove.errors import TrainingError
from tests.support.distributed import run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources

LONG_S, MIDDLE_S, SHORT_S = 90, 80, 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def config(sources: dict[str, str], run_dir: Path, **parallel: Any) -> dict[str, Any]:
    timeouts = {"timeout_s": LONG_S, "step_timeout_s": MIDDLE_S}
    data = tiny_config(sources, run_dir, parallel={**timeouts, **parallel}, train={"num_steps": 3})
    data["checkpoint"] = {"interval_steps": 2, "save_initial": True}
    return data


def make_trainer(data: dict[str, Any]):
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    checked = check(data)
    return Trainer(checked, initialize_topology(checked.parallel, seed=checked.seed))


def present_timeouts(topology) -> set[float]:
    """The timeouts, in seconds, of all groups that a part of the program is handed."""
    import torch
    import torch.distributed as dist

    groups = [value for value in vars(topology).values() if isinstance(value, dist.ProcessGroup)]
    groups += [value for value in vars(topology.process_groups).values() if isinstance(value, dist.ProcessGroup)]
    assert len(groups) > 10
    backends = [group._get_backend(torch.device("cpu")) for group in (*groups, dist.group.WORLD)]
    return {backend.options._timeout / timedelta(seconds=1) for backend in backends}


def host_timeouts(topology) -> set[float]:
    """The timeouts, in seconds, of the groups of the thread that prepares steps."""
    import torch

    groups = [topology.data_host_group, topology.replica_host_group]
    backends = [group._get_backend(torch.device("cpu")) for group in groups if group.size() > 1]
    return {LONG_S, *(backend.options._timeout / timedelta(seconds=1) for backend in backends)}


def note_timeouts(rank: int, world_size: int, data: dict[str, Any]) -> list[tuple[str, set[float]]]:
    """Runs; returns what happened with the timeouts that held then."""
    from megatron_ove.parallel.timeouts import set_collective_timeout

    trainer = make_trainer(data)
    topology, notes = trainer.train_step._topology, []
    assert host_timeouts(topology) == {LONG_S}
    set_collective_timeout(LONG_S)  # the group of this test's world was made with another one

    def noting(name: str, call):
        def noted(*args: Any, **kwargs: Any):
            notes.append((name, present_timeouts(topology)))
            return call(*args, **kwargs)

        return noted

    trainer.loader.load_step = noting("step", trainer.loader.load_step)
    trainer.checkpoints.save = noting("save", trainer.checkpoints.save)
    trainer.run()
    return [*notes, ("end", present_timeouts(topology))]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"use_distributed_optimizer": True})],
)
def test_every_group_has_the_short_timeout_in_later_steps_only(sources, tmp_path, world_size, parallel):
    for notes in run_distributed(note_timeouts, world_size, config(sources, tmp_path / "run", **parallel)):
        assert notes == [
            ("save", {LONG_S}),
            ("step", {LONG_S}),
            ("step", {MIDDLE_S}),
            ("save", {LONG_S}),
            ("step", {MIDDLE_S}),
            ("save", {LONG_S}),
            ("end", {LONG_S}),
        ]


def test_the_short_timeout_is_never_above_the_long_one(sources, tmp_path):
    data = config(sources, tmp_path / "run", step_timeout_s=LONG_S + 1)
    (notes,) = run_distributed(note_timeouts, 1, data)
    assert {seconds for _, timeouts in notes for seconds in timeouts} == {LONG_S}


def hang_in_a_step(rank: int, world_size: int, data: dict[str, Any], told: str) -> str:
    """Rank 1 does not go on with step 2 until rank 0 has given up."""
    import torch.distributed as dist

    trainer = make_trainer(data)
    load_step = trainer.loader.load_step

    def slow(step: int):
        while rank == 1 and step == 1 and not Path(told).exists():
            time.sleep(0.05)
        return load_step(step)

    trainer.loader.load_step = slow  # type: ignore[method-assign]
    try:
        trainer.run()
    except TrainingError as error:
        text = str(error)
    except RuntimeError as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = ""
    if rank == 0:
        Path(told).touch()
    dist.destroy_process_group()  # the ranks cannot meet any more
    return text


def test_a_rank_that_hangs_ends_the_others_with_a_sentence(sources, tmp_path):
    data = config(sources, tmp_path / "run", use_distributed_optimizer=True, step_timeout_s=SHORT_S)
    first, _ = run_distributed(hang_in_a_step, 2, data, str(tmp_path / "told"))
    assert first == (
        "this rank waited 3 s for another one after step 1 and gave up (parallel.step_timeout_s = 3), so some rank "
        "has died, hangs, or is that much slower; look in the logs for the first message of a rank that says something "
        "else (docs/debugging.md), or raise parallel.step_timeout_s if it really takes that long"
    )
