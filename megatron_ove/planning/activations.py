"""How many microbatches are under way at the fullest moment of megatron-core's schedule, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ove.planning.footprint import ChunkActivations
from megatron_ove.planning.layout import Layout


def peak_activations(
    layout: Layout, stage: int, num_microbatches: int, parts: Sequence[ChunkActivations]
) -> tuple[int, list[int]]:
    """Plays megatron-core's schedule through and returns its fullest moment.

    Plain 1F1B runs as many forward passes ahead as there are stages to come. Interleaved, microbatches go in groups of
    as many as stages, chunk by chunk, forwards in order and backwards with the chunks reversed.

    Args:
        layout: of the ranks.
        stage: pipeline stage.
        num_microbatches: of one replica.
        parts: one microbatch in each chunk of the rank.

    Returns:
        (bytes, microbatches of each chunk that are between forward and backward pass then).
    """
    stages, chunks = layout.pipeline, layout.chunks
    group = stages if chunks > 1 else num_microbatches
    order = [
        chunk
        for first in range(0, num_microbatches, group)
        for chunk in range(chunks)
        for _ in range(min(group, num_microbatches - first))
    ]
    ahead = stages - stage - 1 if chunks == 1 else (stages - stage - 1) * 2 + (chunks - 1) * stages
    ahead = min(ahead, len(order))
    alive, most, fullest = [0] * chunks, 0, [0] * chunks
    for position in range(len(order) + ahead):
        if position < len(order):
            alive[order[position]] += 1
        if position < ahead:
            continue
        chunk = chunks - 1 - order[position - ahead]
        size = sum(count * part.kept for count, part in zip(alive, parts, strict=True)) + parts[chunk].again
        if size > most:
            most, fullest = size, list(alive)
        alive[chunk] -= 1
    return most, fullest
