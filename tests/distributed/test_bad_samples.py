"""Samples that cannot be read: emptied on every rank that shares them, recorded, and bad again after a resume."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ove.data.bad_samples import BadSample, read_bad_samples
from tests.integration.test_resume import assert_equal_checkpoints, rows
from tests.support.distributed import WorkerError, run_distributed
from tests.support.tiny_run import check, tiny_config, write_tiny_sources

NUM_STEPS, KILLED_STEP, BAD_STEP = 8, 6, 4
"""Steps counted from 0: the run is killed in the seventh, its fifth has the bad sample, and the second was saved."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


def configuration(sources: dict[str, str], run_dir: Path, parallel: dict[str, Any], **data_section: Any) -> dict:
    data = tiny_config(
        sources,
        run_dir,
        sample_rate=0.5,
        parallel={"timeout_s": 60, **parallel},
        train={"num_steps": NUM_STEPS, "global_batch_size": 8, "precision": "fp32", "log_interval_steps": 1},
        checkpoint={"interval_steps": 2, "keep": 100},
    )
    data["data"]["sources"]["video"]["strategies"] = {"codec": 1.0, "frame_sampling": 0.0, "collage": 0.0}
    data["data"] |= data_section
    return data


class FailingReads:
    """Stands in for os.pread: fails `times` times where a member of a sample lies, on the ranks of one stage."""

    def __init__(self, shards: Any, row: int, member: str, times: float) -> None:
        self.place = shards.index.place(row, member)[0]
        self.times = times

    def __call__(self, handle: int, size: int, offset: int) -> bytes:
        if offset == self.place and self.times > 0:
            self.times -= 1
            if self.times % 2:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return os.pread(handle, size // 2, offset)
        return os.pread(handle, size, offset)


def train(
    rank: int, world_size: int, data: dict[str, Any], failure: dict[str, Any] | None, kills: bool
) -> dict[str, Any] | None:
    """Trains; `failure` names source, row, member, times and stage. Returns what a rank saw of the bad step."""
    from megatron_ove.data import read_ahead
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.shards.shard_set import ShardSet
    from megatron_ove.training.trainer import Trainer

    read_ahead.PAUSES_S = (0.0, 0.0, 0.0)
    config = check(data)
    topology = initialize_topology(config.parallel, seed=config.seed)
    opened = ShardSet.open

    def open_failing(directory: Any, **options: Any) -> Any:
        shards = opened(directory, **options)
        if failure and Path(directory).name == failure["source"] and topology.pipeline_rank == failure["stage"]:
            shards.files.pread = FailingReads(shards, failure["row"], failure["member"], failure["times"])
        return shards

    ShardSet.open = open_failing  # type: ignore[method-assign]
    try:
        trainer = Trainer(config, topology)
    finally:
        ShardSet.open = opened  # type: ignore[method-assign]
    seen: dict[str, Any] = {}
    load_step = trainer.loader.load_step

    def watched(step: int) -> Any:
        if kills and step == KILLED_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        loaded = load_step(step)
        if step == BAD_STEP:
            seen.update(num_bad=loaded.num_bad, samples=[describe(batch) for batch in loaded.batches])
        return loaded

    trainer.loader.load_step = watched  # type: ignore[method-assign]
    trainer.run()
    return seen


def describe(batch: Any) -> dict[str, tuple[bool, bool, bool]]:
    """Returns key -> whether patches, positions and labels have something other than nothing."""
    found = {}
    pack, samples = batch.main, batch.samples
    for row, key in enumerate(samples.keys):
        place = slice(*pack.cu_seqlens[row : row + 2].tolist())
        name = samples.source_names[samples.source[row]]
        labels = batch.inputs.get(f"{name}_labels")
        own = None if labels is None else labels[samples.of(name).tolist().index(row)]
        found[key] = (
            pack.patches is not None and bool(pack.patches[place].any()),
            bool(pack.positions[place].any()),
            own is not None and bool((own >= 0).any()),
        )
    return found


def first_seen(data: dict[str, Any], source: str) -> int:
    """Returns a row of a source that the bad step has and no step before it."""
    import torch

    from megatron_ove.data.build import build_source, open_shard_sets
    from megatron_ove.data.planner import planner_of

    config = check(data)
    shards = open_shard_sets(config)
    common = {"kinds": config.kinds, "patch_size": 14, "device": torch.device("cpu"), "num_threads": 1}
    built = [build_source(name, one, shards[name], **common) for name, one in config.data.sources.items()]
    planner, index = planner_of(config, built, data_size=1), list(config.data.sources).index(source)
    chosen = [plan.rows[plan.source_index == index] for plan in map(planner.plan, range(BAD_STEP + 1))]
    new = np.setdiff1d(chosen[BAD_STEP], np.concatenate(chosen[:BAD_STEP]))
    assert new.size
    return int(new[0])


LAYOUTS = {
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
PIXELS = {"source": "image", "member": "jpg", "stage": 0}
POSITIONS_OF_THE_LAST_STAGE = {"source": "video", "member": "positions.npy", "stage": 1}


@pytest.mark.parametrize(
    ("layout", "place", "times"),
    [
        pytest.param("dp2", PIXELS, float("inf"), marks=pytest.mark.full),
        ("dp2", PIXELS, 4),
        pytest.param("tp2_pp2", PIXELS, 4, marks=pytest.mark.full),
        ("tp2_pp2", POSITIONS_OF_THE_LAST_STAGE, float("inf")),
    ],
    ids=["dp2-for-good", "dp2-once", "tp2_pp2-once", "tp2_pp2-positions"],
)
def test_a_killed_run_with_a_bad_sample_ends_as_if_it_had_not_been_killed(sources, tmp_path, layout, place, times):
    world_size, parallel = LAYOUTS[layout]
    whole, cut = (configuration(sources, tmp_path / name, parallel) for name in ("whole", "cut"))
    failure = {**place, "row": first_seen(whole, place["source"]), "times": times}
    seen = run_distributed(train, world_size, whole, failure, False)
    with pytest.raises(WorkerError):
        run_distributed(train, world_size, cut, failure, True)
    for path in (tmp_path / "cut/checkpoints").iterdir():
        if path.name > "step_00000002":
            path.rename(tmp_path / path.name)
    # A read that failed once succeeds from here on.
    again = run_distributed(train, world_size, cut, failure if times == float("inf") else None, False)
    assert again == seen
    records = list(read_bad_samples(tmp_path / "whole"))
    assert list(read_bad_samples(tmp_path / "cut"))[: len(records)] == records
    first = min(records, key=lambda record: record.step)
    assert (first.step, first.source, first.row) == (BAD_STEP + 1, place["source"], failure["row"])
    assert (
        "cannot be read (Stale file handle); check the disk" in first.reason or "bytes, so the shard is" in first.reason
    )
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row["bad_samples"] for row in rows(tmp_path / "whole")][: BAD_STEP + 1] == [0] * BAD_STEP + [1]
    last = f"checkpoints/step_{NUM_STEPS:08d}"
    assert_equal_checkpoints(tmp_path / "whole" / last, tmp_path / "cut" / last)
    check_what_ranks_saw(seen, first)


def check_what_ranks_saw(seen: list[dict[str, Any]], bad: BadSample) -> None:
    holders = [one for one in seen if any(bad.key in batch for batch in one["samples"])]
    assert holders and all(one["num_bad"] == 1 for one in holders)
    assert all(one["num_bad"] == 0 for one in seen if one not in holders)
    for one in holders:
        for batch in one["samples"]:
            for key, found in batch.items():
                assert any(found) != (key == bad.key), (key, found)


def test_reads_that_fail_three_times_cost_nothing(sources, tmp_path):
    data = configuration(sources, tmp_path / "run", {})
    failure = {**PIXELS, "row": first_seen(data, "image"), "times": 3}
    (seen,) = run_distributed(train, 1, data, failure, False)
    assert seen["num_bad"] == 0
    assert not list(read_bad_samples(tmp_path / "run"))


def test_too_many_bad_samples_end_the_run_with_a_sentence(sources, tmp_path):
    data = configuration(sources, tmp_path / "run", {}, max_bad_samples_share=0.0)
    failure = {**PIXELS, "row": first_seen(data, "image"), "times": float("inf")}
    with pytest.raises(WorkerError) as caught:
        run_distributed(train, 2, data, failure, False)
    text = str(caught.value)
    assert "1 of the 40 samples up to step 5 could not be read, more than data.max_bad_samples_share = 0 allows" in text
    assert f"{tmp_path}/run/rejects names each with its reason: repair the shards or the disk, move that folder" in text
