"""What a checkpoint of a run holds, and how a run is put back from one.

Key prefixes in the files: `model.` encoder, `modules.<objective>.` its dense weights, `optimizer.` moments and master
weights of both, `average.` their moving average, `objectives.<name>.` class centers with moments, `rng` generators per
rank. Plain values: step, config, train_state, sampler, layout. Beside them, as plain files: the words that
OCR objectives' classes stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from megatron_ove.checkpoint.compatibility import (
    check_fits,
    exactness_warnings,
    shifted_moments_clause,
    size_warnings,
)
from megatron_ove.checkpoint.manager import CheckpointManager, read_common_state
from megatron_ove.checkpoint.rng_state import restore_rng_state, sharded_rng_state
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import CheckpointError
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.optim.optimizer import DenseOptimizer
from megatron_ove.optim.weight_average import WeightAverage
from megatron_ove.parallel.topology import ParallelTopology
from megatron_ove.training.model_state import (
    load_model_state,
    sharded_model_state,
    with_layers_apart,
    without_scaling_history,
)
from megatron_ove.training.run_vocabularies import RunVocabularies
from megatron_ove.training.train_state import TrainState, fingerprint, sampler_state

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves a run and restores it; every method is collective over all ranks."""

    def __init__(
        self,
        config: TrainConfig,
        topology: ParallelTopology,
        chunks: Sequence[DistributedDataParallel],
        objectives: ObjectiveSet | None,
        optimizer: DenseOptimizer,
        average: WeightAverage | None = None,
    ) -> None:
        self._config = config
        self._average = average
        self._topology = topology
        self._chunks = chunks
        self._objectives = objectives
        self._optimizer = optimizer
        self._plain_config = config.model_dump(mode="json")
        self._restored_sizes: Mapping[str, int] = {}
        self._initialized_from: str | None = None
        self._vocabularies = RunVocabularies(config, is_main=topology.global_rank == 0)
        self._manager = CheckpointManager(
            Path(config.run_dir) / "checkpoints",
            keep=config.checkpoint.keep,
            verify=config.checkpoint.verify,
            data_group=topology.data_group,
        )

    @property
    def last_save_s(self) -> float:
        """Seconds that the last save took."""
        return self._manager.last_save_s

    def save(self, state: TrainState, *, source_sizes: Mapping[str, int]) -> Path:
        """Writes a checkpoint; returns its folder.

        Args:
            state: counters.
            source_sizes: source -> number of samples.

        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        self._optimizer.finish_param_gather()
        content = self._sharded_state(has_moments=state.samples_seen > 0, is_loading=False)
        content |= {
            "step": state.step,
            "config": self._plain_config,
            "train_state": state.state_dict(),
            "sampler": sampler_state(self._config, state.step, source_sizes),
            "layout": self._layout(),
            "initialized_from": self._initialized_from,
        }
        content["rng"] = sharded_rng_state(rank=self._topology.global_rank, world_size=self._topology.world_size)
        extra = {"config_sha256": fingerprint(self._plain_config), "world_size": self._topology.world_size}
        return self._manager.save(state.step, content, files=self._vocabularies.files, manifest_extra=extra)

    def restore(self, state: TrainState) -> Path | None:
        """Puts the run back to its newest usable checkpoint.

        Args:
            state: counters, filled in.

        Returns:
            The checkpoint; None when there is none and the run starts at step 0.

        Raises:
            CheckpointError: it holds another model, cannot be read, its moments belong to other parameters, or its
                classes stand for other words.
        """
        path = self._manager.latest()
        if path is None:
            return None
        common = read_common_state(path)
        try:
            check_fits(path, common["config"], self._plain_config)
        except CheckpointError as error:
            error.on_every_rank = True  # all ranks compare the same two configurations
            raise
        self._vocabularies.continue_from(path)
        if self._topology.global_rank == 0:
            for sentence in exactness_warnings(common["config"], self._plain_config):
                logger.warning("%s", sentence)
        template = self._sharded_state(has_moments=common["train_state"]["samples_seen"] > 0, is_loading=True)
        if common["config"]["encoder"].get("fp8") != "delayed":
            # A run that begins to compute with `fp8: delayed` finds no history, and starts one.
            template["model"] = without_scaling_history(template["model"])
        has_average = common["config"]["train"].get("ema_decay") is not None
        if not has_average:
            template.pop("average", None)  # begins with the weights of this checkpoint
        same_layout = common["layout"] == self._layout()
        if same_layout:
            template["rng"] = sharded_rng_state(rank=self._topology.global_rank, world_size=self._topology.world_size)
        elif self._topology.global_rank == 0:
            logger.info("The layout was %s and is %s now; generators start anew.", common["layout"], self._layout())
        loaded = self._manager.load(path, template)
        load_model_state(self._chunks, loaded["model"], strict=True)
        if self._average is not None:
            if has_average:
                self._average.load_state(loaded["average"], sharded_model_state(self._chunks, self._topology))
            else:
                self._average.restart()
        if "optimizer" in loaded:
            self._refuse_shifted_moments(path, loaded["optimizer"])
            self._optimizer.load_state_dict(loaded["optimizer"])
        else:
            self._optimizer.reload_model_params()
        if self._objectives is not None:
            self._objectives.load_state(loaded.get("objectives", {}))
        if same_layout:
            restore_rng_state(loaded["rng"])
        state.load_state_dict(common["train_state"])
        self._restored_sizes = common["sampler"].get("source_sizes", {})
        self._initialized_from = common.get("initialized_from")
        return path

    def _refuse_shifted_moments(self, path: Path, optimizer: dict[str, Any]) -> None:
        parameter = self._manager.first_problem(self._optimizer.differing_master_weights(optimizer))
        if parameter is not None:
            raise CheckpointError(
                f"the checkpoint {path} cannot be continued: {shifted_moments_clause(parameter)}; the weights are "
                f"right, so start a new run with init_from: {path} and another run_dir",
                on_every_rank=True,
            )

    def size_warnings(self, source_sizes: Mapping[str, int]) -> list[str]:
        """Returns one sentence for every source that has another number of samples than in what was restored."""
        return size_warnings(self._restored_sizes, source_sizes)

    def started_from(self, paths: Sequence[str]) -> None:
        """Notes what the run's first weights were taken from; takes the model's weights as master weights."""
        self._optimizer.reload_model_params()
        if self._average is not None:
            self._average.restart()
        self._initialized_from = ", ".join(paths)

    def _sharded_state(self, *, has_moments: bool, is_loading: bool) -> dict[str, Any]:
        """`has_moments`: whether a step was ever accepted. Before that AdamW has none, and its master weights are the
        model's weights."""
        model = sharded_model_state(self._chunks, self._topology)
        state: dict[str, Any] = {"model": model}
        if self._average is not None:
            state["average"] = self._average.sharded_state_dict(model)
        if has_moments and self._optimizer.trains:
            # Frozen layers have no moments, so those of the others cannot be one stack.
            weights = with_layers_apart(model) if self._config.freeze else model
            state["optimizer"] = self._optimizer.sharded_state_dict(weights, is_loading=is_loading)
        if self._objectives is not None:
            state["objectives"] = self._objectives.sharded_state_dict("objectives.")
        return state

    def _layout(self) -> dict[str, int]:
        topology = self._topology
        return {"tensor": topology.tensor_size, "pipeline": topology.pipeline_size, "data": topology.data_size}
