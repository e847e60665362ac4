"""What the OneVision-Encoder needs, counted from the modules in `model/`.

Of activations, what the local layers save: per token and layer, with h the width, f that of the MLP and t the tensor
group, inputs and outputs of two norms (4 h, split over t under sequence parallelism), queries, keys and values as the
projection made them (3 h / t), rotated queries and keys (2 h / t), what attention puts out and what the output
projection is given (2 h / t), the MLP before and after its activation (2 f / t). Transformer Engine's layers save the
same tensors; in FP8 they keep inputs of matrix products in one byte. Korthikanti et al., "Reducing activation
recomputation in large transformer models", 2022, is the same count for a decoder with dropout.

A multiplication and an addition count as two operations. A backward pass costs twice its forward pass, once for inputs
and once for weights; patches need no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.footprint import ChunkActivations, EncoderFootprint, Message, Work, activation_bytes
from megatron_ove.planning.layout import Layout, Place
from megatron_ove.planning.parameters import Parameter
from megatron_ove.planning.workload import Workload

_STATISTIC = 4
"""Bytes of a norm's mean or deviation, or of attention's log-sum-exp, per token."""

# Element-wise passes of a layer, forward and backward, in reads and writes of one value per token. Counted from the
# local layers: norms 2 x (2 + 4), bias and residual 2 x (3 + 2) on the full width; rotation of queries and keys, which
# materialises its parts, 2 x (8 + 8), copies around attention 8 on the width's share; bias 4 and GELU 5 on the MLP's.
_FULL_WIDTH_PASSES, _HEAD_PASSES, _MLP_PASSES = 22, 40, 9


class VitFootprint(EncoderFootprint):
    """The OneVision-Encoder."""

    def parameters(self, config: TrainConfig, layout: Layout, *, stage: int, chunk: int) -> list[Parameter]:
        return chunk_parameters(_section(config), layout, stage=stage, chunk=chunk)

    def activations(
        self, config: TrainConfig, layout: Layout, *, stage: int, chunk: int, num_samples: int
    ) -> ChunkActivations:
        return chunk_activations(config, layout, stage=stage, chunk=chunk, num_samples=num_samples)

    def work(
        self, config: TrainConfig, layout: Layout, stage: int, *, squared_lengths: float, num_samples: float
    ) -> Work:
        return stage_work(config, layout, stage, squared_lengths=squared_lengths, num_samples=num_samples)

    def messages(self, config: TrainConfig, layout: Layout, place: Place, workload: Workload) -> Iterator[Message]:
        """Yields those of attention and MLP of every layer; in the backward pass full recompute sends what the forward
        pass sent."""
        hidden = config.data.tokens_per_microbatch * config.encoder.hidden_size * activation_bytes(config)
        layers = sum(len(layout.layers_of(place.stage, chunk)) for chunk in range(layout.chunks))
        blocks = 2 * layers * workload.num_microbatches
        forwards = 2 if _section(config).recompute == "full" else 1
        if layout.sequence_parallel:
            yield Message("tensor", "all_gather", hidden, (forwards + 2) * blocks)
            yield Message("tensor", "reduce_scatter", hidden, (forwards + 1) * blocks)
            if place.stage == layout.pipeline - 1:
                yield Message("tensor", "all_gather", hidden, workload.num_microbatches)  # tokens for the pooling head
        else:
            yield Message("tensor", "all_reduce", hidden, (forwards + 1) * blocks)

    def memory_changes(self, config: TrainConfig) -> Iterator[dict[str, Any]]:
        modes = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
        return ({"encoder.recompute": mode} for mode in modes[_section(config).recompute])


def _section(config: TrainConfig) -> EncoderConfig:
    section = config.encoder
    assert isinstance(section, EncoderConfig)
    return section


def chunk_parameters(encoder: EncoderConfig, layout: Layout, *, stage: int, chunk: int) -> list[Parameter]:
    """Returns the parameters of a model chunk, in the order of the modules of local layers."""
    hidden, parameters = encoder.hidden_size, []
    if layout.is_first(stage, chunk):
        parameters.append(Parameter("patch_embed.weight", (hidden, 3 * encoder.patch_size**2), sees_sequence=True))
        parameters += _norm("layernorm_pre", hidden)
    for index in range(len(layout.layers_of(stage, chunk))):
        parameters += _layer(f"decoder.layers.{index}", encoder, layout.tensor)
    if layout.is_last(stage, chunk) and encoder.has_final_norm:
        parameters += _norm("decoder.final_layernorm", hidden)
    if layout.is_last(stage, chunk) and encoder.use_head:
        parameters += _pooling_head(encoder)
    return parameters


def _norm(name: str, size: int) -> list[Parameter]:
    return [Parameter(f"{name}.{kind}", (size,), sees_sequence=True) for kind in ("weight", "bias")]


def _layer(name: str, encoder: EncoderConfig, tensor: int) -> list[Parameter]:
    hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    attention, mlp = f"{name}.self_attention", f"{name}.mlp"
    return [
        *_norm(f"{name}.input_layernorm", hidden),
        Parameter(f"{attention}.linear_proj.weight", (hidden, hidden // tensor), is_sharded=True),
        Parameter(f"{attention}.linear_proj.bias", (hidden,), sees_sequence=True),
        Parameter(f"{attention}.linear_qkv.weight", (3 * hidden // tensor, hidden), is_sharded=True),
        Parameter(f"{attention}.linear_qkv.bias", (3 * hidden // tensor,), is_sharded=True),
        *_norm(f"{name}.pre_mlp_layernorm", hidden),
        Parameter(f"{mlp}.linear_fc1.weight", (ffn // tensor, hidden), is_sharded=True),
        Parameter(f"{mlp}.linear_fc1.bias", (ffn // tensor,), is_sharded=True),
        Parameter(f"{mlp}.linear_fc2.weight", (hidden, ffn // tensor), is_sharded=True),
        Parameter(f"{mlp}.linear_fc2.bias", (hidden,), sees_sequence=True),
    ]


def _pooling_head(encoder: EncoderConfig) -> list[Parameter]:
    hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    return [
        Parameter("head.probe", (1, 1, hidden)),
        Parameter("head.attention.in_proj_weight", (3 * hidden, hidden)),
        Parameter("head.attention.in_proj_bias", (3 * hidden,)),
        Parameter("head.attention.out_proj.weight", (hidden, hidden)),
        Parameter("head.attention.out_proj.bias", (hidden,)),
        Parameter("head.norm.weight", (hidden,)),
        Parameter("head.mlp.fc1.weight", (ffn, hidden)),
        Parameter("head.mlp.fc1.bias", (ffn,)),
        Parameter("head.mlp.fc2.weight", (hidden, ffn)),
        Parameter("head.mlp.fc2.bias", (hidden,)),
    ]


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
    encoder, item = _section(config), activation_bytes(config)
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
    encoder, item = _section(config), activation_bytes(config)
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
    encoder, tokens = _section(config), config.data.tokens_per_microbatch
    heads = encoder.num_attention_heads // layout.tensor
    return tokens * heads * (3 * encoder.head_dim * activation_bytes(config) + _STATISTIC)


def _work_bytes(config: TrainConfig, layout: Layout) -> int:
    """Returns the gradients that are alive together in the backward pass of a layer."""
    encoder, item = _section(config), activation_bytes(config)
    tokens = config.data.tokens_per_microbatch
    hidden, ffn = encoder.hidden_size // layout.tensor, encoder.ffn_hidden_size // layout.tensor
    gathered = tokens * encoder.hidden_size * item  # the residual's gradient, and the block's output or input
    mlp = 2 * tokens * ffn * item + encoder.hidden_size * ffn * item
    attention = 6 * tokens * hidden * item
    return 2 * gathered + max(mlp, attention)


def _rotary_bytes(config: TrainConfig) -> int:
    """Returns the tables of cosines and sines, which all layers of a chunk share."""
    return 2 * config.data.tokens_per_microbatch * _section(config).head_dim * activation_bytes(config)


def _pooling_bytes(config: TrainConfig, num_samples: int) -> int:
    """Returns tokens, keys and values of all tokens, and a few vectors of each sample."""
    encoder, item = _section(config), activation_bytes(config)
    tokens, hidden = config.data.tokens_per_microbatch, encoder.hidden_size
    sample = 6 * hidden * item + 2 * encoder.ffn_hidden_size * item + 2 * hidden * 4
    return 3 * tokens * hidden * item + num_samples * sample


def stage_work(config: TrainConfig, layout: Layout, stage: int, *, squared_lengths: float, num_samples: float) -> Work:
    """Returns forward and backward of one microbatch on one rank of a stage, recomputation included.

    Args:
        config: the run.
        layout: of the ranks.
        stage: pipeline stage.
        squared_lengths: of the microbatch's segments, summed.
        num_samples: of the microbatch.
    """
    chunks = range(layout.chunks)
    num_layers = sum(len(layout.layers_of(stage, chunk)) for chunk in chunks)
    work = layer_work(config, layout.tensor, squared_lengths).times(num_layers)
    tokens, hidden = config.data.tokens_per_microbatch, config.encoder.hidden_size
    if any(layout.is_first(stage, chunk) for chunk in chunks):
        area = 3 * config.encoder.patch_size**2
        moved = tokens * (7 * area + 8 * hidden) * activation_bytes(config)
        work += Work(2 * 2.0 * tokens * area * hidden, 0.0, moved).times(1 / layout.token_share)
    if any(layout.is_last(stage, chunk) for chunk in chunks):
        work += pooling_work(config, num_samples)
    return work


def layer_work(config: TrainConfig, tensor: int, squared_lengths: float, *, with_recompute: bool = True) -> Work:
    """Returns one layer's forward and backward of a microbatch on one of `tensor` ranks."""
    encoder, item = _section(config), activation_bytes(config)
    tokens, hidden, ffn = config.data.tokens_per_microbatch, encoder.hidden_size, encoder.ffn_hidden_size
    again = encoder.recompute if with_recompute else "none"
    products = 2.0 * tokens * (4 * hidden * hidden + 2 * hidden * ffn) / tensor
    attention = 4.0 * squared_lengths * hidden / tensor
    moved = item * tokens * (_FULL_WIDTH_PASSES * hidden + (_HEAD_PASSES * hidden + _MLP_PASSES * ffn) / tensor)
    # Flash attention forms its first product once more in the backward pass: 5 products there, 2 in the forward.
    return Work(
        products * (4 if again == "full" else 3),
        attention * (4.5 if again != "none" else 3.5),
        moved * (1.35 if again == "full" else 1.0),
    )


def pooling_work(config: TrainConfig, num_samples: float) -> Work:
    """Returns the pooling head's forward and backward, which every tensor rank does alike."""
    encoder = _section(config)
    tokens, hidden, ffn = config.data.tokens_per_microbatch, encoder.hidden_size, encoder.ffn_hidden_size
    products = tokens * 2.0 * 2 * hidden * hidden + num_samples * 2.0 * (hidden * hidden + 2 * hidden * ffn)
    return Work(3 * products, 3.5 * 4.0 * tokens * hidden, 20.0 * tokens * hidden * activation_bytes(config))
