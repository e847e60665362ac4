"""A replica's share of a step: the same samples and places as the plan, whatever the number of replicas."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ove.data.planner import MicrobatchPlan
from megatron_ove.data.step_decoder import find_known, places_of
from megatron_ove.data.step_share import count_samples, share_of

NAMES = ("images", "pages", "clips")


def random_plan(seed: int, num_samples: int, num_microbatches: int) -> MicrobatchPlan:
    random = np.random.default_rng(seed)
    source_index = np.sort(random.integers(0, len(NAMES), num_samples))
    return MicrobatchPlan(
        step=5,
        tokens_per_microbatch=4096,
        num_microbatches=num_microbatches,
        source_index=source_index,
        ordinals=np.arange(num_samples) + 100,
        rows=random.integers(0, 1000, num_samples),
        seeds=random.integers(0, 1 << 60, num_samples),
        num_tokens=random.integers(1, 50, num_samples),
        microbatch_index=random.integers(0, num_microbatches, num_samples),
    )


@pytest.mark.parametrize(("num_samples", "data_size", "of_replica"), [(40, 1, 4), (40, 3, 2), (5, 4, 3), (0, 2, 1)])
def test_shares_are_the_plan(num_samples: int, data_size: int, of_replica: int) -> None:
    plan = random_plan(num_samples, num_samples, data_size * of_replica)
    counts = count_samples(plan, NAMES, data_size)
    for rank in range(data_size):
        share = share_of(plan, rank, data_size)
        assert share.num_microbatches == of_replica
        for i, microbatch in enumerate(plan.microbatches_of(rank, data_size)):
            expected = plan.samples_of(microbatch)
            mine = share.of_microbatch(i)
            assert np.array_equal(share.places[mine], expected)
            stops = np.cumsum(plan.num_tokens[expected]).tolist()
            starts = [0, *stops[:-1]] if stops else []
            assert places_of(share, mine) == [(i, slice(a, b)) for a, b in zip(starts, stops, strict=True)]
            for index, name in enumerate(NAMES):
                assert counts[name].shape == (data_size, of_replica)
                assert counts[name][rank, i] == (plan.source_index[expected] == index).sum()


def test_recorded_samples_are_found_by_source_and_ordinal() -> None:
    plan = random_plan(1, 30, 2)
    share = share_of(plan, 0, 1)
    wanted = [int(place) for place in (3, 17, 29)]
    known = {5: frozenset((NAMES[plan.source_index[place]], int(plan.ordinals[place])) for place in wanted)}
    assert sorted(share.places[find_known(share, known, NAMES)].tolist()) == wanted
    assert not find_known(share, {4: known[5]}, NAMES).any()
    assert not find_known(share, {5: frozenset({("gone", 103)})}, NAMES).any()
