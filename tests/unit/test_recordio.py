"""RecordIO files: our reader against our writer and against DALI's, label rules, damage, and the import tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import pytest
from nvidia.dali import Pipeline

from megatron_ove.errors import DataError
from megatron_ove.shards.recordio import PictureRecord, integer_labels, read_records
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from tests.support.distributed import repository_root
from tests.support.id_shards import encode, id_picture
from tests.support.record_writer import RecordWriter

MAGIC = (0xCED7230A).to_bytes(4, "little")


def write_pictures(prefix: Path, rows: list[np.ndarray]) -> Path:
    with RecordWriter(prefix) as writer:
        for i, labels in enumerate(rows):
            writer.write(10 + i, labels, encode(id_picture(i, 30, 40)))
    return prefix.with_suffix(".rec")


def test_records_come_back(tmp_path: Path) -> None:
    payloads = [b"plain", b"", MAGIC * 3, b"abcd" + MAGIC + b"ef" + MAGIC, b"x" + MAGIC, b"abcd" + MAGIC]
    with RecordWriter(tmp_path / "a") as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, np.array([key, 2**24 - 1]), payload)
    records = list(read_records(tmp_path / "a.rec"))
    assert [record.picture for record in records] == payloads
    assert [record.key for record in records] == list(range(len(payloads)))
    assert all(record.labels.tolist() == [i, 2**24 - 1] for i, record in enumerate(records))


def test_dali_reads_what_we_write(tmp_path: Path) -> None:
    rows = [np.arange(100) + 1000 * i for i in range(5)]
    path = write_pictures(tmp_path / "a", rows)
    pipeline = Pipeline(batch_size=5, num_threads=1, device_id=None)
    with pipeline:
        pictures, labels = fn.readers.mxnet(path=[str(path)], index_path=[str(path.with_suffix(".idx"))])
        pipeline.set_outputs(fn.decoders.image(pictures), labels)
    pipeline.build()
    pictures, labels = pipeline.run()
    for i in range(5):
        assert labels.at(i).astype(int).tolist() == rows[i].tolist()
        assert np.array_equal(pictures.at(i), id_picture(i, 30, 40))


def test_one_label_is_in_the_header(tmp_path: Path) -> None:
    (record,) = read_records(write_pictures(tmp_path / "a", [np.array([7])]))
    assert record.labels.tolist() == [7.0]


def test_labels_beyond_float32_are_refused(tmp_path: Path) -> None:
    with (
        RecordWriter(tmp_path / "a") as writer,
        pytest.raises(DataError, match=r"record 3 has the label 16777216, but"),
    ):
        writer.write(3, np.array([2**24]), b"")
    path = write_pictures(tmp_path / "b", [np.array([1, 2])])
    data = bytearray(path.read_bytes())
    data[8 + 24 : 8 + 28] = np.float32(2**24).tobytes()
    path.write_bytes(data)
    (record,) = read_records(path)
    with pytest.raises(DataError, match=r"record 10 of .*b\.rec has the label 16777216, .* exact only below 2\*\*24"):
        integer_labels(record, path, zeros_mean_none=False)


def test_zero_labels_of_a_page_mean_none(tmp_path: Path) -> None:
    path = write_pictures(tmp_path / "a", [np.zeros(4, int), np.array([0, 0, 5, 0])])
    empty, words = read_records(path)
    assert integer_labels(empty, path, zeros_mean_none=True).tolist() == [-1] * 4
    assert integer_labels(empty, path, zeros_mean_none=False).tolist() == [0] * 4
    assert integer_labels(words, path, zeros_mean_none=True).tolist() == [0, 0, 5, 0]


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    path = write_pictures(tmp_path / "a", [np.array([1, 2])] * 3)
    index = path.with_suffix(".idx")
    whole, entries = path.read_bytes(), index.read_text()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"a\.rec ends inside the record at byte \d+, so it is truncated"):
        list(read_records(path))
    path.write_bytes(whole)
    index.write_text("10\t4\n")
    with pytest.raises(DataError, match=r"has no record at byte 4, where one should begin"):
        list(read_records(path))
    index.write_text("not an index\n")
    with pytest.raises(DataError, match=r"a\.idx is no RecordIO index"):
        list(read_records(path))
    index.write_text("")
    with pytest.raises(DataError, match=r"a\.idx lists no records; copy it again, or delete it"):
        list(read_records(path))
    for offset in (-8, len(whole), 2**63 - 1):
        index.write_text(f"10\t{offset}\n")
        with pytest.raises(DataError, match=rf"places a record at byte {offset}, but the file has {len(whole)} bytes"):
            list(read_records(path))
    index.write_text(f"10\t{2**63}\n")
    with pytest.raises(DataError, match=r"a\.idx is no RecordIO index"):
        list(read_records(path))
    index.write_text(entries)
    path.write_bytes(MAGIC + (2 << 29 | 4).to_bytes(4, "little") + whole[8:])
    with pytest.raises(DataError, match=r"the record at byte 0 of .*a\.rec has its parts in a wrong order"):
        list(read_records(path))
    path.unlink()
    with pytest.raises(DataError, match=r"record file .*a\.rec does not exist"):
        list(read_records(path))


def test_a_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    for label in ("nan", "inf", "0.5", "-16777217"):
        record = PictureRecord(7, np.array([1, label], np.float32), b"")
        with pytest.raises(DataError, match=rf"record 7 of a\.rec has the label {label.replace('217', '216')}, "):
            integer_labels(record, "a.rec", zeros_mean_none=False)


def test_many_parts_take_no_longer_than_one(tmp_path: Path) -> None:
    parts = [(1 << 29, bytes(24)), *[(2 << 29, b"")] * 200_000, (3 << 29, b"abcd")]
    content = b"".join(MAGIC + (flag | len(part)).to_bytes(4, "little") + part for flag, part in parts)
    (tmp_path / "a.rec").write_bytes(content)
    (record,) = read_records(tmp_path / "a.rec")
    assert len(record.picture) > 700_000


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository_root() / "tools" / "shards" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=repository_root(), check=False)


def test_the_import_tool_converts_pages(tmp_path: Path) -> None:
    rows = [np.array([1, 2, 3]), np.zeros(3, int), np.array([0, 9, 0])]
    first = write_pictures(tmp_path / "pages+one", rows)
    with RecordWriter(tmp_path / "two") as writer:
        writer.write(0, np.array([4, 4, 4]), b"this is text")
        writer.write(1, np.array([5, 6, 7]), encode(id_picture(77, 30, 40)))
    options = ("--kind", "ocr", "--num-classes", 10, "--output", tmp_path / "set")
    done = run_tool("import_recordio.py", *options, first, tmp_path / "two.rec")
    assert done.returncode == 0, done.stderr
    assert "4 samples with 3 labels each, 1 rejected" in done.stdout
    shards = ShardSet.open(tmp_path / "set")
    assert shards.labels.tolist() == [[1, 2, 3], [-1, -1, -1], [0, 9, 0], [5, 6, 7]]
    assert shards.key(0) == "0000_pages_one_000000000010"
    assert shards.read(3, "jpg") == encode(id_picture(77, 30, 40))
    assert "it is not a picture" in (tmp_path / "set.rejects.jsonl").read_text()
    assert validate_shard_set(tmp_path / "set", deep=True) == []
    again = run_tool("import_recordio.py", *options, first)
    assert again.returncode == 2
    assert "exists already and would be overwritten" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_validation_tool_tells_problems(tmp_path: Path) -> None:
    rows = [np.array([1, 2, 3])]
    path = write_pictures(tmp_path / "a", rows)
    run_tool("import_recordio.py", "--kind", "image", "--num-classes", 10, "--output", tmp_path / "set", path)
    good = run_tool("validate_shards.py", tmp_path / "set", "--deep")
    assert (good.returncode, good.stdout.strip().endswith("1 image samples, 10 classes, all well")) == (0, True)
    (tmp_path / "set" / "shards" / "000000.tar").write_bytes(b"")
    bad = run_tool("validate_shards.py", tmp_path / "set")
    assert bad.returncode == 1
    assert "is truncated: it has 0 bytes" in bad.stdout
