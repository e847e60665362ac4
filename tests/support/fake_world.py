"""One rank of a world of any size in a single process: no rank but this one exists, and nothing has memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_ove.config.train import TrainConfig
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology


class OnMeta(TorchFunctionMode):
    """Everything that names a device is made on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs))


def start_fake_world(config: TrainConfig, rank: int, world_size: int) -> ParallelTopology:
    """Replaces this process's communication by one that only knows sizes; call it in a process of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    new_group = dist.new_group
    # megatron-core asks for gloo groups by name.
    dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    return replace(initialize_topology(config.parallel, seed=config.seed), device=torch.device("meta"))


def build_on_meta(config: TrainConfig, topology: ParallelTopology) -> list[Any]:
    """Returns this rank's wrapped model chunks with the dense weights of objectives, all without values; a frozen
    teacher, which is in no chunk, is left out."""
    from megatron_ove.model import encoder
    from megatron_ove.objectives import build as objectives
    from megatron_ove.objectives.reconstruction import teacher
    from megatron_ove.training.build_model import build_model_chunks

    def know_width(self: Any, section: Any, *rest: Any) -> None:
        del rest
        self.width = teacher.read_teacher_config(section.path).hidden_size

    encoder.initialize_parameters = lambda *args, **options: None  # type: ignore[assignment]
    objectives.initialize_parameters = lambda *args, **options: None  # type: ignore[assignment]
    teacher.Teacher.__init__ = know_width  # type: ignore[assignment,method-assign]
    dense = {name: section for name, section in config.objectives.items() if section.kind != "partial_fc"}
    with OnMeta():
        built = None
        if dense and topology.is_last_stage:
            built = objectives.build_objectives(
                dense,
                kinds=config.kinds,
                topology=topology,
                embedding_size=config.encoder.hidden_size,
                seed=config.seed,
                optim=config.optim.class_centers,
                dtype=torch.bfloat16,
            )
        return build_model_chunks(config, topology, built)
