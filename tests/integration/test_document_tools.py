"""tools/documents and tools/text_render/make_documents: whole runs, odd inputs, tasks, and a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.preprocess.ocr.words import segmentation_name
from megatron_ove.shards.merge import merge_parts
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from megatron_ove.vocabulary import Vocabulary
from tests.support.document_sets import documents_of, picture, rejected, samples_of, special, write_lines, write_tar
from tests.support.tool_scripts import run_script

_OCR = "documents/write_ocr_documents.py"
_CAPTIONS = "documents/write_caption_documents.py"
_TARS = "documents/import_webdataset.py"
_DATASET = "documents/import_image_text_dataset.py"
_RENDER = "text_render/make_documents.py"
_ROOT = Path(__file__).parents[2]


def _options(folder: Path) -> list[object]:
    return ["--workers", 1, "--rejects", folder / "rejects.jsonl"]


def _fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _run_in_tasks(script: str, output: Path, *arguments: object, count: int) -> None:
    """Runs every task of a tool and joins the parts; `arguments` hold the output's place as None."""
    for number in range(count):
        given = [output if argument is None else argument for argument in arguments]
        assert run_script(script, *given, "--workers", 1, "--task", f"{number + 1}/{count}") == 0
    merge_parts(output)


def _pages(folder: Path) -> Path:
    """Writes pictures and the lines.jsonl of pages, some of which cannot be used."""
    box = [[5, 5], [50, 5], [50, 15], [5, 15]]
    _fill(folder, {f"{name}.png": picture(i, size=(80, 40)) for i, name in enumerate("abcdg")})
    Image.fromarray(np.zeros((30, 60), np.uint16)).save(folder / "deep.png")
    lines = [{"text": "Law of", "score": 0.99, "box": box}, {"text": "peace", "score": 0.98, "box": box}]
    records = [{"key": name, "file": str(folder / f"{name}.png"), "lines": lines} for name in ("a", "b", "deep")]
    records[1]["lines"] = [{"text": "nothing known", "score": 0.99, "box": box}]
    records += [
        {"key": "c", "file": str(folder / "c.png"), "lines": [{"text": "low", "score": 0.2, "box": box}]},
        {"key": "d", "file": str(folder / "d.png"), "lines": lines, "file_state": [1, 1]},
        {"key": "gone", "file": str(folder / "gone.png"), "lines": lines},
        {"key": "a", "file": str(folder / "a.png"), "lines": lines},
        {
            "key": "g",
            "file": str(folder / "g.png"),
            "lines": [{"text": "law", "score": 1, "box": [[70, 30], [200, 30], [200, 50], [70, 50]]}],
        },
    ]
    return write_lines(folder / "lines.jsonl", *records)


def test_pages_of_ocr_keep_their_lines_boxes_and_the_labels_of_step_3(tmp_path: Path) -> None:
    lines = _pages(tmp_path / "in")
    vocabulary = Vocabulary(("law", "peace"), (1, 1), {"engine": None, "segmentation": segmentation_name()})
    vocabulary.save(tmp_path / "vocabulary.json")
    labels = ["--vocabulary", tmp_path / "vocabulary.json", "--num-tags", 3]
    assert run_script(_OCR, lines, tmp_path / "set", *labels, "--longest-side", 40, *_options(tmp_path)) == 0
    assert not validate_shard_set(tmp_path / "set", deep=True)
    found = documents_of(tmp_path / "set")
    assert list(found) == ["a", "deep", "g"]
    assert found["a"].text == "Law of\npeace"
    assert found["a"].lines.corners.tolist() == [[2.5, 2.5, 25, 7.5]] * 2
    assert found["g"].lines.corners.tolist() == [[35, 15, 40, 20]]  # cut at the page's edge
    assert run_script("ocr/3_write_page_shards.py", lines, tmp_path / "ocr", *labels, *_options(tmp_path)) == 0
    assert np.array_equal(ShardSet.open(tmp_path / "set").labels, ShardSet.open(tmp_path / "ocr").labels)
    _run_in_tasks(_OCR, tmp_path / "many", lines, None, *labels, "--longest-side", 40, count=5)
    assert samples_of(tmp_path / "many") == samples_of(tmp_path / "set")
    for folder in ("many", "set"):
        assert (tmp_path / folder / "vocabulary.json").read_bytes() == (tmp_path / "ocr/vocabulary.json").read_bytes()
    reasons = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    mine, theirs = (
        sorted((record["file"], record["reason"]) for record in reasons if record["stage"] == stage)
        for stage in ("documents", "page shards")
    )
    assert len(mine) == 5  # no word, no line, changed, gone, twice
    assert mine == theirs


def test_tasks_of_pages_make_the_set_of_one_writer(tmp_path: Path) -> None:
    lines = _pages(tmp_path / "in")
    assert run_script(_OCR, lines, tmp_path / "one", *_options(tmp_path)) == 0
    assert ShardSet.open(tmp_path / "one").info.label_width == 0
    assert [key for key, *_ in samples_of(tmp_path / "one")] == ["a", "b", "deep", "g"]
    _run_in_tasks(_OCR, tmp_path / "many", lines, None, count=3)
    assert samples_of(tmp_path / "many") == samples_of(tmp_path / "one")
    apart = [line for path in sorted((tmp_path / "many/rejects").iterdir()) for line in path.read_text().splitlines()]
    assert sorted(apart) == sorted((tmp_path / "rejects.jsonl").read_text().splitlines())


def test_a_folder_of_pictures_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"text": "EXIT", "words": [[0, 0, 0, 30, 20, 0, 4]], "url": "x"}
    folder = _fill(
        tmp_path / "in",
        {
            "a.jpg": picture(1, form="JPEG"),
            "a.txt": "Ein Haus, 家".encode(),
            "deep/b.webp": picture(2, form="WEBP"),
            "deep/b.json": json.dumps(record).encode(),
            "both.png": picture(3),
            "both.txt": b"one",
            "both.json": b'{"captions": ["two"]}',
            "alone.png": picture(),
            "text.txt": b"alone",
            "broken.png": picture(),
            "broken.json": b'{"text": ',
            "cut.png": picture()[:50],
            "cut.txt": b"cut",
            "empty.png": b"",
            "empty.txt": b"empty",
            "latin.png": picture(),
            "latin.txt": b"\xe9",
            "box.png": picture(),
            "box.json": json.dumps({"text": "a", "words": [[0, 0, 0, 300, 20, 0, 1]]}).encode(),
            "notes.md": b"not read",
        },
    )
    sheets = [Image.new("RGB", (50, 50), (i, i, i)) for i in (0, 200)]
    sheets[0].save(folder / "two.tiff", save_all=True, append_images=sheets[1:])
    (folder / "two.txt").write_text("two pages")
    Image.new("CMYK", (40, 40)).save(folder / "cmyk.jpg")
    (folder / "cmyk.txt").write_text("ink")
    assert run_script(_CAPTIONS, folder, tmp_path / "set", *_options(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "1 files that hold no picture (.md 1)" in output
    assert "entries that were not read: url 1" in output
    assert "5 documents, 7 rejected" in output.replace("\n", " ")
    assert not validate_shard_set(tmp_path / "set", deep=True)
    found = {key.rsplit("-", 1)[0]: document for key, document in documents_of(tmp_path / "set").items()}
    assert list(found) == ["a", "both", "cmyk", "deep_b", "two"]
    assert found["a"].captions == ("Ein Haus, 家",)
    assert found["both"].captions == ("one", "two")
    assert (found["deep_b"].text, found["deep_b"].words.corners.tolist()) == ("EXIT", [[0, 0, 30, 20]])
    assert ShardSet.open(tmp_path / "set").num_pages.tolist() == [1, 1, 1, 1, 2]
    reasons = rejected(tmp_path / "rejects.jsonl")
    starts = {
        "alone.png": "has no text beside it: there is no alone.txt or alone.json",
        "text.txt": "has no picture of this name beside it",
        "broken.png": "broken.json is no JSON",
        "cut.png": "is a truncated or damaged picture",
        "empty.png": "is empty (0 bytes)",
        "latin.png": "latin.txt is not UTF-8",
        "box.png": "which leaves its page",
    }
    assert set(reasons) == set(starts)
    assert {name: start for name, start in starts.items() if start not in reasons[name]} == {}


def test_a_table_is_read_line_by_line_and_its_tasks_make_one_set(tmp_path: Path) -> None:
    _fill(tmp_path / "in", {"a.png": picture(1), "deep/b.png": picture(2)})
    table = write_lines(
        tmp_path / "in/table.jsonl",
        {"file": "a.png", "caption": "one"},
        {"file": "a.png", "caption": "another of the same"},
        b"",
        {"file": str(tmp_path / "in/deep/b.png"), "text": "B", "turns": [{"question": "q", "answer": "a"}]},
        b'{"file": "a.png", ',
        b'{"file": "a.png", "caption": "\xff"}',
        b"[1]",
        {"file": 5, "caption": "x"},
        {"file": "a\0.png", "caption": "x"},
        {"file": "\ud800.png", "caption": "x"},
        {"file": "gone.png", "caption": "x"},
        {"file": "a.png"},
        {"file": "a.png", "caption": "\ud800"},
        {"file": "table.jsonl", "caption": "no picture"},
    )
    assert run_script(_CAPTIONS, table, tmp_path / "one", *_options(tmp_path)) == 0
    assert [document.captions or document.text for document in documents_of(tmp_path / "one").values()] == [
        ("one",),
        ("another of the same",),
        "B",
    ]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    starts = [
        f"line 5 of {table} is no JSON in UTF-8",
        f"line 6 of {table} is no JSON in UTF-8",
        f"line 7 of {table} is no object",
        f"line 8 of {table} has the file 5",
        f"line 9 of {table} has the file",
        f"line 10 of {table} has the file",
        f"{tmp_path}/in/gone.png cannot be read",
        f"{table}/line 12 ({tmp_path}/in/a.png): it has no text, no caption and no turn",
        f"{table}/line 13 ({tmp_path}/in/a.png): its json has half of a surrogate pair in captions[0]",
        f"{table} is not a picture",
    ]
    assert len(reasons) == len(starts)
    assert [
        (reason, start) for reason, start in zip(reasons, starts, strict=True) if not reason.startswith(start)
    ] == []
    _run_in_tasks(_CAPTIONS, tmp_path / "many", table, None, count=4)
    assert samples_of(tmp_path / "many") == samples_of(tmp_path / "one")
    assert run_script(_CAPTIONS, table, tmp_path / "one", "--overwrite", *_options(tmp_path)) == 0
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == len(starts)  # judged again, not twice


def _tars(folder: Path) -> list[Path]:
    folder.mkdir()
    tars = []
    for number in range(3):
        members: list[tuple[str, bytes] | tarfile.TarInfo] = []
        for i in range(3):
            record = {"caption": f"picture {number}.{i}", "url": "u", "sha256": "s"}
            members += [(f"x/{i:03d}.jpg", picture(i + number)), (f"x/{i:03d}.json", json.dumps(record).encode())]
        members += [
            ("x/003.jpg", picture()),
            ("x/003.txt", b"tail"),
            ("x/003.npy", b"?"),
            ("zero.jpg", b""),
            ("zero.txt", b"0"),
        ]
        members.append(special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"))
        tars.append(write_tar(folder / f"{number:05d}.tar", members))
    data = tars[2].read_bytes()
    tars[2].write_bytes(data[: 6 * 1024 + 600])
    return tars


def test_tars_become_documents_and_their_tasks_one_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars = _tars(tmp_path / "in")
    before = {path.name for path in tmp_path.rglob("*")}
    assert run_script(_TARS, tmp_path / "one", *tars, *_options(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "members that are neither picture nor text: .npy 2" in output
    assert "entries that were not read: sha256" in output
    assert not validate_shard_set(tmp_path / "one", deep=True)
    found = documents_of(tmp_path / "one")
    assert len(found) == 11
    assert [document.captions[0] for document in found.values()][:5] == [
        *(f"picture 0.{i}" for i in range(3)),
        "tail",
        "picture 1.0",
    ]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(reasons) == 6
    assert reasons[0].startswith(f"{tars[0]}/zero.jpg is empty (0 bytes)")
    assert reasons[1].startswith(f"{tars[0]}/link.jpg is a link to /etc/passwd")
    assert reasons[4].startswith(f"{tars[2]}/x/003 is the last one before the damage")
    assert reasons[5].startswith(f"{tars[2]} is truncated or damaged")
    new = {path.name for path in tmp_path.rglob("*")} - before
    assert new == {
        "one",
        "shards",
        "index",
        "dataset.json",
        "part.json",
        "rejects.jsonl",
        "000000.tar",
        "000000.tar.idx",
    } | {path.name for path in (tmp_path / "one/index").iterdir()}
    _run_in_tasks(_TARS, tmp_path / "many", None, tmp_path / "in", count=2)
    assert samples_of(tmp_path / "many") == samples_of(tmp_path / "one")


def test_a_part_that_is_there_is_not_made_again_and_other_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = _tars(tmp_path / "in")
    task = ["--workers", 1, "--task", "1/3"]
    assert run_script(_TARS, tmp_path / "set", *tars, *task) == 0
    state = (tmp_path / "set/parts/00000-of-00003/dataset.json").stat().st_mtime_ns
    assert run_script(_TARS, tmp_path / "set", *tars, *task) == 0
    assert "is there already: 4 samples; nothing to do" in capsys.readouterr().out
    assert (tmp_path / "set/parts/00000-of-00003/dataset.json").stat().st_mtime_ns == state
    assert run_script(_TARS, tmp_path / "set", *tars, "--quality", 50, *task) == 2
    assert "was written with another quality" in capsys.readouterr().err
    assert run_script(_TARS, tmp_path / "set", *tars[:2], *task) == 2
    assert "was written with another tars" in capsys.readouterr().err


def test_tasks_share_a_folder_of_captions_wherever_it_lies_until_a_file_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{name}.{suffix}": content for name in "ab" for suffix, content in (("png", picture()), ("txt", b"one"))}
    first, second = _fill(tmp_path / "in", files), _fill(tmp_path / "other/machine", files)
    options = ["--workers", 1, "--task"]
    assert run_script(_CAPTIONS, first, tmp_path / "set", *options, "1/2") == 0
    assert run_script(_CAPTIONS, second, tmp_path / "set", *options, "2/2") == 0
    assert run_script(_CAPTIONS, second, tmp_path / "set", *options, "1/2") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert merge_parts(tmp_path / "set").num_samples == 2
    for name, content in {"a.txt": b"other", "b.png": picture(size=(90, 90))}.items():
        _fill(second, {name: content})
        assert run_script(_CAPTIONS, second, tmp_path / "set", *options, "1/2") == 2
        assert "was written with another inputs" in capsys.readouterr().err
        _fill(second, {name: files[name]})


def test_options_that_nothing_would_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _fill(tmp_path / "in", {"a.png": picture(), "a.txt": b"one"})
    assert run_script(_CAPTIONS, folder, tmp_path / "set", *_options(tmp_path), "--task", "1/2") == 2
    assert "give no --rejects with --task" in capsys.readouterr().err
    for option in (["--num-tags", 3], ["--fill", "cyclic"]):
        assert run_script(_OCR, tmp_path / "lines.jsonl", tmp_path / "set", *option, *_options(tmp_path)) == 2
        assert "give the --vocabulary of the words, too" in capsys.readouterr().err
    for score in ("nan", "1.5", "-0.1", "x"):
        with pytest.raises(SystemExit):
            run_script(_OCR, tmp_path / "lines.jsonl", tmp_path / "set", "--min-score", score)
        assert f"{score} is not a number from 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_tasks_may_not_write_into_a_whole_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _fill(tmp_path / "in", {"a.png": picture(), "a.txt": b"one"})
    assert run_script(_CAPTIONS, folder, tmp_path / "set", *_options(tmp_path)) == 0
    (tmp_path / "cut/shards").mkdir(parents=True)
    for name in ("set", "cut"):
        assert run_script(_CAPTIONS, folder, tmp_path / name, "--workers", 1, "--task", "1/2") == 2
        assert f"{tmp_path / name} is a whole shard set itself" in capsys.readouterr().err
        assert not (tmp_path / name / "parts").exists()


def test_rejects_do_not_double_when_a_path_is_written_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _fill(Path("in"), {"a.png": picture(), "a.txt": b"one", "b.txt": b"alone"})
    write_lines(Path("in/t.jsonl"), {"file": "a.png", "caption": "one"}, b"{")
    members = [("a.png", picture()), ("a.txt", b"one"), ("b.txt", b"alone")]
    write_tar(tmp_path / "in/0.tar", members)
    Path("link").symlink_to("in")
    for script, name in ((_CAPTIONS, ""), (_CAPTIONS, "t.jsonl"), (_TARS, "0.tar"), (_TARS, "")):
        rejects = tmp_path / "rejects.jsonl"
        for place in (tmp_path / "in", Path("in"), Path("link"), Path("in/../link")):
            given = ["set", place / name] if script == _TARS else [place / name, "set"]
            assert run_script(script, *given, "--overwrite", *_options(tmp_path)) == 0
            assert len(rejects.read_text().splitlines()) == 1
        rejects.unlink()


def _write_dataset(folder: Path) -> None:
    """Writes rows as save_to_disk does in two files, and the same as parquet."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(i: int) -> dict:
        said = [{"user": f"What is {i}?", "assistant": f"Number {i}.", "source": "s"}]
        return {"id": i, "images": [{"bytes": picture(i), "path": None}] * (1 + i % 2), "texts": said}

    rows = [row(i) for i in range(6)]
    rows[1] |= {"images": []}
    rows[2] |= {"images": [{"bytes": None, "path": "/outside.png"}]}
    rows[3] |= {"images": [{"bytes": b"no picture", "path": "x.png"}]}
    rows[4] |= {"texts": None}
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    said = arrow.struct([(name, arrow.string()) for name in ("user", "assistant", "source")])
    columns = [("id", arrow.int64()), ("images", arrow.list_(image)), ("texts", arrow.list_(said))]
    table = arrow.Table.from_pylist(rows, schema=arrow.schema(columns))
    (folder / "saved").mkdir(parents=True)
    (folder / "hub/data").mkdir(parents=True)
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        name = f"data-{number:05d}-of-00002.arrow"
        with (
            arrow.OSFile(str(folder / "saved" / name), "wb") as file,
            arrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(part)
        parquet.write_table(part, folder / f"hub/data/train-{number:05d}-of-00002.parquet")
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in (0, 1)]
    (folder / "saved/state.json").write_text(json.dumps({"_data_files": files}))
    shutil.copy(folder / "saved" / files[0]["filename"], folder / "saved/cache-1.arrow")


def test_data_sets_of_huggingface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_dataset(tmp_path)
    for name in ("saved", "hub"):
        options = ["--workers", 1, "--rejects", tmp_path / f"{name}.jsonl"]
        assert run_script(_DATASET, tmp_path / name, tmp_path / f"{name}_set", *options) == 0
        output = capsys.readouterr().out
        assert "2 files; image from 'images', conversation from 'texts'; columns that are not read: id" in output
        found = documents_of(tmp_path / f"{name}_set")
        said = [(turn.question, turn.answer) for document in found.values() for turn in document.turns]
        assert said == [("What is 0?", "Number 0."), ("What is 5?", "Number 5.")]
        assert ShardSet.open(tmp_path / f"{name}_set").num_pages.tolist() == [1, 2]
        reasons = [json.loads(line)["reason"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        wanted = ["has no picture", "only the path '/outside.png'", "is not a picture", "it has no text"]
        assert len(reasons) == 4
        assert [(reason, want) for reason, want in zip(reasons, wanted, strict=True) if want not in reason] == []
    _run_in_tasks(_DATASET, tmp_path / "many", tmp_path / "hub", None, count=2)
    assert samples_of(tmp_path / "many") == samples_of(tmp_path / "hub_set")
    one = ["--files", "data/train-00001*", "--rejects", tmp_path / "one.jsonl", "--workers", 1]
    assert run_script(_DATASET, tmp_path / "hub", tmp_path / "one", *one) == 0
    assert len(documents_of(tmp_path / "one")) == 1
    assert run_script(_DATASET, tmp_path / "hub", tmp_path / "no", "--text", "nothing", *_options(tmp_path)) == 2
    assert "there is no column 'nothing'; there are id, images, texts" in capsys.readouterr().err


def test_damaged_files_of_a_data_set_are_named_and_what_precedes_is_used(tmp_path: Path) -> None:
    _write_dataset(tmp_path)
    (tmp_path / "hub/data/train-00000-of-00002.parquet").write_bytes(b"PAR1")
    saved = tmp_path / "saved/data-00001-of-00002.arrow"
    saved.write_bytes(saved.read_bytes()[:-8])
    for name, sentence in (("hub", "is damaged or of another form"), ("saved", "lacks the mark that ends a stream")):
        options = ["--workers", 1, "--rejects", tmp_path / f"{name}.jsonl"]
        assert run_script(_DATASET, tmp_path / name, tmp_path / f"{name}_set", *options) == 0
        reasons = [json.loads(line)["reason"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert sum(sentence in reason for reason in reasons) == 1
        assert len(documents_of(tmp_path / f"{name}_set")) == (1 if name == "hub" else 2)


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        (_CAPTIONS, ["gone"], "gone does not exist; give a folder of pictures and texts, or a table"),
        (_CAPTIONS, ["empty.jsonl"], "empty.jsonl is empty; write lines such as"),
        (_OCR, ["gone"], "gone does not exist; make it with tools/ocr/1_recognize_pages.py"),
        (_DATASET, ["gone"], "the data set gone does not exist"),
        (_RENDER, ["--count", 2, "--size", 8, 8], "no word of "),
        (_RENDER, ["--count", 2, "--languages", "ja", "--typefaces", "families"], "there is no typeface of the script"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_no_set(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    arguments: list[object],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    given = ["set", *arguments] if script == _RENDER else [*arguments, "set"]
    assert run_script(script, *given, "--workers", 1) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("set").exists()


def test_drawn_documents_do_not_depend_on_workers_and_tasks_not_even_after_a_kill(tmp_path: Path) -> None:
    options = [
        "--count",
        12,
        "--size",
        168,
        112,
        "--looks",
        "printed",
        "degraded=0.2",
        "--seed",
        3,
        "--samples-per-shard",
        1,
    ]
    assert run_script(_RENDER, tmp_path / "one", *options, *_options(tmp_path)) == 0
    assert not validate_shard_set(tmp_path / "one", deep=True)
    assert run_script(_RENDER, tmp_path / "two", *options, "--workers", 2, "--rejects", tmp_path / "r.jsonl") == 0
    assert samples_of(tmp_path / "two") == samples_of(tmp_path / "one")

    command = [sys.executable, _ROOT / "tools" / _RENDER, tmp_path / "many", *options, "--workers", 1, "--task", "2/2"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("many/parts/.*/shards/000001.tar")) and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "many/parts").iterdir())) == 1  # what it left
    assert not (tmp_path / "many/parts/00001-of-00002").exists()
    _run_in_tasks(_RENDER, tmp_path / "many", None, *options, count=2)
    assert sorted(path.name for path in (tmp_path / "many/parts").iterdir()) == ["00000-of-00002", "00001-of-00002"]
    assert samples_of(tmp_path / "many") == samples_of(tmp_path / "one")
