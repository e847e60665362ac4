"""Recognition of a rendered page, line filters, and the 100-tags-a-page rule."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr import engines
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
    random = np.random.default_rng(6)
    passage = draw_passage(language, random, num_characters=300)
    page = render_page(passage, draw_style(passage, random, width=420, height=260), seed=1)
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


def test_paddle_models_find_and_read_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}

    class Detection:
        def __init__(self, **options: object) -> None:
            made["detection"] = options

        def predict(self, picture: np.ndarray) -> list[dict[str, object]]:
            assert picture[0, 0].tolist() == [0, 0, 255]  # red, in OpenCV's order
            return [{"dt_polys": [[[10, 20], [60, 20], [60, 40], [10, 40]]], "dt_scores": [0.9]}]

    class Recognition:
        def __init__(self, **options: object) -> None:
            made["recognition"] = options

        def predict(self, picture: np.ndarray) -> list[dict[str, object]]:
            return [{"rec_text": f"{picture.shape[1]} x {picture.shape[0]}", "rec_score": 0.75}]

    package = types.ModuleType("paddleocr")
    package.__spec__ = importlib.machinery.ModuleSpec("paddleocr", None)
    package.TextDetection, package.TextRecognition = Detection, Recognition  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "paddleocr", package)
    monkeypatch.setattr(engines, "version", lambda name: "3.7.0")
    for name in ("det", "rec"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inference.yml").write_text(f"Global: {{model_name: some_{name}}}")
        (tmp_path / name / "inference.pdiparams").write_bytes(b"weights")
    engine = PaddleOcrEngine(detection_model_dir=tmp_path / "det", recognition_model_dir=tmp_path / "rec")
    lines = engine.recognize(np.full((100, 200, 3), (255, 0, 0), np.uint8))
    assert [(line.text, line.score, line.box[2]) for line in lines] == [("50 x 20", 0.75, (60.0, 40.0))]
    assert made["detection"]["model_name"] == "some_det"
    assert made["detection"]["limit_side_len"] == 1280
    assert made["recognition"]["model_dir"] == str(tmp_path / "rec")
    assert sorted(engine.info.models) == ["det/inference.pdiparams", "rec/inference.pdiparams"]


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


def _text_page(width: int, height: int, size: int, pitch: int) -> tuple[np.ndarray, list[str]]:
    """A page of numbered lines of one size."""
    page, lines = Image.new("RGB", (width, height), "white"), []
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    for top in range(size, height - 2 * size, pitch):
        lines.append(f"river garden bridge market {100 + len(lines)}")
        draw.text((size, top), lines[-1], font=font, fill="black")
    return np.asarray(page), lines


@pytest.mark.parametrize(
    ("shape", "size", "pitch"), [((400, 2000), 24, 400), ((800, 1100), 18, 210)], ids=["screenshot", "fine print"]
)
def test_every_word_of_a_large_page_is_read(shape: tuple[int, int], size: int, pitch: int) -> None:
    page, expected = _text_page(*shape, size, pitch)
    lines = RapidOcrEngine(detection_side=320).recognize(page)
    read = [line.text for line in believable_lines(lines)]
    assert read == expected  # each line once, none of them nonsense


def test_detection_side_bounds_what_the_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = build_engine("rapidocr", {"detection_side": 256}), []
    find = engine._find  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "_find", lambda part: sizes.append(max(part.shape[:2])) or find(part))
    engine.recognize(np.full((700, 900, 3), 255, np.uint8))
    assert sizes and max(sizes) <= 256
