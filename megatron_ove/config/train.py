"""`TrainConfig`: the whole run, and the checks that cross sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, create_model

from megatron_ove.config.base import StrictModel
from megatron_ove.config.data import DataConfig, SourceConfig
from megatron_ove.config.encoder import EncoderSection
from megatron_ove.config.evaluation import EvaluationConfig
from megatron_ove.config.objectives import ObjectiveConfig
from megatron_ove.config.optim import OptimConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.config.profile import ProfileConfig
from megatron_ove.config.upgrade import CONFIG_VERSION

if TYPE_CHECKING:
    from megatron_ove.kinds import Kinds


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
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of dense weights, kept in fp32 beside them: held-out figures are measured
    with it, and `convert export --average` exports it; null = none."""
    deterministic: bool = False
    """Whether a GPU adds numbers in a fixed order, so that equal runs and resumed runs are bit-equal; slower. A CPU
    always does."""
    log_interval_steps: Annotated[int, Field(gt=0)] = 10
    """Steps between metric reductions."""
    gc_interval_steps: Annotated[int, Field(gt=0)] = 100
    """Steps between Python's garbage collections, which all ranks do after the same step and at no other time."""
    max_refused_steps: Annotated[int, Field(gt=0)] = 3
    """Steps in a row that may be refused for a non-finite loss or gradient before the run stops with an error."""
    stop_after_steps: Annotated[int, Field(gt=0)] | None = None
    """Save and stop cleanly after this many steps of this launch; null = run to num_steps."""


class InitFrom(StrictModel):
    """Weights that a new run starts with."""

    path: str
    """Run folder (its newest usable checkpoint is taken), checkpoint (of a run or from `megatron-ove convert import`)
    or HuggingFace folder."""
    parts: Annotated[tuple[str, ...], Field(min_length=1)] = ("encoder",)
    """Parts of the model that are taken from there: the beginnings of weights' names up to a dot, like encoder,
    encoder.layers.0-5 or objectives.<name>, which includes the class centers."""


def _form_of_start(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "path"


class TrainConfig(StrictModel):
    """A training run. Objects are of a class made by `train_config_of`, which knows the kinds of sections.

    Attributes:
        kinds: the kinds that its sections may be of.
    """

    kinds: ClassVar[Kinds]

    name: str
    """Name of the run."""
    run_dir: str
    """Folder for checkpoints, metrics and logs."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, data order, augmentation, label slots and negatives."""
    init_from: (
        Annotated[
            Annotated[str, Tag("path")] | Annotated[tuple[InitFrom, ...], Tag("list")], Discriminator(_form_of_start)
        ]
        | None
    ) = None
    """What a new run starts with: a run folder, checkpoint or HuggingFace folder whose encoder is taken; or a list of
    {path, parts}; null = random weights. Not read when the run resumes."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that keep the weights they start with: the beginnings of weights' names up to a dot, like
    encoder.patch_embed, encoder.layers.0-5 or objectives.<name>."""
    config_version: Literal[2] = CONFIG_VERSION
    """Version of the form that this configuration has; written by the program when it stores one."""
    plugins: tuple[str, ...] = ()
    """Python modules that describe further kinds of encoders, objectives and sources; imported on every rank."""
    encoder: EncoderSection
    parallel: ParallelConfig = ParallelConfig()
    objectives: Annotated[dict[str, ObjectiveConfig], Field(min_length=1)]
    """Objective name -> objective."""
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainLoopConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def starts(self) -> tuple[InitFrom, ...]:
        """What `init_from` asks for."""
        if isinstance(self.init_from, str):
            return (InitFrom(path=self.init_from),)
        return self.init_from or ()

    @property
    def token_multiple(self) -> int:
        """What a microbatch's patches must be a multiple of: ranks share them, and FP8 products want whole tiles."""
        share = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return share * self.encoder.token_multiple

    def _check_encoder(self) -> Iterator[str]:
        yield from self.encoder.check_run(self)

    def _check_pooling(self) -> Iterator[str]:
        readers = [name for name, objective in self.objectives.items() if objective.reads_pooled]
        if readers and not self.encoder.has_pooling:
            yield (
                f"encoder.use_head = false leaves no pooled embedding for the objectives ({', '.join(readers)}); set "
                "it to true for training"
                if hasattr(self.encoder, "use_head")
                else f"encoder.kind = {self.encoder.kind} has no pooled embedding for the objectives "
                f"({', '.join(readers)}); use another encoder, or objectives that read tokens"
            )

    def _check_pooling_head_learns(self) -> Iterator[str]:
        is_read = any(objective.reads_pooled for objective in self.objectives.values())
        if not is_read and self.encoder.has_pooling and hasattr(self.encoder, "use_head"):
            is_frozen = any(part in ("encoder", "encoder.head") for part in self.freeze)
            if not is_frozen:
                yield (
                    "encoder.use_head = true, but no objective reads the pooled embedding, so weight decay alone would "
                    "move the pooling head; add encoder.head to freeze, or set use_head: false with final_norm: true"
                )

    def _check_objectives(self) -> Iterator[str]:
        for name, objective in self.objectives.items():
            yield from objective.check_run(self, name)

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

    def _check_objective_sources(self) -> Iterator[str]:
        for name, objective in self.objectives.items():
            for source in objective.sources:
                if source not in self.data.sources:
                    yield (
                        f"objectives.{name}.source = '{source}' is not one of data.sources "
                        f"({', '.join(self.data.sources)}), so it would never see a sample; name one of them"
                    )

    def _check_evaluation_objectives(self) -> Iterator[str]:
        for name in self.evaluation.sets:
            if name not in self.objectives:
                yield (
                    f"evaluation.sets.{name} belongs to none of the objectives ({', '.join(self.objectives)}), so "
                    "there are no class centers to measure it with; write the name of an objective"
                )

    def _check_every_source_is_used(self) -> Iterator[str]:
        used = {source for objective in self.objectives.values() for source in objective.sources}
        unused = [name for name in self.data.sources if name not in used]
        if unused:
            yield (
                f"data.sources.{unused[0]} feeds no objective, so its samples would be loaded for nothing; "
                "add an objective with this source or remove the source"
            )

    def _check_patches(self) -> Iterator[str]:
        for name, source in self.data.sources.items():
            for place, sentence in source.check_patches(self.encoder.patch_size):
                yield f"data.sources.{name}.{place} {sentence}"

    def _check_sample_fits_budget(self) -> Iterator[str]:
        budget = self.data.tokens_per_microbatch
        for name, source in self.data.sources.items():
            largest = max(source.list_budgets(self.encoder.patch_size))
            if largest > budget:
                yield (
                    f"one sample of data.sources.{name} can have {largest} patches, more than "
                    f"data.tokens_per_microbatch = {budget}; raise the budget or make samples smaller"
                )

    def _check_text_budget(self) -> Iterator[str]:
        budget = self.data.text_tokens_per_microbatch
        readers = [name for name, objective in self.objectives.items() if objective.reads_texts]
        if readers and budget is None:
            yield (
                f"data.text_tokens_per_microbatch is not set, but objectives.{readers[0]} reads texts, of which a "
                "microbatch has limited room; set it to a multiple of a sample's longest text, e.g. 8192"
            )
        if budget is not None and not readers:
            yield (
                f"data.text_tokens_per_microbatch = {budget} has no effect, because no objective reads texts; remove it"
            )

    def _check_warmup_ends(self) -> Iterator[str]:
        warmup, num_steps = self.optim.schedule.warmup_steps, self.train.num_steps
        if warmup >= num_steps:
            yield (
                f"optim.schedule.warmup_steps = {warmup} is not below train.num_steps = {num_steps}, so the rate would "
                "never reach optim.lr; shorten the warm-up, or, to try a few steps of a long run, set "
                "train.stop_after_steps instead of num_steps"
            )

    def _check_profile_window(self) -> Iterator[str]:
        start, num_steps = self.profile.start_step, self.train.num_steps
        if start is not None and start + self.profile.num_steps - 1 > num_steps:
            yield (
                f"profile.start_step = {start} with profile.num_steps = {self.profile.num_steps} asks for steps up to "
                f"{start + self.profile.num_steps - 1}, but train.num_steps = {num_steps} is the last one; start "
                "earlier or profile fewer steps"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # The class that knows the kinds is made while the program runs, and pickle finds classes by their name.
        return _restore, (self.plugins, self.model_dump(mode="python"))


def train_config_of(
    *,
    encoders: Mapping[str, type[EncoderSection]],
    objectives: Mapping[str, type[ObjectiveConfig]],
    sources: Mapping[str, type[SourceConfig]],
) -> type[TrainConfig]:
    """Returns the configuration class whose sections may be of these kinds.

    Args:
        encoders, objectives, sources: kind -> class of a section; the first encoder needs not be named.
    """
    first = next(iter(encoders))

    def encoder_kind(section: Any) -> Any:
        return section.get("kind", first) if isinstance(section, dict) else getattr(section, "kind", first)

    encoder: Any = next(iter(encoders.values()))
    if len(encoders) > 1:
        encoder = Annotated[
            _union(Annotated[one, Tag(kind)] for kind, one in encoders.items()), Discriminator(encoder_kind)
        ]
    data = create_model(
        "DataConfig", __base__=DataConfig, sources=(_map_of(sources, DataConfig.model_fields["sources"]))
    )
    return create_model(
        "TrainConfig",
        __base__=TrainConfig,
        encoder=(encoder, TrainConfig.model_fields["encoder"]),
        objectives=_map_of(objectives, TrainConfig.model_fields["objectives"]),
        data=(data, TrainConfig.model_fields["data"]),
    )


def _map_of(kinds: Mapping[str, Any], field: Any) -> tuple[Any, Any]:
    section = _union(kinds.values())
    if len(kinds) > 1:
        section = Annotated[section, Field(discriminator="kind")]
    return dict[str, section], Field(min_length=1, description=field.description)


def _union(classes: Iterable[Any]) -> Any:
    return Union[tuple(classes)]  # noqa: UP007 - of as many as there are


def _restore(plugins: tuple[str, ...], values: dict[str, Any]) -> TrainConfig:
    from megatron_ove.kinds import load_kinds

    return load_kinds(plugins).train_config.model_validate(values)
