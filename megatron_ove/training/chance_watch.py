"""Notices a loss that stays above that of a head that knows nothing, which no other figure shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from megatron_ove.config.train import TrainConfig

_HALF = 100
"""Reports of each half of what is looked at."""
_CLEARLY_ABOVE = 0.2
"""Nats. Of two runs on words, whose figures are those of the test, one was 0.13 above for long and learned to read."""


class ChanceWatch:
    """Says one sentence, once an objective and launch.

    Two halves of 100 reports each are compared. An objective is spoken of when the second, which lies behind the
    warm-up, has a mean loss clearly above chance, and with the same change once more it would still be there. So a loss
    that falls fast enough is left alone; fresh centers point anywhere, which costs s^2 / (2 e) at the start.

    Attributes:
        losses: objective -> its loss of chance.
    """

    def __init__(self, config: TrainConfig) -> None:
        total = sum(source.weight for source in config.data.sources.values())
        self.losses: dict[str, float] = {}
        for name, objective in config.objectives.items():
            share = sum(config.data.sources[source].weight for source in objective.sources) / total
            chance_loss = config.kinds.objectives[objective.kind].chance_loss
            if chance_loss is not None:
                self.losses[name] = chance_loss(objective, config.train.global_batch_size * share)
        self._rate = config.optim.class_centers.lr_multiplier
        self._warmup = config.optim.schedule.warmup_steps
        self._reports: dict[str, deque[tuple[float, float]]] = {name: deque(maxlen=2 * _HALF) for name in self.losses}

    def observe(self, row: Mapping[str, float]) -> list[str]:
        """Takes in a report, with keys `step` and `loss/<objective>`; returns the sentences that are due."""
        sentences = []
        for name, reports in list(self._reports.items()):
            loss = row.get(f"loss/{name}")
            if loss is not None:  # None = no sample of its source
                reports.append((row["step"], loss))
            if len(reports) == 2 * _HALF and self._is_stuck(name):
                del self._reports[name]
                sentences.append(self._sentence(name, reports))
        return sentences

    def _is_stuck(self, name: str) -> bool:
        steps, losses = zip(*self._reports[name], strict=True)
        early, late = sum(losses[:_HALF]) / _HALF, sum(losses[_HALF:]) / _HALF
        limit = self.losses[name] + _CLEARLY_ABOVE
        return steps[_HALF] > self._warmup and late > limit and 2 * late - early > limit

    def _sentence(self, name: str, reports: deque[tuple[float, float]]) -> str:
        late = sum(loss for _, loss in list(reports)[_HALF:]) / _HALF
        first, last = reports[_HALF][0], reports[-1][0]
        return (
            f"The loss of objectives.{name} was {late:.2f} on average from step {first:.0f} to {last:.0f}, where a "
            f"head that knows nothing has {self.losses[name]:.2f}, and does not fall fast enough to get there soon. "
            "Most often its class centers move too fast for the encoder: stop, set optim.class_centers.lr_multiplier "
            f"to about {self._rate / 10:g} (now {self._rate:g}), and start the same command again; see "
            "docs/debugging.md."
        )
