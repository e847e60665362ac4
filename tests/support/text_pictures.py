"""Checks of a text picture's ground truth against its ink."""

from __future__ import annotations

import numpy as np

from megatron_ove.preprocess.text_render.canvas import Box
from megatron_ove.preprocess.text_render.picture import TextPicture


def assert_exact(picture: TextPicture) -> None:
    """Every inked pixel has a glyph, whose box holds it; boxes of words and lines are tight around their glyphs."""
    np.testing.assert_array_equal(picture.glyph_map >= 0, picture.coverage > 0)
    for number, glyph in enumerate(picture.glyphs):
        own = picture.mask(glyph)
        assert (glyph.first, glyph.stop) == (number, number + 1)
        assert own.any(), glyph
        around, box = _box(own), glyph.box
        assert box[0] <= around[0] < around[2] <= box[2], glyph
        assert box[1] <= around[1] < around[3] <= box[3], glyph
        # A neighbour that covers more of its rim may have taken some of it.
        assert np.abs(np.subtract(around, box)).max() <= 2, glyph
    for piece in (*picture.words, *picture.lines):
        around = _box(picture.mask(piece))
        assert np.abs(np.subtract(around, piece.box)).max() <= 1, piece
        height, width = picture.glyph_map.shape
        assert 0 <= piece.box[0] < piece.box[2] <= width
        assert 0 <= piece.box[1] < piece.box[3] <= height


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
