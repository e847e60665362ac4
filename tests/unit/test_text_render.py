"""Rendered pages: the recorded boxes are where the ink is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.text_render import fonts
from megatron_ove.preprocess.text_render.page import RenderedPage, draw_style, render_page
from megatron_ove.preprocess.text_render.passages import draw_passage, languages, load_text


def _page(language: str, seed: int = 0, **style_changes: object) -> RenderedPage:
    random = np.random.default_rng(seed)
    passage = draw_passage(language, random, num_characters=600)
    style = draw_style(language, random, width=420, height=320)
    return render_page(passage, dataclasses.replace(style, **style_changes), seed=seed)


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
    fonts.font_paths.cache_clear()
    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(DataError, match=r"no font for language 'ja'.*run `pip install matplotlib-fontja`"):
            fonts.font_paths("ja")
    finally:
        fonts.font_paths.cache_clear()


@pytest.mark.parametrize("language", ["en", "ja"])
def test_boxes_hold_all_ink_and_nothing_else(language: str) -> None:
    paper = (255, 255, 255)
    page = _page(language, grain=0.0, paper=paper, ink=(0, 0, 0), title_ink=(0, 0, 0))
    is_ink = (page.picture < 128).all(axis=-1)  # the rule under the title is lighter
    inside = np.zeros_like(is_ink)
    for glyph in page.glyphs:
        left, top, right, bottom = glyph.box
        inside[top:bottom, left:right] = True
        if glyph.text not in ".,、。;:'’-":
            assert is_ink[top:bottom, left:right].any(), glyph
    assert is_ink.sum() > 1000
    assert (is_ink & ~inside).sum() <= is_ink.sum() * 0.002  # anti-aliased rims


def test_words_and_lines_agree_with_the_text() -> None:
    page = _page("en")
    assert [word.text for word in page.words] == [word for line in page.lines for word in line.text.split()]
    assert "".join(glyph.text for glyph in page.glyphs) == "".join(word.text for word in page.words)
    height, width = page.picture.shape[:2]
    for box in (item.box for item in (*page.lines, *page.words, *page.glyphs)):
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height


def test_every_glyph_of_every_language_exists_in_its_fonts() -> None:
    for language in languages():
        characters = {c for _, sentences in load_text(language).sections for s in sentences for c in s} - {" "}
        for path in fonts.font_paths(language):
            font = fonts.open_font(path, 20)
            missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
            drawn_as_missing = [c for c in characters if (font.getmask(c).getbbox(), bytes(font.getmask(c))) == missing]
            assert not drawn_as_missing, (language, path.name, drawn_as_missing)


def test_pages_follow_from_the_seed() -> None:
    np.testing.assert_array_equal(_page("fr", seed=3).picture, _page("fr", seed=3).picture)
    assert not np.array_equal(_page("fr", seed=3).picture, _page("fr", seed=4).picture)
