"""Word segmentation, script by script."""

from __future__ import annotations

import marshal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ove.preprocess.ocr import words
from megatron_ove.preprocess.ocr.words import segment_words


@pytest.fixture
def without_icu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_has_icu", lambda: False)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Don’t stop: 12.4% at example.org, a-b", ["don't", "stop", "12.4", "at", "example.org", "a-b"]),
        ("ＦＵＬＬ ｗｉｄｔｈ ﬁne", ["full", "width", "fine"]),
        ("Théâtre du Palais-Royal", ["théâtre", "du", "palais-royal"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("iPhone15手机优惠99元", ["iphone15", "手机", "优惠", "99", "元"]),
        ("第三季度营业收入同比增长", ["第三季度", "营业", "收入", "同比", "增长"]),
        ("서울특별시 강남구", ["서울특별시", "강남구"]),
    ],
)
def test_segmentation(text: str, expected: list[str]) -> None:
    assert segment_words(text) == expected


@pytest.mark.parametrize("text", ["a b c", "... !? —", "x" * 33, "123456789", "の"])
def test_useless_tokens_are_dropped(text: str) -> None:
    assert segment_words(text) == []


def test_eight_digits_are_kept() -> None:
    assert segment_words("20240131 012345678") == ["20240131"]


@pytest.mark.usefixtures("without_icu")
def test_japanese_without_icu_gives_kanji_and_katakana_runs() -> None:
    assert segment_words("新しい倉庫の開設により、サービスは大幅に") == ["新", "倉庫", "開設", "サービス", "大幅"]


@pytest.mark.usefixtures("without_icu")
def test_thai_without_icu_gives_pairs_of_clusters() -> None:
    assert segment_words("สวัสดี") == ["สวั", "วัส", "สดี"]


def test_segmentation_name_tells_whether_icu_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_has_icu", lambda: True)
    assert words.segmentation_name().endswith("/icu")
    monkeypatch.setattr(words, "_has_icu", lambda: False)
    assert words.segmentation_name().endswith("/no-icu")


def test_a_planted_cache_has_no_effect_and_none_is_made(tmp_path: Path) -> None:
    planted = tmp_path / "jieba.cache"
    planted.write_bytes(marshal.dumps(({"中": 1, "国人": 10**6}, 10**6)))
    code = "from megatron_ove.preprocess.ocr.words import segment_words; print(*segment_words('中国人民'))"
    root = str(Path(words.__file__).parents[3])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": root, "PYTHONUTF8": "1"},
        capture_output=True,
        check=True,
    )
    assert result.stdout.decode().split() == segment_words("中国人民")
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]


def test_a_vocabulary_of_an_earlier_version_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_has_icu", lambda: True)
    assert words.segmentation_name() == "nfkc-casefold/jieba-0.42.1-7197c3211ddd/icu"
    assert words.is_same_segmentation("nfkc-casefold/jieba-0.42.1-7197c3211ddd/icu")
    assert words.is_same_segmentation("nfkc-casefold/jieba-0.42.1/icu")  # the same dictionary, not yet named
    assert not words.is_same_segmentation("nfkc-casefold/jieba-0.42.1/no-icu")
    assert not words.is_same_segmentation("nfkc-casefold/jieba-0.42.1-0123456789ab/icu")
    assert not words.is_same_segmentation(None)
    monkeypatch.setattr(words, "_dictionary_digits", lambda: "0123456789ab")  # another dictionary is installed
    assert not words.is_same_segmentation("nfkc-casefold/jieba-0.42.1/icu")
