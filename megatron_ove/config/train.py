"""`TrainConfig`: the whole run, and the checks that cross sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel
from megatron_ove.config.data import DataConfig, ImageSourceConfig
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.config.optim import OptimConfig
from megatron_ove.config.parallel import ParallelConfig


class CheckpointConfig(StrictModel):
    """When checkpoints are written and how many are kept."""

    interval_steps: Annotated[int, Field(gt=0)] = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(gt=0)] = 3
    """Newest checkpoints kept; older ones are deleted after a newer one is complete."""
    save_initial: bool = False
    """Whether the untrained model is saved as step 0 (and never deleted), e.g. to compare against later."""
    verify: Literal["full", "sizes"] = "full"
    """What is checked before loading: full = every file's checksum; sizes = file names and sizes only."""


class TrackingConfig(StrictModel):
    """Where metrics go, besides the progress display and metrics.jsonl."""

    tensorboard: bool = True
    """Whether TensorBoard event files are written to the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; null = off. Needs the `wandb` extra."""


class TrainLoopConfig(StrictModel):
    """Length, batch, precision and rhythm of the loop."""

    num_steps: Annotated[int, Field(gt=0)]
    """Optimizer steps of the whole run."""
    global_batch_size: Annotated[int, Field(gt=0)]
    """Samples of one step over all replicas and sources."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and gradients."""
    log_interval_steps: Annotated[int, Field(gt=0)] = 10
    """Steps between metric reductions."""
    max_refused_steps: Annotated[int, Field(gt=0)] = 3
    """Steps in a row that may be refused for a non-finite loss or gradient before the run stops with an error."""
    stop_after_steps: Annotated[int, Field(gt=0)] | None = None
    """Save and stop cleanly after this many steps of this launch; null = run to num_steps."""


class TrainConfig(StrictModel):
    """A training run."""

    name: str
    """Name of the run."""
    run_dir: str
    """Folder for checkpoints, metrics and logs."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, data order, augmentation, label slots and negatives."""
    init_from: str | None = None
    """Checkpoint folder (of a run, or from `megatron-ove convert import`) whose encoder a new run starts with; null =
    random weights. Not read when the run resumes."""
    encoder: EncoderConfig
    parallel: ParallelConfig = ParallelConfig()
    objectives: Annotated[dict[str, ObjectiveConfig], Field(min_length=1)]
    """Objective name -> objective."""
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainLoopConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def _check_tensor_parallel_divides(self) -> Iterator[str]:
        size = self.parallel.tensor_model_parallel_size
        for field in ("hidden_size", "num_attention_heads", "ffn_hidden_size"):
            value = getattr(self.encoder, field)
            if value % size:
                yield (
                    f"encoder.{field} = {value} is not divisible by parallel.tensor_model_parallel_size = {size}, "
                    f"so ranks would get unequal shares; change one of the two"
                )

    def _check_layers_divide_stages(self) -> Iterator[str]:
        parallel, layers = self.parallel, self.encoder.num_layers
        names = ("num_layers_in_first_stage", "num_layers_in_last_stage")
        given = {name: getattr(parallel, name) for name in names if getattr(parallel, name) is not None}
        others = parallel.pipeline_model_parallel_size - len(given)
        if given and parallel.pipeline_model_parallel_size == 1:
            return  # has its own sentence
        chunks, rest = others * (parallel.virtual_pipeline_model_parallel_size or 1), layers - sum(given.values())
        settings = " and ".join(f"parallel.{name} = {size}" for name, size in given.items())
        if not given and rest % chunks:
            yield (
                f"encoder.num_layers = {layers} is not divisible by the {chunks} model chunks of the pipeline, so "
                "stages would get unequal numbers of layers; change num_layers or the pipeline sizes, or give the "
                "first or the last stage another number with parallel.num_layers_in_last_stage"
            )
        elif given and not others and rest:
            yield (
                f"{settings} are the only stages and hold {layers - rest} layers, but encoder.num_layers = {layers}; "
                "set one of the two to null, and its stage gets the rest"
            )
        elif given and others and (rest <= 0 or rest % chunks):
            yield (
                f"{settings} leaves {rest} of encoder.num_layers = {layers} for the {chunks} model chunks of the other "
                f"stages, which need a multiple of {chunks} and at least one each; change one of these numbers"
            )

    def _check_token_budget_splits(self) -> Iterator[str]:
        size, budget = self.parallel.tensor_model_parallel_size, self.data.tokens_per_microbatch
        if self.parallel.sequence_parallel and budget % size:
            yield (
                f"data.tokens_per_microbatch = {budget} is not divisible by parallel.tensor_model_parallel_size = "
                f"{size}, which sequence_parallel needs; use a multiple of {size}"
            )

    def _check_fp8_token_count(self) -> Iterator[str]:
        parallel, budget = self.parallel, self.data.tokens_per_microbatch
        share = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        if self.encoder.fp8 != "off" and budget % (16 * share):
            yield (
                f"data.tokens_per_microbatch = {budget} is not a multiple of {16 * share}, which FP8 matrix products "
                f"need on each of {share} sequence-parallel ranks; use {-(-budget // (16 * share)) * 16 * share}"
            )

    def _check_objective_sources(self) -> Iterator[str]:
        for name, objective in self.objectives.items():
            if objective.source not in self.data.sources:
                yield (
                    f"objectives.{name}.source = '{objective.source}' is not one of data.sources "
                    f"({', '.join(self.data.sources)}), so it would never see a sample; name one of them"
                )

    def _check_every_source_is_used(self) -> Iterator[str]:
        used = {objective.source for objective in self.objectives.values()}
        unused = [name for name in self.data.sources if name not in used]
        if unused:
            yield (
                f"data.sources.{unused[0]} feeds no objective, so its samples would be loaded for nothing; "
                "add an objective with this source or remove the source"
            )

    def _check_image_size(self) -> Iterator[str]:
        patch, budget = self.encoder.patch_size, self.data.tokens_per_microbatch
        for name, source in self.data.sources.items():
            if isinstance(source, ImageSourceConfig) and source.image_size % patch:
                yield (
                    f"data.sources.{name}.image_size = {source.image_size} is not a multiple of encoder.patch_size = "
                    f"{patch}, so pixels at the edge would be lost; use {source.image_size // patch * patch or patch}"
                )
            tokens = (source.image_size // patch) ** 2 if isinstance(source, ImageSourceConfig) else source.max_patches
            if tokens > budget:
                yield (
                    f"one sample of data.sources.{name} can have {tokens} patches, more than "
                    f"data.tokens_per_microbatch = {budget}; raise the budget or make samples smaller"
                )

    def _check_head(self) -> Iterator[str]:
        if not self.encoder.use_head:
            yield (
                "encoder.use_head = false leaves no pooled embedding for the objectives "
                f"({', '.join(self.objectives)}); set it to true for training"
            )
