"""The vocabulary: counts, cuts, stable ids, the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.vocabulary import build_vocabulary
from megatron_ove.vocabulary import Vocabulary, vocabulary_path

_PAGES = [["law", "right", "law"], ["right", "freedom"], ["right", "law", "peace"]]


def test_words_count_once_a_page_and_ties_go_by_the_word() -> None:
    vocabulary = build_vocabulary(_PAGES, permutation_seed=None)
    assert vocabulary.words == ("right", "law", "freedom", "peace")
    assert vocabulary.page_counts == (3, 2, 1, 1)
    assert vocabulary.ids == {"right": 0, "law": 1, "freedom": 2, "peace": 3}


def test_cuts() -> None:
    assert build_vocabulary(_PAGES, min_pages=2, permutation_seed=None).words == ("right", "law")
    assert build_vocabulary(_PAGES, max_words=3, permutation_seed=None).words == ("right", "law", "freedom")


def test_ids_do_not_depend_on_the_order_of_pages() -> None:
    assert build_vocabulary(_PAGES).words == build_vocabulary(_PAGES[::-1]).words


def test_permutation_spreads_frequent_words() -> None:
    pages = [[f"word{i}" for i in range(1000) if page < 1000 - i] for page in range(1000)]
    sorted_ids = build_vocabulary(pages, permutation_seed=None)
    permuted = build_vocabulary(pages, permutation_seed=7)
    assert set(permuted.words) == set(sorted_ids.words)
    halves = [sum(v.page_counts[:500]) / sum(v.page_counts) for v in (sorted_ids, permuted)]
    assert halves[0] > 0.74  # the first of two ranks would see three of four labels
    assert 0.45 < halves[1] < 0.55
    assert permuted.words == build_vocabulary(pages, permutation_seed=7).words
    assert permuted.words != build_vocabulary(pages, permutation_seed=8).words


def test_save_and_load(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(_PAGES, info={"engine": {"name": "rapidocr"}, "segmentation": "x"})
    vocabulary.save(tmp_path / "deep" / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "deep" / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded.info["num_pages"] == 3
    assert loaded.info["engine"] == {"name": "rapidocr"}


def test_empty_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"no word is on at least min_pages = 5 of the 3 pages \(4 different words"):
        build_vocabulary(_PAGES, min_pages=5)


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    with pytest.raises(DataError, match=r"the vocabulary .* does not exist; build it with"):
        Vocabulary.load(path)
    path.write_text("[1, 2")
    with pytest.raises(DataError, match=r"vocabulary\.json is not a vocabulary"):
        Vocabulary.load(path)
    path.write_text(json.dumps({"info": {"format_version": 99}, "words": []}))
    with pytest.raises(DataError, match=r"has format 99, but this version reads format 1"):
        Vocabulary.load(path)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); check the path"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            [["law", 2], "peace"],
            r"is not a vocabulary \(entry 1 of its words is peace, not \[word, number of pages\]",
        ),
        ([["law", 2, 3]], r"entry 0 of its words is \['law', 2, 3\], not \[word"),
        ([[7, 2]], r"entry 0 of its words is \[7, 2\], not \[word"),
        ([["law", 2], ["peace", 1], ["law", 1]], r"has the word 'law' twice, as the ids 0 and 2, but a class has one"),
        (17, r"is not a vocabulary \('int' object is not iterable\)"),
    ],
)
def test_rows_that_are_no_words_are_named(tmp_path: Path, words: object, text: str) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"info": {"format_version": 1}, "words": words}))
    with pytest.raises(DataError, match=text):
        Vocabulary.load(path)


def test_a_saved_vocabulary_is_what_it_encodes_to(tmp_path: Path) -> None:
    vocabulary = build_vocabulary([["größe", "法", 'a"b']])
    vocabulary.save(tmp_path / "v.json")
    content = (tmp_path / "v.json").read_bytes()
    assert content == vocabulary.encode()
    assert Vocabulary.decode(content, "v.json") == vocabulary
    assert "法" in content.decode() and len(content.splitlines()) == 6  # one line a word, readable


def test_a_name_of_an_objective_is_a_plain_file_name() -> None:
    assert vocabulary_path("page_words") == "vocabularies/page_words.json"
    assert vocabulary_path("../../a/b") == "vocabularies/..%2F..%2Fa%2Fb.json"
