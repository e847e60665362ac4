"""Recognition of a rendered page, line filters, and the 100-tags-a-page rule."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.engines import PaddleOcrEngine, RapidOcrEngine, build_engine
from megatron_ove.preprocess.ocr.lines import TextLine, believable_lines
from megatron_ove.preprocess.ocr.tags import page_tags, rank_words
from megatron_ove.preprocess.ocr.vocabulary import build_vocabulary
from megatron_ove.preprocess.ocr.words import segment_words
from megatron_ove.preprocess.text_render.page import draw_style, render_page
from megatron_ove.preprocess.text_render.passages import draw_passage
from megatron_ove.vocabulary import Vocabulary


def _line(text: str, score: float = 0.99, *, top: float = 0.0, height: float = 10.0, width: float = 100.0) -> TextLine:
    bottom = top + height
    return TextLine(text, score, ((0.0, top), (width, top), (width, bottom), (0.0, bottom)))


def _vocabulary(*words: str) -> Vocabulary:
    return build_vocabulary([words], permutation_seed=None)


@pytest.fixture(scope="module")
def engine() -> RapidOcrEngine:
    return RapidOcrEngine()


@pytest.mark.parametrize("language", ["en", "fr"])
def test_recognition_finds_the_words_of_a_rendered_page(engine: RapidOcrEngine, language: str) -> None:
    random = np.random.default_rng(5)
    passage = draw_passage(language, random, num_characters=300)
    page = render_page(passage, draw_style(language, random, width=420, height=260), seed=1)
    lines = engine.recognize(page.picture)
    found = set(rank_words(lines))
    expected = {word for line in page.lines for word in segment_words(line.text)}
    assert len(expected) > 15
    assert len(found & expected) >= 0.9 * len(expected), expected - found
    assert [line.box[0][1] for line in lines] == sorted(line.box[0][1] for line in lines)
    title = min(page.lines, key=lambda line: line.box[1]).box
    assert abs(lines[0].box[0][0] - title[0]) < 15  # boxes are in the picture's own pixels
    assert abs(lines[0].box[0][1] - title[1]) < 15


def test_engine_says_what_it_is(engine: RapidOcrEngine) -> None:
    assert engine.info.name == "rapidocr"
    assert engine.info.version
    assert any("det" in name for name in engine.info.models)
    assert any("rec" in name for name in engine.info.models)
    assert all(len(digest) == 16 for digest in engine.info.models.values())


def test_page_without_text_is_refused(engine: RapidOcrEngine) -> None:
    lines = engine.recognize(np.full((200, 200, 3), 240, np.uint8))
    with pytest.raises(DataError, match=r"^the page has no text: no line was recognized$"):
        page_tags(lines, _vocabulary("law"))


def test_missing_paddle_extra_is_explained() -> None:
    pytest.importorskip("rapidocr")
    try:
        import paddleocr  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"needs the package paddleocr.*pip install megatron_ove\[ocr-paddle\]"):
            PaddleOcrEngine(detection_model_dir="a", recognition_model_dir="b")
    else:
        with pytest.raises(DataError, match=r"the detection model folder a has no inference\.yml"):
            PaddleOcrEngine(detection_model_dir="a", recognition_model_dir="b")


def test_unknown_engine() -> None:
    with pytest.raises(DataError, match=r"there is no OCR engine 'eyes'; choose rapidocr or paddleocr"):
        build_engine("eyes", {})


def test_line_filters() -> None:
    lines = [_line("good line", 0.9), _line("nonsense", 0.79), _line("8", 0.99), _line(" 0 ", 0.99), _line("x" * 501)]
    assert [line.text for line in believable_lines(lines)] == ["good line"]
    assert len(believable_lines(lines, min_score=0.7)) == 2


def test_line_area_is_that_of_its_corners() -> None:
    turned = TextLine("ab", 1.0, ((0.0, 5.0), (5.0, 0.0), (10.0, 5.0), (5.0, 10.0)))
    assert turned.area == pytest.approx(50.0)


def test_line_record_round_trip() -> None:
    line = _line("some text", 0.9876)
    assert TextLine.from_record(line.as_record()) == line


def test_large_words_come_first_and_repetition_counts_once() -> None:
    lines = [_line("small print here", top=50), _line("HEADLINE", height=40), _line("small headline", top=80)]
    ranked = rank_words(lines)
    assert next(iter(ranked)) == "headline"
    assert ranked["headline"] == pytest.approx(100 * 40 * 0.99)
    assert sorted(ranked) == ["headline", "here", "print", "small"]
    tags = page_tags(lines, _vocabulary("headline", "print", "small"), num_tags=5)
    assert tags.words == ("headline", "small", "print")
    assert tags.ids.tolist() == [0, 2, 1, -1, -1]
    assert tags.ids.dtype == np.int32


def test_tags_are_cut_to_their_number_and_can_repeat_cyclically() -> None:
    vocabulary = _vocabulary("aa", "bb", "cc")
    lines = [_line("aa", height=30), _line("bb", height=20), _line("cc", height=10)]
    assert page_tags(lines, vocabulary, num_tags=2).ids.tolist() == [0, 1]
    assert page_tags(lines, vocabulary, num_tags=7, fill="cyclic").ids.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(page_tags(lines, vocabulary).ids) == 100


def test_reasons_for_pages_without_tags() -> None:
    with pytest.raises(DataError, match=r"none of its 2 recognized lines .* a score of 0\.85 \(best score 0\.60\)"):
        page_tags([_line("murky", 0.6), _line("gloom", 0.5)], _vocabulary("law"))
    with pytest.raises(DataError, match=r"none of the page's 2 words is in the vocabulary of 1 words"):
        page_tags([_line("other words")], _vocabulary("law"))


def test_detection_side_reaches_the_engine(engine: RapidOcrEngine) -> None:
    random = np.random.default_rng(5)
    passage = draw_passage("en", random, num_characters=300)
    page = render_page(passage, draw_style("en", random, width=420, height=260), seed=1)
    blurred = build_engine("rapidocr", {"detection_side": 64}).recognize(page.picture)
    assert len(blurred) < len(engine.recognize(page.picture))
