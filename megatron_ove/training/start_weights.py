"""Weights of other runs and of published models, as the start of a new run: what `init_from` asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_ove.checkpoint.compatibility import architecture_differences
from megatron_ove.checkpoint.initialize import find_start, load_start
from megatron_ove.checkpoint.manager import read_common_state
from megatron_ove.config.train import InitFrom, TrainConfig
from megatron_ove.convert.exchange import PlainExchange
from megatron_ove.convert.hf_export import class_centers_path
from megatron_ove.errors import CheckpointError, MegatronOveError
from megatron_ove.model.initialization import fill_parameters
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.optim.parts import is_in_any, is_in_part, parts_without_weights, top_parts
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.build_model import model_of
from megatron_ove.training.model_state import (
    keep_parts,
    load_model_state,
    sharded_model_state,
    with_whole_stacks,
    without_scaling_history,
)

logger = logging.getLogger(__name__)


class StartWeights:
    """Gives a new run the weights that `init_from` names; every method is collective over all ranks."""

    def __init__(
        self,
        config: TrainConfig,
        topology: ParallelTopology,
        chunks: Sequence[DistributedDataParallel],
        objectives: ObjectiveSet | None,
        names: Mapping[Tensor, str],
    ) -> None:
        """
        Args:
            config: the run.
            topology: this rank's place.
            chunks: wrapped model chunks of this rank.
            objectives: on the last pipeline stage; None elsewhere.
            names: parameter -> its name in the whole model, of this rank.
        """
        self._config, self._topology = config, topology
        self._chunks, self._objectives = chunks, objectives
        self._names = self._of_all_ranks([*names.values(), *(objectives.table_names() if objectives else [])])

    def take(self) -> list[str]:
        """Takes all weights; returns what they were taken from. Says in one sentence each what came from where, what
        stayed there, and what starts fresh.

        Raises:
            CheckpointError: on all ranks, something cannot be read or does not fit.
        """
        taken: list[str] = []
        paths: list[str] = []
        for name, objective in self._config.objectives.items():
            if objective.starts_from:
                self._together(
                    lambda name=name: self._objectives[name].load_named_weights() if self._objectives else None
                )
                taken += [f"objectives.{name}.{part}" for part in objective.starts_from]
                paths += objective.starts_from.values()
        for start in self._config.starts:
            unknown = parts_without_weights(start.parts, self._names)
            if unknown:
                raise CheckpointError(
                    f"init_from = {start.path}: this run has no part {' and '.join(unknown)}; its parts are for "
                    f"instance {', '.join(top_parts(self._names))}",
                    on_every_rank=True,
                )
            if self._on_main(lambda path=start.path: (Path(path) / "config.json").is_file()):
                paths.append(start.path)
                left = self._from_hf_folder(start)
            else:
                path = find_start(start.path, verify=self._config.checkpoint.verify)
                paths.append(str(path))
                left = self._from_checkpoint(start, path)
            taken += start.parts
            if self._topology.global_rank == 0:
                rest = f"; left there: {', '.join(left)}" if left else ""
                logger.info("init_from = %s: taken from %s: %s%s.", start.path, paths[-1], ", ".join(start.parts), rest)
        fresh = top_parts(name for name in self._names if not is_in_any(name, taken))
        if fresh and self._topology.global_rank == 0:
            logger.info("Starting with random weights: %s.", ", ".join(fresh))
        return paths

    def _from_checkpoint(self, start: InitFrom, path: Path) -> list[str]:
        """Takes parts of a checkpoint; returns those that stayed there."""
        stored = read_common_state(path)["config"]
        plain = self._config.model_dump(mode="json")
        if any(part.split(".")[0] == "encoder" for part in start.parts):
            self._compare_encoders(start, stored["encoder"], plain["encoder"])
        # FP8 scaling history belongs to the run that made it, and an imported model has none.
        state = without_scaling_history(sharded_model_state(self._chunks, self._topology))

        def is_wanted(name: str) -> bool:
            return is_in_any(name, start.parts)

        template: dict[str, Any] = {"model": with_whole_stacks(state, self._chunks, is_wanted)}
        tables = self._tables_in(start.parts)
        for name in self._of_all_ranks(tables):
            if name not in stored.get("objectives", {}):
                known = ", ".join(stored.get("objectives", {})) or "none"
                raise CheckpointError(
                    f"init_from = {start.path} has no objective '{name}' (it has {known}); name parts that it has",
                    on_every_rank=True,
                )
            there, here = (one["objectives"][name] for one in (stored, plain))
            differences = [f"objectives.{name}.kind is {there['kind']} there and {here['kind']} here"]
            if there["kind"] == here["kind"]:
                differences = list(self._config.kinds.objectives[here["kind"]].differences(name, there, here))
            if differences:
                raise CheckpointError(
                    f"init_from = {start.path} holds another head: {'; '.join(differences)}; leave objectives.{name} "
                    "out of parts, or set the fields as they are there",
                    on_every_rank=True,
                )
        if tables and self._objectives is not None:
            template["objectives"] = {
                name: self._objectives[name].start_state_dict(f"objectives.{name}.") for name in tables
            }
        loaded = load_start(path, template, given=start.path)
        # A rank may have been given nothing: other stages have these weights, or no row of a table is its own.
        model = keep_parts(loaded.get("model", {}), self._chunks, is_wanted)
        load_model_state(self._chunks, model, strict=False)
        for name in tables:
            assert self._objectives is not None
            self._objectives[name].load_start(loaded.get("objectives", {}).get(name, {}))
        there = ["encoder", *(f"objectives.{name}" for name in stored.get("objectives", {}))]
        return _left_there(there, start.parts)

    def _from_hf_folder(self, start: InitFrom) -> list[str]:
        """Takes parts of a HuggingFace folder; returns those that stayed there."""
        folder = Path(start.path)
        state: dict[str, Tensor] = {}

        def read() -> None:
            exchange = self._config.kinds.encoders[self._config.encoder.kind].exchange
            weights, section = (PlainExchange() if exchange is None else exchange()).read(folder)
            self._compare_encoders(start, section.model_dump(mode="json"), self._config.encoder.model_dump(mode="json"))
            state.update(weights)

        is_module = {
            name: not name.startswith("encoder.") and not name.endswith(".class_centers") for name in self._names
        }
        alone = [part for part in start.parts if all(is_module[name] for name in self._names if is_in_part(name, part))]
        if alone:
            raise CheckpointError(
                f"init_from = {start.path} is a published folder, which has no dense weights of objectives: it cannot "
                f"give {' and '.join(alone)}; name a checkpoint for them",
                on_every_rank=True,
            )
        if any(part.split(".")[0] == "encoder" for part in start.parts):
            self._together(read)
            for chunk in self._chunks:
                encoder = model_of(chunk).encoder
                fill_parameters(
                    encoder.named_parameters(),
                    lambda name, shape: state[name].reshape(shape),
                    layer_offset=encoder.layer_offset,
                    tensor_rank=self._topology.tensor_rank,
                    tensor_size=self._topology.tensor_size,
                    is_wanted=lambda name: is_in_any(
                        f"encoder.{name}".replace("encoder.decoder.", "encoder.", 1), start.parts
                    ),
                )
        self._together(lambda: [self._take_exported_table(folder, name) for name in self._tables_in(start.parts)])
        there = ["encoder", *(f"objectives.{file.stem}" for file in sorted((folder / "class_centers").glob("*")))]
        return _left_there(there, start.parts)

    def _take_exported_table(self, folder: Path, name: str) -> None:
        file = folder / class_centers_path(name)
        if not file.is_file():
            raise CheckpointError(
                f"init_from = {folder} has no {class_centers_path(name)}; export it with --class-centers, or leave "
                f"objectives.{name} out of parts"
            )
        assert self._objectives is not None
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); export it again") from error
        if "class_centers" not in tensors:
            raise CheckpointError(
                f"{file} has no tensor class_centers, so this program did not write it; export it again"
            )
        self._objectives[name].load_exported(tensors, origin=str(file))

    def _tables_in(self, parts: Iterable[str]) -> list[str]:
        """Returns the objectives on this rank whose tables are wanted."""
        parts = list(parts)
        return [name for name in self._objectives or () if is_in_any(f"objectives.{name}.class_centers", parts)]

    def _compare_encoders(self, start: InitFrom, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        differences = list(architecture_differences(there, here, self._config.kinds))
        if differences:
            raise CheckpointError(
                f"init_from = {start.path} holds another encoder: {'; '.join(differences)}; set the fields as they are "
                "there",
                on_every_rank=True,
            )

    def _of_all_ranks(self, names: Sequence[str]) -> list[str]:
        """Returns what any rank of the first replica names, without repetition."""
        gathered: list[Sequence[str]] = [()] * self._topology.world_size
        dist.all_gather_object(gathered, names if self._topology.data_rank == 0 else ())
        return list(dict.fromkeys(name for part in gathered for name in part))

    def _on_main(self, action: Callable[[], Any]) -> Any:
        shared: list[Any] = [None, ""]
        if self._topology.global_rank == 0:
            try:
                shared[0] = action()
            except OSError as error:
                shared[1] = f"init_from cannot be looked at ({error}); make it readable, or name another place"
        dist.broadcast_object_list(shared, src=0)
        if shared[1]:
            raise CheckpointError(shared[1], on_every_rank=True)
        return shared[0]

    def _together(self, action: Callable[[], Any]) -> None:
        """Does something on every rank; an error of any becomes one of all."""
        problem = ""
        try:
            action()
        except MegatronOveError as error:
            problem = str(error)
        except OSError as error:
            problem = f"init_from cannot be read ({error}); make it readable, or name another place"
        problems = [""] * self._topology.world_size
        dist.all_gather_object(problems, problem)
        if any(problems):
            raise CheckpointError(next(filter(None, problems)), on_every_rank=True)


def _left_there(there: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Returns what of a place's parts was not asked for, not even in part."""
    return [part for part in there if not any(is_in_part(part, one) or is_in_part(one, part) for one in parts)]
