"""One run of the head ablation: a small encoder trained under one head, measured on held-out samples along the way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from ablation_data import NUM_LABELS, AblationData, nearest
from ablation_heads import Head, make_head
from torch import Tensor, nn
from torch.nn.functional import normalize

from megatron_ove.parallel.topology import ParallelTopology

EMBEDDING_SIZE, HIDDEN_SIZE = 128, 512
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 1e-3, 50, 0.05, 5.0
MEASUREMENTS = 5
"""Times that held-out figures are taken, at equal distances, the last one at the end."""
_EMBED_BLOCK = 8192


@dataclass(frozen=True)
class Figures:
    """Held-out figures, 0 .. 1, higher is better.

    Attributes:
        top1: the nearest training sample has the query's truth.
        neighbours: so does one of the 10 nearest (synthetic), or: the share of the 10 that has it (digits).
        recall: of the query's 10 nearest classes, among the 10 nearest centers.
    """

    top1: float
    neighbours: float
    recall: float


@dataclass(frozen=True)
class Point:
    """Figures at one moment; seconds are CPU seconds of training alone, which other processes hardly disturb."""

    samples: int
    seconds: float
    figures: Figures


@dataclass(frozen=True)
class RunSize:
    """How long and on what."""

    steps: int
    batch_size: int
    seed: int


def train(variant: str, data: AblationData, size: RunSize, topology: ParallelTopology) -> list[Point]:
    """Trains an encoder and a head from scratch; the seed decides initial weights, batches, labels and negatives.

    Batches, labels, views and the encoder's initial weights are the same for every variant of a seed.

    Returns:
        Figures before the first step and `MEASUREMENTS` times after it.
    """
    torch.manual_seed(size.seed)
    encoder = make_encoder(data.train.inputs.shape[1])
    head = make_head(variant, data.num_classes, EMBEDDING_SIZE, seed=size.seed, topology=topology)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    draws = torch.Generator().manual_seed(size.seed + 1)
    points = [Point(0, 0.0, measure(encoder, head, data))]
    stops = {round(size.steps * part / MEASUREMENTS) for part in range(1, MEASUREMENTS + 1)}
    seconds = 0.0
    for step in range(size.steps):
        inputs, labels, seeds = _draw_batch(data, size.batch_size, draws)
        started = time.process_time()
        lr = learning_rate(step, size.steps)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        head.loss(step, encoder(inputs), labels, seeds).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
        optimizer.step()
        head.update(lr)
        seconds += time.process_time() - started
        if step + 1 in stops:
            points.append(Point((step + 1) * size.batch_size, seconds, measure(encoder, head, data)))
    return points


def make_encoder(input_size: int) -> nn.Sequential:
    """Returns a multilayer perceptron, [n, input_size] to [n, EMBEDDING_SIZE]."""
    return nn.Sequential(
        nn.Linear(input_size, HIDDEN_SIZE),
        nn.GELU(),
        nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE),
        nn.GELU(),
        nn.Linear(HIDDEN_SIZE, EMBEDDING_SIZE),
    )


def learning_rate(step: int, steps: int) -> float:
    """Returns the encoder's rate: linear warm-up, then linear to 0 after the last step."""
    return LEARNING_RATE * min(1.0, (step + 1) / min(WARMUP_STEPS, steps)) * (1 - step / steps)


def _draw_batch(data: AblationData, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views [b, d], stored labels [b, 10] and seeds [b] of random training samples."""
    chosen = torch.randint(len(data.train.inputs), (count,), generator=generator)
    seeds = torch.randint(2**62, (count,), generator=generator)
    return data.view(data.train.inputs[chosen], generator), data.train.labels[chosen], seeds


@torch.no_grad()
def measure(encoder: nn.Module, head: Head, data: AblationData) -> Figures:
    """Returns the held-out figures; digits are seen in the same one view every time."""
    generator = torch.Generator().manual_seed(0)
    train, held_out = (_embed(encoder, data.view(part.inputs, generator)) for part in (data.train, data.held_out))
    hits = data.train.truth[nearest(held_out, train, NUM_LABELS)] == data.held_out.truth[:, None]
    classes = nearest(held_out, normalize(head.centers(), dim=1), NUM_LABELS)
    found = (classes[:, :, None] == data.held_out.labels[:, None, :]).any(1)
    second = hits.float().mean(1) if data.counts_share else hits.any(1).float()
    return Figures(float(hits[:, 0].float().mean()), float(second.mean()), float(found.float().mean()))


def _embed(encoder: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([normalize(encoder(block), dim=1) for block in inputs.split(_EMBED_BLOCK)])


def as_record(points: list[Point]) -> list[dict[str, object]]:
    """Returns points as plain data for JSON."""
    return [asdict(point) for point in points]
