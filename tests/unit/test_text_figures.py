"""Figures of written texts, by hand."""

from __future__ import annotations

import pytest

from megatron_ove.evaluation.text_figures import published_figures, strict_figures, text_figures
from megatron_ove.objectives.text_generation.measures import WrittenText, is_repeated, measure_texts


def text(wanted: str, written: str, is_cut: bool = False) -> WrittenText:
    return WrittenText(wanted, written, is_cut)


TEXTS = [text("the cat sat", "the cat sat"), text("on the mat", "on a mat mat", True), text("now", "")]


def test_strict_figures_add_up_over_all_texts() -> None:
    found = strict_figures(TEXTS)
    # on the mat -> on a mat mat: t to a, h to a space, e to m, and "at" of the mat that is there twice; now: all three
    assert found["character_error_rate"] == pytest.approx((5 + 3) / (11 + 10 + 3))
    assert found["word_error_rate"] == pytest.approx((1 + 1 + 1) / 7)
    assert [found[name] for name in ("exact", "empty", "cut", "repeated")] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert found["word_f1"] == pytest.approx(2 * 5 / (7 + 7))
    assert 0 < found["bleu"] < 1 and strict_figures(TEXTS[:1] * 4)["word_f1"] == 1
    long = text("a cat sat on the old mat", "a cat sat on the old mat")
    assert strict_figures([long])["bleu"] == pytest.approx(1.0)


def test_published_figures_are_means_over_texts() -> None:
    found = published_figures(TEXTS)
    assert found["edit_distance"] == pytest.approx((0 + 5 / 12 + 1) / 3)
    assert found["precision"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["recall"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    (meteor,) = [name for name in found if name.startswith("meteor")]
    assert 0 < found[meteor] < 1
    again = published_figures([text("cat", "cat cat cat")])
    assert again["precision"] == 1.0  # sets of words: what the published figure does not see
    assert strict_figures([text("cat", "cat cat cat")])["word_error_rate"] == 2.0


def test_meteor_says_whether_it_knew_synonyms(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from megatron_ove.evaluation import text_figures as module

    module._wordnet.cache_clear()
    monkeypatch.setattr(module, "WORDNET", tmp_path)
    found = published_figures([text("cats running", "cat run"), text("cats", "dogs")])
    assert "meteor" not in found and 0 < found["meteor_exact_stem"] < 1  # stems are the same words
    module._wordnet.cache_clear()


def test_both_ways_are_there_and_no_text_is_no_figure() -> None:
    assert set(text_figures(TEXTS)) == {"strict", "published"}
    assert measure_texts([])["exact"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("no no no no", True),
        ("it is it is it is it is", True),
        ("well, it is it is it is it is", True),
        ("no no no", False),
        ("1000000", False),
        ("." * 40, True),
        ("ha" * 8, True),
        ("a b c d a b c d a b c d", False),
        ("", False),
        ("the end", False),
    ],
)
def test_texts_that_say_the_same_over_and_over(written: str, expected: bool) -> None:
    assert is_repeated(written) == expected
