"""Writing shard sets: what comes back, what plain tools and DALI read, what is refused and how it is said."""

from __future__ import annotations

import errno
import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wds2idx import IndexCreator

from megatron_ove.errors import DataError
from megatron_ove.rejects import RejectsFile
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from megatron_ove.shards.writer import ShardWriter
from tests.support.id_shards import clip_members, encode, id_picture, npy_bytes, write_id_shard_set

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
JPEG = encode(np.asarray(Image.fromarray(PICTURE).resize((200, 150))), "JPEG")
PNG_16 = encode(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
LABELS = np.array([1, -1], np.int32)


def writer(directory: Path, **options: object) -> ShardWriter:
    settings = {"kind": "image", "num_classes": 10, "label_width": 2, **options}
    return ShardWriter(directory, **settings)  # type: ignore[arg-type]


def encoded(mode: str, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(stream, image_format, **options)
    return stream.getvalue()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with writer(tmp_path / "set", samples_per_shard=4) as out:
        for i in range(10):
            assert out.add(f"k{i}", {"jpg": encode(id_picture(i, 20 + i, 50))}, np.array([i, -1]))
    shards = pickle.loads(pickle.dumps(ShardSet.open(tmp_path / "set")))
    assert len(shards) == 10
    assert [shards.key(i) for i in range(10)] == [f"k{i}" for i in range(10)]
    assert shards.labels[:, 0].tolist() == list(range(10))
    assert shards.height.tolist() == list(range(20, 30))
    assert set(shards.width.tolist()) == {50}
    assert shards.num_patches[9] == 3 * 4  # 29 x 50 pixels are covered by 3 x 4 patches of 14
    for i in (9, 0, 5):
        assert shards.read(i, "jpg") == encode(id_picture(i, 20 + i, 50))
        assert np.frombuffer(shards.read(i, "cls"), "<i4").tolist() == [i, -1]
    assert "sample 'k5' (number 5) of" in shards.describe(5)
    assert shards.describe(5).endswith("shards/000001.tar")
    assert validate_shard_set(tmp_path / "set", deep=True) == []


def test_shards_are_plain_tar_files_with_the_index_dali_makes_of_them(tmp_path: Path) -> None:
    write_id_shard_set(tmp_path / "set", "video", 3, samples_per_shard=2)
    shards = sorted((tmp_path / "set" / "shards").glob("*.tar"))
    assert len(shards) == 2
    for shard in shards:
        with IndexCreator(str(shard), str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "index").read_text() == shard.with_name(shard.name + ".idx").read_text()
    with tarfile.open(shards[0]) as tar:
        assert tar.getnames()[:3] == ["video0.codec.jpg", "video0.positions.npy", "video0.frame00.jpg"]
    info = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert (info["kind"], info["frames"], info["grid_height"], info["grid_width"]) == ("video", 16, 2, 3)


def test_sizes_are_those_after_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # rotate by 90 degrees
    with writer(tmp_path / "set") as out:
        out.add("turned", {"jpg": encode(PICTURE, "JPEG", exif=exif)}, LABELS)
    shards = ShardSet.open(tmp_path / "set")
    assert (shards.height[0], shards.width[0]) == (60, 40)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"just some text" * 20, "it is not a picture", id="text"),
        pytest.param(JPEG[:-2], "cannot be decoded to its end", id="jpeg without its end marker"),
        pytest.param(JPEG[: len(JPEG) // 2], "cannot be decoded to its end", id="half a jpeg"),
        pytest.param(encode(PICTURE)[:-500], "cannot be decoded to its end", id="truncated png"),
        pytest.param(encoded("P", "GIF"), "its format GIF is not one of JPEG, PNG, WEBP", id="gif"),
        pytest.param(encoded("RGB", "TIFF"), "its format TIFF is not one of", id="tiff"),
        pytest.param(encoded("CMYK", "JPEG"), "its colours are CMYK", id="cmyk"),
        pytest.param(PNG_16, "it has 16 bits per channel", id="16-bit png"),
        pytest.param(encoded("RGBA", "PNG"), "it has an alpha channel", id="alpha"),
        pytest.param(
            encoded("RGB", "WEBP", save_all=True, append_images=[Image.fromarray(255 - PICTURE)]),
            "it is an animation of 2 frames",
            id="animation",
        ),
    ],
)
def test_bad_pictures_are_rejected_with_their_reason(tmp_path: Path, picture: bytes, reason: str) -> None:
    rejects = RejectsFile(tmp_path / "rejects.jsonl", stage="shards")
    with rejects, writer(tmp_path / "set", rejects=rejects) as out:
        assert not out.add("bad", {"jpg": picture}, LABELS, source="photos/bad.jpg")
        assert out.add("good", {"jpg": JPEG}, LABELS)
    (line,) = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "photos/bad.jpg"
    assert json.loads(line)["reason"].startswith("bad.jpg: ")
    assert reason in json.loads(line)["reason"]
    assert len(ShardSet.open(tmp_path / "set")) == 1


def test_ordinary_pictures_are_accepted(tmp_path: Path) -> None:
    pictures = {
        "grey": encoded("L", "JPEG"),
        "progressive": encoded("RGB", "JPEG", progressive=True),
        "png": encode(PICTURE),
        "palette": encoded("P", "PNG"),
        "webp": encoded("RGB", "WEBP"),
    }
    with writer(tmp_path / "set") as out:
        for key, picture in pictures.items():
            assert out.add(key, {"jpg": picture}, LABELS), key


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frame03.jpg": b"nothing"}, "frame03.jpg: it is not a picture"),
        (
            {"frame15.jpg": encode(id_picture(0, 28, 28))},
            "frame15.jpg: it has 28 x 28 pixels where",
        ),
        (
            {"codec.jpg": encode(id_picture(0, 28, 224))},
            "codec.jpg: it has 224 x 28 pixels where",
        ),
        ({"positions.npy": b"x"}, "positions.npy: it cannot be read"),
        ({"positions.npy": npy_bytes(np.zeros((0, 3), np.int32))}, "instead of int32 [K, 3], K >= 1"),
        ({"positions.npy": npy_bytes(np.zeros((4, 3), np.int64))}, "holds int64 [4, 3] instead of int32 [K, 3]"),
        ({"positions.npy": npy_bytes(np.array([[16, 0, 0]], np.int32))}, "leaves the grid of 16 x 2 x 3"),
        ({"positions.npy": npy_bytes(np.array([[1, 0, 0], [0, 0, 1]], np.int32))}, "not sorted by (t, h, w)"),
    ],
)
def test_bad_clips_are_rejected_with_their_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, bytes], reason: str
) -> None:
    with writer(tmp_path / "set", kind="video", frames=16, grid_height=2, grid_width=3) as out:
        assert out.add("good", clip_members(0, 10), LABELS)
        assert not out.add("bad", {**clip_members(0, 10), **change}, LABELS)
    assert reason in caplog.text
    assert "rejected bad" in caplog.text


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.array([10, 1]), "label 10 of 'k' is outside 0..9 (num_classes = 10; -1 = none); correct"),
        (np.array([1, -2]), "label -2 of 'k' is outside 0..9"),
        (np.array([1, 2, 3]), "labels of 'k' are int64 of shape [3], but"),
        (np.array([1.0, 2.0]), "give [2] integers, with -1 for none"),
    ],
)
def test_bad_labels_are_errors(tmp_path: Path, labels: np.ndarray, text: str) -> None:
    with pytest.raises(DataError, match=re.escape(text)), writer(tmp_path / "set") as out:
        out.add("k", {"jpg": JPEG}, labels)
    assert list(tmp_path.iterdir()) == [], "an error must leave nothing behind"


def test_wrong_calls_are_errors(tmp_path: Path) -> None:
    with writer(tmp_path / "set") as out:
        out.add("k", {"jpg": JPEG}, LABELS)
        with pytest.raises(DataError, match=r"key 'k' is used twice in .*; make it unique"):
            out.add("k", {"jpg": JPEG}, LABELS)
        with pytest.raises(DataError, match=r"key 'a\.b' cannot name a sample"):
            out.add("a.b", {"jpg": JPEG}, LABELS)
        with pytest.raises(DataError, match="sample 'm' lacks or has unknown members for kind image: jpg, png"):
            out.add("m", {"png": JPEG}, LABELS)
    with pytest.raises(DataError, match="exists already and would be overwritten"):
        writer(tmp_path / "set")
    with pytest.raises(DataError, match="needs grid_height and grid_width"):
        writer(tmp_path / "clips", kind="video")
    with pytest.raises(DataError, match=r"num_classes = 0, .* must all be at least 1"):
        writer(tmp_path / "none", num_classes=0)


def test_an_empty_shard_set_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    text = r"no sample was accepted .* cannot be trained on; the first .* not a picture"
    with pytest.raises(DataError, match=text), writer(tmp_path / "set") as out:
        out.add("text", {"jpg": b"text"}, LABELS)
    assert not (tmp_path / "set").exists()


def test_companion_files_appear_with_the_set(tmp_path: Path) -> None:
    out = writer(tmp_path / "set")
    out.add_file("vocabulary.json", b"words")
    out.add("k", {"jpg": JPEG}, LABELS)
    assert not (tmp_path / "set").exists()
    for name in ("dataset.json", "index", "shards", "", "..", "../a", "a/b", "/a"):
        with pytest.raises(DataError, match=r"cannot name a companion file of .*; choose another"):
            out.add_file(name, b"")
    out.close()
    assert (tmp_path / "set/vocabulary.json").read_bytes() == b"words"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_nothing_is_visible_before_close(tmp_path: Path) -> None:
    out = writer(tmp_path / "set")
    out.add("k", {"jpg": JPEG}, LABELS)
    assert not (tmp_path / "set").exists()
    out.close()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("mine", ["notes.txt", "shards/notes.txt", "shards/a.tar", "index/more.npy", "index/sub/a"])
def test_a_set_with_a_file_of_the_user_is_not_replaced(tmp_path: Path, mine: str) -> None:
    with writer(tmp_path / "set", samples_per_shard=1) as out:
        for key in "ab":
            out.add(key, {"jpg": JPEG}, LABELS)
        out.add_file("vocabulary.json", b"words")
    writer(tmp_path / "set", overwrite=True).discard()
    (tmp_path / "set" / mine).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / mine).touch()
    with pytest.raises(DataError, match="set exists and holds something else than what would replace it"):
        writer(tmp_path / "set", overwrite=True)


@pytest.mark.parametrize("full", ["a shard", "its index", "the set's index"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), writer(tmp_path / "set", samples_per_shard=1) as out:
        out.add("k0", {"jpg": JPEG}, LABELS)
        if full == "a shard":
            shard = out._shard
            assert shard is not None
            shard._tar.close()
            shard._tar = Path("/dev/full").open("wb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
        elif full == "its index":
            monkeypatch.setattr(Path, "write_text", no_space)
        else:
            monkeypatch.setattr(np, "save", no_space)
        out.add("k1", {"jpg": JPEG}, LABELS)
    assert list(tmp_path.iterdir()) == []
