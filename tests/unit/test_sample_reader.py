"""What objectives are told about the samples of a microbatch: labels of one source, of several, and of missing ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ove.batch import Samples
from megatron_ove.data.sample_reader import SampleReader
from megatron_ove.shards.shard_set import ShardSet
from tests.support.id_shards import write_id_shard_set

WIDTHS = {"image": 2, "ocr": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for kind, width in WIDTHS.items():
        write_id_shard_set(folder / kind, kind, 9, label_width=width)  # type: ignore[arg-type]
    return folder


def reader_of(directory: Path, *names: str) -> SampleReader:
    sources: list[Any] = [SimpleNamespace(name=name, shards=ShardSet.open(directory / name)) for name in names]
    return SampleReader(sources)


def samples_of(names: tuple[str, ...], source: list[int], rows: list[int], bad: int | None = None) -> Samples:
    is_valid = torch.tensor([place != bad for place in range(len(rows))], dtype=torch.bool)
    index, row = torch.tensor(source, dtype=torch.int32), torch.tensor(rows, dtype=torch.int64)
    return Samples(names, index, row, torch.zeros(len(rows), dtype=torch.int64), is_valid, tuple(map(str, rows)))


def test_labels_of_several_sources_come_in_microbatch_order_as_wide_as_the_widest(directory: Path) -> None:
    reader = reader_of(directory, "image", "ocr")
    samples = samples_of(("image", "ocr"), [1, 0, 1, 0], [3, 5, 8, 2], bad=2)
    assert reader.labels(samples, "image").tolist() == [[5, -1], [2, -1]]
    assert reader.labels(samples, "ocr", "image")[:, 0].tolist() == [3, 5, -1, 2], "what cannot be read has no label"
    assert reader.labels(samples, "ocr", "image").shape == (4, 4)
    assert (reader.labels(samples, "ocr", "image")[:, 1:] == -1).all()
    assert reader.labels(samples_of(("image", "ocr"), [], []), "image").shape == (0, 2)


def test_a_held_out_set_stands_for_all_sources_of_its_objective(directory: Path) -> None:
    """Its samples come as those of the first source, and the others are not there."""
    samples = samples_of(("image",), [0, 0], [3, 5])
    assert reader_of(directory, "image").labels(samples, "image", "ocr").tolist() == [[3, -1], [5, -1]]
