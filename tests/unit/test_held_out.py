"""Which held-out samples are looked at, and how they are divided into rounds of microbatches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ove.data.bad_samples import BadSample
from megatron_ove.data.held_out import HeldOutSamples
from megatron_ove.data.step_share import share_of
from megatron_ove.errors import DataError
from megatron_ove.shards.shard_set import ShardSet
from tests.support.id_shards import write_id_shard_set
from tests.support.tiny_run import check, tiny_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_id_shard_set(tmp_path_factory.mktemp("sets") / "clips", "video", 101))


def samples(shards: Any, *, data_size: int = 1, max_samples: int = 1000, parallel: Any = None) -> HeldOutSamples:
    data = tiny_config(dict.fromkeys(("image", "ocr", "video"), "nowhere"), "nowhere", parallel=parallel or {})
    data["evaluation"] = {"sets": {"video_labels": "nowhere"}, "max_samples": max_samples}
    topology: Any = SimpleNamespace(data_size=data_size, device="cpu")
    return HeldOutSamples("video_labels", check(data), shards, topology)


@pytest.mark.parametrize("data_size", [1, 3, 40])
@pytest.mark.parametrize("chunks", [None, 2])
def test_every_sample_is_in_one_round_and_rounds_fit_the_schedule(
    clips: ShardSet, data_size: int, chunks: int | None
) -> None:
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": chunks}
    held_out = samples(clips, data_size=data_size, parallel=parallel)
    plans = [held_out.plan(number) for number in range(held_out.num_rounds)]
    assert np.concatenate([np.sort(plan.rows) for plan in plans]).size == 101
    assert sorted(np.concatenate([plan.rows for plan in plans]).tolist()) == list(range(101))
    assert len({plan.tokens_per_microbatch for plan in plans}) == 1
    counts = np.zeros(data_size, dtype=np.int64)
    for plan in plans:
        assert plan.num_microbatches % (data_size * (chunks or 1)) == 0
        shares = [share_of(plan, replica, data_size) for replica in range(data_size)]
        assert len({share.num_microbatches for share in shares}) == 1 and shares[0].num_microbatches <= 16
        counts += [len(share.places) for share in shares]
        filled = np.bincount(plan.microbatch_index, weights=plan.num_tokens)
        assert filled.max() <= plan.tokens_per_microbatch <= 48
    assert counts.tolist() == held_out.sample_counts.tolist()
    assert data_size > 1 or held_out.num_rounds > 1


def test_samples_are_spread_evenly_and_always_the_same(clips: ShardSet) -> None:
    plan = samples(clips, max_samples=10).plan(0)
    assert sorted(plan.rows.tolist()) == [number * 101 // 10 for number in range(10)]
    assert plan.rows.tolist() == samples(clips, max_samples=10).plan(0).rows.tolist()
    assert not plan.seeds.any()


def test_a_held_out_sample_without_patches_is_named(clips: ShardSet) -> None:
    damaged = ShardSet.open(clips.directory)
    damaged.columns["num_patches"] = np.where(np.arange(101) == 7, 0, clips.num_patches)
    with pytest.raises(
        DataError, match=r"sample 7 of evaluation\.sets\.video_labels has 0 patches by its index, so the"
    ):
        samples(damaged)


def test_a_record_counts_for_its_own_set_and_from_its_first_step_on(clips: ShardSet) -> None:
    held_out = samples(clips)
    steps_and_sources = [
        (9, "held_out/video_labels"),
        (5, "held_out/video_labels"),
        (2, "held_out/other"),
        (1, "video"),
    ]
    held_out.know_bad(BadSample(step, source, 0, 33, "clip", "gone") for step, source in steps_and_sources)
    assert [held_out.is_known_bad(33, step) for step in (4, 5, 6)] == [False, True, True]
    assert not held_out.is_known_bad(34, 100)
