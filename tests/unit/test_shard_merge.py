"""Parts joined into one set: equal to what one writer makes, or a sentence about what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.merge import merge_parts, part_name
from megatron_ove.shards.rewrite import rewrite_shard_set
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from megatron_ove.shards.writer import ShardWriter
from tests.support.id_shards import encode, id_picture, write_id_shard_set
from tests.support.old_shards import to_first_format

COUNT = 23


def write_images(directory: Path, rows: range, **options: object) -> Path:
    settings = {"kind": "image", "num_classes": 50, "label_width": 2, "samples_per_shard": 3, **options}
    with ShardWriter(directory, may_be_empty=True, **settings) as writer:  # type: ignore[arg-type]
        for i in rows:
            labels = np.array([i, -1]) if settings["label_width"] == 2 else np.array([i])
            writer.add(f"key{i}", {"jpg": encode(id_picture(i, 20 + i, 30))}, labels)
    return directory


def write_documents(directory: Path, rows: range) -> Path:
    with ShardWriter(directory, kind="document", samples_per_shard=3, may_be_empty=True) as writer:
        for i in rows:
            pages = {f"page{page:04d}.jpg": encode(id_picture(i, 30 + i, 40 + page)) for page in range(1 + i % 3)}
            text = f"page number {i}, Straße 东京"
            words = Boxes.of([[i % len(pages), 1, 2, 20, 9.5, 0, 4]])
            writer.add(f"document-{i}", {"json": Document(text, words=words).encode(), **pages})
    return directory


def write_parts(directory: Path, write: Callable[[Path, range], Path], sizes: list[int]) -> None:
    start = 0
    for number, size in enumerate(sizes):
        write(directory / "parts" / part_name(number, len(sizes)), range(start, start + size))
        start += size


def assert_equal(first: ShardSet, second: ShardSet) -> None:
    assert len(first) == len(second) and first.info.num_classes == second.info.num_classes
    assert [first.key(i) for i in range(len(first))] == [second.key(i) for i in range(len(first))]
    for name in first.columns.keys() - {"offset", "keys"}:
        assert np.array_equal(first.columns[name], second.columns[name]), name
    for i in range(len(first)):
        members = first.index.stored_members(i)
        assert members == second.index.stored_members(i)
        assert all(first.read(i, member) == second.read(i, member) for member in members)


@pytest.mark.parametrize("write", [write_images, write_documents])
@pytest.mark.parametrize("sizes", [[COUNT], [5, 0, 7, 1, 10], [0, 3, 20], [1] * COUNT])
def test_a_joined_set_equals_one_that_was_written_at_once(
    tmp_path: Path, write: Callable[[Path, range], Path], sizes: list[int]
) -> None:
    whole = ShardSet.open(write(tmp_path / "whole", range(COUNT)))
    write_parts(tmp_path / "joined", write, sizes)
    with pytest.raises(
        DataError, match=r"holds parts of a shard set, but no dataset\.json, because they were not join"
    ):
        ShardSet.open(tmp_path / "joined")
    info = merge_parts(tmp_path / "joined")
    assert (info.num_samples, info.num_parts) == (COUNT, sum(size > 0 for size in sizes))
    assert validate_shard_set(tmp_path / "joined", deep=True) == []
    assert_equal(whole, ShardSet.open(tmp_path / "joined"))
    moved = shutil.move(tmp_path / "joined", tmp_path / "moved")
    assert_equal(whole, ShardSet.open(moved, looks_at_shards=False))
    merge_parts(moved)  # again
    assert_equal(whole, ShardSet.open(moved))


def test_documents_keep_their_pages_and_texts(tmp_path: Path) -> None:
    shards = ShardSet.open(write_documents(tmp_path / "set", range(COUNT)))
    assert shards.num_pages.tolist() == [1 + i % 3 for i in range(COUNT)]
    counts, sizes = shards.page_sizes(np.array([5, 0, 2]))
    assert counts.tolist() == [3, 1, 3]
    assert sizes.tolist() == [[35, 40], [35, 41], [35, 42], [30, 40], [32, 40], [32, 41], [32, 42]]
    assert shards.num_patches[:2].tolist() == [3 * 3, 2 * 3 * 3]
    assert shards.columns["characters"].tolist() == [len(f"page number {i}, Straße 东京") for i in range(COUNT)]
    document = shards.read_document(5)
    assert document.text == "page number 5, Straße 东京"
    assert document.words.page.tolist() == [2] and document.words.corners.tolist() == [[1, 2, 20, 9.5]]
    assert shards.labels.shape == (COUNT, 0)


@pytest.mark.parametrize("kind", ["image", "ocr", "video"])
def test_rewriting_the_first_format_loses_nothing(tmp_path: Path, kind: str) -> None:
    whole = write_id_shard_set(tmp_path / "whole", kind, 7, samples_per_shard=3)  # type: ignore[arg-type]
    old = Path(shutil.copytree(whole, tmp_path / "old"))
    to_first_format(old)
    (old / "vocabulary.json").write_text("words")
    assert_equal(ShardSet.open(whole), ShardSet.open(old))
    rewrite_shard_set(old, tmp_path / "new")
    assert (tmp_path / "new/vocabulary.json").read_text() == "words"
    (tmp_path / "new/vocabulary.json").unlink()
    for path in whole.rglob("*"):
        copy = tmp_path / "new" / path.relative_to(whole)
        if path.name == "dataset.json":  # all but the digits of the content, which nobody kept
            one, other = (json.loads(file.read_text()) for file in (path, copy))
            assert one.pop("content") != other.pop("content") and one == other
        else:
            assert path.is_dir() or path.read_bytes() == copy.read_bytes(), path
    with pytest.raises(DataError, match="has the present format 2 already"):
        rewrite_shard_set(whole, tmp_path / "again")
    (old / "vocabulary.json").unlink()
    merge_parts(tmp_path / "joined", [old])
    assert_equal(ShardSet.open(whole), ShardSet.open(tmp_path / "joined"))


def parts_of(folder: Path) -> list[Path]:
    write_parts(folder, write_images, [3, 4, 5])
    return sorted((folder / "parts").iterdir())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda parts: shutil.rmtree(parts[1]),
            r"lacks 1 of 3 parts, the first is 00001-of-00003; run its task \(--task",
        ),
        (
            lambda parts: shutil.copytree(parts[0], parts[0].with_name("extra")),
            "extra is none of the 3 parts beside it",
        ),
        (
            lambda parts: shutil.copytree(parts[0], parts[0].with_name("00000-of-00004")),
            "holds parts of 3 and of 4 tasks, whose samples overlap",
        ),
        (lambda parts: (parts[1] / "index/rows.npy").unlink(), r"rows\.npy is missing or unreadable"),
        (lambda parts: (parts[2] / "dataset.json").unlink(), r"00002-of-00003 is not a shard set, because it holds no"),
        (
            lambda parts: (shutil.rmtree(parts[1]), write_images(parts[1], range(2, 5))),
            r"key 'key2' is in .*00000-of-00003 and again in .*00001-of-00003, and keys tell samples apart",
        ),
        (
            lambda parts: (shutil.rmtree(parts[1]), write_images(parts[1], range(3, 5), num_classes=60)),
            r"00001-of-00003 has num_classes = 60, but .*00000-of-00003 has 50, so they are no one set; write",
        ),
        (
            lambda parts: (parts[1] / "vocabulary.json").write_text("other"),
            r"vocabulary\.json of .*00001-of-00003 differs from that of .*00000-of-00003, so their labels",
        ),
        (
            lambda parts: [(shutil.rmtree(p), write_images(p, range(0))) for p in parts],
            "none of 3 parts has a sample, so there is nothing to train on; see their rejects",
        ),
    ],
)
def test_parts_that_make_no_set_are_a_sentence(
    tmp_path: Path, damage: Callable[[list[Path]], object], text: str
) -> None:
    damage(parts_of(tmp_path / "set"))
    with pytest.raises(DataError, match=text):
        merge_parts(tmp_path / "set")
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_folders_without_parts_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folder parts, so there is nothing to join"):
        merge_parts(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match="is empty, so there is nothing to join"):
        merge_parts(tmp_path)
    part = write_images(tmp_path / "one", range(3))
    with pytest.raises(DataError, match="is named twice"):
        merge_parts(tmp_path / "joined", [part, part])
    merge_parts(tmp_path / "joined", [part])
    with pytest.raises(DataError, match="is a joined set itself; name its parts instead"):
        merge_parts(tmp_path / "again", [tmp_path / "joined"])
    with pytest.raises(DataError, match=re.escape("exists already and would be overwritten")):
        merge_parts(tmp_path / "joined", [part])


def test_a_part_that_was_cut_is_found_when_the_set_is_opened(tmp_path: Path) -> None:
    last = parts_of(tmp_path / "set")[1]
    merge_parts(tmp_path / "set")
    tar = sorted((last / "shards").glob("*.tar"))[-1]
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"the shard .*00001-of-00003/shards/000001\.tar is truncated"):
        ShardSet.open(tmp_path / "set")
    tar.unlink()
    with pytest.raises(DataError, match=r"the shard .*00001-of-00003/shards/000001\.tar is missing"):
        ShardSet.open(tmp_path / "set")
    assert len(ShardSet.open(tmp_path / "set", looks_at_shards=False)) == 12
