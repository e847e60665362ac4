"""The step loader in one process: pairing, shapes, resume, replicas, errors from the background, and build checks."""

from __future__ import annotations

import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ove.batch import Batch
from megatron_ove.data.bad_samples import read_bad_samples
from megatron_ove.data.build import open_shard_sets
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.errors import ConfigError, DataError
from megatron_ove.shards.shard_set import ShardSet
from tests.support.id_loader import (
    SIZES,
    assert_same_batches,
    check_pairing,
    id_config,
    single_process,
    start_loader,
    take_steps,
    write_id_sources,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_id_sources(tmp_path_factory.mktemp("id"))


def test_labels_pictures_and_keys_stay_together(directory: Path) -> None:
    steps = take_steps(start_loader(id_config(directory), single_process()), 0, 8)
    seen: Counter[tuple[str, int]] = Counter()
    for batches in steps:
        samples = [sample for batch in batches for sample in check_pairing(batch)]
        assert Counter(name for name, _ in samples) == {"image": 6, "ocr": 3, "video": 3}
        seen.update(samples)
        for batch in batches:
            pack = batch.main
            assert pack.patches is not None
            assert (pack.patches.dtype, pack.patches.shape) == (torch.uint8, (40, 588))
            assert (pack.positions.dtype, pack.positions.shape) == (torch.int32, (40, 3))
            assert pack.cu_seqlens.dtype == pack.grids.dtype == pack.sample.dtype == torch.int32
            assert batch.samples.row.dtype == batch.samples.seed.dtype == torch.int64
            assert batch.samples.is_valid.all()
    for name, size in SIZES.items():  # 48 images of 23, 24 pages of 17, 24 clips of 11: whole epochs and a part
        counts = [seen[name, number] for number in range(size)]
        taken = 48 if name == "image" else 24
        assert sum(counts) == taken
        assert max(counts) - min(counts) <= 1, "a sample of an epoch was lost or doubled"


def test_a_new_loader_continues_bit_equal(directory: Path) -> None:
    config = id_config(directory)
    running = take_steps(start_loader(config, single_process()), 0, 7)
    resumed = take_steps(start_loader(config, single_process(), start_step=5), 5, 2)
    for left, right in zip(running[5:], resumed, strict=True):
        assert_same_batches(left, right)
    other = take_steps(start_loader(id_config(directory, seed=4), single_process(), start_step=5), 5, 1)
    assert {tuple(b.samples.keys) for b in other[0]} != {tuple(b.samples.keys) for b in running[5]}


def test_replicas_share_a_step_without_loss(directory: Path) -> None:
    config = id_config(directory)
    whole = {seed: name for name, seed in step_samples(config, 1, 0)}
    for size in (2, 3):
        shared = [sample for rank in range(size) for sample in step_samples(config, size, rank)]
        assert {seed: name for name, seed in shared} == whole
        assert len(shared) == len(whole) == 12


def step_samples(config: object, size: int, rank: int) -> list[tuple[str, int]]:
    loader = start_loader(config, single_process(data_size=size, data_rank=rank), start_step=2)  # type: ignore[arg-type]
    (batches,) = take_steps(loader, 2, 1)
    return [
        (f"{name}{number}", seed)
        for batch in batches
        for (name, number), seed in zip(check_pairing(batch), batch.samples.seed.tolist(), strict=True)
    ]


def test_replicas_without_samples_get_empty_batches(directory: Path) -> None:
    config = id_config(directory)
    topology = single_process(data_size=13, data_rank=12)  # a step has 12 samples
    (batches,) = take_steps(start_loader(config, topology), 0, 1)
    (empty,) = batches
    assert empty.num_samples == 0
    assert empty.main.cu_seqlens.tolist() == [0]
    assert (empty.main.grids.shape, empty.main.sample.shape) == ((0, 3), (0,))
    assert check_pairing(empty) == []
    assert {name: tuple(rows.shape) for name, rows in empty.inputs.items()} == {
        "image": (0, 3),
        "ocr": (0, 4),
        "video": (0, 3),
    }


def test_stages_get_their_fields_only(directory: Path) -> None:
    config = id_config(directory)
    (whole,) = take_steps(start_loader(config, single_process()), 0, 1)
    for first, last, wants in ((1, 0, 0), (1, 0, 1), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)):
        topology = single_process(is_first_stage=bool(first), is_last_stage=bool(last))
        (part,) = take_steps(start_loader(config, topology, last_stage_has_pixels=bool(wants)), 0, 1)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a.main.positions, b.main.positions)
            assert torch.equal(a.main.cu_seqlens, b.main.cu_seqlens)
            has_patches = bool(first or (last and wants))
            assert (b.main.patches is not None) == has_patches
            assert bool(b.inputs) == last
            if has_patches:
                assert torch.equal(a.main.patches, b.main.patches)  # type: ignore[arg-type]
            for name in b.inputs:
                assert torch.equal(a.inputs[name], b.inputs[name])


def test_steps_come_in_order(directory: Path) -> None:
    loader = start_loader(id_config(directory), single_process(), start_step=3)
    try:
        with pytest.raises(ValueError, match="step 0 was asked for, but steps come in order and the next is 3"):
            loader.load_step(0)
        loader.load_step(3)
    finally:
        loader.close()


def test_close_ends_all_threads(directory: Path) -> None:
    loader = start_loader(id_config(directory, prefetch_steps=1), single_process())
    loader.load_step(0)
    loader.close()
    loader.close()
    for thread in threading.enumerate():
        assert not thread.name.startswith("step-")
        if thread.name.startswith("reader"):  # may have had one more read to finish
            thread.join(10)
            assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        for step in range(1, 4):  # a prepared step that waits may still be taken
            loader.load_step(step)


def damaged_copy(directory: Path, target: Path) -> Path:
    """Copies the sources and zeroes part of every page, past what opening looks at."""
    shutil.copytree(directory, target)
    shards = ShardSet.open(target / "ocr")
    for row in range(len(shards)):
        with shards.shard_path(row).open("r+b") as stream:
            stream.seek(shards.index.place(row, "jpg")[0] + 30)
            stream.write(b"\0" * 60)
    return target


def test_what_cannot_be_decoded_is_left_empty_and_recorded(directory: Path, tmp_path: Path) -> None:
    expected = take_steps(start_loader(id_config(directory), single_process()), 0, 2)
    config = id_config(damaged_copy(directory, tmp_path / "damaged"))
    steps = take_steps(start_loader(config, single_process()), 0, 2)
    records = {(sample.step, sample.key): sample for sample in read_bad_samples(config.run_dir)}
    for step, (batches, whole) in enumerate(zip(steps, expected, strict=True), start=1):
        for batch, reference in zip(batches, whole, strict=True):
            pages = batch.samples.of("ocr").tolist()
            assert torch.equal(batch.main.cu_seqlens, reference.main.cu_seqlens)
            check_emptied(batch, reference, set(pages))
            for row in pages:
                record = records.pop((step, batch.samples.keys[row]))
                assert (record.source, f"ocr{record.row}") == ("ocr", record.key)
                assert re.fullmatch(
                    rf"the page of sample '{record.key}' \(number {record.row}\) of .*ocr/shards/00000\d\.tar cannot "
                    "be decoded, although it could when its shard was written, so the shard is damaged; check it with "
                    "tools/shards/validate_shards.py --deep and copy it again",
                    record.reason,
                )
    assert all(step > 2 for step, _ in records)  # steps that were prepared and not taken


def check_emptied(batch: Batch, reference: Batch, bad: set[int]) -> None:
    """Checks that the samples `bad` are zeros without labels and not valid, and all others as in `reference`."""
    pack, whole = batch.main, reference.main
    assert pack.patches is not None and whole.patches is not None
    for row in range(batch.num_samples):
        assert bool(batch.samples.is_valid[row]) == (row not in bad)
        place = slice(*pack.cu_seqlens[row : row + 2].tolist())
        for mine, theirs in (
            (pack.patches[place], whole.patches[place]),
            (pack.positions[place], whole.positions[place]),
        ):
            assert not mine.any() if row in bad else torch.equal(mine, theirs)
    for name, labels in batch.inputs.items():
        for labels_row, row in enumerate(batch.samples.of(name).tolist()):
            wanted = torch.full_like(labels[0], -1) if row in bad else reference.inputs[name][labels_row]
            assert torch.equal(labels[labels_row], wanted)


def test_a_label_changed_after_opening_is_caught(directory: Path) -> None:
    config = id_config(directory)
    loader = start_loader(config, single_process())
    source = loader._sources[0]
    source.shards.columns["labels"] = np.full_like(source.shards.labels, 300)
    with pytest.raises(DataError, match=r"label 300 of sample 'image\d+' in .* is outside 0\.\.255"):
        take_steps(loader, 0, 12)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"image": {"kind": "ocr", "path": "{d}/image", "max_patches": 9}},
            "data.sources.image.kind = ocr, but {d}/image holds samples of kind image; change the kind or the path",
        ),
        ({"video": {"num_frames": 5}}, "data.sources.video.num_frames = 5 does not divide the 16 stored frames of"),
        ({"video": {"num_frames": 8}}, "= 8 frames of 2 x 3 patches make 48 patches, more than data.tokens_per_m"),
        ({"image": {"path": "nowhere"}}, "data.sources.image: the shard set nowhere does not exist or is no folder"),
    ],
)
def test_mismatches_are_sentences(directory: Path, changes: dict[str, dict[str, object]], text: str) -> None:
    filled = {
        name: {key: str(value).format(d=directory) if key == "path" else value for key, value in change.items()}
        for name, change in changes.items()
    }
    with pytest.raises((ConfigError, DataError), match=re.escape(text.format(d=directory))):
        open_shard_sets(id_config(directory, changes=filled))


def test_all_mismatches_are_told_at_once(directory: Path, tmp_path: Path) -> None:
    write_synthetic_shard_set(tmp_path / "clips", kind="video", num_samples=2, patch_size=16, frames=32)
    config = id_config(directory, changes={"video": {"path": str(tmp_path / "clips"), "num_frames": 3}})
    objectives = {
        **config.objectives,
        "image": config.objectives["image"].model_copy(update={"num_classes": 100}),
    }
    config = config.model_copy(update={"objectives": objectives})
    with pytest.raises(ConfigError) as caught:
        start_loader(config, single_process())
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    assert lines[0].startswith("encoder.patch_size = 14, but the clips of ")
    assert "are stored as patches of 16 pixels and are not resized; use patch_size: 16" in lines[0]
    assert lines[1].startswith(
        f"encoder.rope_temporal_size = 16, but the clips of {tmp_path / 'clips'} lie on a time grid of"
    )
    assert "32 frames, so an exported model would place frames elsewhere than training did; set it to 32" in lines[1]
    assert "num_frames = 3 does not divide the 32 stored frames" in lines[2]
    assert "num_frames = 3 frames of 4 x 4 patches make 48 patches, more than data.tokens_per_microbatch" in lines[3]
    assert lines[4].startswith("objectives.image.num_classes = 100 is smaller than the 256 classes of ")


def test_synthetic_pictures_can_be_told_apart_by_class(tmp_path: Path) -> None:
    """A nearest-mean classifier on raw colours already beats chance by far, so training tests can see a loss fall."""
    write_synthetic_shard_set(tmp_path / "image", kind="image", num_samples=64, num_classes=4, label_width=10)
    write_synthetic_shard_set(tmp_path / "ocr", kind="ocr", num_samples=4)
    write_synthetic_shard_set(tmp_path / "video", kind="video", num_samples=3, frames=16)
    config = id_config(tmp_path, batch=64, tokens=128, changes={"image": {"weight": 60.0}})
    (batches,) = take_steps(start_loader(config, single_process()), 0, 1)
    means, classes = [], []
    for batch in batches:
        pack = batch.main
        assert pack.patches is not None
        rows = batch.samples.of("image").tolist()
        for row, labels in zip(rows, batch.inputs["image"].tolist(), strict=True):
            part = pack.patches[pack.cu_seqlens[row] : pack.cu_seqlens[row + 1]]
            means.append(part.view(part.shape[0], 3, -1).float().mean((0, 2)))
            classes.append(labels[0])
            assert len(set(labels[:3])) == 3 and set(labels[:3]) < {0, 1, 2, 3}
            assert labels[3:] == [-1] * 7
    colours, target = torch.stack(means), torch.tensor(classes)
    centers = torch.stack([colours[target == c].mean(0) for c in range(4)])
    assert (torch.cdist(colours, centers).argmin(1) == target).float().mean() > 0.9
