"""What a Partial-FC head embeds and names: whole samples, or regions of them (`regions/region_items.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.outputs import VisionFeatures

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


class Items(Protocol):
    """The items of a microbatch: equally many of each sample of the sources, those of one sample together.

    m counts this replica's samples of the sources in a microbatch, q is `per_sample`, L any number of labels.

    Attributes:
        per_sample: items of a sample.
    """

    per_sample: int

    def modules(self) -> Mapping[str, nn.Module]:
        """Returns name -> dense weights; see `Objective.modules`."""
        ...

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> Any:
        """Returns the inputs of a microbatch; see `Objective.collate`."""
        ...

    def labels_of(self, inputs: Any) -> Tensor:
        """Returns [m * q, L] int32 on the CPU, class ids, -1 = none."""
        ...

    def seeds(self, batch: Batch) -> Tensor:
        """Returns [m * q] int64 on the CPU: labels are drawn from them."""
        ...

    def rows(self, batch: Batch) -> Tensor:
        """Returns [m * q] int64 on the CPU: the items' places in `embeddings`."""
        ...

    def embeddings(self, features: VisionFeatures, batch: Batch, inputs: Any) -> Tensor:
        """Returns [., e], embeddings, not normalized."""
        ...

    def metrics(self, inputs: Any) -> Mapping[str, tuple[float, float]]:
        """Returns name -> (sum, count) of what a microbatch says beside the loss."""
        ...


class SampleItems:
    """Every sample is one item: its pooled embedding and its stored labels."""

    per_sample = 1

    def __init__(self, sources: tuple[str, ...]) -> None:
        self._sources = sources

    def modules(self) -> Mapping[str, nn.Module]:
        return {}

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> Tensor:
        """Returns the stored labels, [m, L] int32, -1 = none."""
        return reader.labels(samples, *self._sources)

    def labels_of(self, inputs: Tensor) -> Tensor:
        return inputs

    def seeds(self, batch: Batch) -> Tensor:
        return batch.samples.seed[self.rows(batch)]

    def rows(self, batch: Batch) -> Tensor:
        return batch.samples.of(*self._sources)

    def embeddings(self, features: VisionFeatures, batch: Batch, inputs: Tensor) -> Tensor:
        return features.sample_embeddings(batch.num_samples)

    def metrics(self, inputs: Tensor) -> Mapping[str, tuple[float, float]]:
        return {}
