"""Indexes, descriptions and mirrors that are damaged or made to do harm: a sentence, never wrong samples."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.shards.documents import Document
from megatron_ove.shards.format import set_mark
from megatron_ove.shards.merge import merge_parts, part_name
from megatron_ove.shards.remote import RemoteSettings, make_mirror
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.token_cache import (
    TextTokenizer,
    TokenCache,
    cache_folder,
    join_cache,
    pieces_folder,
    write_cache,
)
from megatron_ove.shards.writer import ShardWriter
from tests.support.documents import write_documents, write_tokenizer
from tests.support.id_shards import encode, id_picture, write_id_shard_set


def npy_header(text: str) -> bytes:
    content = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


def an_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", b"x")
    return stream.getvalue()


HEADERS = [
    npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999,)}"),
    npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (100000000000000000000000,)}"),
    npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
    npy_header("{'descr': '<i4', 3: False, 'shape': (1,)}"),
    npy_header("{[]: '<i4', 'fortran_order': False, 'shape': (1,)}"),
    npy_header("(" * 60000),
    b"PK\x03\x04 nothing",
    an_archive(),
]


@pytest.mark.parametrize("content", HEADERS)
@pytest.mark.parametrize("name", ["width", "rows"])
def test_a_file_that_is_no_array_is_a_sentence(tmp_path: Path, content: bytes, name: str) -> None:
    path = write_id_shard_set(tmp_path / "set", "image", 3)
    (path / "index" / f"{name}.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"index/{name}\.npy (is missing or unreadable|holds)"):
        ShardSet.open(path)


@pytest.mark.parametrize(
    "change",
    [
        {"label_width": 10**10},
        {"patch_size": 10**30},
        {"grid_height": 10**12},
        {"grid_height": None},
        {"frames": 10**9},
        {"frames": 0},
        {"num_classes": float("nan")},
        {"members": [[["x"]]]},
    ],
)
def test_a_description_with_impossible_figures_is_a_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_id_shard_set(tmp_path / "set", "video", 2)
    info = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(DataError, match=r"which no shard set has|no layout of this version"):
        ShardSet.open(path)


def joined(folder: Path) -> Path:
    for number in range(3):
        write_documents(folder / "parts" / part_name(number, 3), range(number * 5, number * 5 + 5))
    merge_parts(folder)
    return folder


def change_array(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    array = np.load(path)
    change(array)
    np.save(path, array)


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("parts", lambda a: a["first_shard"].__setitem__(1, 10**9), r"parts\.npy does not belong to the shards"),
        ("parts", lambda a: a["first_shard"].__setitem__(1, 2**63 + 5), r"parts\.npy does not belong to the shards"),
        ("parts", lambda a: a["first_row"].__setitem__(2, 3), r"parts\.npy does not belong to the shards"),
        ("parts", lambda a: a["path"].__setitem__(0, b"a\0b"), r"parts\.npy does not belong|is missing, but the index"),
        ("page_width", lambda a: a.__setitem__(3, -7), r"page_width\.npy has -7 pixels in row 3, so it is damaged"),
        ("num_pages", lambda a: a.__setitem__(0, 9), r"num_pages\.npy counts \d+ pages, 9 at most, where dataset"),
    ],
)
@pytest.mark.parametrize("looks_at_shards", [True, False])
def test_figures_that_do_not_belong_together_are_a_sentence_on_every_rank(
    tmp_path: Path, file: str, change: Callable[[np.ndarray], Any], text: str, looks_at_shards: bool
) -> None:
    path = joined(tmp_path / "set")
    change_array(path / "index" / f"{file}.npy", change)
    if "is missing" in text and not looks_at_shards:
        return
    with pytest.raises(DataError, match=text):
        ShardSet.open(path, looks_at_shards=looks_at_shards)


def test_more_pages_than_the_description_says_are_noticed(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "set", range(5))
    info = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**info, "most_pages": 1}))
    with pytest.raises(DataError, match=r"3 at most, where dataset\.json says 9 and 1"):
        ShardSet.open(path, looks_at_shards=False)


def test_a_place_behind_the_shard_is_a_damaged_index(tmp_path: Path) -> None:
    path = write_id_shard_set(tmp_path / "set", "image", 5)
    change_array(path / "index" / "rows.npy", lambda rows: rows["offset"].__setitem__(2, 2**63 + 1))
    shards = ShardSet.open(path)
    with pytest.raises(DataError, match=r"jpg of sample 'image2' .* lies behind the shard's end by its index"):
        shards.read(2, "jpg")


def test_columns_in_another_order_are_no_one_set(tmp_path: Path) -> None:
    for number, names in enumerate((("a", "b"), ("b", "a"))):
        folder = tmp_path / "set/parts" / part_name(number, 2)
        columns = dict.fromkeys(names, "int8")
        with ShardWriter(folder, kind="image", num_classes=2, label_width=1, columns=columns) as writer:
            writer.add(f"k{number}", {"jpg": encode(id_picture(1, 20, 20))}, np.array([0]), values={"a": 1, "b": 2})
    with pytest.raises(DataError, match="has columns = "):
        merge_parts(tmp_path / "set")


@pytest.mark.parametrize(
    ("kind", "value"), [("int8", 1.7), ("int8", 300), ("uint8", -1), ("float32", 1e300), ("int8", "x")]
)
def test_values_that_a_column_cannot_hold_are_refused(tmp_path: Path, kind: str, value: Any) -> None:
    writer = ShardWriter(tmp_path / "set", kind="image", num_classes=2, label_width=1, columns={"score": kind})
    with pytest.raises(DataError, match=rf"has score = .*, which its column of {kind} cannot hold"), writer:
        writer.add("a", {"jpg": encode(id_picture(1, 20, 20))}, np.array([0]), values={"score": value})


def test_the_mark_of_a_set_follows_its_content(tmp_path: Path) -> None:
    first = write_documents(tmp_path / "a", range(30))
    assert set_mark(first) == set_mark(write_documents(tmp_path / "b", range(30)))
    with ShardWriter(tmp_path / "c", kind="document", samples_per_shard=4) as writer:
        shards = ShardSet.open(first)
        for row in range(30):
            members = {m: shards.read(row, m) for m in shards.index.stored_members(row)}
            if row == 3:  # other text of the same length, far from the ends of the index
                document = shards.read_document(row)
                members["json"] = Document(document.text[::-1], document.turns, document.captions).encode()
            writer.add(shards.key(row), members)
    assert set_mark(first) != set_mark(tmp_path / "c")


def test_merging_again_takes_away_what_no_part_has(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number in range(2):
        part = write_documents(folder / "parts" / part_name(number, 2), range(number * 2, number * 2 + 2))
        (part / "vocabulary.json").write_text("words")
    merge_parts(folder)
    assert (folder / "vocabulary.json").exists()
    for part in (folder / "parts").iterdir():
        (part / "vocabulary.json").unlink()
    merge_parts(folder)
    assert not (folder / "vocabulary.json").exists()


def test_a_merge_that_is_killed_leaves_no_set_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = joined(tmp_path / "set")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_ove.shards.merge._replace_info", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_parts(folder)
    with pytest.raises(DataError, match="because they were not joined yet"):
        ShardSet.open(folder)
    merge_parts(folder)
    assert len(ShardSet.open(folder)) == 15


def test_a_whole_set_is_not_replaced_by_joined_parts(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "set", range(4))
    write_documents(folder / "parts" / part_name(0, 1), range(4, 6))
    with pytest.raises(DataError, match="is a whole shard set itself, which a set joined of its parts would replace"):
        merge_parts(folder)
    assert len(ShardSet.open(folder)) == 4


def test_a_set_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "set", range(3))
    with pytest.raises(DataError, match="is named twice, so its samples would count twice"):
        ShardSet.open_all([folder, tmp_path / "." / "set"])


def test_a_cache_of_half_a_set_is_refused(tmp_path: Path) -> None:
    shards = ShardSet.open(write_documents(tmp_path / "set", range(10)))
    tokenizer = TextTokenizer(write_tokenizer(tmp_path / "tokenizer"))
    folder = cache_folder(shards.directory, tokenizer.fingerprint)
    write_cache(shards, tokenizer, range(5), pieces_folder(folder) / part_name(0, 1))
    with pytest.raises(DataError, match="have 5 of the 10 samples of"):
        join_cache(shards, tokenizer.fingerprint, 1)
    write_cache(shards, tokenizer, range(5), folder)
    with pytest.raises(DataError, match="was made of another version of the set"):
        TokenCache.open(shards.directory, tokenizer.fingerprint)


# -- mirrors -----------------------------------------------------------------------------------------------------------


def mirror(tmp_path: Path, name: str, **changes: Any) -> ShardSet:
    settings = {"url": f"file://{tmp_path / 'set'}", "cache": str(tmp_path / "cache"), "max_gib": 1.0, "block_mib": 1}
    make_mirror(RemoteSettings(**{**settings, **changes}), tmp_path / name)
    return ShardSet.open(tmp_path / name)


def texts(shards: ShardSet) -> list[str]:
    return [shards.read_document(row).text for row in range(len(shards))]


def test_blocks_of_another_size_or_version_are_not_read(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", range(8))
    expected = texts(mirror(tmp_path, "large", block_mib=2))
    assert texts(mirror(tmp_path, "small", block_mib=1)) == expected
    shutil.rmtree(tmp_path / "set")
    write_documents(tmp_path / "set", range(1, 9))
    assert texts(mirror(tmp_path, "later")) == texts(ShardSet.open(tmp_path / "set")) != expected


@pytest.mark.parametrize(
    "change",
    [
        {"cache": 5},
        {"url": 7},
        {"max_gib": float("nan")},
        {"max_gib": float("inf")},
        {"block_mib": 1.5},
        {"cache": "a\0b"},
        {"more": 1},
    ],
)
def test_a_mirror_with_impossible_settings_is_a_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    write_documents(tmp_path / "set", range(3))
    mirror(tmp_path, "mirror")
    path = tmp_path / "mirror/remote.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="does not say where shards are"):
        ShardSet.open(tmp_path / "mirror")


def test_a_cache_that_cannot_be_there_is_a_sentence_or_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_documents(tmp_path / "set", range(3))
    with pytest.raises(DataError, match="names a variable that is not set on this node"):
        mirror(tmp_path, "unset", cache="$NOT_SET_ANYWHERE/cache")
    assert texts(mirror(tmp_path, "nowhere", cache="/proc/nothing")) == texts(ShardSet.open(tmp_path / "set"))
    assert "cannot be written" in caplog.text and caplog.text.count("every sample is read from afar") == 1


def test_parts_outside_of_a_set_are_not_mirrored(tmp_path: Path) -> None:
    part = write_documents(tmp_path / "elsewhere", range(3))
    merge_parts(tmp_path / "set", [part])
    with pytest.raises(DataError, match=r"is joined of parts outside of its folder \(\.\./elsewhere\)"):
        mirror(tmp_path, "mirror")
