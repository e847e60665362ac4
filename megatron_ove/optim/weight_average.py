"""`WeightAverage`: an exponential moving average of dense weights, kept beside them.

It is what a run measures held-out figures with and may be exported instead of the weights themselves. Every rank
averages the weights that it holds, in fp32. Source: Polyak and Juditsky, 1992; with the growing decay that timm and
TensorFlow use at the start, so that initial weights are forgotten soon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_ove.errors import TrainingError

_PREFIX = "average."


class WeightAverage:
    """Averages of parameters."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        """Starts with the present weights.

        Args:
            parameters: of this rank; frozen ones are averaged too, and stay what they are.
            decay: weight of the average so far in a step, in the long run.
        """
        self._decay = decay
        self._averages = {parameter: parameter.detach().float().clone() for parameter in parameters}

    @torch.no_grad()
    def restart(self) -> None:
        """Starts anew with the present weights."""
        for parameter, average in self._averages.items():
            average.copy_(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after an update.

        Args:
            step: updates so far, this one included.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for parameter, average in self._averages.items():
            average.lerp_(parameter.float(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the averages inside of the block, and their own values again after it."""
        own = {parameter: parameter.detach().clone() for parameter in self._averages}
        with torch.no_grad():
            for parameter, average in self._averages.items():
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def sharded_state_dict(self, model: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the averages as sharded tensors whose keys are those of the weights behind `average.`.

        Args:
            model: chunk -> key -> sharded tensor, of the weights themselves.
        """
        kept = {average for content in model.values() for _, _, average in self._averaged(content)}
        if len(kept) < len(self._averages):
            raise TrainingError(
                f"train.ema_decay: {len(self._averages) - len(kept)} weights of this rank are stored in pieces, and "
                "the average of such weights would be lost; set train.ema_decay: null"
            )
        return {
            chunk: {key: _with_average(item, average) for key, item, average in self._averaged(content)}
            for chunk, content in model.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], model: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over what was read for `sharded_state_dict`.

        Args:
            state: chunk -> key -> tensor.
            model: as for `sharded_state_dict`.
        """
        for chunk, content in model.items():
            for key, _, average in self._averaged(content):
                average.copy_(state[chunk][key])

    def _averaged(self, content: Mapping[str, Any]) -> Iterator[tuple[str, Any, Tensor]]:
        """Yields (key, sharded tensor of the weight, its average) of a chunk."""
        for key, item in content.items():
            weight = item.data if isinstance(item, ShardedTensor | ShardedTensorFactory) else None
            if weight is not None and weight in self._averages:
                yield key, item, self._averages[weight]


def _with_average(item: Any, average: Tensor) -> Any:
    """Returns what stores a weight, storing its average."""
    kind = {} if isinstance(item, ShardedTensorFactory) else {"dtype": torch.float32}
    return replace(item, key=_PREFIX + item.key, data=average, **kind)
