"""A source with a list of sets: as one set that holds their samples one after the other."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.shards.joined import Pieces
from megatron_ove.shards.merge import merge_parts
from megatron_ove.shards.shard_set import ShardSet
from tests.support.documents import write_documents
from tests.support.id_shards import write_id_shard_set
from tests.support.old_shards import to_first_format


def test_several_sets_are_read_as_one(tmp_path: Path) -> None:
    sizes = [5, 1, 9]
    folders = [
        write_documents(tmp_path / str(i), range(sum(sizes[:i]), sum(sizes[: i + 1])), num_classes=20) for i in range(3)
    ]
    joined = pickle.loads(pickle.dumps(ShardSet.open_all(folders)))
    merge_parts(tmp_path / "merged", folders)
    merged = ShardSet.open(tmp_path / "merged")
    assert len(joined) == len(merged) == 15
    assert joined.info.num_pages == merged.info.num_pages and joined.info.most_pages == 3
    rows = np.array([14, 0, 5, 6, 3, 3])
    for name in ("labels", "num_pages", "characters", "boxes"):
        assert np.array_equal(joined.columns[name][rows], merged.columns[name][rows]), name
        assert np.array_equal(np.asarray(joined.columns[name]), merged.columns[name])
        assert np.array_equal(joined.columns[name][2:8], merged.columns[name][2:8])
    assert joined.labels.shape == (15, 2)
    for found, expected in zip(joined.page_sizes(rows), merged.page_sizes(rows), strict=True):
        assert np.array_equal(found, expected)
    for row in range(15):
        assert joined.key(row) == merged.key(row)
        assert joined.shard_path(row).resolve() == merged.shard_path(row).resolve()
        assert joined.index.stored_members(row) == merged.index.stored_members(row)
        assert all(joined.read(row, m) == merged.read(row, m) for m in merged.index.stored_members(row))
    assert {number: len(rows) for number, rows in joined.index.shard_rows().items()} == {
        number: len(rows) for number, rows in merged.index.shard_rows().items()
    }


def test_both_formats_go_together(tmp_path: Path) -> None:
    folders = [write_id_shard_set(tmp_path / name, "image", 5, samples_per_shard=2) for name in "ab"]
    to_first_format(folders[0])
    joined = ShardSet.open_all(folders)
    assert [joined.key(i) for i in range(10)] == [f"image{i}" for i in range(5)] * 2
    assert joined.labels[np.array([7, 2])][:, 0].tolist() == [2, 2]
    assert joined.read(7, "jpg") == joined.read(2, "jpg")
    assert joined.width[7] == joined.width[2]


def test_sets_that_are_no_one_source_are_a_sentence(tmp_path: Path) -> None:
    one = write_id_shard_set(tmp_path / "one", "image", 3)
    pages = write_id_shard_set(tmp_path / "pages", "ocr", 3)
    text = f"{pages} has kind = ocr, but {one} has image, so they are no one source; write them alike"
    with pytest.raises(DataError, match=re.escape(text)):
        ShardSet.open_all([one, pages])
    other = write_id_shard_set(tmp_path / "other", "image", 3)
    (other / "vocabulary.json").write_text("words")
    with pytest.raises(DataError, match=r"vocabulary\.json of .*other differs from that of .*one, so equal labels"):
        ShardSet.open_all([one, other])
    with pytest.raises(DataError, match=r"(?s)a does not exist.*b does not exist"):
        ShardSet.open_all([tmp_path / "a", one, tmp_path / "b"])


def test_pieces_are_as_one_array() -> None:
    arrays = [np.arange(6).reshape(3, 2), np.empty((0, 2), int), np.arange(8).reshape(4, 2) + 100]
    pieces, whole = Pieces(arrays), np.concatenate(arrays)
    assert len(pieces) == 7 and pieces.shape == whole.shape and pieces.dtype == whole.dtype
    rows = np.array([6, 0, 3, 2, 3])
    assert np.array_equal(pieces[rows], whole[rows])
    assert np.array_equal(pieces[1:6], whole[1:6])
    assert pieces[3].tolist() == whole[3].tolist()
    assert np.array_equal(np.asarray(pieces), whole)
