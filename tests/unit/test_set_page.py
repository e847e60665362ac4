"""`megatron-ove inspect SET`: statistics equal to counting by hand; a page that shows a set and believes nothing."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_ove.cli.main import main
from megatron_ove.data.windows import boxes_to_patches
from megatron_ove.report.histogram import draw_histogram
from megatron_ove.report.sample_pictures import light
from megatron_ove.report.set_page import draw_rows, find_rows, write_set_page
from megatron_ove.report.set_samples import draw_sample
from megatron_ove.report.set_statistics import Distribution, even_runs, measure_shard_set
from megatron_ove.report.visible_text import visible
from megatron_ove.shards.documents import Boxes, Document, Turn
from megatron_ove.shards.merge import merge_parts, part_name
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import ShardWriter
from megatron_ove.vocabulary import Vocabulary
from tests.support.id_shards import GRID, NUM_CLASSES, PATCH, encode, write_id_shard_set
from tests.support.old_shards import to_first_format

HOSTILE = (
    "<script>alert(1)</script></svg></title></div><img src=http://x.example/a onerror=a()>\"'&amp;\x00\x1b[2J\u202e\x85"
)
SHOWN = (
    "<script>alert(1)</script></svg></title></div><img src=http://x.example/a onerror=a()>\"'&amp;"
    "[U+0000][U+001B][2J[U+202E][U+0085]"
)


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and texts by the classes that hold them."""

    VOID = ("meta", "img")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(f"{tag}.{dict(attrs).get('class', '')}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().split(".")[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inside(self, place: str) -> list[str]:
        """Returns the texts directly in or below an element "tag.class"."""
        return [text for path, text in self.texts if place in path]


def is_self_contained(page: Page, html: str) -> bool:
    tags = {tag for tag, _ in page.elements}
    names = {name for _, attributes in page.elements for name in attributes}
    return (
        not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "use", "image", "foreignobject"}
        and not {name for name in names if name.startswith("on") or name in ("href", "srcset", "xlink:href", "style")}
        and all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
        and not any("http" in value for _, attributes in page.elements for value in attributes.values())
        and page.all("meta")[-1]["content"].startswith("default-src 'none'")
        and not re.search(r"@import|url\(", html)
    )


def pixels(image: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1]))))


def page_of(shards: ShardSet, output: Path, **options: object) -> tuple[Page, str]:
    rows = options.pop("rows", range(len(shards)))
    path = write_set_page(shards, output, statistics=measure_shard_set(shards), rows=rows, **options)  # type: ignore[arg-type]
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert is_self_contained(page, html)
    assert visible(html) == html, "a control character or mark of direction is in the page as it is"
    return page, html


def white(height: int, width: int) -> bytes:
    return encode(np.full((height, width, 3), 255, np.uint8))


def write_documents(directory: Path, documents: list[tuple[Document, list[tuple[int, int]]]]) -> ShardSet:
    with ShardWriter(directory, kind="document", samples_per_shard=3) as writer:
        for i, (document, pages) in enumerate(documents):
            members = {f"page{number:04d}.jpg": white(*size) for number, size in enumerate(pages)}
            assert writer.add(f"doc-{i}", {"json": document.encode(), **members})
    return ShardSet.open(directory)


def box(*rows: tuple[float, ...]) -> Boxes:
    return Boxes.of(rows)


# --- patches under boxes


@settings(max_examples=200, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    corners=st.lists(st.tuples(*[st.integers(-80, 280)] * 4), max_size=4),
)
def test_patches_that_boxes_touch_are_those_of_brute_force(
    grid: tuple[int, int], size: tuple[int, int], corners: list[tuple[int, ...]]
) -> None:
    boxes = np.array(corners, np.float32).reshape(-1, 4) / 4
    want = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes.tolist():
        for row in range(grid[0]):
            for column in range(grid[1]):
                # Patch (row, column) is [row, row + 1) * height / rows; compared without dividing, so exactly.
                rows = max(top * grid[0], row * size[0]) < min(bottom * grid[0], (row + 1) * size[0])
                columns = max(left * grid[1], column * size[1]) < min(right * grid[1], (column + 1) * size[1])
                want[row, column] |= rows and columns and left < right and top < bottom
    np.testing.assert_array_equal(boxes_to_patches(boxes, size, grid), want)


def test_only_patches_that_are_not_lit_are_dimmed() -> None:
    lit = np.array([[True, False, False], [False, False, True]])
    picture = np.full((20, 25, 3), 200, np.uint8)  # 2 x 2.5 patches of 10 pixels
    found = light(picture, lit, (2, 2.5), strength=0.5)
    want = np.kron(lit, np.ones((10, 10), bool))[:, :25]
    np.testing.assert_array_equal(found[..., 0] == 200, want)
    assert (found[~want] == (200 + 96) // 2).all()
    half = light(picture[::2, ::2], lit, (2, 2.5), strength=0.5)
    np.testing.assert_array_equal(half[..., 0] == 200, want[::2, ::2])


# --- statistics


def distributions(shards: ShardSet, **options: int) -> dict[str, Distribution]:
    return {one.name: one for one in measure_shard_set(shards, **options).distributions}


def assert_counts(one: Distribution, values: list[int]) -> None:
    assert (one.minimum, one.maximum) == (min(values), max(values))
    assert one.median == pytest.approx(np.median(values)) and one.mean == pytest.approx(np.mean(values))
    assert sum(bar.count for bar in one.bars) == len(values)
    for i, bar in enumerate(one.bars):
        high = np.inf if one.is_open and i == len(one.bars) - 1 else bar.high
        assert bar.count == sum(bar.low <= value <= high for value in values)


def test_statistics_of_pictures_equal_counting(tmp_path: Path) -> None:
    sizes = [(20 + 7 * (i % 5), 30 + i) for i in range(23)]
    labels = [[i % 4, (i % 4 + 1) % 5, -1][: 3 - (i % 3)] for i in range(23)]
    with ShardWriter(tmp_path / "set", kind="image", num_classes=9, label_width=3, samples_per_shard=10) as writer:
        for i, (height, width) in enumerate(sizes):
            mine = [] if i % 6 == 5 else labels[i]
            writer.add(f"k{i}", {"jpg": white(height, width)}, np.array((mine + [-1] * 3)[:3], np.int32))
    shards = ShardSet.open(tmp_path / "set")
    found, statistics = distributions(shards), measure_shard_set(shards)
    assert_counts(found["width, pixels"], [width for _, width in sizes])
    assert_counts(found["height, pixels"], [height for height, _ in sizes])
    assert_counts(found["patches of a sample"], [ceil(h / PATCH) * ceil(w / PATCH) for h, w in sizes])
    stored = [[label for label in row if label >= 0] for row in shards.labels.tolist()]
    assert_counts(found["labels of a sample"], [len(row) for row in stored])
    flat = [label for row in stored for label in row]
    assert statistics.labels is not None
    want = sorted(((label, flat.count(label)) for label in set(flat)), key=lambda item: (-item[1], item[0]))
    assert list(statistics.labels.most_common) == want
    assert statistics.labels.num_labels == len(flat) and statistics.labels.num_classes == len(set(flat))
    assert statistics.labels.num_without == sum(not row for row in stored) == 3
    assert (statistics.num_shards, statistics.num_parts, statistics.num_rows) == (3, 0, 23)
    # A tar file ends with 1,024 zero bytes, and its last member is filled up to 512.
    tars = sum(path.stat().st_size for path in (tmp_path / "set/shards").glob("*.tar"))
    assert 0 <= tars - statistics.shard_bytes < 3 * (1024 + 512 + 1)
    assert statistics.basis == "From the index, all rows."


def test_statistics_of_documents_equal_counting(tmp_path: Path) -> None:
    pages = [[(30 + i, 40 + j) for j in range(1 + i % 4)] for i in range(17)]
    texts = ["" if i % 5 == 0 else "word " * i for i in range(17)]
    shards = write_documents(
        tmp_path / "set",
        [
            (Document(text, turns=(Turn("ocr", ""),) * (len(text) % 3)), sizes)
            for text, sizes in zip(texts, pages, strict=True)
        ],
    )
    found, statistics = distributions(shards), measure_shard_set(shards)
    assert_counts(found["pages of a sample"], [len(sizes) for sizes in pages])
    assert_counts(found["width of a page, pixels"], [width for sizes in pages for _, width in sizes])
    assert_counts(
        found["patches of a sample"], [sum(ceil(h / PATCH) * ceil(w / PATCH) for h, w in sizes) for sizes in pages]
    )
    assert_counts(found["characters of text"], [len(text) for text in texts])
    assert_counts(found["turns and captions"], [len(text) % 3 for text in texts])
    assert statistics.num_without_text == 4 and statistics.labels is None
    assert (statistics.num_pages, statistics.num_page_rows) == (sum(map(len, pages)),) * 2


def test_of_many_rows_some_are_looked_at_evenly_and_this_is_said(tmp_path: Path) -> None:
    shards = ShardSet.open(write_id_shard_set(tmp_path / "set", "image", 50))
    statistics = measure_shard_set(shards, max_rows=9)
    assert (statistics.num_rows, statistics.num_runs) == (9, 3)
    assert statistics.basis.startswith(
        "From 9 of the 50 rows of the index, in 3 runs of neighbours evenly over the set"
    )
    rows = [0, 1, 2, 23, 24, 25, 47, 48, 49]
    assert statistics.labels is not None and statistics.labels.num_labels == 9
    assert [label for label, _ in statistics.labels.most_common] == rows
    assert_counts(distributions(shards, max_rows=9)["width, pixels"], shards.width[rows].tolist())


@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 100, 400_000_000])
@pytest.mark.parametrize("most", [1, 9, 1 << 20])
def test_runs_are_even_and_without_overlap(count: int, most: int) -> None:
    runs = even_runs(count, most)
    assert sum(map(len, runs)) == count if count <= most else most - most**0.5 < sum(map(len, runs)) <= most
    assert runs[0].start == 0 and runs[-1].stop <= count and (most == 1 or runs[-1].stop == count)
    gaps = [after.start - before.stop for before, after in pairwise(runs)]
    assert all(gap >= 0 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 40), min_size=1, max_size=60))
def test_every_whole_number_is_in_one_bar(values: list[int]) -> None:
    one = Distribution.of("numbers", np.array(values, np.int32))
    assert one is not None and len(one.bars) <= 25
    assert_counts(one, values)
    Page(draw_histogram(one))


def test_numbers_that_are_none_are_left_out() -> None:
    assert Distribution.of("numbers", np.array([np.nan, np.inf])) is None
    one = Distribution.of("numbers", np.array([np.nan, 1.0, 2.5, -np.inf]))
    assert one is not None and (one.minimum, one.maximum, sum(bar.count for bar in one.bars)) == (1, 2.5, 2)
    huge = Distribution.of("numbers", np.array([-1.7e308, 1.7e308, 3.0]))
    assert huge is not None and huge.maximum == 1.7e308


# --- rows


def test_rows_are_drawn_evenly_and_again_the_same() -> None:
    for count, samples in ((1, 24), (10, 24), (24, 24), (25, 24), (37, 24), (400_000_000, 1000)):
        rows = draw_rows(count, samples, 5)
        assert rows == draw_rows(count, samples, 5)
        pieces = min(count, samples)
        assert [row * pieces // count for row in rows] == pytest.approx(list(range(pieces)), abs=1)
        assert all(i * count // pieces <= row < (i + 1) * count // pieces for i, row in enumerate(rows))
    assert draw_rows(1000, 10, 5) != draw_rows(1000, 10, 6)
    assert draw_rows(10, 0, 0) == []


def test_rows_are_found_by_their_keys(tmp_path: Path) -> None:
    shards = ShardSet.open(write_id_shard_set(tmp_path / "set", "image", 20))
    assert find_rows(shards, ["image17", "image1", "image17"]) == [17, 1]


# --- pages


def test_pictures_have_their_labels_as_words(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with ShardWriter(folder, kind="ocr", num_classes=30, label_width=25) as writer:
        writer.add("many", {"jpg": white(28, 900)}, np.arange(25, dtype=np.int32))
        writer.add("none", {"jpg": white(28, 42)}, np.full(25, -1, np.int32))
    words = [f"word{i}" for i in range(30)]
    words[3] = HOSTILE
    words[4] = "half \ud800"
    page, html = page_of(ShardSet.open(folder), tmp_path / "page.html", words=words)
    chips = page.inside("ul.labels")
    assert chips[:5] == ["word0", "word1", "word2", visible(HOSTILE, 60), "half [U+D800]"]
    assert len(chips) == 21 and chips[-1] == "5 more labels"
    assert page.inside("p.labels quiet") == ["no labels"]
    large, small = (pixels(image).shape for image in page.all("img"))
    assert large == (20, 640, 3) and small == (28, 42, 3), "large pictures are scaled down"
    assert "row 0 · 900 × 28 pixels · 130 patches · " in page.inside("p.facts")
    assert "1 of 2 samples (50.0%) have no label." in html


def test_clips_show_which_patches_the_codec_selected(tmp_path: Path) -> None:
    shards = ShardSet.open(write_id_shard_set(tmp_path / "set", "video", 3))
    page, _ = page_of(shards, tmp_path / "page.html", rows=[2])
    # Of the 6 patches of a frame every second is selected, 12 of all: so the first 4 frames have 3 each.
    captions = page.inside("figcaption.")
    assert [text for text in captions if text.startswith("frame ")] == [f"frame {i}: 3 of 6" for i in range(4)]
    _, rows, columns = GRID
    for frame, image in enumerate(page.all("img")):
        picture = pixels(image).astype(int)
        assert picture.shape == (rows * PATCH, columns * PATCH, 3)
        for place in range(rows * columns):
            y, x = (place // columns * PATCH + PATCH // 2), (place % columns * PATCH + PATCH // 2)
            green = 253 if place % 2 == 0 else int(253 * 0.18 + 96 * 0.82)
            assert abs(picture[y, x, 1] - green) < 12, (frame, place)


def test_documents_show_boxes_lit_patches_text_and_turns(tmp_path: Path) -> None:
    text = "first שלום " + HOSTILE.replace("\x00", "")
    document = Document(
        text,
        turns=(Turn("ocr", "Read <b>it</b>."), Turn("qa", "", "A & B")),
        captions=("A <i>page</i>",),
        lines=box((0, 0, 0, 70, 56, 0, 3)),  # words are there too, so lines are not shown
        words=box((0, 15, 1, 29, 13, 0, 5), (1, 182, 14.5, 196, 20.5, 12, len(text))),
    )
    shards = write_documents(tmp_path / "set", [(document, [(56, 70), (40, 200)])])
    page, _ = page_of(shards, tmp_path / "page.html")
    passages = page.inside("div.passage")
    assert passages == [visible(text), "Read <b>it</b>.", "A & B", "A <i>page</i>"]
    assert page.inside("bdi.")[-2:] == ["ocr", "qa"] and page.inside("p.quiet")[-1] == "the text"
    overlays = [attributes for tag, attributes in page.elements if tag == "svg" and "preserveaspectratio" in attributes]
    assert [overlay["viewbox"] for overlay in overlays] == ["0 0 70 56", "0 0 200 40"]
    boxes = [{k: v for k, v in a.items() if k != "class"} for a in page.all("rect") if "class" not in a]
    assert boxes == [
        {"x": "15.0", "y": "1.0", "width": "14.0", "height": "12.0"},
        {"x": "182.0", "y": "14.5", "width": "14.0", "height": "6.0"},
    ]
    titles = [t for path, t in page.texts if path[-1:] == ("title.",) and "div.page" in path]
    assert titles == ["first", visible(text[12:], 100)]
    # The second page has 2.86 x 14.29 patches of 14 pixels; the last ones are cut, and none is stretched.
    for image, lit in zip(page.all("img"), ({(0, 1), (0, 2)}, {(1, 13)}), strict=True):
        picture = pixels(image)
        for y in range(5, picture.shape[0], PATCH):
            for x in range(5, picture.shape[1], PATCH):
                shade = picture[y, x, 0]
                assert (shade > 240) == ((y // PATCH, x // PATCH) in lit), (y, x)
                assert shade > 195, "dimmed lightly"


def test_what_is_too_much_is_counted(tmp_path: Path) -> None:
    document = Document(
        "x" * 5000,
        turns=(Turn("qa", "why?", "so"),) * 23,
        captions=("c",) * 22,
        characters=box(*[(0, 1, 1, 5, 5, i, i + 1) for i in range(2100)]),
    )
    shards = write_documents(tmp_path / "set", [(document, [(20, 20)] * 11)])
    page, html = page_of(shards, tmp_path / "page.html")
    assert "x" * 4000 + " … (1,000 more characters)" in page.inside("div.passage")
    for more in ("3 more turns", "2 more captions", "3 more pages"):
        assert more in page.inside("p.quiet")
    assert "page 1, 2,100 characters, the first 2,000 are drawn" in page.inside("figcaption.")
    assert len([a for a in page.all("rect") if "class" not in a]) == 2000 and len(page.all("img")) == 8
    assert "11 pages" in html


def test_a_hostile_set_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a<b>&'").mkdir()
    shards = write_documents(tmp_path / "a<b>&'/set", [(Document(HOSTILE), [(20, 20)])])
    keys = tmp_path / "a<b>&'/set/index/keys.npy"
    np.save(keys, np.array([b"<script>\x1b\xff"]))
    shards = ShardSet.open(shards.directory, looks_at_shards=False)
    page, _ = page_of(shards, tmp_path / "page.html", problems=[f"<b>bad</b> {HOSTILE}"])
    assert page.inside("div.passage") == [SHOWN]
    assert page.inside("h3.")[-1] == "<script>[U+001B]�"
    assert page.inside("p.problem") == [f"<b>bad</b> {SHOWN}"]
    assert any("a<b>&'/set" in text for text in page.inside("header."))


def damage(shards: ShardSet, row: int, member: str, content: bytes) -> None:
    offset, size = shards.index.place(row, member)
    with shards.shard_path(row).open("r+b") as file:
        file.seek(offset)
        file.write(content.ljust(size)[:size])


def test_a_sample_that_cannot_be_read_is_a_sentence_and_ends_nothing(tmp_path: Path) -> None:
    shards = write_documents(tmp_path / "set", [(Document(f"text {i}"), [(20, 20)] * 2) for i in range(4)])
    damage(shards, 1, "json", b'{"text": 3}')
    damage(shards, 2, "page0001.jpg", b"<script>")
    page, _ = page_of(shards, tmp_path / "page.html")
    sentences = page.inside("p.problem")
    assert len(sentences) == 2
    assert "sample 'doc-1'" in sentences[0] and "which is no text" in sentences[0]
    assert sentences[1].startswith("page0001.jpg of sample 'doc-2'") and "cannot be decoded" in sentences[1]
    assert len(page.all("img")) == 7, "the pages that are whole are shown"
    assert page.inside("div.passage") == ["text 0", "text 2", "text 3"]

    clips = ShardSet.open(write_id_shard_set(tmp_path / "clips", "video", 2))
    damage(clips, 0, "positions.npy", b"no array")
    damage(clips, 1, "frame00.jpg", b"")
    page, _ = page_of(clips, tmp_path / "clips.html")
    assert ["cannot be read" in one or "cannot be decoded" in one for one in page.inside("p.problem")] == [True, True]

    images = ShardSet.open(write_id_shard_set(tmp_path / "images", "image", 3))
    images.columns["width"][1] += 1
    assert "has 73 x 39 pixels, but the index says 74 x 39" in draw_sample(images, 1, None)
    images.shard_path(0).unlink()
    images.close()
    assert "cannot be read (No such file or directory); check the disk" in draw_sample(images, 0, None)


# --- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, re.sub(r"\s+", " ", captured.out), captured.err


@pytest.mark.parametrize("kind", ["image", "ocr", "video", "document"])
def test_the_command_writes_a_page_of_any_kind(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 1 if kind == "document" else 30
    if kind == "document":
        write_documents(tmp_path / "set", [(Document("only one"), [(20, 20)])])
    else:
        write_id_shard_set(tmp_path / "set", kind, count)  # type: ignore[arg-type]
        words = tuple(f"w{i}" for i in range(NUM_CLASSES))
        Vocabulary(words, (1,) * NUM_CLASSES, {}).save(tmp_path / "set/vocabulary.json")
    output = tmp_path / "new/page.html"
    status, printed, _ = run(capsys, tmp_path / "set", "--page", output, "--samples", 5, "--verify")
    assert status == 0 and str(output) in printed and f"samples │ {count} " in printed
    assert "patches of a" in printed and "From the index, all rows." in printed
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    assert is_self_contained(page, html) and len(page.all("article")) == min(5, count)
    assert "Every file was read and compared with the index: nothing is wrong." in html
    assert kind == "document" or ("w0 (1)" in printed and "w0" in page.inside("section.statistics"))
    first = output.read_bytes()
    assert run(capsys, tmp_path / "set", "--page", output, "--samples", 5, "--verify")[0] == 0
    assert output.read_bytes() == first


def test_keys_that_are_asked_for_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_id_shard_set(tmp_path / "set", "image", 30), tmp_path / "page.html"

    def shown(*options: object) -> list[str]:
        assert run(capsys, folder, "--page", output, *options)[0] == 0
        return [text for path, text in Page(output.read_text()).texts if path[-2:] == ("h3.", "bdi.")]

    assert shown("--key", "image7", "image3") == ["image7", "image3"]
    assert shown("--key", "image7", "--samples", "2", "--seed", "3")[0] == "image7"
    assert len(shown()) == 24 and shown("--seed", "1") != shown()
    status, _, error = run(capsys, folder, "--page", output, "--key", "image99")
    assert status == 2 and "has no sample with the key 'image99', so it cannot be shown; its first is 'image0'" in error


def test_a_joined_set_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        part = tmp_path / "set/parts" / part_name(number, 2)
        with ShardWriter(part, kind="document", samples_per_shard=2) as writer:
            for i in range(3):
                writer.add(f"d{number}-{i}", {"json": Document(f"t{number}{i}").encode(), "page0000.jpg": white(9, 9)})
    merge_parts(tmp_path / "set")
    status, printed, _ = run(capsys, tmp_path / "set", "--page", tmp_path / "page.html")
    assert status == 0 and re.search(r"shards │ 4, .* MiB, in 2 parts", printed)
    page = Page((tmp_path / "page.html").read_text())
    assert page.inside("div.passage") == ["t00", "t01", "t02", "t10", "t11", "t12"]
    assert f"parts/{part_name(1, 2)}/shards/000001.tar" in page.inside("p.facts")


def test_a_set_of_the_first_format_has_the_same_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_id_shard_set(tmp_path / "set", "video", 9), tmp_path / "page.html"
    assert run(capsys, folder, "--page", output)[0] == 0
    first = output.read_bytes()
    to_first_format(folder)
    assert run(capsys, folder, "--page", output)[0] == 0
    assert output.read_bytes() == first


def test_problems_are_on_the_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_id_shard_set(tmp_path / "set", "image", 4), tmp_path / "page.html"
    damage(ShardSet.open(folder), 2, "jpg", b"nothing")
    assert run(capsys, folder, "--page", output)[0] == 0
    status, printed, _ = run(capsys, folder, "--page", output, "--verify")
    (sentence, on_sample) = Page(output.read_text()).inside("p.problem")
    assert status == 2 and sentence in printed and "jpg of sample 'image2'" in sentence and "cannot be" in on_sample
    (folder / "vocabulary.json").write_text("{}")
    status, printed, _ = run(capsys, folder, "--page", output)
    assert status == 2 and "is not a vocabulary" in printed
    assert "is not a vocabulary" in Page(output.read_text()).inside("p.problem")[0]
    output.unlink()
    (folder / "index/rows.npy").unlink()
    status, printed, _ = run(capsys, folder, "--page", output)
    assert status == 2 and "rows.npy is missing or unreadable" in printed and not output.exists()
    assert f"{output} was not written, because the set cannot be opened" in printed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--samples", "3"], "--samples says what a page shows, and no page is asked for; add --page FILE.html"),
        (["--seed", "0"], "--seed says what a page shows, and no page"),
        (["--key", "image1"], "--key says what a page shows, and no page"),
        (["--page", "page.txt"], "--page page.txt does not end in .html, as a page does; give another name"),
        (["--page", "p.html", "--samples", "1001"], "ask for 1,001 samples, but a page that a browser can show has 0"),
        (["--page", "p.html", "--samples", "-1"], "ask for -1 samples, but a page that a browser can show has 0"),
        (["--page", "p.html", "--seed", "-1"], "--seed -1 is below 0; give a whole number from 0 on"),
    ],
)
def test_options_that_cannot_be_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    status, _, error = run(capsys, write_id_shard_set(tmp_path / "set", "image", 2), *options)
    assert status == 2 and text in error


def test_a_page_of_something_else_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, tmp_path, "--page", tmp_path / "page.html")
    assert status == 2 and "is no shard set (it holds no dataset.json); leave it out" in error
    assert not (tmp_path / "page.html").exists()
