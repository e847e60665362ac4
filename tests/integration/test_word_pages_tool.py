"""tools/text_render: shard sets of pictures of words, the same whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ove.preprocess.text_render.looks import LOOKS
from megatron_ove.preprocess.text_render.passages import draw_word_list
from megatron_ove.preprocess.text_render.typefaces import typefaces
from megatron_ove.preprocess.text_render.word_pages import WordPages
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.validation import validate_shard_set
from tests.support.tool_scripts import run_script

_TOOL = "text_render/make_word_pages.py"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_a_set_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    options = ["--words", 40, "--count", 150, "--looks", "coloured", "degraded=0.5", "--pages", 0.2, "--seed", 7]
    assert run_script(_TOOL, tmp_path / "one", *options, "--workers", 1) == 0
    assert run_script(_TOOL, tmp_path / "two", *options, "--workers", 2) == 0
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    assert not validate_shard_set(tmp_path / "one", deep=True)
    stored = ShardSet.open(tmp_path / "one")
    vocabulary = stored.read_vocabulary()
    assert vocabulary is not None
    assert vocabulary.words == draw_word_list("en", 40)
    assert sum(vocabulary.page_counts) == (stored.labels >= 0).sum()

    looks = (LOOKS["coloured"], LOOKS["degraded"])
    recipe = WordPages(vocabulary.words, typefaces("latin", "train"), looks, (1.0, 0.5), 7, page_share=0.2)
    for index in (0, 77, 149):
        labels = [int(word) for word in stored.labels[index] if word >= 0]
        assert [vocabulary.words[word] for word in labels] == [w.text for w in recipe.make(index).picture.words]


def test_a_control_has_the_same_pictures_with_the_words_of_others(tmp_path: Path) -> None:
    options = ["--words", 40, "--count", 30, "--pages", 0.5, "--workers", 1]
    assert run_script(_TOOL, tmp_path / "real", *options) == 0
    assert run_script(_TOOL, tmp_path / "control", *options, "--control") == 0
    real, control = ShardSet.open(tmp_path / "real"), ShardSet.open(tmp_path / "control")
    assert [real.read(row, "jpg") for row in range(30)] == [control.read(row, "jpg") for row in range(30)]
    assert (control.labels == np.roll(real.labels, -1, axis=0)).all()


def test_held_out_sets_have_the_classes_of_training(tmp_path: Path) -> None:
    assert run_script(_TOOL, tmp_path / "train", "--words", 20, "--count", 5, "--workers", 1) == 0
    file = tmp_path / "train" / "vocabulary.json"
    for split in ("siblings", "families"):
        options = ["--vocabulary", file, "--count", 5, "--typefaces", split, "--seed", 1, "--workers", 1]
        assert run_script(_TOOL, tmp_path / split, *options) == 0
        assert (tmp_path / split / "vocabulary.json").read_bytes() == file.read_bytes()
        assert ShardSet.open(tmp_path / split).info.num_classes == 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--words", 9999], "9999 words of 3 to 8 letters are wanted"),
        (["--words", 5, "--language", "ja", "--letters", 2, 4, "--typefaces", "families"], "there is no typeface of"),
        (["--words", 5, "--strip-size", 4, 4, "--pages", 0], "does not fit a picture of 4 x 4 pixels"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_no_folder(tmp_path: Path, capsys, options: list, sentence: str) -> None:
    assert run_script(_TOOL, tmp_path / "set", *options, "--count", 200, "--workers", 1) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("looks", "sentence"),
    [
        ("faded", "there is no look 'faded'; choose among fixed,"),
        ("fixed=0", "the share '0' of fixed is no number"),
    ],
)
def test_a_look_that_cannot_be_is_a_sentence(tmp_path: Path, capsys, looks: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(_TOOL, tmp_path / "set", "--words", 5, "--count", 2, "--looks", looks)
    assert sentence in capsys.readouterr().err


def test_the_picture_of_the_docs_can_be_drawn(tmp_path: Path) -> None:
    assert run_script("text_render/draw_page_maker.py", tmp_path / "sheet.png") == 0
    assert 50_000 < (tmp_path / "sheet.png").stat().st_size < 300_000
