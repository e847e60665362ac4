"""Lines of pages of any size, found in tiles by a stand-in for the model: it sees bars of ink, and only high ones."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from megatron_ove.preprocess.ocr.reading import cut_line, read_page
from megatron_ove.preprocess.ocr.tiles import find_lines, join_lines

SIDE = 320
_LEAST_HEIGHT = 5  # of a bar that the stand-in sees, in pixels of what it is given


class Finder:
    """Finds black bars; keeps the largest size it was given."""

    def __init__(self) -> None:
        self.calls, self.largest = 0, 0

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.largest = max(self.largest, *picture.shape[:2])
        ink = (picture[..., 0] < 128).astype(np.uint8)
        contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        boxes = []
        for contour in contours:
            (center, size, angle) = cv2.minAreaRect(contour)
            if angle > 45:
                size, angle = size[::-1], angle - 90
            if min(size) + 1 >= _LEAST_HEIGHT:
                box = cv2.boxPoints((center, (size[0] + 1, size[1] + 1), angle))
                boxes.append(np.roll(box, -int(box.sum(1).argmin()), axis=0))
        return np.asarray(boxes, np.float32).reshape(-1, 4, 2)


def _page(width: int, height: int, bars: list[tuple[int, int, int, int]]) -> np.ndarray:
    """A white page with black bars (left, top, right, bottom)."""
    page = np.full((height, width, 3), 255, np.uint8)
    for left, top, right, bottom in bars:
        page[top:bottom, left:right] = 0
    return page


def _bounds(boxes: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(np.round([*box.min(0), *box.max(0)]).astype(int).tolist()) for box in boxes]


def _assert_equal(found: np.ndarray, bars: list[tuple[int, int, int, int]], *, within: float) -> None:
    assert len(found) == len(bars), _bounds(found)
    for box, bar in zip(_bounds(found), bars, strict=True):
        assert np.abs(np.subtract(box, bar)).max() <= within, (box, bar)


def test_a_small_page_is_looked_at_once_as_it_is() -> None:
    find, bars = Finder(), [(20, 20, 200, 40), (20, 60, 180, 80)]
    _assert_equal(find_lines(_page(300, 200, bars), find, side=SIDE), bars, within=1)
    assert (find.calls, find.largest) == (1, 300)


def test_high_lines_of_a_large_page_are_found_in_one_look() -> None:
    find, bars = Finder(), [(50, 50 + 120 * i, 600, 110 + 120 * i) for i in range(7)]
    _assert_equal(find_lines(_page(700, 940, bars), find, side=SIDE), bars, within=6)
    assert (find.calls, find.largest) == (1, SIDE)


@pytest.mark.parametrize("size", [(300, 6000), (1500, 2000)], ids=["long screenshot", "fine print"])
def test_low_lines_are_found_once_each_wherever_tiles_cut_them(size: tuple[int, int]) -> None:
    width, height = size
    bars = [(15, top, width - 15, top + 16) for top in range(10, height - 20, 29)]
    find = Finder()
    _assert_equal(find_lines(_page(width, height, bars), find, side=SIDE), bars, within=4)
    assert find.largest <= SIDE  # memory does not grow with the page


@pytest.mark.parametrize("height", [9, 6], ids=["seen in the second look", "seen in the third look"])
def test_lines_too_low_for_the_first_look_are_looked_for_more_closely(height: int) -> None:
    """The first look is at a third of the page's size, the second at two thirds."""
    bars = [(15, top, 1485, top + height) for top in range(40, 1900, 300)]
    _assert_equal(find_lines(_page(1500, 2000, bars), Finder(), side=SIDE), bars, within=4)


def test_a_line_over_many_tiles_is_one_line_at_any_slant() -> None:
    page = _page(6000, 700, [(50, 300, 5900, 320), (50, 360, 5900, 380)])
    turn = cv2.getRotationMatrix2D((3000, 350), 2.0, 1.0)
    page = cv2.warpAffine(page, turn, (6000, 700), borderValue=(255, 255, 255))
    found = find_lines(page, Finder(), side=SIDE)
    assert len(found) == 2
    for box in found:
        assert np.linalg.norm(box[1] - box[0]) == pytest.approx(5850, rel=0.01)
        assert np.linalg.norm(box[3] - box[0]) == pytest.approx(20, abs=8)


def test_columns_stay_apart_and_rows_are_read_from_left_to_right() -> None:
    bars = [(x, y + 2 * (x > 100), x + 700, y + 2 * (x > 100) + 16) for y in range(20, 560, 40) for x in (20, 760)]
    _assert_equal(find_lines(_page(1500, 600, bars), Finder(), side=SIDE), bars, within=4)


def test_cut_letters_at_the_edge_of_a_tile_join_no_lines() -> None:
    bars = [(15, top, 280, top + 20) for top in range(10, 260, 33)]
    page = _page(600, 290, bars)  # two tiles, of which the second one begins at 246

    def find(part: np.ndarray) -> np.ndarray:
        boxes = Finder()(part)
        if (part[:, 0] < 128).any():  # one box over the ends of several lines
            end = boxes[:, :, 0].max()
            boxes = np.array([[[0, 10], [end, 10], [end, 90], [0, 90]]], np.float32)
        return boxes

    _assert_equal(find_lines(page, find, side=SIDE), bars, within=2)


def test_a_letter_too_large_for_a_closer_look_is_kept_from_the_first() -> None:
    def find(picture: np.ndarray) -> np.ndarray:
        boxes = Finder()(picture)
        heights = np.linalg.norm(boxes[:, 3] - boxes[:, 0], axis=1)
        return boxes[heights < 120]  # the first look is at a third of the size

    bars = [(50, 50, 1400, 350)] + [(50, top, 1400, top + 16) for top in range(400, 1900, 100)]
    found = find_lines(_page(1500, 2000, bars), find, side=SIDE)
    assert len(found) == len(bars)
    assert _bounds(found)[0] == pytest.approx(bars[0], abs=8)


def test_parts_of_one_tile_are_never_joined() -> None:
    box = np.array([[0, 0], [100, 0], [100, 20], [0, 20]], np.float32)
    boxes = np.stack([box, box + np.array([90, 0], np.float32), box + np.array([90, 15], np.float32)])
    assert len(join_lines(boxes, np.array([0, 0, 0]))) == 3
    joined = join_lines(boxes, np.array([0, 1, 2]))  # the third lies a quarter in their row: the next line
    assert _bounds(joined) == [(0, 0, 190, 20), (90, 15, 190, 35)]


def test_what_is_as_high_as_long_is_joined_as_it_stands() -> None:
    box = np.array([[100, 100], [160, 100], [160, 162], [100, 162]], np.float32)
    joined = join_lines(
        np.stack([box, box + np.array([1, -1], np.float32), box + np.array([-1, 2], np.float32)]), np.arange(3)
    )
    assert len(joined) == 1
    assert np.abs(joined[0] - box).max() <= 3


def test_a_cut_end_does_not_slant_a_line() -> None:
    line = np.array([[45, 2308], [2480, 2308], [2480, 2368], [45, 2368]], np.float32)
    end = np.array([[2336, 2296], [2492, 2287], [2495, 2374], [2336, 2383]], np.float32)  # as a model saw it
    joined = join_lines(np.stack([line, end]), np.arange(2))
    assert _bounds(joined) == [(45, 2308, 2495, 2368)]


def test_no_page_is_too_thin() -> None:
    for shape in ((1, 1), (2, 3000), (5000, 1), (8, 9000)):
        assert len(find_lines(np.full((*shape, 3), 255, np.uint8), Finder(), side=SIDE)) == 0


def test_a_strip_is_given_to_the_model_with_ground_around_its_line() -> None:
    seen = []

    def find(part: np.ndarray) -> np.ndarray:
        seen.append(part)
        return np.array([[[5, 2], [290, 2], [290, 40], [5, 40]]], np.float32)

    strip = np.full((24, 300, 3), 230, np.uint8)
    strip[4:20, 10:280] = 20
    strip[4:20, 10:280:2] = 230
    boxes = find_lines(strip, find, side=SIDE)
    assert seen[0].shape == (64, 300, 3)
    assert (seen[0][24:] == 230).all()
    assert _bounds(boxes) == [(5, 2, 290, 24)]  # no box reaches over the edge of the page


def test_lines_are_cut_out_upright_and_not_higher_than_they_are_read() -> None:
    page = np.full((400, 400, 3), 255, np.uint8)
    page[50:80, 20:220] = (255, 0, 0)
    page[100:300, 300:330] = (0, 0, 255)
    page[100:300, 20:270] = (0, 255, 0)
    flat = np.array([[20, 50], [220, 50], [220, 80], [20, 80]], np.float32)
    line = cut_line(page, flat)
    assert line.shape == (30, 200, 3)
    assert (line == (255, 0, 0)).all()
    tall = cut_line(page, np.array([[300, 100], [330, 100], [330, 300], [300, 300]], np.float32))
    assert tall.shape == (30, 200, 3)
    large = cut_line(page, np.array([[20, 100], [270, 100], [270, 300], [20, 300]], np.float32))
    assert large.shape == (64, 80, 3)
    outside = cut_line(page, flat + np.array([200, 340], np.float32))  # a joined box may reach over the edge
    assert outside.shape == (30, 200, 3)


@pytest.mark.parametrize("turned", [False, True])
def test_a_line_longer_than_opencv_can_warp_is_scaled(turned: bool) -> None:
    page = np.full((100, 40_200, 3), 255, np.uint8)
    page[30:70, 100:40_100] = (255, 0, 0)
    box = np.array([[100, 30], [40_100, 30], [40_100, 70], [100, 70]], np.float32)
    if turned:
        page, box = np.rot90(page, -1), np.stack([100 - box[:, 1], box[:, 0]], -1)[[3, 0, 1, 2]]
    line = cut_line(page, box)
    assert line.shape == (32, 31_998, 3)  # with two pixels around it 32,000
    assert (line[2:-2, 2:-2] == (255, 0, 0)).all()


def test_a_page_is_read_line_by_line() -> None:
    bars = [(20, 20, 200, 40), (20, 60, 180, 80), (20, 100, 220, 120)]
    texts = iter([("first", 0.9), ("  ", 0.3), ("third", 0.7)])
    lines = read_page(_page(300, 200, bars), Finder(), lambda line: next(texts), side=SIDE)
    assert [(line.text, line.score) for line in lines] == [("first", 0.9), ("third", 0.7)]
    assert _bounds(np.array([line.box for line in lines])) == [bars[0], bars[2]]
