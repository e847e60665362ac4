"""Shard sets on another file system: the index here, shards there, what was read in a cache of limited size."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megatron_ove.data.sampler import permute, permute_blocks
from megatron_ove.errors import DataError
from megatron_ove.shards.merge import merge_parts
from megatron_ove.shards.remote import RemoteSettings, RemoteShardFiles, make_mirror
from megatron_ove.shards.shard_set import ReadError, ShardSet
from megatron_ove.shards.validation import validate_shard_set
from megatron_ove.shards.writer import ShardWriter
from tests.support.documents import write_documents
from tests.support.id_shards import encode
from tests.support.tool_scripts import run_script

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """A store in memory with a set at memory://bucket/set."""
    files = fsspec.filesystem("memory")
    write_documents(tmp_path / "set", range(11))
    files.put(str(tmp_path / "set"), "/bucket/set", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


def mirror(tmp_path: Path, name: str = "mirror", **changes: Any) -> ShardSet:
    settings = {"url": "memory://bucket/set", "cache": str(tmp_path / "cache"), "max_gib": 1.0, "block_mib": 1}
    make_mirror(RemoteSettings(**{**settings, **changes}), tmp_path / name)
    return ShardSet.open(tmp_path / name)


def test_a_mirror_is_read_as_the_set_itself(tmp_path: Path, store: Any) -> None:
    there, here = mirror(tmp_path), ShardSet.open(tmp_path / "set")
    assert not (tmp_path / "mirror" / "shards").exists()
    for row in range(len(here)):
        for member in here.index.stored_members(row):
            assert there.read(row, member) == here.read(row, member)
        assert there.read_document(row).text == here.read_document(row).text
    assert validate_shard_set(tmp_path / "mirror", deep=True) == []
    files = there.files
    assert isinstance(files, RemoteShardFiles)
    assert 0 < files.num_fetched <= len(there.index.shard_rows()), "each shard is smaller than a block"
    again = ShardSet.open(tmp_path / "mirror", looks_at_shards=False)
    assert again.read(3, "json") == here.read(3, "json")
    assert isinstance(again.files, RemoteShardFiles) and again.files.num_fetched == 0, "the cache is the node's"


def test_joined_parts_are_mirrored_with_their_set(tmp_path: Path) -> None:
    for number in range(2):
        write_documents(tmp_path / "joined/parts" / f"{number:05d}-of-00002", range(number * 5, number * 5 + 5))
    merge_parts(tmp_path / "joined")
    url = f"file://{tmp_path / 'joined'}"
    arguments = [url, tmp_path / "mirror", "--cache", "$PLACE/cache", "--block-mib", 2]
    assert run_script("shards/mirror_remote.py", *arguments) == 0
    os.environ["PLACE"] = str(tmp_path / "node")
    try:
        there, here = ShardSet.open(tmp_path / "mirror"), ShardSet.open(tmp_path / "joined")
    finally:
        del os.environ["PLACE"]
    assert [there.read(row, "json") for row in range(10)] == [here.read(row, "json") for row in range(10)]
    assert list((tmp_path / "node/cache").iterdir())


def write_large(folder: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    with ShardWriter(folder, kind="document", samples_per_shard=count) as writer:
        for i in range(count):
            noise = random.integers(0, 256, (110, 110, 3), dtype=np.uint8)
            writer.add(f"k{i}", {"json": b'{"text":"a"}', "page0000.jpg": encode(noise)})
    return folder


def test_neighbours_share_a_block_and_old_blocks_give_way(tmp_path: Path) -> None:
    count = 400  # 37 KiB each: 28 to a block
    set_url = f"file://{write_large(tmp_path / 'large', count)}"
    shards = mirror(tmp_path, url=set_url, max_gib=4 / 1024)
    expected = ShardSet.open(tmp_path / "large")
    orders = {
        "random": permute(np.arange(count), count, 1),
        "blocks": permute_blocks(np.arange(count), count, 1, block=25, window=50),
    }
    fetched = {}
    for name, rows in orders.items():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        files = shards.files
        assert isinstance(files, RemoteShardFiles)
        files.num_fetched = 0
        for row in rows.tolist():
            assert shards.read(row, "page0000.jpg") == expected.read(row, "page0000.jpg")
            held = sum(path.stat().st_size for path in files.cache.iterdir())
            assert held <= 4 * MIB
        fetched[name] = files.num_fetched
    assert fetched["blocks"] < 60 < 200 < fetched["random"], fetched


def test_what_fails_there_is_tried_again_and_then_a_sentence(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = mirror(tmp_path)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    cat, calls = type(store).cat_file, []

    def flaky(self: Any, path: str, **options: Any) -> bytes:
        calls.append(path)
        if len(calls) == 1:
            raise TimeoutError("slow down")
        if len(calls) == 2:
            raise RuntimeError("503")
        return cat(self, path, **options)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    for _ in range(2):
        with pytest.raises(ReadError, match=r"json of sample 'document-2' .* cannot be read \(.*\); check the disk"):
            shards.read(2, "json")
    assert shards.read(2, "json")
    start = time.monotonic()
    assert shards.read(2, "json") and len(calls) == 3 and time.monotonic() - start < 5


def test_mistakes_are_sentences(tmp_path: Path, store: Any) -> None:
    with pytest.raises(DataError, match="nowhere://bucket/set cannot be read"):
        mirror(tmp_path, url="nowhere://bucket/set")
    with pytest.raises(DataError, match="memory://bucket/other cannot be read"):
        mirror(tmp_path, url="memory://bucket/other")
    store.pipe("/bucket/empty/readme.txt", b"x")
    with pytest.raises(DataError, match=r"memory://bucket/empty is not a shard set, because it holds no dataset\.json"):
        mirror(tmp_path, url="memory://bucket/empty")
    store.rm("/bucket/set/shards/000001.tar")
    with pytest.raises(DataError, match=r"the shard .*000001\.tar is missing"):
        mirror(tmp_path)
    (tmp_path / "mirror/remote.json").write_text('{"url": 3}')
    with pytest.raises(DataError, match=r"remote\.json does not say where shards are"):
        ShardSet.open(tmp_path / "mirror")
