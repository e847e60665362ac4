"""Operations and element-wise traffic of a step, per pipeline stage and microbatch.

A multiplication and an addition count as two operations. A backward pass costs twice its forward pass, once for inputs
and once for weights; patches need no gradient of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ove.config.train import TrainConfig
from megatron_ove.model.operations import encoder_operations
from megatron_ove.planning.activations import activation_bytes
from megatron_ove.planning.layout import Layout
from megatron_ove.planning.workload import Workload

# Element-wise passes of a layer, forward and backward, in reads and writes of one value per token. Counted from the
# local layers: norms 2 x (2 + 4), bias and residual 2 x (3 + 2) on the full width; rotation of queries and keys, which
# materialises its parts, 2 x (8 + 8), copies around attention 8 on the width's share; bias 4 and GELU 5 on the MLP's.
_FULL_WIDTH_PASSES, _HEAD_PASSES, _MLP_PASSES = 22, 40, 9


@dataclass(frozen=True)
class Work:
    """What one rank does.

    Attributes:
        products: operations of matrix products with weights.
        attention: operations of attention's two products.
        moved: bytes that element-wise passes read and write.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention, self.moved + other.moved)

    def times(self, factor: float) -> Work:
        return Work(self.products * factor, self.attention * factor, self.moved * factor)


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
    encoder, item = config.encoder, activation_bytes(config)
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
    encoder = config.encoder
    tokens, hidden, ffn = config.data.tokens_per_microbatch, encoder.hidden_size, encoder.ffn_hidden_size
    products = tokens * 2.0 * 2 * hidden * hidden + num_samples * 2.0 * (hidden * hidden + 2 * hidden * ffn)
    return Work(3 * products, 3.5 * 4.0 * tokens * hidden, 20.0 * tokens * hidden * activation_bytes(config))


def model_operations(config: TrainConfig, workload: Workload) -> dict[str, float]:
    """Returns the operations of a whole step that the model asks for, by part, over all replicas.

    Only real tokens count, nothing is counted twice for recomputation or tensor parallelism: what MFU is measured by.
    """
    return encoder_operations(
        config.encoder,
        tokens=float(workload.real_tokens.sum()),
        samples=float(workload.num_samples.sum()),
        squares=float(workload.sample_squares.sum()),
    )
