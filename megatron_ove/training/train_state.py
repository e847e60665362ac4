"""`TrainState`: how far a run has come. Everything else about data order and rates follows from the step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_ove.config.train import TrainConfig


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: steps done, refused ones included (their samples are not seen again).
        samples_seen: samples that changed the weights.
        refused_steps: steps refused because something was not finite.
        refused_in_a_row: refused steps since the last accepted one.
        bad_samples: samples that could not be read and counted as empty.
    """

    step: int = 0
    samples_seen: int = 0
    refused_steps: int = 0
    refused_in_a_row: int = 0
    bad_samples: int = 0

    def accept(self, num_samples: int) -> None:
        """Counts a step that changed the weights."""
        self.step += 1
        self.samples_seen += num_samples
        self.refused_in_a_row = 0

    def refuse(self) -> None:
        """Counts a step that changed nothing."""
        self.step += 1
        self.refused_steps += 1
        self.refused_in_a_row += 1

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, field.default))  # older checkpoints count less


def sampler_state(config: TrainConfig, step: int, source_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns all there is to say about the data order: a function of seed, step, the sources' settings and sizes."""
    order = {
        "seed": config.seed,
        "global_batch_size": config.train.global_batch_size,
        "sources": {name: source.model_dump(mode="json") for name, source in config.data.sources.items()},
        "source_sizes": dict(source_sizes),
    }
    return {
        "seed": config.seed,
        "step": step,
        "source_sizes": dict(source_sizes),
        "fingerprint": fingerprint(order),
    }


def fingerprint(values: Any) -> str:
    """Returns the SHA-256 of plain values, independent of key order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
