"""Pages whose words are known: tables, texts beside pictures, lines.jsonl by hand, and the tool that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.page_shards import check_origin
from megatron_ove.preprocess.ocr.recognition import PageRecognizer, common_engine, read_pages
from megatron_ove.preprocess.ocr.tags import rank_words
from megatron_ove.preprocess.ocr.vocabulary import build_vocabulary
from megatron_ove.preprocess.ocr.worded_pages import read_worded_pages, unnamed_pictures
from megatron_ove.preprocess.ocr.words import segmentation_name
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.vocabulary import Vocabulary
from tests.support.tool_scripts import reject_reasons, run_script

_TOOL = "ocr/write_worded_pages.py"


def _pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 180, 160)).save(folder / name)


def _table(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _options(tmp_path: Path) -> list[object]:
    return ["--workers", 1, "--rejects", tmp_path / "rejects.jsonl"]


def test_a_table_of_words_and_texts_becomes_a_shard_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pictures(tmp_path, "a.png", "deep/b.jpg", "empty.png", "rare.png", "odd.png", "unnamed.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    table = _table(
        tmp_path / "words.jsonl",
        {"file": "a.png", "words": ["Law", "right", "LAW", "peace"], "id": 7},
        {"file": "deep/b.jpg", "text": "Right of law.\nPeace" + " right" * 200},
        {"file": str(tmp_path / "damaged.png"), "words": ["law"]},
        {"file": "gone.png", "words": ["law"]},
        {"file": "empty.png", "text": " \n"},
        {"file": "rare.png", "words": ["seldom"]},
        {"file": "odd.png", "words": ["?!"]},
        {"file": "a.png", "words": ["peace"]},
    )
    arguments = [table, tmp_path / "set", "--build-vocabulary", tmp_path / "v.json", "--num-tags", 4]
    assert run_script(_TOOL, *arguments, *_options(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "1 pictures beside the named ones stand in no line of" in output
    assert "unnamed.png" in output
    assert "2 pages, 3 classes, 6 rejected" in output
    reasons = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    sentences = {
        "gone.png": "does not exist or is no file; relative files lie beside the table",
        "empty.png": "no word is given for",
        "rare.png": "none of the page's 1 words is in the vocabulary of 3 words",
        "odd.png": "none of the 1 texts given for it holds a word that counts",
        "a.png": "stands in the list of pages twice; its first lines are used",
        "damaged.png": "is a truncated or damaged picture",
    }
    assert sorted(Path(record["file"]).name for record in reasons) == sorted(sentences)
    for record in reasons:
        assert sentences[Path(record["file"]).name] in record["reason"]
    vocabulary, shards = Vocabulary.load(tmp_path / "v.json"), ShardSet.open(tmp_path / "set")
    assert set(vocabulary.words) == {"law", "right", "peace"}
    tags = {shards.key(row): [vocabulary.words[i] for i in shards.labels[row] if i >= 0] for row in range(2)}
    assert {key.rsplit("-", 1)[0]: words for key, words in tags.items()} == {
        "a": ["law", "right", "peace"],  # in the order in which they are given
        "deep_b": ["right", "law", "peace"],
    }
    assert "of" not in vocabulary.ids  # on one page only

    again = [table, tmp_path / "held_out", "--vocabulary", tmp_path / "v.json", *_options(tmp_path)]
    assert run_script(_TOOL, *again) == 0
    assert ShardSet.open(tmp_path / "held_out").labels.shape == (2, 100)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 6  # judged again, not counted twice


def test_texts_beside_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    _pictures(folder, "a.png", "b.jpg", "alone.png", "latin.png")
    (folder / "a.txt").write_text("\ufeffLaw\nright", encoding="utf-8")
    (folder / "b.txt").write_text("law and right", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "nobody.txt").write_text("law", encoding="utf-8")
    arguments = [folder, tmp_path / "set", "--build-vocabulary", tmp_path / "v.json", *_options(tmp_path)]
    assert run_script(_TOOL, *arguments) == 0
    assert len(ShardSet.open(tmp_path / "set")) == 2
    assert set(Vocabulary.load(tmp_path / "v.json").words) == {"law", "right"}
    reasons = reject_reasons(tmp_path / "rejects.jsonl")
    assert set(reasons) == {"alone.png", "latin.png", "nobody.txt"}
    assert reasons["alone.png"].endswith("has no text beside it: there is no alone.txt that can be read")
    assert reasons["latin.png"].endswith("is not UTF-8; save latin.txt as UTF-8")
    assert reasons["nobody.txt"].endswith("has no picture of this name beside it")


def test_a_text_that_cannot_be_read_costs_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("law")
    (tmp_path / "c.txt").mkdir()  # a folder is no text
    read_text = Path.read_text

    def refuse(path: Path, **options: str) -> str:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    pages = read_worded_pages(tmp_path)
    assert [page.key for page in pages.pages] == [page.key for page in pages.pages if "b" in page.file]
    ((_, reason),) = pages.refused
    assert reason == f"{tmp_path / 'a.txt'} cannot be read (Permission denied); check its permissions"


def test_texts_are_found_whatever_links_suffixes_and_names_are_like(tmp_path: Path) -> None:
    folder, outside = tmp_path / "pages", tmp_path / "outside"
    _pictures(folder, "big.PNG", "v1.png", "plain.png", "same_1.png", "same_2.png", "store/twin.png", ".hid/h.png")
    (folder / "plain.png").rename(folder / "v1.2 scan")
    _pictures(outside, "deep/o.png")
    (folder / "linked").symlink_to(outside)
    (folder / "name.png").symlink_to(folder / "store/twin.png")
    texts = {"big.TXT": "upper", "v1.txt": "one", "v1.2 scan.txt": "two", "name.txt": "twin", "store/none.txt": "lost"}
    texts |= {"text": "same", ".hid/h.txt": "hidden", "linked/deep/o.txt": "P1 outside", "linked/o.txt": "alone"}
    texts |= {"v1.TXT.txt": "odd", "v1.Txt": "second"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("same_1.txt", "same_2.txt"):
        (folder / name).symlink_to("text")
    worded = read_worded_pages(folder)
    assert {Path(page.file).name: [line.text for line in page.lines] for page in worded.pages} == {
        **{"big.PNG": ["upper"], "v1.png": ["second"], "v1.2 scan": ["two"], "twin.png": ["twin"]},
        **{"same_1.png": ["same"], "same_2.png": ["same"], "o.png": ["P1 outside"]},
    }
    reasons = {Path(file).relative_to(folder).as_posix(): reason for file, reason in worded.refused}
    assert sorted(reasons) == ["linked/o.txt", "store/none.txt", "v1.TXT.txt", "v1.txt"]
    assert reasons["v1.txt"] == f"{folder}/v1.png has the text v1.Txt, so v1.txt is not used"
    assert reasons["linked/o.txt"] == f"{folder}/linked/o.txt has no picture of this name beside it"
    assert worded.ignored.endswith("(without suffix 1); 1 more paths to the same file; 1 hidden folders")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"words": ["law"]}, r"line 2 of .* has no file"),
        ({"file": 3, "words": []}, r"line 2 of .* has the file 3, which is no name; write lines such as \{"),
        ({"file": "a\0.png", "text": "b"}, r"line 2 of .* has the file 'a\\x00.png', but no file can be called so"),
        ({"file": "\ud800", "text": "b"}, r"line 2 of .* has the file '\\ud800', but no file can be called so"),
        ({"file": "a.png"}, r"line 2 of .* has neither words nor text, but one is needed"),
        ({"file": "a.png", "words": ["b"], "text": "b"}, r"line 2 of .* has both words and text, but one is needed"),
        ({"file": "a.png", "words": "law"}, r"line 2 of .* has the words 'law', which are no list of strings"),
        ({"file": "a.png", "words": ["law", 3]}, r"line 2 of .* has the words \['law', 3\], which are no list"),
        ({"file": "a.png", "text": ["law"]}, r"line 2 of .* has the text \['law'\], which is no string"),
    ],
)
def test_a_line_of_another_form_is_a_sentence(record: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        read_worded_pages(_table(tmp_path / "t.jsonl", {"file": "a.png", "words": ["law"]}, record))


def test_nothing_usable_and_no_vocabulary_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = _table(tmp_path / "t.jsonl", {"file": "gone.png", "words": ["law"]})
    arguments = [table, tmp_path / "set", "--build-vocabulary", tmp_path / "v.json", *_options(tmp_path)]
    assert run_script(_TOOL, *arguments) == 2
    assert "no page of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(_TOOL, table, tmp_path / "set")
    assert "one of the arguments --vocabulary --build-vocabulary is required" in capsys.readouterr().err


def test_a_file_where_the_vocabulary_should_go_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pictures(tmp_path, "a.png", "b.png")
    table = _table(tmp_path / "t.jsonl", *({"file": f"{name}.png", "words": ["law"]} for name in "ab"))
    vocabulary, options = tmp_path / "v.json", _options(tmp_path)
    arguments = [table, tmp_path / "set", "--build-vocabulary", vocabulary, *options]
    for content in ('{"mine": 1}', ""):
        vocabulary.write_text(content)
        assert run_script(_TOOL, *arguments, "--overwrite") == 2
        assert "v.json exists and is no vocabulary, so it is not overwritten" in capsys.readouterr().err
        assert vocabulary.read_text() == content
    vocabulary.unlink()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine").touch()
    assert run_script(_TOOL, *arguments) == 2
    assert not vocabulary.exists()  # as there is no set that has it
    (tmp_path / "set/mine").unlink()
    assert run_script(_TOOL, *arguments) == 0
    before = vocabulary.read_text()
    table = _table(table, *({"file": f"{name}.png", "words": ["peace"]} for name in "ab"))
    assert run_script(_TOOL, table, tmp_path / "other", "--build-vocabulary", vocabulary, *options) == 2
    assert "v.json holds a vocabulary already, whose ids may be in other shard sets" in capsys.readouterr().err
    assert vocabulary.read_text() == before
    assert run_script(_TOOL, *arguments, "--overwrite") == 0
    assert Vocabulary.load(vocabulary).words == ("peace",)


def test_keys_do_not_depend_on_where_the_table_lies(tmp_path: Path) -> None:
    keys = []
    for name in ("one", "two"):
        _pictures(tmp_path / name, "x/a.png", "y/a.png")
        table = _table(tmp_path / name / "t.jsonl", *({"file": f"{x}/a.png", "words": ["law"]} for x in "xy"))
        worded = read_worded_pages(table)
        keys.append([page.key for page in worded.pages])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 2
    assert unnamed_pictures(worded.files) == []


def test_lines_written_by_hand_need_only_a_text(tmp_path: Path) -> None:
    path = _table(
        tmp_path / "lines.jsonl",
        {"key": "a", "file": "a.png", "lines": [{"text": "second word"}, {"text": "x" * 30 + " word"}, {"text": "水"}]},
    )
    (page,) = read_pages(path)
    assert page.engine is None
    assert list(rank_words(page.lines)) == ["second", "word", "x" * 30, "水"]
    boxed = [{"text": "low", "box": [[0, 0], [9, 0], [9, 9], [0, 9]]}, {"text": "HIGH", "score": 0.5}]
    (page,) = read_pages(_table(path, {"key": "a", "file": "a.png", "lines": boxed}))
    assert list(rank_words(page.lines)) == ["low"]  # the score counts with and without a box


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lines": [{"text": "a"}, {"score": 0.9}]}, r"line 1 of .* has in lines\[1\] a line that has no text$"),
        ({"lines": [{"text": 5}]}, r"lines\[0\] a line that has the text 5, no string"),
        ({"lines": ["law"]}, r"lines\[0\] a line that is no object with a text"),
        ({"lines": [{"text": "a", "score": "high"}]}, r"has the score 'high', which is no number from 0 to 1"),
        ({"lines": [{"text": "a", "score": 97}]}, r"has the score 97, which is no number from 0 to 1"),
        ({"lines": [{"text": "a", "score": 10**400}]}, r"has the score 10+, which is no number from 0 to 1"),
        ({"lines": [{"text": "a", "box": [[10**400, 0]] * 4}]}, r"has the box .*, which is no list of four corners"),
        ({"file_state": 5}, r"line 1 of .* has the file_state 5, which is not \[bytes, modification time in ns\]"),
        (
            {"lines": [{"text": "a", "box": [1, 2, 3, 4]}]},
            r"has the box \[1, 2, 3, 4\], which is no list of four corners",
        ),
        ({"lines": {"text": "a"}}, r"has the lines .*, which are no list"),
        ({"file": ""}, r"has the file '', which is no name"),
        ({"key": "a.b"}, r"line 1 of .* has the key 'a\.b', but names in a shard are 1 to 80 letters"),
        ({"key": "a" * 81}, r"line 1 of .* has the key 'a+', but names in a shard are 1 to 80 letters"),
        ({"engine": "tesseract"}, r"has the engine 'tesseract', which has no name and version"),
    ],
)
def test_a_wrong_field_of_lines_jsonl_is_named(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    record = {"key": "a", "file": "a.png", "lines": [{"text": "law"}], **change}
    with pytest.raises(DataError, match=sentence):
        read_pages(_table(tmp_path / "lines.jsonl", record))


def test_two_pages_of_one_key_are_named_before_anything_is_written(tmp_path: Path) -> None:
    records = [{"key": key, "file": f"{file}.png", "lines": []} for key, file in ("ax", "bx", "ax", "ay")]
    assert len(read_pages(_table(tmp_path / "lines.jsonl", *records[:3]))) == 3
    with pytest.raises(DataError, match=r"line 4 of .* has the key 'a' of another page, that of line 1; change one"):
        read_pages(_table(tmp_path / "lines.jsonl", *records))


def test_known_texts_go_with_every_engine_and_engines_do_not_mix(tmp_path: Path) -> None:
    engines = [{"name": "eyes", "version": v, "models": {}} for v in ("1", "2")]
    records = [{"key": str(i), "file": f"{i}.png", "lines": [], "engine": e} for i, e in enumerate([engines[0], None])]
    pages = read_pages(_table(tmp_path / "a.jsonl", *records))
    assert common_engine(pages) == engines[0]
    assert common_engine(pages[1:]) is None
    others = read_pages(_table(tmp_path / "b.jsonl", {**records[0], "engine": engines[1]}))
    with pytest.raises(DataError, match=r"read by different engines or models \(eyes 1, eyes 2\)"):
        common_engine(pages + others)
    info = {"segmentation": segmentation_name()}
    read, known = (build_vocabulary([["law"]], info={**info, "engine": e}) for e in (engines[0], None))
    for vocabulary, pages_of_it in ((read, pages), (known, pages), (known, others)):
        check_origin(vocabulary, pages_of_it, Path("v.json"))
    with pytest.raises(DataError, match=r"0\.png was read by eyes 2 with other models than the pages of v\.json"):
        check_origin(read, others, Path("v.json"))


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (1, 5000)])
def test_a_hairline_page_gets_a_sentence(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ove.preprocess.ocr.recognition.build_engine", lambda name, options: None)
    Image.fromarray(np.full((size[1], size[0], 3), 255, np.uint8)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=rf"thin\.png has {size[0]} x {size[1]} pixels, which is too thin for a line"):
        PageRecognizer("none", {})(InputFile(tmp_path / "thin.png", "thin.png", "thin"))
