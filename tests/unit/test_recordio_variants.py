"""Record files as people have them: sets of faces with their header, indices that editors changed, ragged labels."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.rejects import read_rejects
from megatron_ove.shards import recordio
from megatron_ove.shards.recordio import PictureFile
from megatron_ove.shards.shard_set import ShardSet
from tests.support.distributed import repository_root
from tests.support.id_shards import encode, id_picture

PICTURES, IDENTITIES = 12, 4


def write(prefix: Path, records: Sequence[tuple[int, Sequence[float], bytes]], *, flag: int | None = None) -> Path:
    """Packs (key, labels, picture) as mxnet does; `flag` is the count of labels, 0 = one in the header."""
    with prefix.with_suffix(".rec").open("wb") as stream, prefix.with_suffix(".idx").open("w") as index:
        for key, labels, picture in records:
            values = np.asarray(labels, "<f4")
            count = (0 if values.size == 1 else values.size) if flag is None else flag
            head = struct.pack("<IfQQ", count, values[0] if count == 0 else 0.0, key, 0)
            payload = head + (values.tobytes() if count else b"") + picture
            index.write(f"{key}\t{stream.tell()}\n")
            stream.write(struct.pack("<II", 0xCED7230A, len(payload)) + payload + b"\0" * (-len(payload) % 4))
    return prefix.with_suffix(".rec")


def picture(key: int) -> bytes:
    return encode(id_picture(key, 30, 40))


def faces(filler: Sequence[float] = (), *, first: int = PICTURES + 1) -> list[tuple[int, Sequence[float], bytes]]:
    """A header, three pictures an identity, the identities' records; `first` is the key of the first of these."""
    start = first - PICTURES  # key of the first picture
    size = PICTURES // IDENTITIES
    return [
        (0, (first, first + IDENTITIES), b""),
        *((start + i, (i // size, *filler), picture(i)) for i in range(PICTURES)),
        *((first + i, (start + size * i, start + size * (i + 1)), b"") for i in range(IDENTITIES)),
    ]


def plain(labels: Sequence[Sequence[float]] | None = None) -> list[tuple[int, Sequence[float], bytes]]:
    return [(i, labels[i] if labels else (i % 4,), picture(i)) for i in range(PICTURES)]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "import_recordio", repository_root() / "tools/shards/import_recordio.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_all(tool: ModuleType, output: Path, *files: Path, **options: object) -> ShardSet:
    defaults = {"kind": "image", "num_classes": 4, "samples_per_shard": 100}
    tool.import_records(list(files), output, **{**defaults, **options})
    return ShardSet.open(output)


@pytest.mark.parametrize("filler", [(), (0,), (0, 5)])
def test_pictures_of_a_set_of_faces_get_their_identity(tool: ModuleType, tmp_path: Path, filler: tuple) -> None:
    """Neither the header nor the identities' records become samples, and the filler is no second label."""
    path = write(tmp_path / "faces", faces(filler))
    assert PictureFile(path).is_face_set
    shards = import_all(tool, tmp_path / "set", path)
    assert shards.labels.tolist() == [[i // 3] for i in range(PICTURES)]
    assert [shards.read(i, "jpg") for i in (0, 11)] == [picture(0), picture(11)]
    assert read_rejects(tmp_path / "set.rejects.jsonl") == []


def test_a_set_of_faces_without_its_index(tool: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "faces", faces())
    path.with_suffix(".idx").unlink()
    assert import_all(tool, tmp_path / "set", path).labels.tolist() == [[i // 3] for i in range(PICTURES)]
    assert f"{path} has no index beside it; its 17 records were found by reading it" in caplog.text


def test_more_pictures_than_float32_counts(tmp_path: Path) -> None:
    """The header of such a set is off by one, as that of the largest published ones is."""
    for first in (2**24 + 11, 2**24 + 13, 2**24 + 12):  # stored as + 12 and + 12, and as it is
        records = PictureFile(write(tmp_path / "faces", faces(first=first))).records()
        assert [record.labels.tolist() for record in records] == [[i // 3] for i in range(PICTURES)]


def test_pictures_missing_from_the_index_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "faces", faces())
    lines = path.with_suffix(".idx").read_text().splitlines()
    path.with_suffix(".idx").write_text("\n".join(lines[:5] + lines[7:]))
    assert len(list(PictureFile(path).records())) == PICTURES - 2
    assert "promises 12 pictures, but its index lists 10 of them" in caplog.text


def test_two_labels_and_an_empty_first_picture_are_no_header(tool: ModuleType, tmp_path: Path) -> None:
    """Labels that a header cannot have, or a picture: all records stay samples."""
    for number, (labels, first) in enumerate([((3.0, 1.0), b""), ((1.0, 3.0), b""), ((2.0, 3.0), picture(0))]):
        records = [(0, labels, first), *((i, (i % 4, 2), picture(i)) for i in range(1, 4))]
        path = write(tmp_path / f"{number}", records)
        assert not PictureFile(path).is_face_set
        assert import_all(tool, tmp_path / f"set{number}", path).labels[-3:].tolist() == [[1, 2], [2, 2], [3, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.write_bytes(index.read_bytes().replace(b"\n", b"\r\n")), ""),
        (lambda index: index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes()), ""),
        (lambda index: index.write_text(index.read_text().replace("\t", "  ") + "\n\n"), ""),
        (lambda index: index.unlink(), "has no index beside it; its 12 records were found"),
        (
            lambda index: index.write_text(index.read_text() * 2),
            "more than once (12 lines); each is read once",
        ),
        (
            lambda index: index.write_text("".join(f"1\t{row.split()[1]}\n" for row in index.read_text().splitlines())),
            "different records of .* have one key, so all are numbered by their place",
        ),
    ],
    ids=["windows", "mark", "blanks", "none", "twice", "one key"],
)
def test_indices_that_were_changed(
    tool: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: object, message: str
) -> None:
    path = write(tmp_path / "plain", plain())
    change(path.with_suffix(".idx"))  # type: ignore[operator]
    shards = import_all(tool, tmp_path / "set", path)
    assert shards.labels.tolist() == [[i % 4] for i in range(PICTURES)]
    assert [shards.key(i)[-12:] for i in (0, 11)] == ["0" * 12, "000000000011"]
    assert (message == "") == (caplog.text == "")
    assert message.split(".*")[0] in caplog.text


def test_numbers_of_labels_that_differ(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [[i % 4] * (1 + i % 3) for i in range(PICTURES)]
    path = write(tmp_path / "ragged", plain(labels))
    shards = import_all(tool, tmp_path / "set", path)
    assert shards.labels.tolist() == [row + [-1] * (3 - len(row)) for row in labels]
    assert import_all(tool, tmp_path / "wide", path, label_width=5).labels[1].tolist() == [1, 1, -1, -1, -1]
    monkeypatch.setattr(tool, "_LOOKED_AT", 2)
    with pytest.raises(DataError, match=r"record 2 of .* has 3 labels, but .* get 2 .*; give --label-width 3"):
        import_all(tool, tmp_path / "narrow", path)
    assert not (tmp_path / "narrow").exists()


def test_minus_one_is_none_and_one_label_may_stand_behind_the_header(tool: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "minus", plain([[i % 4, -1, -1] for i in range(PICTURES)]))
    assert import_all(tool, tmp_path / "a", path).labels[3].tolist() == [3, -1, -1]
    path = write(tmp_path / "flag", plain(), flag=1)
    assert import_all(tool, tmp_path / "b", path).labels.tolist() == [[i % 4] for i in range(PICTURES)]


def test_records_that_cannot_be_used_are_left_out(tool: ModuleType, tmp_path: Path) -> None:
    records = plain()
    records[3], records[5] = (3, (3,), b"\xff\xd8 nonsense"), (5, (1,), b"")
    path = write(tmp_path / "bad", records)
    content = bytearray(path.read_bytes())
    offset = int(path.with_suffix(".idx").read_text().split()[15])
    content[offset + 8 : offset + 12] = (99999).to_bytes(4, "little")  # record 7 promises that many labels
    path.write_bytes(content)
    shards = import_all(tool, tmp_path / "set", path)
    assert len(shards) == 9
    reasons = {row["file"]: row["reason"] for row in read_rejects(tmp_path / "set.rejects.jsonl")}
    assert sorted(reasons) == [f"{path}:3", f"{path}:5", f"{path}:7"]
    assert "promises 99999 labels but ends before" in reasons[f"{path}:7"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"record 5 of .*nan\.rec has the label nan, which is no whole number"),
        ("range", r"label 4 of '0000_range_000000000008' is outside 0\.\.3"),
        ("pixels", r"no sample was accepted .* refused because: .*it is not a picture"),
        ("cut", r"cut\.rec (ends inside the record|.* truncated)"),
        ("empty", r"empty\.rec is empty \(0 bytes\)"),
    ],
)
def test_what_cannot_be_imported_gets_a_sentence(tool: ModuleType, tmp_path: Path, name: str, message: str) -> None:
    records = plain()
    if name == "nan":
        records = plain([[i % 4, float("nan") if i == 5 else 1] for i in range(PICTURES)])
    if name == "range":
        records[8] = (8, (4,), picture(8))
    if name == "pixels":
        records = [(i, (i % 4,), bytes(192)) for i in range(PICTURES)]
    path = write(tmp_path / name, [] if name == "empty" else records)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DataError, match=message):
        import_all(tool, tmp_path / "set", path)
    assert not (tmp_path / "set").exists()


def test_a_cut_file_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "cut", plain())
    whole = path.read_bytes()
    for missing in (4, 700, len(whole) // 2):
        path.write_bytes(whole[:-missing])
        with pytest.raises(DataError, match="truncated"):
            PictureFile(path)


def test_the_published_way_of_reading_gives_the_same(tmp_path: Path) -> None:
    """The rules of insightface's own data set class, written down again: header, then keys 1 .. f - 1, first label."""
    path = write(tmp_path / "faces", faces((0,)))
    shutil.copy(path, tmp_path / "copy.rec")
    index = dict(map(int, line.split()) for line in path.with_suffix(".idx").read_text().splitlines())
    content, expected = path.read_bytes(), []
    for key in range(1, PICTURES + 1):
        length = int.from_bytes(content[index[key] + 4 : index[key] + 8], "little")
        payload = content[index[key] + 8 : index[key] + 8 + length]
        flag = int.from_bytes(payload[:4], "little")
        expected.append((key, float(np.frombuffer(payload, "<f4", 1, 24)[0]), payload[24 + 4 * flag :]))
    read = [(record.key, float(record.labels[0]), record.picture) for record in PictureFile(path).records()]
    assert read == expected and recordio.MAX_EXACT_LABEL == 2**24
