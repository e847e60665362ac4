"""PDFs become a shard set of documents; each page and file that does not is named with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ove.preprocess.documents import pdf_documents, pdf_process
from megatron_ove.shards.merge import merge_parts
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from tests.support.odd_pdfs import write_odd_pdfs
from tests.support.pdf_files import Page, pdf_bytes, text_at
from tests.support.tool_scripts import run_script
from tests.unit.test_shard_merge import assert_equal

SCRIPT = "documents/write_pdf_documents.py"
SCAN = Page("".join(f"{10 + 12 * i} {20 + 15 * j} 8 10 re f\n" for i in range(22) for j in range(10)))
BLANK = Page("")


def written(number: int) -> Page:
    return Page(text_at(20, 100, f"Page {number}") + text_at(20, 50, "second line"))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def rejects_in(path: Path) -> list[tuple[str, str]]:
    """Returns (file name, reason)."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(Path(record["file"]).name, record["reason"]) for record in records]


def run(folder: Path, output: Path, *options: object) -> int:
    rejects = () if "--task" in options else ("--rejects", output.parent / "rejects.jsonl")
    return run_script(SCRIPT, folder, output, "--longest-side", 150, "--workers", 1, *rejects, *options)


def test_a_folder_of_pdfs_becomes_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(
        tmp_path / "in",
        {
            "a.pdf": pdf_bytes([written(1), SCAN, BLANK, written(4)]),
            "sub/scan.PDF": pdf_bytes([SCAN]),
            "locked.pdf": pdf_bytes([written(1)], user_password="secret"),
            "open.pdf": pdf_bytes([written(1)], user_password=""),
            "empty.pdf": b"",
            "word.pdf": b"PK\x03\x04 no pdf",
            "no_suffix": pdf_bytes([written(1)]),
            "notes.txt": b"text",
        },
    )
    assert run(folder, tmp_path / "set") == 0
    said = capsys.readouterr().out
    assert f"ignored below {folder}: 1 files that hold no PDF (.txt 1)" in said
    assert f"4 documents of 4 pages, 6 rejected -> {tmp_path / 'set'}" in said
    assert validate_shard_set(tmp_path / "set", deep=True) == []
    shards = ShardSet.open(tmp_path / "set")
    assert [shards.key(i).split("-")[0] + shards.key(i)[-7:] for i in range(4)] == [
        "a-p00001",
        "a-p00004",
        "no_suffix-p00001",
        "open-p00001",
    ]
    document = shards.read_document(1)
    assert document.text == "Page 4\nsecond line"
    assert len(document.words) == 4 and len(document.lines) == 2 and len(document.characters) == 15
    assert shards.page_sizes(np.arange(4))[1].tolist() == [[100, 150]] * 4
    reasons = rejects_in(tmp_path / "rejects.jsonl")
    assert [name for name, _ in reasons] == ["empty.pdf", "locked.pdf", "word.pdf", "a.pdf", "a.pdf", "scan.PDF"]
    by_name = [reason.split(".pdf ", 1)[-1] for _, reason in reasons]
    assert by_name[0].startswith("is empty (0 bytes)") and by_name[1].startswith("is encrypted and needs a password")
    assert by_name[2].startswith("is no PDF")
    assert reasons[3][1].startswith(f"page 2 of {folder}/a.pdf has no text layer; give --without-text FOLDER")
    assert reasons[4][1].startswith(f"page 3 of {folder}/a.pdf is blank")
    assert reasons[5][1].startswith(f"page 1 of {folder}/sub/scan.PDF has no text layer")
    # Again, with pictures of the pages without text; what is judged again has no earlier line.
    assert run(folder, tmp_path / "set", "--overwrite", "--without-text", tmp_path / "ocr") == 0
    assert "2 pages without a usable text layer" in capsys.readouterr().out
    assert len(rejects_in(tmp_path / "rejects.jsonl")) == 4
    pictures = sorted(path.name.split("-")[0] + path.name[-11:] for path in (tmp_path / "ocr").iterdir())
    assert pictures == ["a-p00002.jpg", "sub_scan-p00001.jpg"]


def test_several_pages_are_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.pdf": pdf_bytes([written(1), written(2), BLANK, written(4), written(5)]), "b.pdf": pdf_bytes([SCAN])}
    folder = write(tmp_path / "in", {**files, "c.pdf": pdf_bytes([written(1)])})

    def texts(name: str, pages: int) -> list[list[str]]:
        assert run(folder, tmp_path / name, "--pages-per-document", pages) == 0
        assert validate_shard_set(tmp_path / name, deep=True) == []
        shards = ShardSet.open(tmp_path / name)
        documents = [shards.read_document(i) for i in range(len(shards))]
        for document in documents:
            for unit in document.boxes.values():
                for page, (start, stop) in zip(unit.page, unit.spans, strict=True):
                    assert document.text[:start].count(pdf_documents.PAGE_SEPARATOR) == page
                    assert pdf_documents.PAGE_SEPARATOR not in document.text[start:stop]
            found = [document.text[start:stop] for start, stop in document.words.spans]
            assert found == document.text.split()
        return [
            [page.split("\n")[0].removeprefix("Page ") for page in document.text.split(pdf_documents.PAGE_SEPARATOR)]
            for document in documents
        ]

    assert texts("two", 2) == [["1", "2"], ["4"], ["5"], ["1"]]
    assert texts("three", 3) == [["1", "2"], ["4", "5"], ["1"]]
    assert texts("all", 0) == [["1", "2", "4", "5"], ["1"]]
    monkeypatch.setattr(pdf_documents, "MAX_DOCUMENT_BYTES", 2000)  # less than three such pages need
    assert texts("small", 0) == [["1", "2"], ["4", "5"], ["1"]]


def test_tasks_joined_equal_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = {f"{name}.pdf": pdf_bytes([written(i) for i in range(1 + n % 3)]) for n, name in enumerate("abcdefg")}
    folder = write(tmp_path / "in", {**pages, "bad.pdf": b"bad"})
    options = ("--samples-per-shard", 2, "--pages-per-document", 2)
    assert run(folder, tmp_path / "whole", *options) == 0
    for number in (1, 2, 3):
        assert run(folder, tmp_path / "joined", *options, "--task", f"{number}/3") == 0
    lines = [rejects_in(path) for path in sorted((tmp_path / "joined/rejects").iterdir())]
    assert [name for one in lines for name, _ in one] == ["bad.pdf"]
    capsys.readouterr()
    assert run(folder, tmp_path / "joined", *options, "--task", "2/3") == 0
    assert "samples; nothing to do" in capsys.readouterr().out
    merge_parts(tmp_path / "joined")
    assert_equal(ShardSet.open(tmp_path / "whole"), ShardSet.open(tmp_path / "joined"))
    assert run(folder, tmp_path / "joined", "--task", "2/3") == 2
    assert "was written with another pages_per_document" in capsys.readouterr().err
    for option in (("--patch-size", 16), ("--without-text", tmp_path / "aside")):
        assert run(folder, tmp_path / "joined", *options, *option, "--task", "2/3") == 2
        assert f"was written with another {option[0][2:].replace('-', '_')}" in capsys.readouterr().err
    (folder / "g.pdf").write_bytes(pages["b.pdf"] + b"\n")
    assert run(folder, tmp_path / "joined", *options, "--task", "2/3") == 2
    assert "was written with another files" in capsys.readouterr().err
    assert run(folder, tmp_path / "whole", *options, "--task", "2/3") == 2
    assert f"{tmp_path / 'whole'} is a whole shard set itself" in capsys.readouterr().err


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "in", {"a.txt": b"text"})
    assert run(folder, tmp_path / "set") == 2
    assert f"the PDF folder {folder} holds no PDF, not even in its subfolders" in capsys.readouterr().err
    write(folder, {"a.pdf": pdf_bytes([BLANK])})
    assert run(folder, tmp_path / "set") == 2
    assert "no sample was accepted" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    assert run(folder, tmp_path / "set", "--longest-side", 20_000) == 2
    assert "--longest-side 20000 is more than 10000" in capsys.readouterr().err


def serve_for_two_seconds(connection: Any) -> None:
    pdf_process.PAGE_CPU_S = 2.0  # some of the files would take for ever
    pdf_process._serve(connection)


@pytest.mark.parametrize("count", [32, pytest.param(240, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_odd_pdfs_are_used_or_named(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf_process, "_serve", serve_for_two_seconds)
    names = write_odd_pdfs(tmp_path / "in", count)
    assert len(names) == count
    status = run(tmp_path / "in", tmp_path / "set", "--without-text", tmp_path / "ocr")
    said = capsys.readouterr()
    assert status == 0 and "Traceback" not in said.out + said.err
    assert validate_shard_set(tmp_path / "set", deep=True) == []
    shards = ShardSet.open(tmp_path / "set")
    stems = [shards.key(i).rsplit("-", 2)[0] for i in range(len(shards))]
    stems += [path.stem.rsplit("-", 2)[0] for path in (tmp_path / "ocr").glob("*.jpg")]
    rejects = rejects_in(tmp_path / "rejects.jsonl")
    assert not [reason for _, reason in rejects if "unexpected" in reason]
    accounted = {*stems, *(Path(name).stem for name, _ in rejects)}
    assert {Path(name).stem for name in names} - accounted == set()
    assert len(set(stems)) > count // 2 and len({name for name, _ in rejects}) > count // 8
