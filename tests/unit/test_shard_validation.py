"""Opening damaged shard sets: every fault gets its own sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.vocabulary import build_vocabulary
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from tests.support.id_shards import NUM_CLASSES, encode, id_picture, write_id_shard_set
from tests.support.old_shards import to_first_format


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_id_shard_set(tmp_path_factory.mktemp("shards") / "set", "image", 10, samples_per_shard=4)


@pytest.fixture
def copied(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "set"))


def change_column(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = directory / "index" / f"{name}.npy"
    if path.exists():
        np.save(path, change(np.load(path)))
        return
    rows = np.load(directory / "index" / "rows.npy")
    rows[name] = change(rows[name])
    np.save(directory / "index" / "rows.npy", rows)


def swap_columns(directory: Path, first: str, second: str) -> None:
    one, other = (directory / "index" / f"{name}.npy" for name in (first, second))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def change_info(directory: Path, **values: object) -> None:
    path = directory / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def put(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(labels: np.ndarray) -> np.ndarray:
        labels[6, 1] = value
        return labels

    return change


def truncate(directory: Path) -> None:
    shard = directory / "shards" / "000001.tar"
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size // 2)


FAULTS = [
    (truncate, r"shard .*000001\.tar is truncated: it has \d+ bytes, but its last sample ends at byte \d+; copy"),
    (lambda d: (d / "shards" / "000002.tar").unlink(), r"shard .*000002\.tar is missing, but the index refers to it"),
    (lambda d: change_column(d, "labels", put(256)), r"label 256 of sample 'image6' in .* is outside 0\.\.255"),
    (lambda d: change_column(d, "labels", put(-2)), r"label -2 of sample 'image6' in .* is outside 0\.\.255"),
    (
        lambda d: change_column(d, "width", lambda w: w[:-1]),
        r"unequal lengths \(.* 10, .*width 9, .*rows do not",
    ),
    (lambda d: change_info(d, num_samples=11), "promises 11 samples, but the index has 10 rows"),
    (lambda d: change_info(d, format_version=9), "has format_version = 9, but this program reads versions 1 and 2"),
    (lambda d: change_info(d, colour="blue"), r"lacks or has unknown entries \(colour\)"),
    (lambda d: change_info(d, kind="sound"), "describes kind 'sound'"),
    (lambda d: (d / "dataset.json").write_text("{"), r"dataset\.json cannot be read as JSON"),
    (lambda d: (d / "dataset.json").unlink(), r"is not a shard set, because it holds no dataset\.json"),
    (lambda d: change_info(d, num_classes="many"), r"has num_classes = 'many', which no shard set has; write the"),
    (lambda d: change_info(d, num_classes=0), r"has num_classes = 0, which no shard set has"),
    (lambda d: change_info(d, members=None), r"has members = None, which no shard set has"),
    (lambda d: change_info(d, patch_size=0), r"has patch_size = 0, which no shard set has"),
    (lambda d: change_column(d, "width", lambda w: w[:, None]), r"width\.npy holds int32 in 2 dimensions, which"),
    (lambda d: change_column(d, "keys", lambda k: k.astype(str)), r"keys\.npy holds <U\d+ in 1 dimensions, which"),
    (
        lambda d: change_column(d, "keys", lambda k: np.roll(k, 1)),
        r"does not match its shard 000000\.tar: it places image9\.jpg .* where the shard has image0\.jpg",
    ),
    (
        lambda d: overwrite(d / "shards" / "000001.tar", 0, b"\xff" * 512),
        r"does not match its shard 000001\.tar: it places image4\.jpg .* where the shard has no file header",
    ),
]
FAULTS_OF_FORMAT_1 = [
    (lambda d: change_info(d, label_width=4), r"labels\.npy has shape \[10, 3\] instead of \[10, 4\]"),
    (lambda d: (d / "index" / "sizes.npy").unlink(), r"index/sizes\.npy is missing or unreadable"),
    (lambda d: (d / "index" / "sizes.npy").write_bytes(b"xx"), r"index/sizes\.npy is missing or unreadable"),
    (lambda d: change_column(d, "shard", lambda s: s[::-1]), r"shard\.npy is not sorted"),
    (
        lambda d: change_column(d, "sizes", lambda s: s.astype(float)),
        r"sizes\.npy holds float64 in 2 dimensions, which is not what a shard writer puts there, so the file is dam",
    ),
    (lambda d: change_column(d, "offsets", lambda o: np.array(3)), r"offsets\.npy holds int64 in 0 dimensions, which"),
    (lambda d: swap_columns(d, "offsets", "sizes"), r"does not match its shard 000000\.tar: it places image0\.jpg"),
    (lambda d: swap_columns(d, "width", "shard"), r"shard\.npy holds int32 in 1 dimensions|width\.npy holds uint32"),
    (lambda d: swap_columns(d, "labels", "num_patches"), r"(labels|num_patches)\.npy holds int32 in [12] dimensions"),
    (lambda d: change_column(d, "shard", lambda s: s + 10**9), r"shard\.npy names shard 1000000002, more than there"),
]
FAULTS_OF_FORMAT_2 = [
    (lambda d: change_info(d, label_width=4), r"rows\.npy holds .* in 1 dimensions, which is not what a shard writer"),
    (lambda d: change_info(d, columns={"score": "text"}), r"has columns = \{'score': 'text'\}, which no shard set has"),
    (lambda d: (d / "index" / "rows.npy").unlink(), r"index/rows\.npy is missing or unreadable"),
    (lambda d: (d / "index" / "shards.npy").write_bytes(b"xx"), r"index/shards\.npy is missing or unreadable"),
    (lambda d: change_column(d, "shards", lambda s: s[::-1]), r"shards\.npy is not in order, so it is damaged"),
    (lambda d: change_column(d, "shards", lambda s: s[:0]), r"shards\.npy is not in order, so it is damaged"),
    (lambda d: change_column(d, "rows", lambda r: r["sizes"]), r"rows\.npy holds uint32 in 2 dimensions, which is not"),
    (
        lambda d: change_column(d, "offset", lambda o: o + 512),
        r"does not match its shard 000000\.tar: it places image0",
    ),
    (lambda d: swap_columns(d, "rows", "shards"), r"(rows|shards)\.npy holds .*, which is not what a shard writer"),
]


@pytest.mark.parametrize("first_format", [False, True])
@pytest.mark.parametrize(("damage", "text"), FAULTS)
def test_a_fault_found_at_open_is_a_sentence(
    copied: Path, damage: Callable[[Path], object], text: str, first_format: bool
) -> None:
    if first_format:
        to_first_format(copied)
    check_fault(copied, damage, text)


@pytest.mark.parametrize(("damage", "text"), FAULTS_OF_FORMAT_1)
def test_a_fault_of_an_index_of_format_1_is_a_sentence(
    copied: Path, damage: Callable[[Path], object], text: str
) -> None:
    to_first_format(copied)
    check_fault(copied, damage, text)


@pytest.mark.parametrize(("damage", "text"), FAULTS_OF_FORMAT_2)
def test_a_fault_of_an_index_is_a_sentence(copied: Path, damage: Callable[[Path], object], text: str) -> None:
    check_fault(copied, damage, text)


def check_fault(copied: Path, damage: Callable[[Path], object], text: str) -> None:
    damage(copied)
    with pytest.raises(DataError, match=text):
        ShardSet.open(copied)
    problem = validate_shard_set(copied, deep=False)[0]
    assert re.search(text, problem)


def test_a_vocabulary_has_a_word_for_every_class(copied: Path) -> None:
    assert ShardSet.open(copied).read_vocabulary() is None  # sets of earlier versions have none
    assert validate_shard_set(copied, deep=False) == []
    words = [f"word{number}" for number in range(NUM_CLASSES)]
    vocabulary = build_vocabulary([words], permutation_seed=None)
    vocabulary.save(copied / "vocabulary.json")
    assert ShardSet.open(copied).read_vocabulary() == vocabulary
    assert validate_shard_set(copied, deep=True) == []
    build_vocabulary([words[:-1]]).save(copied / "vocabulary.json")
    text = r"vocabulary\.json has 255 words, but .* was written with num_classes = 256, so it is the vocabulary"
    (problem,) = validate_shard_set(copied, deep=False)
    assert re.search(text, problem)
    (copied / "vocabulary.json").write_text("words")
    (problem,) = validate_shard_set(copied, deep=True)
    assert re.search(r"vocabulary\.json is not a vocabulary \(", problem)


def test_no_folder_is_a_sentence(tmp_path: Path) -> None:
    assert validate_shard_set(tmp_path / "none", deep=False) == [
        f"the shard set {tmp_path / 'none'} does not exist or is no folder; check the source's path"
    ]


def test_all_faults_are_told_at_once(copied: Path) -> None:
    truncate(copied)
    change_column(copied, "labels", put(999))
    (copied / "shards" / "000002.tar").unlink()
    assert len(validate_shard_set(copied, deep=False)) == 3


def test_an_empty_index_is_refused(copied: Path) -> None:
    for name in ("rows", "width", "height", "num_patches", "keys"):
        change_column(copied, name, lambda column: column[:0])
    change_info(copied, num_samples=0)
    with pytest.raises(DataError, match="holds no samples, so there is nothing to train on"):
        ShardSet.open(copied)


def offset_of(directory: Path, row: int, column: int) -> int:
    return ShardSet.open(directory).index.place(row, ("jpg", "cls")[column])[0]


DEEP_FAULTS = [
    (
        lambda d: overwrite(d / "shards" / "000000.tar", offset_of(d, 1, 0) + 8, b"\0" * 40),
        r"jpg of sample 'image1' \(number 1\) of .*000000\.tar is unusable: it ",
    ),
    (
        lambda d: overwrite(d / "shards" / "000001.tar", offset_of(d, 5, 0) - 512, b"other.jpg\0"),
        r"it places image5\.jpg .* where the shard has (other\.jpg|no file header)",
    ),
    (
        lambda d: overwrite(d / "shards" / "000002.tar", offset_of(d, 9, 1), b"\1\0\0\0"),
        r"labels of sample 'image9' .* differ between shard and index",
    ),
    (
        lambda d: change_column(d, "height", lambda h: h + (np.arange(10) == 3)),
        r"sample 'image3' .* has 59 x 57 pixels, but the index says 59 x 58",
    ),
]


@pytest.mark.parametrize(("damage", "text"), DEEP_FAULTS)
def test_a_fault_inside_a_shard_is_found_by_the_deep_check(
    copied: Path, damage: Callable[[Path], object], text: str
) -> None:
    damage(copied)
    assert validate_shard_set(copied, deep=False) == []
    (problem,) = validate_shard_set(copied, deep=True)
    assert re.search(text, problem), problem


def test_clips_are_checked_in_depth(tmp_path: Path) -> None:
    directory = write_id_shard_set(tmp_path / "clips", "video", 2)
    assert validate_shard_set(directory, deep=True) == []
    change_column(directory, "num_patches", lambda n: n + 1)
    first, second = validate_shard_set(directory, deep=True)
    assert "has 10 selected patches, but the index says 11" in first
    assert "has 11 selected patches, but the index says 12" in second


def test_a_shard_cut_after_opening_is_named(copied: Path) -> None:
    shards = ShardSet.open(copied)
    truncate(copied)
    with pytest.raises(
        DataError, match=r"jpg of sample 'image7' .* ends after \d+ of \d+ bytes, so the shard is trunc"
    ):
        shards.read(7, "jpg")
    assert shards.read(0, "jpg") == encode(id_picture(0, 30, 80))
