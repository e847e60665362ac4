"""Rendered pages: typefaces write what they can, and the recorded boxes and maps are where the ink is."""

from __future__ import annotations

import dataclasses
import string

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.text_render import typefaces as typefaces_module
from megatron_ove.preprocess.text_render.ink import draw_ink
from megatron_ove.preprocess.text_render.looks import LOOKS, PRINTED, Chance, Look
from megatron_ove.preprocess.text_render.page import draw_style, render_page
from megatron_ove.preprocess.text_render.passages import Passage, draw_passage, draw_word_list, languages, load_text
from megatron_ove.preprocess.text_render.picture import TextPicture
from megatron_ove.preprocess.text_render.typefaces import Typeface, script_of, typefaces
from tests.support.text_pictures import assert_exact

_BLACK_ON_WHITE = dataclasses.replace(PRINTED, paper=(255, 255), ink=(0, 0), grain=(0.0, 0.0), light_on_dark=0.0)


def _page(language: str, seed: int = 0, look: Look = PRINTED, **style_changes: object) -> TextPicture:
    random = np.random.default_rng(seed)
    passage = draw_passage(language, random, num_characters=600)
    style = draw_style(passage, random, width=420, height=320, look=look)
    return render_page(passage, dataclasses.replace(style, **style_changes), seed=seed)


def _face(name: str) -> Typeface:
    return next(face for face in typefaces("latin") if f"{face.family} {face.style}" == name)


def test_there_are_texts_in_several_languages_with_sources() -> None:
    assert {"en", "fr", "de", "es", "it", "pt", "ja", "zh-Hant"} <= set(languages())
    for language in languages():
        text = load_text(language)
        assert len(text.sections) >= 20
        assert "Universal Declaration" in text.source


def test_unknown_language() -> None:
    with pytest.raises(DataError, match=r"there is no text in language 'tlh'; choose among de, en, "):
        load_text("tlh")


def test_missing_font_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    typefaces_module.typefaces.cache_clear()
    monkeypatch.setattr(typefaces_module.importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(DataError, match=r"IPAex Gothic ships with .*; run `pip install matplotlib-fontja`"):
            typefaces("japanese")
    finally:
        typefaces_module.typefaces.cache_clear()


def test_every_typeface_is_there_and_has_the_letters_of_its_scripts() -> None:
    letters = {
        "latin": string.ascii_letters + string.digits,
        "greek": "αβγδεζηθικλμνξοπρστυφχψωάέήίόύώΑΩ",
        "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяЁё",
        "japanese": "人間は、自由で",
        "chinese": "人人有權，",
    }
    for script, usual in letters.items():
        for face in typefaces(script):  # type: ignore[arg-type]
            assert face.path.is_file()
            assert face.can_write(usual), (face, face.missing(usual))
    assert len({face.family for face in typefaces("latin")}) >= 12


def test_held_out_typefaces_are_never_in_training() -> None:
    train, siblings, families = (typefaces("latin", split) for split in ("train", "siblings", "families"))
    paths = [face.path for face in (*train, *siblings, *families)]
    assert len(set(paths)) == len(paths) == len(typefaces("latin"))
    assert {face.family for face in siblings} <= {face.family for face in train}
    assert not {face.family for face in families} & {face.family for face in (*train, *siblings)}
    with pytest.raises(DataError, match="there is no typeface of the script japanese among the siblings"):
        typefaces("japanese", "siblings")


@pytest.mark.parametrize(("face", "text"), [("Computer Modern Roman", "été"), ("Arvo Bold", "œuvre")])
def test_a_missing_glyph_is_refused(face: str, text: str) -> None:
    with pytest.raises(DataError, match=f"{face} has no glyph for '.' of '{text}' and would draw a box instead"):
        draw_ink(text, _face(face), 20)


def test_a_glyph_under_a_wrong_character_does_not_count() -> None:
    """Computer Modern draws a dash for the brace, and a letter with a mark above would have the mark beside it."""
    assert not _face("Computer Modern Roman").can_write("{")
    assert not _face("DejaVu Sans Regular").can_write("e\u0301")
    assert _face("DejaVu Sans Regular").can_write("{\u00e9")


def test_texts_without_ink_are_refused() -> None:
    with pytest.raises(DataError, match="' ' leaves no ink in DejaVu Sans Regular"):
        draw_ink(" ", _face("DejaVu Sans Regular"), 20)


def test_ink_is_that_of_the_font() -> None:
    """In a face without overlapping glyphs, a word drawn glyph by glyph equals the same word drawn at once."""
    face = _face("DejaVu Sans Mono Regular")
    ink = draw_ink("people", face, 18)
    mask, _ = face.open(18).getmask2("people", mode="L")
    whole = np.array(mask, np.uint8).reshape(mask.size[::-1])
    columns = np.flatnonzero(whole.any(axis=0))
    whole = whole[whole.any(axis=1)][:, columns[0] : columns[-1] + 1]
    np.testing.assert_array_equal(ink.coverage, whole)


@pytest.mark.parametrize("language", ["en", "ja", "zh-Hant"])
def test_boxes_and_masks_of_a_page_are_those_of_its_ink(language: str) -> None:
    page = _page(language, look=_BLACK_ON_WHITE, title_size=0)  # without the rule under a title
    np.testing.assert_array_equal(page.picture, np.repeat(255 - page.coverage[..., None], 3, axis=2))
    assert (page.coverage > 0).sum() > 1000
    assert_exact(page)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_turned_and_tilted_pages_keep_exact_boxes_and_masks(language: str) -> None:
    turn, tilt = Chance(1.0, 0.01, 0.08), Chance(1.0, 0.02, 0.12)
    look = dataclasses.replace(_BLACK_ON_WHITE, turn=turn, tilt=tilt)
    page, straight = _page(language, look=look, title_size=0), _page(language, look=_BLACK_ON_WHITE, title_size=0)
    assert not np.array_equal(page.glyph_map, straight.glyph_map)
    assert [word.text for word in page.words] == [word.text for word in straight.words]
    np.testing.assert_allclose(255 - page.picture[..., 0].astype(int), page.coverage, atol=1)
    assert_exact(page)


def test_words_and_lines_agree_with_the_text() -> None:
    page = _page("en")
    assert [word.text for word in page.words] == [word for line in page.lines for word in line.text.split()]
    assert "".join(glyph.text for glyph in page.glyphs) == "".join(word.text for word in page.words)
    for piece in (*page.words, *page.lines):
        assert "".join(g.text for g in page.glyphs[piece.first : piece.stop]) == piece.text.replace(" ", "")


def test_words_of_a_japanese_page_are_their_own_glyphs() -> None:
    page = _page("ja")
    for word in page.words:
        assert "".join(glyph.text for glyph in page.glyphs[word.first : word.stop]) == word.text


def test_a_low_page_without_title_is_a_line() -> None:
    random = np.random.default_rng(1)
    passage = draw_passage("de", random, num_characters=100)
    style = draw_style(passage, random, width=448, height=40, look=LOOKS["coloured"], has_title=False)
    picture = render_page(passage, style, seed=2)
    assert len(picture.lines) == 1
    assert passage.text.startswith(picture.lines[0].text)
    assert_exact(picture)


def test_pages_that_cannot_be_written_get_a_sentence() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"none of the \d+ typefaces at hand has all characters of the passage 'T'"):
        draw_style(Passage("en", "T", "\u0e01"), random, width=200, height=100)
    passage = Passage("en", "T", "word")
    with pytest.raises(DataError, match="no word of 'T' fits a page of 8 x 8 pixels"):
        render_page(passage, draw_style(passage, random, width=8, height=8, has_title=False), seed=0)


def test_pages_follow_from_the_seed() -> None:
    np.testing.assert_array_equal(_page("fr", seed=3).picture, _page("fr", seed=3).picture)
    assert not np.array_equal(_page("fr", seed=3).picture, _page("fr", seed=4).picture)


def test_every_passage_has_a_typeface() -> None:
    for language in languages():
        text = load_text(language)
        writing = "".join(title + "".join(sentences) for title, sentences in text.sections)
        assert any(face.can_write(writing) for face in typefaces(script_of(language), "train"))


def test_word_lists_are_drawn_evenly_and_sorted() -> None:
    words = draw_word_list("en", 300)
    assert words == draw_word_list("en", 300) == tuple(sorted(set(words)))
    assert all(word.isalpha() and word == word.casefold() and 3 <= len(word) <= 8 for word in words)
    assert draw_word_list("en", 300, seed=1) != words
    assert len(draw_word_list("zh-Hant", 50, letters=(2, 4))) == 50
    with pytest.raises(DataError, match=r"9999 words of 3 to 8 letters are wanted, but the text in language 'en' has "):
        draw_word_list("en", 9999)
