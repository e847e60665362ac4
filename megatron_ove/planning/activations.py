"""Bytes that the backward pass keeps of a microbatch, by part of the encoder, and how many microbatches are under way.

Counted from what the local layers save: per token and layer, with h the width, f that of the MLP and t the tensor
group, inputs and outputs of two norms (4 h, split over t under sequence parallelism), queries, keys and values as the
projection made them (3 h / t), rotated queries and keys (2 h / t), what attention puts out and what the output
projection is given (2 h / t), the MLP before and after its activation (2 f / t). Transformer Engine's layers save the
same tensors; in FP8 they keep inputs of matrix products in one byte. Korthikanti et al., "Reducing activation
recomputation in large transformer models", 2022, is the same count for a decoder with dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.layout import Layout

_STATISTIC = 4
"""Bytes of a norm's mean or deviation, or of attention's log-sum-exp, per token."""


@dataclass(frozen=True)
class ChunkActivations:
    """One microbatch in one model chunk.

    Attributes:
        kept: bytes from its forward to its backward pass.
        again: bytes that recomputation adds at the most, one layer at a time, in its backward pass.
        work: bytes of gradients at the largest moment of its backward pass.
    """

    kept: int
    again: int
    work: int


def activation_bytes(config: TrainConfig, precision: str | None = None) -> int:
    """Bytes of one activation."""
    return 2 if (precision or config.train.precision) == "bf16" else 4


def chunk_activations(
    config: TrainConfig, layout: Layout, *, stage: int, chunk: int, num_samples: int
) -> ChunkActivations:
    """Counts one microbatch of a model chunk.

    Args:
        config: the run.
        layout: of the ranks.
        stage: pipeline stage.
        chunk: of the rank.
        num_samples: samples of the microbatch, which the pooling head sees.
    """
    encoder, item = config.encoder, activation_bytes(config)
    tokens, hidden = config.data.tokens_per_microbatch, config.encoder.hidden_size
    share = tokens // layout.token_share
    work, core = _work_bytes(config, layout), _core_bytes(config, layout)
    layer = {"none": _layer_bytes(config, layout) + core, "selective": _layer_bytes(config, layout)}
    stored = layer.get(encoder.recompute, share * hidden * item)
    again = _layer_bytes(config, layout) + core - stored
    kept = len(layout.layers_of(stage, chunk)) * stored + _rotary_bytes(config)
    if layout.is_first(stage, chunk):
        kept += share * (3 * encoder.patch_size**2 * item + hidden * item + 2 * _STATISTIC)
    if not layout.is_last(stage, chunk):
        return ChunkActivations(kept + share * hidden * item, again, work)  # what it sends on stays until it comes back
    if encoder.use_head:
        head = share * (hidden * item + 2 * _STATISTIC) + _pooling_bytes(config, num_samples)
        kept, again = kept + head, max(0, again - head)  # the head's backward pass is over when that of a layer begins
        # Gradients of its joint projection's two slices, and their sum, each as large as the whole; of keys and values.
        work = max(work, 3 * 3 * hidden * hidden * item + 3 * tokens * hidden * item)
    return ChunkActivations(kept, again, work)


def _layer_bytes(config: TrainConfig, layout: Layout) -> int:
    """Returns what one layer keeps besides its core attention."""
    encoder, item = config.encoder, activation_bytes(config)
    operand = 1 if encoder.fp8 != "off" else item
    tokens = config.data.tokens_per_microbatch
    share = tokens // layout.token_share
    hidden, ffn = encoder.hidden_size // layout.tensor, encoder.ffn_hidden_size // layout.tensor
    norms = share * (2 * encoder.hidden_size * (item + operand) + 4 * _STATISTIC)
    projections = tokens * hidden * (3 * item + operand)
    mlp = tokens * ffn * (item + operand)
    return norms + projections + mlp


def _core_bytes(config: TrainConfig, layout: Layout) -> int:
    """Returns what core attention keeps: rotated queries and keys, its output, the log-sum-exp."""
    encoder, tokens = config.encoder, config.data.tokens_per_microbatch
    heads = encoder.num_attention_heads // layout.tensor
    return tokens * heads * (3 * encoder.head_dim * activation_bytes(config) + _STATISTIC)


def _work_bytes(config: TrainConfig, layout: Layout) -> int:
    """Returns the gradients that are alive together in the backward pass of a layer."""
    encoder, item = config.encoder, activation_bytes(config)
    tokens = config.data.tokens_per_microbatch
    hidden, ffn = encoder.hidden_size // layout.tensor, encoder.ffn_hidden_size // layout.tensor
    gathered = tokens * encoder.hidden_size * item  # the residual's gradient, and the block's output or input
    mlp = 2 * tokens * ffn * item + encoder.hidden_size * ffn * item
    attention = 6 * tokens * hidden * item
    return 2 * gathered + max(mlp, attention)


def _rotary_bytes(config: TrainConfig) -> int:
    """Returns the tables of cosines and sines, which all layers of a chunk share."""
    return 2 * config.data.tokens_per_microbatch * config.encoder.head_dim * activation_bytes(config)


def _pooling_bytes(config: TrainConfig, num_samples: int) -> int:
    """Returns tokens, keys and values of all tokens, and a few vectors of each sample."""
    encoder, item = config.encoder, activation_bytes(config)
    tokens, hidden = config.data.tokens_per_microbatch, encoder.hidden_size
    sample = 6 * hidden * item + 2 * encoder.ffn_hidden_size * item + 2 * hidden * 4
    return 3 * tokens * hidden * item + num_samples * sample


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
