"""From a configuration to a running `StepLoader`, after checking that data and configuration fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from megatron_ove.config.data import (
    ImageSourceConfig,
    OcrSourceConfig,
    SourceConfig,
    VideoSourceConfig,
    list_choices,
)
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.bad_samples import KnownBad
from megatron_ove.data.delivery import PrepareStep, StepLoader
from megatron_ove.data.image_dali import ImageSource
from megatron_ove.data.mixture import planner_of
from megatron_ove.data.ocr_dali import OcrSource
from megatron_ove.data.shard_files import raise_file_limit
from megatron_ove.data.shard_index import DatasetInfo, ShardSet
from megatron_ove.data.source import DataSource
from megatron_ove.data.video_dali import VideoSource
from megatron_ove.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from megatron_ove.parallel.topology import ParallelTopology


def build_loader(
    config: TrainConfig,
    topology: ParallelTopology,
    *,
    start_step: int,
    known_bad: KnownBad | None = None,
    prepare: PrepareStep | None = None,
) -> StepLoader:
    """Opens every source and starts loading.

    Args:
        config: the run.
        topology: this process's place in it.
        start_step: first step that will be asked for.
        known_bad: samples that count as unreadable without being tried.
        prepare: see `StepLoader`.

    Raises:
        DataError: shard sets that cannot be used; one sentence a line.
        ConfigError: shard sets that do not fit the configuration; every mistake, one sentence a line.
    """
    raise_file_limit()
    shard_sets = open_shard_sets(config)
    sources = [
        build_source(
            name,
            source,
            shard_sets[name],
            patch_size=config.encoder.patch_size,
            device=topology.device,
            num_threads=config.data.num_threads,
        )
        for name, source in config.data.sources.items()
    ]
    planner = planner_of(config, sources, data_size=topology.data_size)
    return StepLoader(
        planner,
        sources,
        topology,
        patch_size=config.encoder.patch_size,
        prefetch_steps=config.data.prefetch_steps,
        read_threads=config.data.read_threads,
        run_dir=config.run_dir,
        start_step=start_step,
        end_step=config.train.num_steps,
        known_bad=known_bad,
        prepare=prepare,
    )


def open_shard_sets(config: TrainConfig) -> dict[str, ShardSet]:
    """Opens every source's shard set and checks it against the configuration.

    Returns:
        Source name -> shard set.

    Raises:
        DataError: shard sets that cannot be used; one sentence a line.
        ConfigError: shard sets that do not fit the configuration; every mistake, one sentence a line.
    """
    opened: dict[str, ShardSet] = {}
    data_problems: list[str] = []
    config_problems: list[str] = []
    for name, source in config.data.sources.items():
        try:
            opened[name] = ShardSet.open(source.path)
        except DataError as error:
            data_problems += [f"data.sources.{name}: {line}" for line in str(error).split("\n")]
        else:
            config_problems += find_mismatches(config, name, opened[name].info)
    if config_problems:
        raise ConfigError("\n".join(data_problems + config_problems))
    if data_problems:
        raise DataError("\n".join(data_problems))
    return opened


def build_source(
    name: str,
    config: SourceConfig,
    shards: ShardSet,
    *,
    patch_size: int,
    device: torch.device,
    num_threads: int,
) -> DataSource:
    """Returns the source that turns `shards` into patches as `config` says.

    Args:
        name: name in the configuration.
        config: its section.
        shards: opened shard set of the same kind.
        patch_size: p.
        device: where pictures are decoded.
        num_threads: decoding threads.
    """
    common = {"shards": shards, "patch_size": patch_size, "device": device, "num_threads": num_threads}
    match config:
        case ImageSourceConfig():
            return ImageSource(name, config, **common)
        case OcrSourceConfig():
            return OcrSource(name, config, **common)
        case VideoSourceConfig():
            return VideoSource(name, config, **common)
        case _:
            assert_never(config)


def find_mismatches(config: TrainConfig, name: str, info: DatasetInfo) -> list[str]:
    """Returns a sentence for everything in which a shard set does not fit the configuration.

    Args:
        config: the run.
        name: the source.
        info: description of its shard set.
    """
    source = config.data.sources[name]
    place = f"data.sources.{name}"
    if info.kind != source.kind:
        return [
            f"{place}.kind = {source.kind}, but {source.path} holds samples of kind {info.kind}; change the kind or "
            "the path"
        ]
    problems = []
    if info.label_width < 1:
        problems.append(
            f"{source.path} stores no labels (label_width = {info.label_width}), so {place} could teach nothing; write "
            "the shard set with at least one label per sample"
        )
    for objective_name, objective in config.objectives.items():
        if objective.source == name and objective.num_classes < info.num_classes:
            problems.append(
                f"objectives.{objective_name}.num_classes = {objective.num_classes} is smaller than the "
                f"{info.num_classes} classes of {source.path}, so some labels would have no class center; set it to "
                f"{info.num_classes}"
            )
    if isinstance(source, VideoSourceConfig):
        problems += _video_mismatches(config, place, source, info)
    return problems


def _video_mismatches(config: TrainConfig, place: str, source: VideoSourceConfig, info: DatasetInfo) -> list[str]:
    problems = []
    if info.patch_size != config.encoder.patch_size:
        problems.append(
            f"encoder.patch_size = {config.encoder.patch_size}, but the clips of {source.path} are stored as patches "
            f"of {info.patch_size} pixels and are not resized; use patch_size: {info.patch_size} or write the shard "
            "set again"
        )
    if info.frames != config.encoder.rope_temporal_size:
        problems.append(
            f"encoder.rope_temporal_size = {config.encoder.rope_temporal_size}, but the clips of {source.path} lie on "
            f"a time grid of {info.frames} frames, so an exported model would place frames elsewhere than training "
            f"did; set it to {info.frames} or write the shard set again"
        )
    _, rows, columns = info.clip_grid
    budget, strategies = config.data.tokens_per_microbatch, source.strategies
    shows_frames = strategies.frame_sampling + strategies.collage > 0
    for count in dict.fromkeys(list_choices(source.num_frames)):
        if info.frames % count:
            problems.append(
                f"{place}.num_frames = {count} does not divide the {info.frames} stored frames of {source.path}, so "
                f"the bins that frames are drawn from would be unequal; use a divisor of {info.frames}"
            )
        tokens = count * rows * columns
        if tokens > budget and shows_frames:
            problems.append(
                f"{place}.num_frames = {count} frames of {rows} x {columns} patches make {tokens} patches, more than "
                f"data.tokens_per_microbatch = {budget}; raise the budget or use fewer frames"
            )
    return problems
