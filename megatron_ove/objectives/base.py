"""`Objective`: a loss, the weights it owns and the inputs it needs. The training loop knows objectives only by this.

Objectives live on the last pipeline stage. They return local *sums*; the division by the number of items of the step
happens once, in the training step, with a number counted before the first forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import CheckpointError
from megatron_ove.optim.updates import RowTable
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.parallel.topology import ParallelTopology

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


@dataclass(frozen=True)
class ObjectiveContext:
    """What a run tells an objective when it is built.

    Attributes:
        topology: this rank's place.
        embedding_size: width of the encoder's features.
        patch_size: side of a patch in pixels.
        seed: of the run.
        class_centers: optimizer of tables.
        dtype: of the run's weights and activations.
    """

    topology: ParallelTopology
    embedding_size: int
    patch_size: int
    seed: int
    class_centers: ClassCenterOptimConfig
    dtype: torch.dtype


class Objective(ABC):
    """One objective. `forward` and what follows it are collective over the ranks of the last pipeline stage.

    Order of a step: `collate`, `find_mistake`, `message` and `prepare_step`, which another thread calls while the step
    before is still under way; `begin_step`; per microbatch `forward` and autograd's backward pass; `end_step`.

    A plain object, not a module: what it owns says itself who updates it. Dense weights are `modules`: they become
    children of the last model chunk, so data parallelism, the optimizer, precision, checkpoints, freezing and rates by
    name see them. Tables of rows are `tables`, updated by an optimizer of their own.

    Attributes:
        name: key in the configuration; prefix of metrics and checkpoint keys.
        sources: data sources whose samples it sees.
        message_width: int32 numbers that replicas tell one another of every sample of its sources before a step.
        wants_pixels: whether the packs of a batch have patches on the last stage too.
    """

    name: str
    sources: tuple[str, ...]
    message_width: int = 0
    wants_pixels: ClassVar[bool] = False

    def modules(self) -> Mapping[str, torch.nn.Module]:
        """Returns name -> dense weights, replicated or sharded over the tensor group by megatron-core's layers.

        Each has the same initial weights under every layout. A gradient that arrives at replicated weights must be
        complete on every tensor-parallel rank. Weights that a microbatch does not use have gradient 0 in it.
        """
        return {}

    def tables(self) -> Sequence[RowTable]:
        """Returns the tables of rows."""
        return ()

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> Any:
        """Returns the objective's inputs of a microbatch, host tensors; runs in a loader's thread.

        Args:
            samples: of the microbatch.
            pack: what the encoder sees of them; segments and grids are there, patches and positions still to come.
            reader: reads what is stored of samples.

        Raises:
            DataError: something stored cannot be used; names the sample.
        """
        return None

    def collate_held_out(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> Any:
        """As `collate`, for samples that are only measured; more may be read of them."""
        return self.collate(samples, pack, reader)

    @abstractmethod
    def num_items(self, batch: Batch) -> int:
        """Returns how many items of this replica's microbatch the loss is summed over: samples, tokens, regions."""

    def find_mistake(self, batches: Sequence[Batch]) -> str:
        """Returns a sentence about what is wrong with this replica's microbatches of a step; "" = nothing."""
        return ""

    def message(self, batches: Sequence[Batch]) -> np.ndarray:
        """Returns what this replica tells the others, [samples of the sources, message_width] int32, in batch order."""
        return np.zeros((sum(len(batch.samples.of(*self.sources)) for batch in batches), 0), dtype=np.int32)

    def prepare_step(self, step: int, batches: Sequence[Batch], sample_counts: np.ndarray, messages: np.ndarray) -> Any:
        """Returns what `begin_step` needs. Works on the host and changes nothing: the step before may be under way.

        Args:
            step: steps done before; random draws are functions of it.
            batches: this replica's microbatches.
            sample_counts: [replicas, microbatches of a replica] int64, samples of the sources.
            messages: [n, message_width] int32, of all replicas, one after the other.

        Returns:
            Anything; tensors in it are on the CPU, pinned if the objective works on CUDA.
        """
        return None

    def begin_step(self, prepared: Any) -> None:  # noqa: B027 - nothing to do unless there is a table
        """Begins a step with what `prepare_step` returned; waits neither for the device nor for other ranks."""

    @abstractmethod
    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        """Returns the loss sum over this replica's items of a microbatch, which may have none.

        `batch` is one of those given to `prepare_step`, or a copy of it on the device. The metrics hold "loss", the sum
        and its items.

        The gradient that goes back to `features` is complete and identical on every tensor-parallel rank. The gradient
        that arrives at the loss sum must be the same number on every replica, as the training step's factors are.
        """

    @classmethod
    def forward_together(cls, objectives: Sequence[Self], features: VisionFeatures, batch: Batch) -> list[LossTerms]:
        """Returns what `forward` does, for all objectives of this class; a class may share collectives between them."""
        return [objective.forward(features, batch) for objective in objectives]

    def end_step(self, *, accepted: bool) -> None:  # noqa: B027 - nothing to do unless there is a state beside tables
        """Ends a step after its tables were updated, or as if it had never begun; collective."""

    def observe_held_out(self, features: VisionFeatures, batch: Batch) -> Any:
        """Returns what `measure_held_out` is to know of a microbatch of held-out samples.

        Collective over the tensor group, without a gradient. By default [b, h], a copy of their pooled embeddings.
        """
        return features.sample_embeddings(batch.num_samples).clone()

    def measure_held_out(
        self, observed: Sequence[Any], inputs: Sequence[Any], sample_counts: np.ndarray
    ) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Says how well held-out samples are understood; changes nothing. Between steps, collective as `forward` is.

        Args:
            observed: what `observe_held_out` returned for each of this replica's microbatches.
            inputs: what `collate_held_out` returned for each of them.
            sample_counts: [replicas] int64, samples of every replica.

        Returns:
            Figure -> (sum, count) over this replica's samples; the same names on every rank. None by default. "samples"
            is how many counted, (number, 1); unless given the number of items.
        """
        return {}

    def load_named_weights(self) -> None:  # noqa: B027 - most sections name none
        """Takes over weights that the section itself names, like those of a published decoder; a new run asks for it
        before it looks at `init_from`.

        Raises:
            CheckpointError: they cannot be read, or do not fit.
        """

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns what a checkpoint keeps besides modules, as megatron-core sharded tensors whose keys start with
        `prefix`."""
        return {}

    def start_state_dict(self, prefix: str) -> dict[str, Any]:
        """Returns the part of `sharded_state_dict` that another run may start with: tables without moments."""
        return {}

    def load_start(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - nothing to do without a state
        """Takes over tensors read for `start_state_dict`."""

    def load_exported(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        """Takes over whole tensors of `convert export --class-centers`.

        Args:
            tensors: of the file.
            origin: the file, for messages.

        Raises:
            CheckpointError: they do not fit.
        """
        raise CheckpointError(f"{origin}: objectives.{self.name} has no class centers; leave it out of parts")

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - nothing to do without a state
        """Takes over tensors read for `sharded_state_dict`."""
