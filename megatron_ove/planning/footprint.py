"""What planning asks of kinds of encoders and objectives: weights, memory, work and messages, nothing of it built.

A kind that says only which weights it has is planned by rules of thumb for transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.devices import Device
from megatron_ove.planning.layout import Layout, Place
from megatron_ove.planning.parameters import Parameter
from megatron_ove.planning.table_plan import TablePlan
from megatron_ove.planning.workload import Workload

_KEPT_PER_LAYER = 17
"""Values that the backward pass of a transformer layer waits for, per token and element of its width, when its MLP is
four times as wide. Source: Korthikanti et al., 2022, without dropout and with attention that stores no scores."""


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


@dataclass(frozen=True)
class Message:
    """Messages of one kind in one step of one rank.

    Attributes:
        group: tensor, pipeline, data, class, model or world.
        operation: all_reduce, all_gather, reduce_scatter, broadcast or send.
        num_bytes: of one of them.
        count: messages.
    """

    group: str
    operation: str
    num_bytes: int
    count: int = 1


def activation_bytes(config: TrainConfig, precision: str | None = None) -> int:
    """Bytes of one activation."""
    return 2 if (precision or config.train.precision) == "bf16" else 4


class EncoderFootprint(ABC):
    """What a kind of encoder needs."""

    @abstractmethod
    def parameters(self, config: TrainConfig, layout: Layout, *, stage: int, chunk: int) -> list[Parameter]:
        """Returns the weights of a model chunk, in the order of its `named_parameters()`."""

    def activations(
        self, config: TrainConfig, layout: Layout, *, stage: int, chunk: int, num_samples: int
    ) -> ChunkActivations:
        """Counts one microbatch of a model chunk, in which there are `num_samples` samples."""
        tokens, hidden = config.data.tokens_per_microbatch, config.encoder.hidden_size
        layer = _KEPT_PER_LAYER * tokens * hidden * activation_bytes(config) // layout.tensor
        return ChunkActivations(len(layout.layers_of(stage, chunk)) * layer, 0, layer)

    def work(
        self, config: TrainConfig, layout: Layout, stage: int, *, squared_lengths: float, num_samples: float
    ) -> Work:
        """Returns forward and backward of one microbatch on one rank of a stage, recomputation included.

        Args:
            config: the run.
            layout: of the ranks.
            stage: pipeline stage.
            squared_lengths: of the microbatch's segments, summed.
            num_samples: of the microbatch.
        """
        tokens, hidden = config.data.tokens_per_microbatch, config.encoder.hidden_size
        chunks = range(layout.chunks)
        sizes = [one.size for chunk in chunks for one in self.parameters(config, layout, stage=stage, chunk=chunk)]
        layers = sum(len(layout.layers_of(stage, chunk)) for chunk in chunks)
        attention = 3.5 * 4.0 * squared_lengths * hidden * layers / layout.tensor
        return Work(6.0 * tokens * sum(sizes), attention, 40.0 * tokens * hidden * layers * activation_bytes(config))

    def messages(self, config: TrainConfig, layout: Layout, place: Place, workload: Workload) -> Iterator[Message]:
        """Yields what the layers of a rank exchange in a step; by default two sums a layer over the tensor group."""
        num_bytes = config.data.tokens_per_microbatch * config.encoder.hidden_size * activation_bytes(config)
        layers = sum(len(layout.layers_of(place.stage, chunk)) for chunk in range(layout.chunks))
        yield Message("tensor", "all_reduce", num_bytes, 4 * layers * workload.num_microbatches)

    def memory_changes(self, config: TrainConfig) -> Iterator[dict[str, Any]]:
        """Yields settings that may save memory, each as {path: value}."""
        return iter(())


class ObjectiveFootprint:
    """What a kind of objective needs; by default nothing. `section` is `config.objectives[name]`."""

    def parameters(self, config: TrainConfig, name: str, layout: Layout) -> list[Parameter]:
        """Returns its dense weights on a rank of the last stage."""
        return []

    def activations(self, config: TrainConfig, name: str, layout: Layout) -> ChunkActivations:
        """Counts what its modules keep of one microbatch on a rank of the last stage."""
        return ChunkActivations(0, 0, 0)

    def frozen_bytes(self, config: TrainConfig, name: str, layout: Layout) -> int:
        """Returns the bytes of weights on a rank of the last stage that no run trains or stores, as a teacher's."""
        return 0

    def table(
        self, config: TrainConfig, name: str, layout: Layout, place: Place, counts: np.ndarray, device: Device
    ) -> TablePlan | None:
        """Returns its table of rows on a rank of the last stage.

        Args:
            config: the run.
            name: of the objective.
            layout: of the ranks.
            place: of the rank.
            counts: [n, replicas] int64, samples that it sees in each microbatch.
            device: of every rank.
        """
        return None

    def message_width(self, section: Any) -> int:
        """Returns the numbers that replicas tell one another of every sample before a step."""
        return 0

    def num_table_elements(self, config: TrainConfig, name: str) -> int:
        """Returns the elements of its whole table."""
        return 0

    def memory_changes(self, config: TrainConfig, name: str) -> Iterator[dict[str, Any]]:
        """Yields settings that may save memory, each as {path: value}."""
        return iter(())
