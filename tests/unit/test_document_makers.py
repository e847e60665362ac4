"""What is known of pictures in many forms -> documents: records, tars, tables of HuggingFace, pages that are drawn."""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import json
import math
import os
import re
import struct
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.arrow_files import list_data_files, read_schema
from megatron_ove.preprocess.documents.arrow_rows import Columns, RowDocuments, choose_columns
from megatron_ove.preprocess.documents.caption_documents import CaptionTable, read_folder
from megatron_ove.preprocess.documents.known_text import KnownText, document_of, document_of_texts
from megatron_ove.preprocess.documents.ocr_documents import document_of_lines
from megatron_ove.preprocess.documents.preparing import DocumentInput, DocumentPreparer, PageBytes, PreparedDocument
from megatron_ove.preprocess.documents.rendered_documents import PAGE_LOOKS, RenderedPages
from megatron_ove.preprocess.documents.tar_samples import TarSamples, list_tars
from megatron_ove.preprocess.documents.writing import (
    add_document_options,
    count_ignored,
    report_ignored,
    write_documents,
)
from megatron_ove.preprocess.file_runs import run_over_stream
from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.text_render.passages import languages
from megatron_ove.preprocess.text_render.picture_document import document_of_picture
from megatron_ove.rejects import RejectsFile, read_rejects
from megatron_ove.shards.documents import MAX_DOCUMENT_BYTES, Document
from megatron_ove.shards.format import page_member
from tests.support.document_sets import documents_of, picture, special, write_lines, write_tar


def test_all_forms_of_a_record_are_read_and_others_are_named() -> None:
    record = {
        "caption": " A house. ",
        "captions": ["A house.", None, "Red."],
        "text": "EXIT",
        "words": [[0, 1, 2, 30, 12, 0, 4]],
        "turns": [{"question": "Which way?", "answer": "out"}],
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}],
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]},
            {"role": "assistant", "content": "green"},
        ],
        "texts": [{"user": "Why?", "assistant": "Fire.", "source": "x"}],
        "url": "http://x",
        "similarity": math.nan,
        "empty": None,
    }
    known = document_of(record)
    assert known.document.captions == ("A house.", "Red.")
    assert known.document.text == "EXIT"
    assert known.document.words.spans.tolist() == [[0, 4]]
    said = [(turn.question, turn.answer) for turn in known.document.turns]
    assert said == [
        ("Which way?", "out"),
        ("What?", "A sign."),
        ("Colour?", "green"),
        ("Why?", "Fire."),
    ]
    assert sorted(known.ignored) == ["messages of a system", "similarity", "url"]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"caption": 5}, "it has the caption 5, which is no text"),
        ({"captions": [["deep"]]}, "it has the caption"),
        ({"text": ["a"]}, 'its json has text = ["a"], which is no text'),
        ({"text": "a\ud800"}, "half of a surrogate pair in text"),
        ({"caption": "a\udfff"}, "half of a surrogate pair in captions"),
        ({"text": "ab", "words": [[0, 0, math.nan, 5, 5, 0, 2]]}, "its json has words[0]"),
        ({"text": "ab", "words": [[0, 0, 0, 5, 5, 0, 3]]}, "which is no piece of a text of 2 characters"),
        ({"text": "ab", "words": ["ab"]}, "its json has words[0]"),
        ({"turns": {"question": "a"}}, "it has turns = {"),
        ({"turns": [{"question": "a", "answer": 3}]}, "its json has turns[0].answer = 3"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "are no questions with an answer each"),
        ({"conversations": [{"from": "dog", "value": "a"}]}, "said neither by human, user nor by"),
        ({"conversations": "a"}, "which is no list of what was said"),
        ({"texts": [{"user": 4, "assistant": "b"}]}, "somebody said 4, which is no text"),
        ({"text": b"w\xff"}, "it has bytes in text that are not UTF-8"),
        ({"text": datetime.date(2020, 1, 1)}, "it has a date in text (2020-01-01), which is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'somebody said {"type": "text"}, which is'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "which is neither"),
        ({"messages": [{"role": "user", "content": ["plain"]}]}, 'somebody said "plain", which is neither'),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 'somebody said {"type": "video"}'),
        ({"turns": [{"answer": " \n"}]}, "it has no text, no caption and no turn"),
        ({"turns": [{"answer": None}]}, "it has no text, no caption and no turn"),
        ({"texts": [{"user": "q", "assistant": "<image>"}]}, "it has no text, no caption and no turn"),
        ({"url": "http://x", "caption": " \n", "text": " ", "turns": []}, "it has no text, no caption and no turn"),
        ({"text": "a" * (MAX_DOCUMENT_BYTES + 1)}, "divide the document"),
    ],
)
def test_a_record_that_says_nothing_usable_is_a_sentence(record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        document_of(record)
    assert sentence in str(caught.value)


def test_bytes_are_texts_in_utf8_and_turns_without_an_answer_are_left_out_and_counted() -> None:
    turns = [{"question": "a", "answer": ""}, {"question": "b", "answer": None}, {"question": "c", "answer": "d"}]
    known = document_of({"text": "EXIT é".encode(), "caption": [b"c"], "turns": turns})
    assert (known.document.text, known.document.captions) == ("EXIT é", ("c",))
    assert [turn.question for turn in known.document.turns] == ["b", "c"]  # b stands for the text
    assert known.ignored == ("turns without an answer",)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.json": b"{"}, "a.json is no JSON in UTF-8"),
        ({"a.json": b'{"caption": "\xff"}'}, "a.json is no JSON in UTF-8"),
        ({"a.json": b"[" * 100_000}, "a.json is no JSON in UTF-8"),
        ({"a.json": b"[1]"}, "a.json holds [1], but an object"),
        ({"a.json": b""}, "a.json is no JSON"),
        ({"a.txt": b"\xff\xfe"}, "a.txt is not UTF-8"),
        ({"a.txt": b""}, "a.txt: it has no text, no caption and no turn"),
        ({"a.json": b'{"text": "x"}', "b.json": b'{"text": "y"}'}, "both a.json and b.json are there"),
    ],
)
def test_a_text_file_that_says_nothing_usable_is_a_sentence(files: dict[str, bytes], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        document_of_texts([KnownText(name, content) for name, content in files.items()])
    assert sentence in str(caught.value)


def test_a_caption_and_a_record_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA caption.\n")
    texts = [KnownText("a.txt", tmp_path / "a.txt"), KnownText("a.json", b'{"caption": "A caption.", "text": "T"}')]
    document = document_of_texts(texts).document
    assert (document.captions, document.text) == (("A caption.",), "T")
    (tmp_path / "a.txt").write_bytes(b"a" * (MAX_DOCUMENT_BYTES + 1))
    with pytest.raises(DataError, match="which is no text of a picture"):
        document_of_texts(texts)


def test_boxes_are_scaled_with_their_pictures_and_clipped_only_where_asked() -> None:
    text = {"text": "ab", "words": [[0, 10, 20, 40, 30, 0, 1], [1, 0, 0, 100, 50, 1, 2]]}
    pages = (PageBytes(picture(size=(60, 40)), "one"), PageBytes(picture(size=(100, 50)), "two"))
    prepare = DocumentPreparer(longest_side=30, quality=90)
    made = Document.decode(prepare(DocumentInput("k", "n", pages, text)).members["json"])
    assert made.words.corners.tolist() == [[5, 10, 20, 15], [0, 0, 30, 15]]

    lines = document_of_lines([TextLine("first", 1.0, ((-5, 2), (20, -1), (90, 9), (0, 10)))])
    clipped = DocumentInput("k", "n", pages[:1], lines, clips=True)
    assert Document.decode(prepare(clipped).members["json"], [(20, 30)]).lines.corners.tolist() == [[0, 0, 30, 5]]
    with pytest.raises(DataError, match="which leaves its page"):
        Document.decode(prepare(DocumentInput("k", "n", pages[:1], lines)).members["json"], [(20, 30)])
    away = document_of_lines([TextLine("away", 1.0, ((70, 2), (80, 2), (80, 9), (70, 9)))])
    only_text = Document.decode(prepare(DocumentInput("k", "n", pages[:1], away, clips=True)).members["json"])
    assert (only_text.text, len(only_text.lines)) == ("away", 0)


def test_boxes_of_no_page_are_left_for_the_writer_to_refuse() -> None:
    text = {"text": "ab", "words": [[7, 10, 20, 40, 30, 0, 1]]}
    item = DocumentInput("k", "n", (PageBytes(picture(), "one"),), text)
    made = DocumentPreparer(longest_side=30, quality=90)(item).members["json"]
    with pytest.raises(DataError, match="whose page is none of the 1 that are there"):
        Document.decode(made, [(20, 30)])


def test_lines_that_are_believed_become_the_text() -> None:
    box = ((1.0, 2.0), (30.0, 1.0), (30.0, 9.0), (1.0, 10.0))
    lines = [
        TextLine("Title one", 0.99, box),
        TextLine("nonsense", 0.3, box),
        TextLine("known"),
        TextLine("è 日本", 1, box),
    ]
    document = document_of_lines(lines)
    assert document.text == "Title one\nknown\nè 日本"
    assert [document.text[start:stop] for start, stop in document.lines.spans.tolist()] == ["Title one", "è 日本"]
    assert document.lines.corners.tolist() == [[1, 1, 30, 10]] * 2
    with pytest.raises(DataError, match=r"best score 0\.30"):
        document_of_lines(lines[1:2])


def _read(path: Path) -> tuple[dict[str, list[str]], list[str], TarSamples]:
    samples = TarSamples({path.name: path})
    pages: dict[str, list[str]] = {}
    problems = []
    for item in samples.inputs():
        if item.problem:
            problems.append(item.problem)
        else:
            pages[item.name.removeprefix(f"{path}/")] = [Path(page.name).name for page in item.pages]  # type: ignore[union-attr]
    return pages, problems, samples


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_of_a_tar_are_found_and_hostile_members_refused(tmp_path: Path, form: int) -> None:
    long = "d" * 150 + "/" + "ü" * 50
    members = [
        special("deep", tarfile.DIRTYPE),
        ("deep/a.png", picture()),
        ("deep/a.txt", b"hi"),
        ("deep/a.cls", b"3"),
        ("other/a.png", picture()),
        ("other/a.txt", b"hi"),
        (f"{long}.png", picture()),
        (f"{long}.txt", b"hi"),
        ("pages.10.png", picture()),
        ("pages.9.webp", picture(form="WEBP")),
        ("pages.meta.json", b'{"caption": "c"}'),
        ("._pages.png", b"of a Mac"),
        ("/root.jpg", picture()),
        ("/root.txt", b"x"),
        ("../up.png", picture()),
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("link.txt", b"x"),
        special("hard.jpg", tarfile.LNKTYPE, "deep/a.png"),
        special("device.jpg", tarfile.CHRTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        ("double.png", picture()),
        ("double.png", picture()),
        ("text.txt", b"alone"),
        ("alone.png", picture()),
        ("deep/a.png", picture()),
    ]
    path = write_tar(tmp_path / "some.tar", members, form)
    pages, problems, samples = _read(path)
    assert pages == {
        "deep/a": ["a.png"],
        "other/a": ["a.png"],
        long: [f"{Path(long).name}.png"],
        "pages": ["pages.9.webp", "pages.10.png"],
    }
    starts = [
        "/root.jpg has a name that leads out of the tar",
        "../up.png has a name that leads out of the tar",
        "link.jpg is a link to /etc/passwd",
        "hard.jpg is a link to deep/a.png",
        "device.jpg is neither a file nor a folder",
        "pipe.jpg is neither a file nor a folder",
        "double.png is there twice",
        "text has no picture",
        "alone has no text",
        "deep/a came earlier already",
    ]
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(f"{path}/{start}"), problem
    assert samples.ignored == {".cls": 1, "hidden files": 1}


def test_what_precedes_the_damage_of_a_tar_is_used_and_the_damage_named(tmp_path: Path) -> None:
    members = [
        (f"s{number}{suffix}", data) for number in range(4) for suffix, data in ((".png", picture()), (".txt", b"t"))
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    assert _read(tmp_path / "whole.tar")[:2] == ({f"s{number}": [f"s{number}.png"] for number in range(4)}, [])
    sample = 4 * 512  # header and data of both members
    bad_header = bytearray(whole)
    bad_header[2 * sample + 100 : 2 * sample + 160] = b"?" * 60
    cases = {
        "in_data.tar": (whole[: 2 * sample + 600], 2, [2], "is truncated or damaged (unexpected end of data)"),
        "in_header.tar": (whole[: 2 * sample + 100], 1, [1], "is damaged: where a member should begin there is none"),
        "between.tar": (whole[: 2 * sample], 1, [1], "lacks the zeros that end a tar"),
        "header.tar": (bytes(bad_header), 1, [1], "is damaged: where a member should begin there is none"),
        "joined.tar": (whole + whole, 4, [], "has more behind its end, which is not read"),
        "empty.tar": (b"", 0, [], "is truncated or damaged (empty file), or is no tar"),
        "other.tar": (b"no tar at all" * 100, 0, [], "is truncated or damaged (invalid header), or is no tar"),
    }
    for name, (content, num_samples, cut, sentence) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        pages, problems, _ = _read(path)
        assert list(pages) == [f"s{number}" for number in range(num_samples)], name
        assert f"{path} {sentence}" in problems[-1], name
        assert problems[:-1] == [
            f"{path}/s{number} is the last one before the damage of its tar, so it may lack members" for number in cut
        ]


def test_a_huge_member_is_refused_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ove.preprocess.documents.tar_samples.MAX_SAMPLE_BYTES", 1000)
    monkeypatch.setattr("megatron_ove.preprocess.documents.tar_samples.MAX_DOCUMENT_BYTES", 500)
    members = [
        ("a.jpg", bytes(1001)),
        ("a.txt", b"a"),
        ("b.png", picture()),
        ("b.txt", bytes(501)),
        ("c.png", picture()),
    ]
    pages, problems, _ = _read(write_tar(tmp_path / "t.tar", [*members, ("c.txt", b"c")]))
    assert list(pages) == ["c"]
    assert "makes its sample larger than 1000 bytes" in problems[0]
    assert "has 501 bytes, more than 500" in problems[1]


def test_tars_are_listed_once_under_names_that_do_not_depend_on_the_disk(tmp_path: Path) -> None:
    for name in ("x/0.tar", "y/0.tar", "y/1.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(list_tars([tmp_path / "y"])) == ["0.tar", "1.tar.gz"]
    assert list(list_tars([tmp_path / "y", tmp_path / "x/0.tar"])) == ["y/0.tar", "y/1.tar.gz", "x/0.tar"]
    with pytest.raises(DataError, match="is given twice"):
        list_tars([tmp_path / "x", tmp_path / "x/0.tar"])
    with pytest.raises(DataError, match=r"the tar .*gone\.tar does not exist"):
        list_tars([tmp_path / "gone.tar"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tar"):
        list_tars([tmp_path / "empty"])


def test_what_lies_beside_tars_is_counted_and_links_are_followed(tmp_path: Path) -> None:
    for name in ("in/UPPER.TAR", "in/x.tar.zst", "in/readme.md", "in/a.Tgz", "in/.hidden.tar", "away/linked.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "away")
    (tmp_path / "in/circle").symlink_to(".")
    (tmp_path / "in/again.tar").symlink_to("UPPER.TAR")
    said: list[str] = []
    found = list_tars([tmp_path / "in"], say=said.append)
    assert found == {
        "UPPER.TAR": tmp_path / "in/UPPER.TAR",
        "a.Tgz": tmp_path / "in/a.Tgz",
        "linked.tar": tmp_path / "away/linked.tar",
    }
    assert said == [
        f"ignored below {tmp_path}/in: 2 files that hold no tar (.md 1, .zst 1); 1 more paths to the same file; 1 "
        "hidden files; 1 links to folders that are looked through already"
    ]
    (tmp_path / "away/a.Tgz").touch()
    assert list(list_tars([tmp_path / "in"])) == ["UPPER.TAR", "a.Tgz", "link/a.Tgz", "link/linked.tar"]


def _schema(**columns: str) -> Any:
    arrow = pytest.importorskip("pyarrow")
    struct = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    kinds = {"picture": struct, "pictures": arrow.list_(struct), "binary": arrow.binary(), "text": arrow.string()}
    return arrow.schema([(name, kinds[kind]) for name, kind in columns.items()])


def test_columns_are_found_by_their_types_and_names() -> None:
    none: dict[str, str | None] = {}
    schema = _schema(id="text", page="picture", question="text", answers="text", caption="text")
    assert choose_columns(schema, none) == Columns("page", caption="caption", question="question", answer="answers")
    assert choose_columns(schema, {"caption": "id"}) == Columns("page", caption="id")
    assert choose_columns(_schema(images="pictures", texts="text"), none) == Columns("images", conversation="texts")
    assert choose_columns(_schema(b="binary", question="text", text="text"), none) == Columns("b", text="text")


@pytest.mark.parametrize(
    ("columns", "given", "sentence"),
    [
        ({"a": "text"}, {}, "no column holds pictures"),
        ({"a": "picture", "b": "text"}, {}, "no column says what is in the pictures; there are a, b"),
        ({"a": "picture", "b": "text"}, {"text": "c"}, "there is no column 'c'; there are a, b"),
        ({"a": "picture", "b": "text"}, {"image": "b"}, "the column 'b' is string, not pictures"),
        ({"a": "picture", "b": "text"}, {"question": "b"}, "give both --question and --answer"),
    ],
)
def test_columns_that_make_no_document_are_a_sentence(columns: dict, given: dict, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        choose_columns(_schema(**columns), given)
    assert sentence in str(caught.value)


def test_files_of_a_data_set_are_those_that_its_state_names(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("train/data-0.arrow", "train/cache-1.arrow", "train/old.arrow", "more.parquet", "train/.x.arrow"):
        (tmp_path / name).touch()
    state = tmp_path / "train/state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    assert list(list_data_files(tmp_path)) == ["more.parquet", "train/data-0.arrow"]
    assert list(list_data_files(tmp_path, "train/*")) == ["train/data-0.arrow"]
    with pytest.raises(DataError, match=r"of which none matches 'x\*'"):
        list_data_files(tmp_path, "x*")
    state.write_text(json.dumps({"_data_files": [{"filename": "data-1.arrow"}]}))
    with pytest.raises(DataError, match=r"names the file train/data-1\.arrow, which is not there"):
        list_data_files(tmp_path)
    state.write_text("{")
    with pytest.raises(DataError, match="does not say which files"):
        list_data_files(tmp_path)


def test_what_lies_beside_the_files_of_a_data_set_is_counted(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("in/data/cache-train.parquet", "in/data/x.jsonl", "in/.git/y.parquet", "in/s/old.arrow", "blobs/z"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "in/s/state.json").write_text('{"_data_files": []}')
    for path in ("in/data/test-0.PARQUET", "blobs/1f0e"):
        parquet.write_table(arrow.table({path: [1]}), tmp_path / path)
    (tmp_path / "in/data/hub.parquet").symlink_to(tmp_path / "blobs/1f0e")
    said: list[str] = []
    found = list_data_files(tmp_path / "in", say=said.append)
    assert found == {
        "data/hub.parquet": tmp_path / "blobs/1f0e",
        "data/test-0.PARQUET": tmp_path / "in/data/test-0.PARQUET",
    }
    assert [read_schema(path).names for path in found.values()] == [["blobs/1f0e"], ["in/data/test-0.PARQUET"]]
    assert said == [
        f"ignored below {tmp_path}/in: 1 files that hold no rows (.jsonl 1); 1 files cache-* of results of map and "
        "filter; 1 files that state.json does not name; 1 hidden folders"
    ]


def test_a_row_that_is_not_utf8_is_refused_and_those_beside_it_are_used(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    captions = arrow.array([b"one", b"\xff\xfe", b"three"]).view(arrow.string())
    table = arrow.table({"image": [picture(number) for number in range(3)], "caption": captions})
    path = tmp_path / "a.arrow"
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    items = list(RowDocuments({"a.arrow": path}, Columns("image", caption="caption")).inputs())
    assert items[1].problem.startswith(f"{path}/row 1 is damaged, or has a text that is not UTF-8")
    assert [bool(item.problem) for item in items] == [False, True, False]
    assert [item.known for item in items if not item.problem] == [{"captions": "one"}, {"captions": "three"}]


def test_columns_of_bytes_and_conversations_stored_as_lists_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    said = [{"from": ["human", "gpt"], "value": ["q", "a"]}, {"from": ["human", "gpt"], "value": ["q"]}]
    columns = {"image": [picture()] * 2, "question": [b"Why?", b"\xff"], "answer": [b"So.", b"x"], "texts": said}
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), tmp_path / "a.parquet")
    files = {"a.parquet": tmp_path / "a.parquet"}
    first, second = RowDocuments(files, Columns("image", conversation="texts")).inputs()
    turns = document_of(first.known).document.turns  # type: ignore[arg-type]
    assert [(turn.question, turn.answer) for turn in turns] == [("q", "a")]
    assert "row 1 has a conversation of lists that differ in length (2 from, 1 value)" in second.problem
    first, second = RowDocuments(files, Columns("image", question="question", answer="answer")).inputs()
    assert document_of(first.known).document.answers == ("So.",)  # type: ignore[arg-type]
    assert "row 1 has bytes in question that are not UTF-8" in second.problem


def _prepare(item: DocumentInput) -> PreparedDocument:
    return DocumentPreparer(longest_side=1000, quality=90)(item)


def _sheets() -> bytes:
    stream = io.BytesIO()
    pictures = [Image.new("L", (20 + number, 10)) for number in range(3)]
    pictures[0].save(stream, "TIFF", save_all=True, append_images=pictures[1:])
    return stream.getvalue()


def test_every_sheet_of_a_tiff_is_a_page_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tif").write_bytes(_sheets())
    (tmp_path / "a.txt").write_text("three")
    table = write_lines(tmp_path / "t.jsonl", {"file": "a.tif", "caption": "three"})
    tar = write_tar(tmp_path / "t.tar", [("a.tif", _sheets()), ("a.txt", b"three")])
    row = DocumentInput("k", "n", (PageBytes(_sheets(), "row 0"),), {"caption": "three"})
    items = [*read_folder(tmp_path).inputs, *CaptionTable(table).inputs(range(1)), *TarSamples({"t": tar}).inputs()]
    made = [_prepare(item).members for item in (*items, row)]
    assert [sorted(members) for members in made] == [["json", *map(page_member, range(3))]] * 4
    assert len({members[page_member(2)] for members in made}) == 1
    monkeypatch.setattr("megatron_ove.preprocess.documents.preparing.MAX_PAGES", 2)
    with pytest.raises(DataError, match="n has 3 pictures, but a document has 1 to 2"):
        _prepare(row)


def test_a_pipe_or_device_named_in_a_table_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("pipe.tif", "pipe.jpg"):
        os.mkfifo(tmp_path / name)
    names = ("pipe.tif", "pipe.jpg", "/dev/zero")
    table = write_lines(tmp_path / "t.jsonl", *({"file": name, "caption": "x"} for name in names))
    for item in CaptionTable(table).inputs(range(3)):
        with pytest.raises(DataError, match="is a pipe, a socket or a device, not a file"):
            _prepare(item)


def test_a_line_without_end_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ove.preprocess.documents.caption_documents._MAX_LINE_BYTES", 50)
    table = CaptionTable(write_lines(tmp_path / "t.jsonl", {"file": "a", "caption": ""}, b"[" + b"{}," * 50))
    for read in (table.count, lambda: list(table.inputs(range(2)))):
        with pytest.raises(DataError, match=r"line 2 of .* more than 50 bytes, so it looks like a JSON array on one"):
            read()


def test_odd_metadata_of_a_picture_gives_no_warning() -> None:
    stream = io.BytesIO()
    # A TIFF directory with one tag, whose type says more than there is.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x010E, 2, 5000, 60) + b"\0" * 4
    Image.new("RGB", (9, 9)).save(stream, "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _prepare(DocumentInput("k", "n", (PageBytes(stream.getvalue(), "a.jpg"),), {"caption": "x"}))


def _write(folder: Path, items: list[DocumentInput]) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser()
    add_document_options(parser)
    arguments = parser.parse_args(["--workers", "1", "--rejects", str(folder / "rejects.jsonl")])
    arguments.output = folder / "set"
    write_documents(arguments, lambda rejects: items, settings={}, judged=items, title="test")
    return read_rejects(folder / "rejects.jsonl")


def test_a_key_that_two_inputs_get_is_a_reject_that_names_both(tmp_path: Path) -> None:
    items = [DocumentInput("k", f"{name}.png", (PageBytes(picture(), name),), {"caption": name}) for name in "ab"]
    (reject,) = _write(tmp_path, items)
    assert reject["file"] == "b.png"
    assert "b.png and a.png both get the key k, so only the latter is used; rename one" in reject["reason"]
    assert [document.captions for document in documents_of(tmp_path / "set").values()] == [("a",)]


def test_keys_of_lines_are_readable_and_have_enough_digits(tmp_path: Path) -> None:
    table = write_lines(tmp_path / "t.jsonl", *[{"file": "日.png", "caption": "x"}] * 2)
    keys = [item.key for item in CaptionTable(table).inputs(range(2))]
    assert [re.sub("[0-9a-f]{16}$", "", key) for key in keys] == ["png_line_1-", "png_line_2-"]


def test_names_of_entries_are_shown_without_control_characters_and_only_the_first_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ignored = Counter[str]()
    count_ignored(ignored, ["\x1b[31mé\n", *(f"{number:04d}" for number in range(2000)), "0003", "a" * 500])
    assert len(ignored) == 1001
    assert max(map(len, ignored)) <= 80
    report_ignored("entries", ignored)
    output = capsys.readouterr().out.replace("\n", " ")
    assert output.startswith("entries: 0003 2, 0000 1, ")
    assert output.rstrip().endswith("others 1990")
    assert "\\x1b[31mé\\n" in ignored
    record = {"caption": "x", "bell\a": 1}
    assert _write(tmp_path, [DocumentInput("k", "n", (PageBytes(picture(), "n"),), record)]) == []
    assert "not read: bell\\x07 1" in capsys.readouterr().out


def test_rejects_of_records_name_their_line() -> None:
    item = DocumentInput("k", "t.jsonl/line 3 (a.png)", (PageBytes(picture(), "a.png"),), {"caption": 5})
    with pytest.raises(DataError, match=r"^t\.jsonl/line 3 \(a\.png\): it has the caption 5"):
        _prepare(item)


@pytest.mark.parametrize("language", languages())
def test_boxes_of_drawn_pages_say_which_piece_of_the_text_they_hold(language: str) -> None:
    pages = RenderedPages((language,), tuple(PAGE_LOOKS), (1.0,) * len(PAGE_LOOKS), (300, 200), "train", seed=5)
    num_columns = set()
    for number in range(3):
        drawn = pages.make(number)
        document = document_of_picture(drawn)
        assert document.text == "\n".join(line.text for line in drawn.lines)
        for unit, pieces in (("lines", drawn.lines), ("words", drawn.words), ("characters", drawn.glyphs)):
            boxes = document.boxes[unit]
            assert [document.text[start:stop] for start, stop in boxes.spans.tolist()] == [
                piece.text for piece in pieces
            ]
            assert boxes.corners.tolist() == [list(piece.box) for piece in pieces]
            assert (np.diff(boxes.spans[:, 0]) > 0).all()  # no piece of the text is meant twice
        characters = document.characters.spans[:, 0]
        blank = [place for place, sign in enumerate(document.text) if sign.isspace()]
        assert not set(characters.tolist()) & set(blank)
        assert len(characters) + len(blank) == len(document.text)
        num_columns.add(len(drawn.lines))
        Document.decode(document.encode(), [(200, 300)])
    assert len(num_columns) > 1


def test_a_stream_holds_few_of_its_inputs(tmp_path: Path) -> None:
    made = []

    def inputs() -> Iterator[int]:
        for number in range(60):
            made.append(number)
            yield number

    make_task = functools.partial(functools.partial, divmod, 420)
    with RejectsFile(tmp_path / "rejects.jsonl", stage="test") as rejects:
        stream = run_over_stream(make_task, inputs(), title="test", workers=2, rejects=rejects)
        assert next(stream) == (1, (420, 0))
        assert len(made) <= 9
        assert list(stream) == [(number, divmod(420, number)) for number in range(2, 60)]
        assert "ZeroDivisionError while processing 0" in rejects.first_reason
