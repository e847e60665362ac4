"""The message before a step, and where rows of uneven ranks lie: by definition, on odd, uneven and empty shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.objectives.step_exchange import MessageLayout
from megatron_ove.parallel.row_blocks import arrange_gathered_rows, concatenate_ranges


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_replicas=st.integers(1, 6), widths=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_everybody_reads_what_everybody_wrote(data, num_replicas, widths):
    row = st.lists(st.integers(0, 5), min_size=num_replicas, max_size=num_replicas)
    counts = [np.array(data.draw(row)) for _ in widths]
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    sent = [
        [
            generator.integers(-(2**31), 2**31, (size[replica], width), dtype=np.int32)
            for size, width in zip(counts, widths, strict=True)
        ]
        for replica in range(num_replicas)
    ]
    flags = [data.draw(st.booleans()) for _ in range(num_replicas)]
    items = generator.integers(0, 2**31 - 1, (num_replicas, len(widths)))
    layout = MessageLayout(counts, widths)
    gathered = np.stack(
        [
            layout.pack(replica, has_mistake=flags[replica], item_counts=items[replica].tolist(), numbers=sent[replica])
            for replica in range(num_replicas)
        ]
    )
    assert gathered.dtype == np.int32 and gathered.shape == (num_replicas, layout.length)
    read = layout.unpack(gathered)
    assert read.has_mistake == any(flags)
    assert read.item_counts.tolist() == items.sum(axis=0).tolist()  # beyond int32 too
    for index, numbers in enumerate(read.numbers):
        expected = np.concatenate([replica[index] for replica in sent])
        assert numbers.dtype == np.int32 and numbers.shape == expected.shape and (numbers == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_ranges_one_after_the_other(ranges):
    starts, lengths = (np.array([pair[side] for pair in ranges], dtype=np.int64) for side in (0, 1))
    expected = [number for start, length in ranges for number in range(start, start + length)]
    assert concatenate_ranges(starts, lengths).tolist() == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "counts", [[[2, 2, 2]], [[3, 0, 1]], [[0, 0, 2], [1, 4, 0]], [[2, 2, 2], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]]
)
def test_places_of_gathered_rows(counts, rank):
    counts = np.array(counts)
    rows = arrange_gathered_rows(counts, rank, torch.device("cpu"))
    totals = counts.sum(axis=0)
    assert rows.longest == totals.max()
    # What each rank sends, padded, as (rank, block, row of the block).
    names = [[(r, b, i) for b in range(len(counts)) for i in range(counts[b, r])] for r in range(3)]
    gathered = [name for sent in names for name in [*sent, *[None] * (rows.longest - len(sent))]]
    expected = [(r, b, i) for b in range(len(counts)) for r in range(3) for i in range(counts[b, r])]
    found = gathered if rows.places is None else [gathered[place] for place in rows.places.tolist()]
    assert found == expected
    assert (rows.places is None) == (len(counts) == 1 and len(set(totals.tolist())) == 1)
    assert [expected[place] for place in rows.own.tolist()] == names[rank]
