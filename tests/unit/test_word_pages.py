"""Pictures of words: pure in (seed, index), words apart, labels equal to them, contrast kept, and looks as named."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.preprocess.text_render.grounds import draw_colours, draw_ground, grey_levels
from megatron_ove.preprocess.text_render.looks import LOOKS, Chance, Look
from megatron_ove.preprocess.text_render.passages import draw_word_list
from megatron_ove.preprocess.text_render.typefaces import typefaces
from megatron_ove.preprocess.text_render.word_pages import WordPages
from tests.support.text_pictures import assert_exact

_WORDS = draw_word_list("en", 100)


def _recipe(*looks: str, **changes: object) -> WordPages:
    values = {"words": _WORDS, "faces": typefaces("latin", "train"), "seed": 3} | changes
    return WordPages(looks=tuple(LOOKS[name] for name in looks), shares=(1.0,) * len(looks), **values)  # type: ignore[arg-type]


def test_a_picture_follows_from_seed_and_index() -> None:
    first, again = _recipe(*LOOKS), _recipe(*LOOKS)
    backwards = [again.make(index) for index in reversed(range(12))][::-1]
    for index in range(12):
        made = first.make(index)
        assert made.ids == backwards[index].ids
        assert made.picture.encode() == backwards[index].picture.encode()
        np.testing.assert_array_equal(made.picture.glyph_map, backwards[index].picture.glyph_map)
    other = _recipe(*LOOKS, seed=4)
    assert sum(other.make(i).picture.encode() == backwards[i].picture.encode() for i in range(12)) == 0


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("page_share", [0.0, 1.0])
def test_labels_are_the_words_and_boxes_and_masks_are_exact(look: str, page_share: float) -> None:
    recipe = _recipe(look, page_share=page_share)
    for index in range(15):
        made = recipe.make(index)
        assert [word.text for word in made.picture.words] == [_WORDS[word] for word in made.ids]
        assert 1 <= len(made.ids) == len(set(made.ids)) <= (6 if page_share else 1)
        assert made.picture.picture.shape == ((112, 112, 3) if page_share else (28, 112, 3))
        assert_exact(made.picture)


def test_ink_without_a_ground_is_the_coverage() -> None:
    """On plain white paper the picture is recomputed from the recorded coverage alone."""
    for index in range(10):
        picture = _recipe("anywhere", page_share=0.5).make(index).picture
        np.testing.assert_array_equal(picture.picture, np.repeat(255 - picture.coverage[..., None], 3, axis=2))


@pytest.mark.parametrize("look", ["anywhere", "degraded"])
def test_words_do_not_overlap(look: str) -> None:
    recipe = _recipe(look, page_share=1.0, max_words=12)
    counts = []
    for index in range(20):
        words = recipe.make(index).picture.words
        counts.append(len(words))
        for number, word in enumerate(words):
            for other in words[:number]:
                left, top = np.maximum(word.box[:2], other.box[:2])
                right, bottom = np.minimum(word.box[2:], other.box[2:])
                is_apart = left >= right or top >= bottom
                assert is_apart or look == "degraded", (word, other)  # turned words may have boxes that overlap
    assert max(counts) > 6


def test_places_and_sizes_are_those_of_the_look() -> None:
    aligned, fixed = _recipe("aligned", page_share=0.5), _recipe("fixed", page_share=0.0)
    places = [word.box[:2] for index in range(30) for word in aligned.make(index).picture.words]
    assert all(x % 14 == 0 and y % 14 == 0 for x, y in places)
    assert len(set(places)) > 10
    anywhere = [word.box[:2] for i in range(30) for word in _recipe("anywhere").make(i).picture.words]
    assert any(x % 14 and y % 14 for x, y in anywhere)
    assert {fixed.make(index).picture.words[0].box[:2] for index in range(10)} == {(0, 0)}


def test_looks_come_in_their_shares() -> None:
    looks, shares = (LOOKS["anywhere"], dataclasses.replace(LOOKS["anywhere"], paper=(200, 200))), (3.0, 1.0)
    recipe = WordPages(_WORDS, typefaces("latin", "train"), looks, shares, 0, page_share=0.0)
    grey = sum(int(recipe.make(index).picture.picture.max()) == 200 for index in range(200))
    assert 30 < grey < 70


@pytest.mark.parametrize("look", ["coloured", "degraded"])
def test_ink_keeps_its_contrast_to_every_point_of_the_ground(look: str) -> None:
    values = dataclasses.replace(
        LOOKS[look], grain=(0.0, 0.0), gradient=Chance(0.7, 20.0, 90.0), photograph=Chance(0.7, 0.3, 1.0)
    )
    is_dark = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        colours = draw_colours(values, random, num_inks=2)
        ground = draw_ground(values, colours, random, width=60, height=40)
        for ink in grey_levels(colours.inks):
            assert np.abs(grey_levels(ground) - ink).min() >= values.contrast - 1e-6
        is_dark.append(grey_levels(colours.paper) < grey_levels(colours.inks).min())
    assert 10 < sum(is_dark) < 35  # light on dark a third of the time


def test_the_file_is_a_jpeg_of_the_picture() -> None:
    made = _recipe("coloured").make(0).picture
    with Image.open(io.BytesIO(made.encode())) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - made.picture).mean() < 8


def test_words_in_other_scripts() -> None:
    for script, words in (
        ("cyrillic", ("право", "закон")),
        ("greek", ("νόμος", "λόγος")),
        ("chinese", ("權利", "自由")),
    ):
        recipe = _recipe("coloured", words=words, faces=typefaces(script, "train"), page_share=1.0)
        assert {word.text for index in range(8) for word in recipe.make(index).picture.words} == set(words)


def test_long_words_get_smaller_until_they_fit() -> None:
    recipe = _recipe("anywhere", words=("responsibilities",), strip=(72, 14), page_share=0.0)
    for index in range(5):
        assert_exact(recipe.make(index).picture)
    with pytest.raises(DataError, match=r"the word 'responsibilities' in .* does not fit a picture of 14 x 14 pixels"):
        _recipe("anywhere", words=("responsibilities",), strip=(14, 14), page_share=0.0).make(0)


def test_words_that_no_typeface_can_write_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"1 of the 2 words cannot be written by any of the \d+ typefaces, e\.g\. '權利'"
    ):
        _recipe("anywhere", words=("law", "權利"))


def test_values_that_make_no_set_are_refused() -> None:
    with pytest.raises(DataError, match=r"0 words, 1 looks and the shares \[1.0\] make no set"):
        _recipe("anywhere", words=())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ink": (200, 255)}, r"contrast = 80 cannot be had with paper = \(255, 255\) and ink = \(200, 255\)"),
        ({"size": (19, 13)}, r"size = \(19, 13\) is no range within 4 to 512"),
        ({"jpeg_quality": (0, 90)}, r"jpeg_quality = \(0, 90\) is no range within 1 to 95"),
    ],
)
def test_looks_that_cannot_be_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Look(**changes)  # type: ignore[arg-type]
