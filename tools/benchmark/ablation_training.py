"""One run of the head ablation: a small encoder trained under one head, measured on held-out samples along the way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from ablation_data import NUM_LABELS, AblationData, make_words, nearest
from ablation_encoders import PictureEncoder, make_encoder, mean_cosine
from ablation_heads import SMALL_EMBEDDINGS, Head, make_head
from torch import Tensor, nn
from torch.nn.functional import normalize

from megatron_ove.evaluation.retrieval import average_precision, labels_to_relevant
from megatron_ove.parallel.topology import ParallelTopology

LEARNING_RATE, WARMUP_SAMPLES, WEIGHT_DECAY, CLIP = 1e-3, 6_400, 0.05, 5.0
MEASUREMENTS, WORD_MEASUREMENTS = 5, 2
"""Times that held-out figures are taken, at equal distances, the last one at the end; fewer for the slower ViT."""
PRETRAINING_SAMPLES, PRETRAINING_BATCH_SIZE = 24_576, 64
_EMBED_BLOCK = 8192


@dataclass(frozen=True)
class Figures:
    """Held-out figures, 0 .. 1, higher is better.

    Attributes:
        top1: the nearest training sample has the query's truth.
        neighbours: so does one of the 10 nearest (synthetic), or: the share of the 10 that has it (digits).
        recall: of the query's 10 nearest classes, or of its one label, among the 10 nearest centers.
        precision: mean average precision of the labels when centers are ordered by their cosine with the query; only
            of samples with one label (None elsewhere).
    """

    top1: float
    neighbours: float
    recall: float
    precision: float | None = None


@dataclass(frozen=True)
class Point:
    """Figures at one moment; seconds are CPU seconds of training alone, which other processes hardly disturb."""

    samples: int
    seconds: float
    figures: Figures


@dataclass(frozen=True)
class RunSize:
    """How long, on what, and from which encoder.

    Attributes:
        initializer_range: of a ViT, see `make_encoder`.
        pretrained_samples: 0 = a fresh encoder; else one that has seen so many samples of other words.
    """

    steps: int
    batch_size: int
    seed: int
    initializer_range: float | None = None
    pretrained_samples: int = 0


_pretrained: dict[tuple[int, RunSize], Mapping[str, Tensor]] = {}
"""The last pretrained encoder's weights, by its number of words and how it was trained."""


def train(variant: str, data: AblationData, size: RunSize, topology: ParallelTopology) -> tuple[list[Point], float]:
    """Trains an encoder and a fresh head; the seed decides initial weights, batches, labels and negatives.

    Batches, labels, views and the encoder's initial weights are the same for every variant of a seed.

    Returns:
        Figures before the first step and some times after it, and the mean cosine of two held-out embeddings
        before the first step.
    """
    start = _pretrained_weights(data.num_classes, size, topology) if size.pretrained_samples else None
    encoder, head = _make_both(variant, data, size, topology)
    if start is not None:
        encoder.load_state_dict(start)
    cosine = mean_cosine(_embed(encoder, data.view(data.held_out.inputs, torch.Generator().manual_seed(0)), 0.0))
    count = WORD_MEASUREMENTS if data.has_one_label else MEASUREMENTS
    stops = {round(size.steps * part / count) for part in range(1, count + 1)}
    return [Point(0, 0.0, measure(encoder, head, data)), *_run(encoder, head, data, size, stops)], cosine


def _make_both(variant: str, data: AblationData, size: RunSize, topology: ParallelTopology) -> tuple[nn.Module, Head]:
    torch.manual_seed(size.seed)
    encoder, embedding_size = make_encoder(data, size.initializer_range)
    labels = data.train.labels.shape[1]
    head = make_head(variant, data.num_classes, embedding_size, num_labels=labels, seed=size.seed, topology=topology)
    return encoder, head


def _pretrained_weights(num_words: int, size: RunSize, topology: ParallelTopology) -> Mapping[str, Tensor]:
    """Returns weights of an encoder that has learned to read as many other words with the head for small runs.

    That head never sees the embeddings' mean, so training leaves it as large as it was. It goes into the last bias,
    which changes nothing for the head; without it the embeddings would be as collinear as fresh ones.
    """
    before = RunSize(
        steps=size.pretrained_samples // PRETRAINING_BATCH_SIZE,
        batch_size=PRETRAINING_BATCH_SIZE,
        seed=size.seed,
        initializer_range=size.initializer_range,
    )
    if (num_words, before) not in _pretrained:
        data = make_words(num_words, size.seed, others=True)
        encoder, head = _make_both(SMALL_EMBEDDINGS, data, before, topology)
        _run(encoder, head, data, before, stops=set())
        assert isinstance(encoder, PictureEncoder)
        encoder.shift(-head.embedding_mean())
        _pretrained.clear()  # the runs from one start follow each other
        _pretrained[num_words, before] = encoder.state_dict()
    return _pretrained[num_words, before]


def _run(encoder: nn.Module, head: Head, data: AblationData, size: RunSize, stops: set[int]) -> list[Point]:
    """Trains; measures after the steps in `stops`."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    draws = torch.Generator().manual_seed(size.seed + 1)
    points = []
    seconds = 0.0
    for step in range(size.steps):
        inputs, labels, seeds = _draw_batch(data, size.batch_size, draws)
        started = time.process_time()
        lr = learning_rate(step, size.steps, size.batch_size)
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


def learning_rate(step: int, steps: int, batch_size: int) -> float:
    """Returns the encoder's rate: linear warm-up over `WARMUP_SAMPLES`, then linear to 0 after the last step."""
    warmup = max(1, min(round(WARMUP_SAMPLES / batch_size), steps))
    return LEARNING_RATE * min(1.0, (step + 1) / warmup) * (1 - step / steps)


def _draw_batch(data: AblationData, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views [b, ...], stored labels [b, l] and seeds [b] of random training samples."""
    chosen = torch.randint(len(data.train.inputs), (count,), generator=generator)
    seeds = torch.randint(2**62, (count,), generator=generator)
    return data.view(data.train.inputs[chosen], generator), data.train.labels[chosen], seeds


@torch.no_grad()
def measure(encoder: nn.Module, head: Head, data: AblationData) -> Figures:
    """Returns the held-out figures; images are seen in the same one view every time."""
    generator = torch.Generator().manual_seed(0)
    mean = head.embedding_mean()
    train, held_out = (
        _embed(encoder, data.view(inputs, generator), mean)
        for inputs in (data.train.inputs[: data.num_searched], data.held_out.inputs)
    )
    hits = data.train.truth[nearest(held_out, train, NUM_LABELS)] == data.held_out.truth[:, None]
    centers = normalize(head.centers(), dim=1)
    classes = nearest(held_out, centers, NUM_LABELS)
    found = (classes[:, :, None] == data.held_out.labels[:, None, :]).any(1)
    second = hits.float().mean(1) if data.counts_share else hits.any(1).float()
    precision = None
    if data.has_one_label:
        relevant = labels_to_relevant(data.held_out.labels, data.num_classes)
        precision = float(average_precision(held_out @ centers.T, relevant).mean())
    return Figures(float(hits[:, 0].float().mean()), float(second.mean()), float(found.float().mean()), precision)


@torch.no_grad()
def _embed(encoder: nn.Module, inputs: Tensor, mean: Tensor | float) -> Tensor:
    """Returns the directions [n, e] of embeddings less `mean`."""
    return torch.cat([normalize(encoder(block) - mean, dim=1) for block in inputs.split(_EMBED_BLOCK)])


def as_record(points: list[Point]) -> list[dict[str, object]]:
    """Returns points as plain data for JSON, without figures that were not taken."""
    records = [asdict(point) for point in points]
    for record in records:
        record["figures"] = {name: value for name, value in record["figures"].items() if value is not None}
    return records
