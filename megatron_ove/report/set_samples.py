"""Samples of a shard set as HTML: pictures with the patches that matter lit, labels as words, texts and their boxes.

Whatever a set says is hostile: every text goes through `visible` and is escaped, pictures are decoded and encoded anew,
and a sample, or a page of one, that cannot be read is shown as the sentence that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from megatron_ove.data.windows import boxes_to_patches
from megatron_ove.errors import DataError
from megatron_ove.report.sample_pictures import decode_small, jpeg_uri, light
from megatron_ove.report.visible_text import visible
from megatron_ove.shards import format as layout
from megatron_ove.shards.documents import Boxes, Document
from megatron_ove.shards.samples import read_positions
from megatron_ove.shards.shard_set import ShardSet

MAX_PAGES, MAX_FRAMES, MAX_LABELS, MAX_BOXES, MAX_TURNS = 8, 8, 20, 2000, 20
"""Of a sample, or of a page; what is left out is counted."""
_PICTURE_SIDE, _FRAME_SIDE, _PAGE_SIDE, _OF_MANY_SIDE = 640, 320, 1000, 640
"""Pixels of the longest side; the last is that of a page that is not alone."""
_SMALLEST_SIDE = 200
"""Pixels; smaller pictures are enlarged by the browser, by a whole number."""
_MAX_TEXT, _MAX_ANSWER, _MAX_WORD, _MAX_PIECE, _MAX_SENTENCE = 4000, 1000, 60, 100, 600
"""Characters of a text, an answer, the word of a class, the text of a box, and a sentence about damage."""


def draw_sample(shards: ShardSet, row: int, words: Sequence[str] | None) -> str:
    """Returns a sample as an <article>; never raises for what is wrong with it.

    Args:
        shards: the set.
        row: of its index.
        words: word of each class; None = classes are shown as numbers.
    """
    try:
        match shards.info.kind:
            case "video":
                body = _clip(shards, row)
            case "document":
                body = _document(shards, row)
            case _:
                body = _picture(shards, row)
    except DataError as error:
        body = problem(str(error))
    heading = f"<h3>{_bdi(shards.key(row))}</h3>"
    return f'<article class="sample">{heading}{_facts(shards, row)}{_labels(shards, row, words)}{body}</article>'


def label_word(label: int, words: Sequence[str] | None) -> str:
    """Returns the word of a class, fit to be shown, or its number where it has none."""
    if words is None or not 0 <= label < len(words):
        return str(label)
    return visible(words[label], _MAX_WORD)


def problem(sentence: str) -> str:
    """Returns a sentence about what is wrong."""
    return f'<p class="problem">{escape(visible(sentence, _MAX_SENTENCE))}</p>'


def _bdi(text: str) -> str:
    """A text of unknown direction that leaves its neighbours where they are."""
    return f"<bdi>{escape(visible(text, _MAX_PIECE))}</bdi>"


def _facts(shards: ShardSet, row: int) -> str:
    path = shards.shard_path(row)
    name = path.relative_to(shards.directory) if path.is_relative_to(shards.directory) else path
    _, sizes = _sizes(shards, np.array([row]))
    height, width = sizes[0].tolist()
    noun = {"video": "frames of ", "document": "first page " if len(sizes) > 1 else "page "}.get(shards.info.kind, "")
    patches = int((-(-sizes // shards.info.patch_size)).prod(axis=1).sum())
    counted = "patches"
    if shards.info.kind == "video":
        patches, counted = int(shards.num_patches[row]), "selected patches"
    facts = [f"row {row:,}", f"{noun}{width} × {height} pixels", f"{patches:,} {counted}"]
    if len(sizes) > 1:
        facts.insert(1, f"{len(sizes):,} pages")
    shard = f"<bdi>{escape(visible(str(name)))}</bdi>"
    return f'<p class="facts">{" · ".join(escape(fact) for fact in facts)} · {shard}</p>'


def _sizes(shards: ShardSet, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns pages of samples and their (height, width), like `ShardSet.page_sizes`; other samples have one page."""
    if shards.info.has_pages:
        return shards.page_sizes(rows)
    sizes = np.stack([shards.height[rows], shards.width[rows]], axis=1).astype(np.int64)
    return np.ones(len(rows), dtype=np.int64), sizes


def _labels(shards: ShardSet, row: int, words: Sequence[str] | None) -> str:
    if not shards.info.label_width:
        return ""
    labels = [label for label in shards.labels[row].tolist() if label >= 0]
    if not labels:
        return '<p class="labels quiet">no labels</p>'
    items = "".join(f"<li><bdi>{escape(label_word(label, words))}</bdi></li>" for label in labels[:MAX_LABELS])
    more = _more(len(labels) - MAX_LABELS, "labels", tag="li")
    return f'<ul class="labels">{items}{more}</ul>'


def _more(count: int, noun: str, *, tag: str = "p") -> str:
    return f'<{tag} class="quiet">{count:,} more {noun}</{tag}>' if count > 0 else ""


def _image(picture: np.ndarray, alt: str) -> str:
    height, width = picture.shape[:2]
    factor = -(-_SMALLEST_SIDE // max(height, width))
    large = ' class="enlarged"' if factor > 1 else ""
    size = f'width="{width * factor}" height="{height * factor}"'
    return f'<img{large} src="{jpeg_uri(picture)}" {size} alt="{escape(alt)}">'


def _picture(shards: ShardSet, row: int) -> str:
    size = (int(shards.height[row]), int(shards.width[row]))
    picture = _decode(shards, row, layout.PICTURE_MEMBER, size, _PICTURE_SIDE)
    return f'<div class="frames">{_image(picture, "the picture")}</div>'


def _decode(shards: ShardSet, row: int, member: str, size: tuple[int, int], longest_side: int) -> np.ndarray:
    data = shards.read(row, member)
    try:
        return decode_small(data, size, longest_side)
    except DataError as error:
        raise DataError(f"{member} of {shards.describe(row)} {error}") from error


def _clip(shards: ShardSet, row: int) -> str:
    num_frames, rows, columns = shards.info.clip_grid
    try:
        positions = read_positions(shards.read(row, layout.POSITIONS_MEMBER), shards.info)
    except DataError as error:
        raise DataError(
            f"{layout.POSITIONS_MEMBER} of {shards.describe(row)}: {error}; copy its shard again"
        ) from error
    lit = np.zeros((num_frames, rows, columns), dtype=bool)
    lit[tuple(positions.T)] = True
    with_patches = np.flatnonzero(lit.any(axis=(1, 2)))
    chosen = with_patches[np.unique(np.linspace(0, len(with_patches) - 1, MAX_FRAMES).round().astype(np.int64))]
    size, figures = (int(shards.height[row]), int(shards.width[row])), []
    for frame in chosen.tolist():
        caption = f"frame {frame}: {int(lit[frame].sum()):,} of {rows * columns:,}"
        try:
            picture = _decode(shards, row, layout.frame_member(frame), size, _FRAME_SIDE)
            shown = _image(light(picture, lit[frame], (rows, columns), strength=0.82), f"frame {frame}")
        except DataError as error:
            shown = problem(str(error))
        figures.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    note = (
        f"Patches were selected in {len(with_patches):,} of {num_frames:,} frames. Lit: selected; the numbers are "
        "selected patches of a frame."
    )
    return f'<div class="frames">{"".join(figures)}</div><p class="quiet">{note}</p>'


def _document(shards: ShardSet, row: int) -> str:
    document, sentence = Document(), ""
    try:
        document = shards.read_document(row)
    except DataError as error:
        sentence = problem(str(error))  # its pages may be whole
    sizes = [(int(height), int(width)) for height, width in shards.page_sizes(np.array([row]))[1]]
    unit, boxes = next(((unit, boxes) for unit, boxes in document.boxes.items() if len(boxes)), ("", Boxes.of([])))
    side = _PAGE_SIDE if len(sizes) == 1 else _OF_MANY_SIDE
    figures = []
    for page, size in enumerate(sizes[:MAX_PAGES]):
        try:
            shown = _page(shards, row, page, size, boxes.on_page(page), document.text, has_boxes=bool(unit), side=side)
        except DataError as error:
            shown = problem(str(error))
        count = int((boxes.page == page).sum())
        parts = [f"page {page + 1}"] * (len(sizes) > 1) + [
            f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"
        ] * bool(unit)
        parts += [f"the first {MAX_BOXES:,} are drawn"] * (count > MAX_BOXES)
        figures.append(f"<figure>{shown}<figcaption>{', '.join(parts)}</figcaption></figure>")
    many = " many" if len(sizes) > 1 else ""
    pages = f'<div class="pages{many}">{"".join(figures)}{_more(len(sizes) - MAX_PAGES, "pages")}</div>'
    said = sentence or _text(document) + _turns(document) + _captions(document)
    return f'<div class="document">{pages}<div class="said">{said}</div></div>'


def _page(
    shards: ShardSet,
    row: int,
    page: int,
    size: tuple[int, int],
    boxes: Boxes,
    text: str,
    *,
    has_boxes: bool,
    side: int,
) -> str:
    """Returns a page with its boxes; patches without text are dimmed if the document says where its text stands."""
    picture = _decode(shards, row, layout.page_member(page), size, side)
    if not has_boxes:
        return _image(picture, f"page {page + 1}")
    patch, (height, width) = shards.info.patch_size, size
    grid = (-(-height // patch), -(-width // patch))
    lit = boxes_to_patches(boxes.corners, (grid[0] * patch, grid[1] * patch), grid)
    picture = light(picture, lit, (height / patch, width / patch), strength=0.3)
    rectangles = "".join(
        _rectangle(corners.tolist(), text[start:stop])
        for corners, (start, stop) in zip(boxes.corners[:MAX_BOXES], boxes.spans[:MAX_BOXES].tolist(), strict=True)
    )
    overlay = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{rectangles}</svg>'
    return f'<div class="page">{_image(picture, f"page {page + 1}")}{overlay}</div>'


def _rectangle(corners: Sequence[float], text: str) -> str:
    left, top, right, bottom = corners
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    return f"<rect {place}><title>{escape(visible(text, _MAX_PIECE))}</title></rect>"


def _passage(text: str, most: int) -> str:
    return f'<div class="passage" dir="auto" lang="und">{escape(visible(text, most))}</div>'


def _text(document: Document) -> str:
    if not document.text:
        return '<h4>Text</h4><p class="quiet">empty</p>'
    return f"<h4>Text</h4>{_passage(document.text, _MAX_TEXT)}"


def _turns(document: Document) -> str:
    if not document.turns:
        return ""
    items = []
    for turn in document.turns[:MAX_TURNS]:
        question = _passage(turn.question, _MAX_ANSWER) if turn.question else ""
        whole = '<p class="quiet">the text</p>'
        answer = whole if turn.answer is None else _passage(turn.answer, _MAX_ANSWER)
        items.append(f'<dt><span class="task">{_bdi(turn.task)}</span>{question}</dt><dd>{answer}</dd>')
    more = _more(len(document.turns) - MAX_TURNS, "turns")
    return f'<h4>Turns</h4><dl class="turns">{"".join(items)}</dl>{more}'


def _captions(document: Document) -> str:
    if not document.captions:
        return ""
    shown: Iterable[str] = (_passage(caption, _MAX_ANSWER) for caption in document.captions[:MAX_TURNS])
    items = "".join(f"<li>{caption}</li>" for caption in shown)
    more = _more(len(document.captions) - MAX_TURNS, "captions")
    return f'<h4>Captions</h4><ul class="captions">{items}</ul>{more}'
