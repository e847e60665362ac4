"""How ranks are laid out and what each of them holds, without starting any of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ove.config.train import TrainConfig
from megatron_ove.parallel.topology import check_world_size
from megatron_ove.planning.devices import GPUS_PER_NODE


@dataclass(frozen=True)
class Place:
    """One rank: its index along each axis of the grid."""

    stage: int = 0
    data: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the grid; ranks are numbered tensor first, then data, then pipeline.

    Attributes:
        tensor, pipeline, data: sizes; their product is the world size.
        chunks: model chunks of a rank, 1 without a virtual pipeline.
        stage_layers: transformer layers of each pipeline stage.
        overlaps_reduce, overlaps_gather: whether gradients and weights travel beside computation, in buckets.
    """

    tensor: int
    pipeline: int
    data: int
    chunks: int
    stage_layers: tuple[int, ...]
    sequence_parallel: bool
    distributed_optimizer: bool
    overlaps_reduce: bool = False
    overlaps_gather: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def token_share(self) -> int:
        """Ranks that share the tokens between tensor-parallel blocks."""
        return self.tensor if self.sequence_parallel else 1

    def rank_of(self, place: Place) -> int:
        return place.tensor + self.tensor * (place.data + self.data * place.stage)

    def layers_of(self, stage: int, chunk: int) -> range:
        """Returns the layers, counted over the model, of a model chunk."""
        before = chunk * sum(self.stage_layers) + sum(self.stage_layers[:stage])  # in layers of all chunks
        return range(before // self.chunks, (before + self.stage_layers[stage]) // self.chunks)

    def is_first(self, stage: int, chunk: int) -> bool:
        """Whether a chunk embeds patches."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Whether a chunk has the final norm, the pooling head and the objectives."""
        return stage == self.pipeline - 1 and chunk == self.chunks - 1

    def group_size(self, group: str) -> int:
        """Returns the ranks of a group: tensor, pipeline, data, class (tensor x data), model (tensor x pipeline)."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data, "world": self.world_size}
        return {**sizes, "class": self.tensor * self.data, "model": self.tensor * self.pipeline}[group]

    def spans_nodes(self, group: str, *, per_node: int = GPUS_PER_NODE) -> bool:
        """Whether some ranks of a group are on different nodes of `per_node` devices."""
        reach = {"tensor": self.tensor, "data": self.tensor * self.data, "class": self.tensor * self.data}
        return self.group_size(group) > 1 and reach.get(group, self.world_size) > per_node


def layout_of(config: TrainConfig, world_size: int) -> Layout:
    """Returns the grid of a configuration on `world_size` ranks.

    Raises:
        ConfigError: the world size is not a multiple of tensor x pipeline.
    """
    parallel = config.parallel
    check_world_size(parallel, world_size)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=world_size // (tensor * pipeline),
        chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        stage_layers=tuple(parallel.layers_of_stages(config.encoder.num_layers)),
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlaps_reduce=parallel.overlap_grad_reduce,
        overlaps_gather=parallel.overlap_param_gather,
    )
