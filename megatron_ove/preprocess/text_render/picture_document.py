"""What a picture of text says, and where, as a document."""

from __future__ import annotations

import numpy as np

from megatron_ove.preprocess.text_render.canvas import TextBox
from megatron_ove.preprocess.text_render.picture import TextPicture
from megatron_ove.shards.documents import Boxes, Document


def document_of_picture(picture: TextPicture) -> Document:
    """Returns what a picture of text says, and where.

    Returns:
        Text: the lines, one under the other, with their spaces. Boxes of lines, words and characters: tight around the
        ink. Spaces have no box, and in Japanese and Chinese, words are the runs between punctuation marks.
    """
    places = np.zeros(len(picture.glyphs), np.int64)  # of each glyph's character in the text
    start = 0
    spans: list[tuple[int, int]] = []
    for line in picture.lines:
        place = 0
        for number in range(line.first, line.stop):
            # Characters without ink are passed over, and no glyph is one of them.
            place = line.text.index(picture.glyphs[number].text, place)
            places[number] = start + place
            place += 1
        spans.append((start, start + len(line.text)))
        start += len(line.text) + 1

    def row(piece: TextBox, span: tuple[int, int]) -> tuple[int, ...]:
        return (0, *piece.box, *span)

    def between(piece: TextBox) -> tuple[int, int]:
        return int(places[piece.first]), int(places[piece.stop - 1]) + 1

    return Document(
        "\n".join(line.text for line in picture.lines),
        lines=Boxes.of([row(line, span) for line, span in zip(picture.lines, spans, strict=True)]),
        words=Boxes.of([row(word, between(word)) for word in picture.words]),
        characters=Boxes.of([row(glyph, between(glyph)) for glyph in picture.glyphs]),
    )
