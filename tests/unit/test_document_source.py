"""Documents as patches: every page a segment, boxes move with what is made of a page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.config.data import DocumentSourceConfig, ImageSourceConfig, OcrSourceConfig
from megatron_ove.data.picture_decoder import PictureDecoder
from megatron_ove.data.sources.documents import DocumentSource, find_mismatches
from megatron_ove.data.sources.images import ImageSource
from megatron_ove.data.sources.pages import OcrSource
from megatron_ove.data.windows import Windows, visible_share
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import ShardWriter
from tests.support.documents import document_of, write_documents
from tests.support.id_shards import encode
from tests.support.patch_pictures import read_patches

COMMON: dict[str, Any] = {"patch_size": 14, "device": torch.device("cpu"), "num_threads": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_documents(tmp_path_factory.mktemp("documents") / "set", range(12)))


def source_of(shards: ShardSet, **options: object) -> DocumentSource:
    config = DocumentSourceConfig(kind="document", path=str(shards.directory), max_pages=3, **options)  # type: ignore[arg-type]
    return DocumentSource("documents", config, shards=shards, **COMMON)


def test_every_page_is_a_segment_within_its_budget(shards: ShardSet) -> None:
    rows, seeds = np.array([5, 0, 7]), np.array([3, 4, 5])
    found = source_of(shards, max_patches=8).segments(rows, seeds)
    assert found.counts.tolist() == [3, 1, 2]
    assert found.lengths.tolist() == found.grids.prod(axis=1).tolist()
    assert len(found.lengths) == 6 and found.lengths.max() <= 8 and (found.grids[:, 0] == 1).all()
    whole = source_of(shards, max_patches=1000).segments(rows, seeds)
    assert whole.grids.tolist() == [[1, 3, 2], [1, 3, 3], [1, 3, 4], [1, 3, 2], [1, 3, 2], [1, 3, 3]]


def test_pages_are_decoded_to_their_places_and_positions_count_from_0(shards: ShardSet) -> None:
    source = source_of(shards)
    rows, seeds = np.array([5, 1]), np.array([1, 2])
    counts = source.count_tokens(rows, seeds)
    targets = [torch.zeros(int(count), 3 * 14 * 14, dtype=torch.uint8) for count in counts]
    assert source.decode_into(rows, seeds, targets) == {}
    alone = [torch.zeros_like(targets[1])]
    source.decode_into(rows[1:], seeds[1:], alone)
    assert torch.equal(alone[0], targets[1])
    assert all(target.float().std() > 1 for target in targets)
    positions = source.positions(5, 1)
    assert len(positions) == counts[0]
    assert (positions[:, 0] == 0).all() and (np.flatnonzero((positions == 0).all(axis=1))).tolist() == [0, 6, 15]


def test_a_page_that_cannot_be_decoded_makes_its_document_bad(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "set", range(3))
    shards = ShardSet.open(path)
    offset, size = shards.index.place(2, "page0001.jpg")
    with shards.shard_path(2).open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(size))
    source = source_of(shards)
    rows, seeds = np.arange(3), np.arange(3)
    targets = [torch.zeros(int(n), 588, dtype=torch.uint8) for n in source.count_tokens(rows, seeds)]
    problems = source.decode_into(rows, seeds, targets)
    assert list(problems) == [2] and "page0001.jpg of sample 'document-2'" in problems[2]


def test_longer_documents_than_a_run_takes_are_refused(shards: ShardSet) -> None:
    def sentences(max_pages: int) -> list[str]:
        source = DocumentSourceConfig(kind="document", path="DIR", max_pages=max_pages)
        run: Any = SimpleNamespace(data=SimpleNamespace(sources={"d": source}))
        return find_mismatches(run, "d", shards.info)

    (sentence,) = sentences(2)
    assert sentence == (
        "data.sources.d.max_pages = 2, but DIR holds documents of up to 3 pages, and no page is left out in silence; "
        "raise it, or write the set with fewer pages a document"
    )
    assert sentences(3) == []


def test_documents_are_read_as_they_were_written(shards: ShardSet) -> None:
    for row in range(12):
        found, expected = shards.read_document(row), document_of(row, 1 + row % 3)
        assert (found.text, found.turns, found.captions) == (expected.text, expected.turns, expected.captions)
        assert np.array_equal(found.lines.corners, expected.lines.corners)
        assert np.array_equal(found.lines.spans, expected.lines.spans)


# -- boxes -----------------------------------------------------------------------------------------------------------


def marked_picture(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    left, top, right, bottom = box
    picture[top:bottom, left:right] = (255, 0, 0)
    return picture


@st.composite
def pictures_with_a_mark(draw: st.DrawFn) -> tuple[int, int, tuple[int, int, int, int], int]:
    height, width = draw(st.integers(20, 400)), draw(st.integers(20, 400))
    left, top = draw(st.integers(0, width - 6)), draw(st.integers(0, height - 6))
    right, bottom = draw(st.integers(left + 4, width)), draw(st.integers(top + 4, height))
    return height, width, (left, top, right, bottom), draw(st.integers(0, 2**40))


def draw_windows_of(source: Any, seed: int) -> Windows:
    return source.windows(np.array([0]), np.array([seed]))


@settings(max_examples=60, deadline=None)
@given(case=pictures_with_a_mark(), kind=st.sampled_from(["square", "keep", "large", "page", "document"]))
def test_a_marked_glyph_is_inside_its_moved_box_after_every_augmentation(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[int, int, tuple[int, int, int, int], int], kind: str
) -> None:
    height, width, box, seed = case
    path = tmp_path_factory.mktemp("marked") / "set"
    content = encode(marked_picture(height, width, box), "PNG")
    common: dict[str, Any] = {**COMMON}
    if kind == "document":
        with ShardWriter(path, kind="document") as writer:
            writer.add("k", {"json": b'{"text": ""}', "page0000.jpg": content})
        config: Any = DocumentSourceConfig(kind="document", path=str(path), max_patches=40)
        source: Any = DocumentSource("s", config, shards=ShardSet.open(path), **common)
    else:
        with ShardWriter(path, kind="ocr" if kind == "page" else "image", num_classes=2, label_width=1) as writer:
            writer.add("k", {"jpg": content}, np.array([0]))
        shards = ShardSet.open(path)
        if kind == "page":
            source = OcrSource(
                "s", OcrSourceConfig(kind="ocr", path=str(path), max_patches=50), shards=shards, **common
            )
        else:
            options = {"square": {}, "keep": {"aspect": "keep"}, "large": {"aspect": "keep", "max_upscale": 3.0}}[kind]
            config = ImageSourceConfig(
                kind="image", path=str(path), image_size=112, crop_area=(0.3, 1.0), crop_aspect=(0.5, 2.0), **options
            )
            source = ImageSource("s", config, shards=shards, **common)
    windows = draw_windows_of(source, seed)
    decoder = PictureDecoder(device=torch.device("cpu"), num_threads=1, resizes=True)
    decoded = decoder.decode(np.array([height * width]), lambda i: content, str, pytest.fail, windows)
    _, shown = next(decoded)
    picture = shown.clone()  # the memory is the decoder's
    pixels = picture.numpy().astype(int)
    is_red = (pixels[..., 0] > 200) & (pixels[..., 1] < 100)
    (moved,) = windows.move_boxes(0, np.array([box]))
    # A pixel that is mostly red has its middle in the moved box; cubic filtering may move an edge by less than a pixel.
    y, x = np.nonzero(is_red)
    slack = 1.0
    assert (x + 0.5 >= moved[0] - slack).all() and (x + 0.5 <= moved[2] + slack).all()
    assert (y + 0.5 >= moved[1] - slack).all() and (y + 0.5 <= moved[3] + slack).all()
    size = tuple(windows.size[0].tolist())
    left, top, right, bottom = np.clip(moved, 0, [size[1], size[0]] * 2)
    # And what is well inside the moved box is red: the box is neither too large nor elsewhere.
    inner = is_red[int(np.ceil(top + 2)) : max(0, int(bottom - 2)), int(np.ceil(left + 2)) : max(0, int(right - 2))]
    assert inner.all()
    (share,) = visible_share(moved[None], size)
    if not is_red.any():
        assert share < 1 or min(moved[2] - moved[0], moved[3] - moved[1]) < 2
    assert 0 <= share <= 1 + 1e-9
    target = [torch.zeros(int(source.count_tokens(np.array([0]), np.array([seed]))[0]), 588, dtype=torch.uint8)]
    assert source.decode_into(np.array([0]), np.array([seed]), target) == {}
    rows, columns = size[0] // 14, size[1] // 14
    assert np.array_equal(read_patches(target[0], rows, columns).numpy(), picture.numpy())
