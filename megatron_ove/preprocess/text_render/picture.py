"""From a canvas of ink to a picture: movement, ground, colours, and what wears a picture down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from megatron_ove.preprocess.pictures import encode_jpeg
from megatron_ove.preprocess.text_render.canvas import Canvas, TextBox
from megatron_ove.preprocess.text_render.geometry import draw_movement, move_canvas
from megatron_ove.preprocess.text_render.grounds import Colours, draw_colours, draw_ground
from megatron_ove.preprocess.text_render.looks import Look

_RULE_STRENGTH = 85  # of 255: a rule is a third of the way from the paper to the ink


@dataclass(frozen=True)
class TextPicture:
    """A picture of text with its ground truth.

    Boxes and maps say where the ink is before blur, noise and JPEG, which move no pixel; turning and tilting are in.

    Attributes:
        picture: [height, width, 3] uint8 RGB.
        coverage: [height, width] uint8, how much of the pixel the ink covers.
        glyph_map: [height, width] int32, which of `glyphs` inked the pixel, -1 = none; it is -1 where coverage is 0.
        lines: in reading order; of a page, column by column, the title first.
        words: in reading order; in Japanese and Chinese running text the runs between punctuation marks.
        glyphs: single characters in reading order, without spaces.
        jpeg_quality: of the file.
    """

    picture: np.ndarray
    coverage: np.ndarray
    glyph_map: np.ndarray
    lines: tuple[TextBox, ...]
    words: tuple[TextBox, ...]
    glyphs: tuple[TextBox, ...]
    jpeg_quality: int

    def mask(self, piece: TextBox) -> np.ndarray:
        """Returns [height, width] bool: the pixels of one of the lines, words or glyphs."""
        return (self.glyph_map >= piece.first) & (self.glyph_map < piece.stop)

    def encode(self) -> bytes:
        """Returns the picture as a JPEG file."""
        return encode_jpeg(self.picture, quality=self.jpeg_quality)


def finish_picture(canvas: Canvas, look: Look, random: np.random.Generator) -> TextPicture:
    """Draws the look of a canvas that has at least one glyph; the canvas stays as it is."""
    movement = draw_movement(look, canvas, random)
    if movement is not None:
        canvas = move_canvas(canvas, movement)
    colours = draw_colours(look, random, num_inks=max(canvas.inks) + 1)
    ground = draw_ground(look, colours, random, width=canvas.width, height=canvas.height)
    picture = _wear(_colour(canvas, colours, ground), look, random)
    return TextPicture(
        picture=picture,
        coverage=canvas.coverage,
        glyph_map=canvas.glyph_map,
        lines=tuple(canvas.lines),
        words=tuple(canvas.words),
        glyphs=tuple(canvas.glyphs),
        jpeg_quality=int(random.integers(look.jpeg_quality[0], look.jpeg_quality[1] + 1)),
    )


def _colour(canvas: Canvas, colours: Colours, ground: np.ndarray) -> np.ndarray:
    """Returns [height, width, 3] uint8 of ink and rules on the ground."""
    ink = colours.inks[0] if len(colours.inks) == 1 else colours.inks[np.array(canvas.inks)[canvas.glyph_map]]
    if canvas.rules.any():
        ground = ground + (colours.inks[0] - ground) * (canvas.rules[..., None] * (_RULE_STRENGTH / 255 / 255))
    mixed = ground + (ink - ground) * (canvas.coverage[..., None] / 255)
    return (mixed + 0.5).astype(np.uint8)


def _wear(picture: np.ndarray, look: Look, random: np.random.Generator) -> np.ndarray:
    """Blurs, rescales and adds noise, as far as the look says."""
    blur, factor, noise = look.blur.draw(random), look.rescale.draw(random), look.noise.draw(random)
    if blur is not None:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(blur)))
    if factor is not None:
        height, width = picture.shape[:2]
        small = (max(1, round(width * factor)), max(1, round(height * factor)))
        down = Image.fromarray(picture).resize(small, Image.Resampling.BILINEAR)
        picture = np.asarray(down.resize((width, height), Image.Resampling.BICUBIC))
    if noise is not None:
        noisy = picture + random.normal(0.0, noise, picture.shape)
        picture = np.clip(noisy, 0, 255).astype(np.uint8)
    return picture
