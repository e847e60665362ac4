"""What an exported reader writes of the documents of a shard set, beside what stands on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ove.config.data import DocumentSourceConfig
from megatron_ove.data.sources.documents import DocumentSource
from megatron_ove.errors import DataError
from megatron_ove.evaluation.huggingface import normalize_pixels
from megatron_ove.objectives.reconstruction.pictures import to_pictures
from megatron_ove.objectives.text_generation.measures import WrittenText
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import TextTokenizer

_TOGETHER = 32
"""Texts that are written at a time."""


@dataclass(frozen=True)
class ReadingSettings:
    """How documents are shown and read.

    Attributes:
        max_patches: most patches of a page, which is scaled down to as many.
        max_tokens: most tokens that are written of a document, and of its text that the loss is taken of.
        device: torch device.
    """

    max_patches: int
    max_tokens: int
    device: str = "cpu"


@dataclass(frozen=True)
class ReadSet:
    """What was read of a set.

    Attributes:
        keys: of the documents that have a text.
        texts: wanted and written, in their order.
        loss: mean cross entropy of the wanted tokens and the end, given the page.
        token_accuracy: share of them that are the likeliest.
        without_text: documents that nothing is wanted of, left out.
    """

    keys: list[str]
    texts: list[WrittenText]
    loss: float
    token_accuracy: float
    without_text: int


@torch.inference_mode()
def read_set(
    model: Any,
    tokenizer: TextTokenizer,
    shards: ShardSet,
    settings: ReadingSettings,
    *,
    rows: Sequence[int] | None = None,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> ReadSet:
    """Reads every document of a set that has a text.

    Args:
        model: a `OneVisionReaderModel`, ready for evaluation, on the device.
        tokenizer: of the model.
        shards: a document set.
        settings: see there.
        rows: which documents; None = all.
        progress: is given the place of each chunk of documents, and yields it again; shows how far they are.

    Raises:
        DataError: the set holds no documents with a text, one cannot be read, or the reader writes something else.
    """
    if not shards.info.has_pages:
        raise DataError(
            f"{shards.directory} holds samples of kind {shards.info.kind}, which have no text to compare with; give a "
            "document set"
        )
    view = model.config.trained_on.get("texts", "text")
    if view != "text":
        raise DataError(
            f"the reader learned to write {view}, and it is compared with what stands on the pages; measure it with "
            "evaluation.sets while it trains"
        )
    pages = _Pages(shards, int(model.config.vision_config.patch_size), settings)
    end, keys, texts, loss = int(model.config.end_token_id), [], [], 0.0
    count = right = 0
    rows = range(len(shards)) if rows is None else rows
    for start in progress(range(0, len(rows), _TOGETHER)):
        stored = ((row, shards.read_document(row).text) for row in rows[start : start + _TOGETHER])
        chunk = [(row, tokenizer.normalise(text)) for row, text in stored if text]
        if not chunk:
            continue
        pictures = [pages.of(row) for row, _ in chunk]
        try:
            ids = model.generate(pictures, max_new_tokens=settings.max_tokens).tolist()
        except ValueError as error:  # more tokens than the decoder has places for
            raise DataError(str(error)) from error
        keys += [shards.key(row) for row, _ in chunk]
        for (_, text), own, page in zip(chunk, ids, pictures, strict=True):
            written = own[: own.index(end)] if end in own else own
            texts.append(WrittenText(text, tokenizer.decode(written), is_cut=end not in own))
            labels = [*tokenizer.encode([text])[0], end][: settings.max_tokens]
            output = model([page], [labels])  # one by one: the logits of many long texts are many GB
            loss += float(output.loss) * len(labels)
            right += int((output.logits.argmax(-1).cpu() == torch.tensor(labels)).sum())
            count += len(labels)
    if not texts:
        raise DataError(
            f"{shards.directory} holds no document with a text, so there is nothing to read; give another set"
        )
    return ReadSet(keys, texts, loss / count, right / count, len(rows) - len(texts))


class _Pages:
    """Documents as a reader is shown them: whole, at their own aspect, normalised."""

    def __init__(self, shards: ShardSet, patch_size: int, settings: ReadingSettings) -> None:
        most = max(1, shards.info.most_pages)
        path = str(Path(shards.directory))
        section = DocumentSourceConfig(kind="document", path=path, max_patches=settings.max_patches, max_pages=most)
        self._source = DocumentSource(
            "documents", section, shards=shards, patch_size=patch_size, device=torch.device("cpu"), num_threads=1
        )
        self._device, self._patch_size = settings.device, patch_size

    def of(self, row: int) -> list[Tensor]:
        """Returns the pages of a document, [3, height, width] each.

        Raises:
            DataError: one cannot be decoded.
        """
        rows, seeds = np.array([row]), np.zeros(1, dtype=np.int64)
        segments = self._source.segments(rows, seeds)
        target = torch.empty(int(segments.lengths.sum()), 3 * self._patch_size**2, dtype=torch.uint8)
        problems = self._source.decode_into(rows, seeds, [target])
        if problems:
            raise DataError(problems[0])
        parts = target.split(segments.lengths.tolist())
        return [
            normalize_pixels(to_pictures(part, 1, grid[1], grid[2])[0].to(self._device))
            for part, grid in zip(parts, segments.grids.tolist(), strict=True)
        ]


def show_examples(read: ReadSet, count: int) -> Iterator[str]:
    """Yields lines of what was wanted and written of some documents, spread evenly over the set."""
    places: Sequence[int] = [i * len(read.texts) // count for i in range(min(count, len(read.texts)))]
    for place in places:
        text = read.texts[place]
        mark = "" if text.wanted == text.written else f"   <- {_one_line(text.wanted)}"
        yield f"{read.keys[place]}: {_one_line(text.written)}{mark}"


def _one_line(text: str) -> str:
    joined = " / ".join(text.splitlines())
    return joined if len(joined) <= 100 else f"{joined[:97]}..."
