"""Pages of PDFs: boxes lie on the ink, whatever the page does to its coordinates, and offsets fit the text."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents import pdf_process
from megatron_ove.preprocess.documents.pdf_pages import PageText, PdfFile, PdfPage
from megatron_ove.preprocess.documents.pdf_process import PageCounter, PagePlace, PageReader
from megatron_ove.preprocess.input_files import InputFile
from tests.support.pdf_files import Page, codes_at, pdf_bytes, text_at

SIDE = 600
INK = 128


def pages_of(folder: Path, content: bytes, side: int = SIDE) -> list[PdfPage]:
    path = folder / "a.pdf"
    path.write_bytes(content)
    with PdfFile(path) as file:
        return [file.read(number, side) for number in range(len(file))]


def text_of(page: PdfPage) -> PageText:
    assert page.text is not None, page.problem
    check_offsets(page)
    return page.text


def check_offsets(page: PdfPage) -> None:
    """Asserts that pieces are what they are called and that boxes are on the page."""
    assert page.text is not None
    text, (height, width) = page.text.text, page.picture.shape[:2]
    for unit in (page.text.words, page.text.lines, page.text.characters):
        left, top, right, bottom, start, stop = unit.T
        assert (
            (left >= 0) & (left < right) & (right <= width) & (top >= 0) & (top < bottom) & (bottom <= height)
        ).all()
        assert ((start >= 0) & (start < stop) & (stop <= len(text))).all()
    pieces = {name: pieces_of(text, getattr(page.text, name)) for name in ("words", "lines", "characters")}
    assert pieces["words"] == text.split()
    assert pieces["lines"] == (text.split("\n") if text else [])
    assert all(piece and not re.search(r"\s", piece) for piece in pieces["characters"])


def pieces_of(text: str, rows: np.ndarray) -> list[str]:
    return [text[int(start) : int(stop)] for start, stop in rows[:, 4:]]


def ink_of(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) around what is dark."""
    rows, columns = np.nonzero(picture.mean(axis=2) < INK)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


PLACES = {
    "plain": ((0, 0, 300, 200), {}),
    "origin elsewhere": ((-50, 30, 250, 230), {}),
    "crop box": ((-100, -100, 500, 400), {"CropBox": "[15 25 290 195]"}),
    "crop box that leaves the media box": ((0, 0, 300, 200), {"CropBox": "[-90 20 280 999]"}),
    "user unit": ((0, 0, 300, 200), {"UserUnit": "2.5"}),
    "all of it": ((-100, -100, 500, 400), {"CropBox": "[15 25 290 195]", "UserUnit": "3"}),
}


@pytest.mark.parametrize("turn", [0, 90, 180, 270, -90])
@pytest.mark.parametrize("place", PLACES)
def test_the_box_of_each_character_is_where_its_ink_is(tmp_path: Path, place: str, turn: int) -> None:
    box, entries = PLACES[place]
    words = [(30, 150, "Hxg"), (120, 90, "@Qj"), (40, 40, "W8%")]
    everything = "".join(text_at(x, y, text, size=30) for x, y, text in words)
    all_entries = {**entries, "Rotate": str(turn)}
    together = text_of(pages_of(tmp_path, pdf_bytes([Page(everything, box, all_entries)]))[0])
    assert sorted(together.text.split()) == ["@Qj", "Hxg", "W8%"]
    alone = []  # each character on a page of its own: the ink there is all its own
    for x, y, text in words:
        for place_in_word in range(len(text)):
            hidden = "3 Tr", "0 Tr"  # drawn without ink, so that the character stands where it stood
            shown = "".join(f"{hidden[i == place_in_word]} ({one}) Tj " for i, one in enumerate(text))
            alone.append(f"BT /F1 30 Tf 1 0 0 1 {x} {y} Tm {shown} ET")
    pages = pages_of(tmp_path, pdf_bytes([Page(content, box, all_entries) for content in alone]))
    found = dict(zip(pieces_of(together.text, together.characters), together.characters[:, :4], strict=True))
    assert len(found) == 9
    for character, page in zip("".join(text for _, _, text in words), pages, strict=True):
        assert np.abs(found[character] - ink_of(page.picture)).max() <= 2, character


def test_words_and_lines_are_around_their_characters(tmp_path: Path) -> None:
    content = text_at(20, 150, "Two  words,") + text_at(20, 120, "one line") + text_at(20, 60, "end.")
    page = pages_of(tmp_path, pdf_bytes([Page(content)]))[0]
    text = text_of(page)
    assert text.text == "Two words,\none line\nend."
    assert page.picture.shape == (400, 600, 3) and page.left_out == {}
    assert pieces_of(text.text, text.characters) == [c for c in text.text if not c.isspace()]
    for unit in (text.words, text.lines):
        for left, top, right, bottom, start, stop in unit:
            inside = text.characters[(text.characters[:, 4] >= start) & (text.characters[:, 5] <= stop)]
            assert inside[:, :2].min(axis=0).tolist() == [left, top]
            assert inside[:, 2:4].max(axis=0).tolist() == [right, bottom]
    left, top, right, bottom = ink_of(page.picture)
    whole = [*text.lines[:, :2].min(axis=0), *text.lines[:, 2:4].max(axis=0)]
    assert np.abs(np.array(whole) - [left, top, right, bottom]).max() <= 2


def test_a_hyphen_at_the_end_of_a_line_stays_there(tmp_path: Path) -> None:
    content = text_at(20, 150, "an exam-") + text_at(20, 120, "ple of so\xad") + text_at(20, 90, "on, A-B")
    text = text_of(pages_of(tmp_path, pdf_bytes([Page(content)]))[0])
    assert text.text == "an exam-\nple of so-\non, A-B"
    assert pieces_of(text.text, text.characters).count("-") == 3


@pytest.mark.parametrize(
    ("meaning", "text", "pieces"),
    [
        ("\U0001f600", "a\U0001f600b", ["a", "\U0001f600", "b"]),  # PDFium counts two
        ("\U00020000\U00020001", "a\U00020000\U00020001b", ["a", "\U00020000\U00020001", "b"]),
        ("ffi", "affib", ["a", "ffi", "b"]),
        ("\ufb01", "afib", ["a", "fi", "b"]),
        ("e\u0301", "ae\u0301b", ["a", "e\u0301", "b"]),
        ("\u00ad", "a-b", ["a", "-", "b"]),
        ("\u200d", "a\u200db", ["a", "\u200d", "b"]),
        ("\ufeff", "ab", ["a", "b"]),
        ("\u00a0", "a b", ["a", "b"]),
    ],
)
def test_what_a_glyph_means_is_one_box(tmp_path: Path, meaning: str, text: str, pieces: list[str]) -> None:
    page = pages_of(tmp_path, pdf_bytes([Page(codes_at(20, 50, "axb"))], meanings={"x": meaning, "a": "a", "b": "b"}))[
        0
    ]
    found = text_of(page)
    assert found.text == text and page.left_out == {}
    assert pieces_of(found.text, found.characters) == pieces


@pytest.mark.parametrize("meaning", ["\ufffd", "\ue123", "\x07", "\U000f0000"])
def test_characters_that_mean_nothing_are_left_out(tmp_path: Path, meaning: str) -> None:
    letters = {letter: letter for letter in "abcdefgh"}
    some, many = codes_at(20, 50, "abcxdefgh"), codes_at(20, 50, "abcxxxd")
    pages = pages_of(tmp_path, pdf_bytes([Page(some), Page(many)], meanings={"x": meaning, **letters}))
    assert text_of(pages[0]).text == "abcdefgh" and pages[0].left_out == {"without a known meaning": 1}
    assert pages[1].text is None
    assert pages[1].problem == "has a text layer of which 3 of 7 characters have no known meaning"


def test_text_from_right_to_left_is_in_the_order_in_which_it_is_read(tmp_path: Path) -> None:
    meanings = dict(zip("abcdefg", "\u05d0\u05d1\u05d2 \u05d3\u05d4\u05d5", strict=True))
    page = pages_of(tmp_path, pdf_bytes([Page(codes_at(20, 50, "abcdefg"))], meanings=meanings))[0]
    text = text_of(page)
    assert text.text == "\u05d5\u05d4\u05d3 \u05d2\u05d1\u05d0"  # the right-most first
    assert (np.diff(text.characters[:, 0]) < 0).all()
    assert text.words[0, 0] > text.words[1, 2]


def test_text_that_stands_or_runs_downwards_keeps_its_boxes(tmp_path: Path) -> None:
    stacked = "".join(text_at(50, 170 - 25 * i, character) for i, character in enumerate("STACK"))
    turned = "BT /F1 20 Tf 0 -1 1 0 150 180 Tm (turned text) Tj ET\n"
    text = text_of(pages_of(tmp_path, pdf_bytes([Page(stacked + turned)]))[0])
    assert sorted(re.sub(r"\s", "", text.text)) == sorted("STACKturnedtext")
    boxes = dict(zip(pieces_of(text.text, text.characters), text.characters[:, :4], strict=False))
    assert boxes["S"][3] < boxes["T"][1] < boxes["A"][1] < boxes["K"][1]
    assert boxes["n"][3] < boxes["d"][1] and abs(boxes["n"][0] - boxes["d"][0]) < 20


def test_what_is_not_on_the_page_is_not_in_its_text(tmp_path: Path) -> None:
    content = text_at(20, 100, "Seen") + text_at(270, 50, "WWWWWW") + text_at(20, -40, "below")
    page = pages_of(tmp_path, pdf_bytes([Page(content)]))[0]
    text = text_of(page)
    assert text.text == "Seen\nWW"  # the second one is cut by the edge, at 300 points
    assert text.words[1, 2] == 600
    assert page.left_out == {"outside the page": 9}


def test_what_cannot_be_seen_is_not_in_the_text(tmp_path: Path) -> None:
    white = "1 1 1 rg " + text_at(20, 60, "white") + "0 0 0 rg "
    hidden = text_at(20, 30, "no ink", more="3 Tr") + "0 Tr "
    over_a_picture = "0.5 0.5 0.5 rg 150 20 30 30 re f 185 20 50 30 re f 0 0 0 rg " + text_at(
        150, 25, "layer", size=30, more="3 Tr"
    )
    content = text_at(20, 100, "Here is something that is seen, for one,", size=12) + white + hidden
    pages = pages_of(tmp_path, pdf_bytes([Page(content), Page(content + over_a_picture)]))
    assert text_of(pages[0]).text == "Here is something that is seen, for one,"
    assert pages[0].left_out == {"not to be seen": 10}
    assert text_of(pages[1]).text.endswith("layer")  # as OCR writes it under a scan
    only = pages_of(tmp_path, pdf_bytes([Page(white + hidden + "0 0 10 10 re f")]))[0]
    assert (only.text, only.problem) == (None, "has a text layer of 10 characters of which none can be seen")


def test_pages_without_a_text_layer_say_so(tmp_path: Path) -> None:
    scan = "".join(f"{10 + 12 * i} {20 + 15 * j} 8 10 re f\n" for i in range(22) for j in range(10))
    stamped, number = scan + text_at(250, 5, "p. 7", size=8), text_at(250, 5, "7", size=8)
    pages = pages_of(tmp_path, pdf_bytes([Page(scan), Page(stamped), Page(number)]))
    assert [page.problem for page in pages] == [
        "has no text layer",
        "has a text layer of only 3 characters beside much more that is drawn",
        "",
    ]
    assert [page.text is None for page in pages] == [True, True, False]
    assert text_of(pages[2]).text == "7"


@pytest.mark.parametrize("content", ["", "1 1 1 rg " + text_at(20, 60, "white"), "0.8 g 0 0 300 200 re f"])
def test_a_blank_page_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"^page 1 of .*a\.pdf is blank: nothing that can be seen is drawn on it"):
        pages_of(tmp_path, pdf_bytes([Page(content)]))


@pytest.mark.parametrize(
    ("box", "entries", "shape"),
    [
        ((0, 0, 14400, 14400), {}, (600, 600, 3)),
        ((0, 0, 14400, 7200), {"UserUnit": "10"}, (300, 600, 3)),
        ((0, 0, 1_000_000, 500_000), {}, (300, 600, 3)),
        ((0, 0, 14400, 4), {}, (1, 600, 3)),
        ((0, 0, 2, 4), {}, (600, 300, 3)),
    ],
)
def test_pages_of_any_size_fit_the_picture(tmp_path: Path, box: Any, entries: dict[str, str], shape: Any) -> None:
    size = min(box[2], box[3]) / 2
    content = text_at(0, size / 4, "Big", size=size) + f"0 0 {size} {size / 8} re f"
    page = pages_of(tmp_path, pdf_bytes([Page(content, box, entries)]))[0]
    assert page.picture.shape == shape
    if page.text is not None:
        check_offsets(page)
    assert (page.text is not None and page.text.text == "Big") or shape[0] == 1


WORD = pdf_bytes([Page(text_at(20, 100, "Word"))])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"a\.pdf is empty \(0 bytes\), so it is not a PDF"),
        (b"not a PDF at all", r"a\.pdf is no PDF, or a truncated or damaged one"),
        (WORD[:150], r"a\.pdf is no PDF, or a truncated or damaged one"),
        (pdf_bytes([]), r"a\.pdf is a PDF without pages|a\.pdf is no PDF, or a truncated or damaged one"),
        (WORD.replace(b"/Count 1", b"/Count 600000"), r"a\.pdf says that it has 600000 pages, more than its \d+ bytes"),
        (pdf_bytes([Page(text_at(20, 100, "Word"))], user_password="secret"), r"is encrypted and needs a password"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pages_of(tmp_path, content)
    with pytest.raises(DataError, match=r"absent\.pdf cannot be read \(No such file or directory\)"):
        PdfFile(tmp_path / "absent.pdf")


def test_files_that_can_be_opened_all_the_same(tmp_path: Path) -> None:
    page = Page(text_at(20, 100, "Word"))
    xref = WORD.index(b"xref")
    contents = {
        "without asking for a password": pdf_bytes([page], user_password=""),
        "compressed": pdf_bytes([page], compress=True),
        "deep tree": pdf_bytes([page], tree_depth=40),
        "without xref": WORD[:xref] + b"trailer <</Root 1 0 R>>",
        "wrong xref": WORD[:xref] + WORD[xref:].replace(b"00000 n", b"00001 n").replace(b"000000", b"000123"),
        "text in a form": pdf_bytes([Page("/X1 Do")], form=text_at(20, 100, "Word")),
    }
    plain = text_of(pages_of(tmp_path, WORD)[0])
    assert plain.text == "Word"
    for name, content in contents.items():
        found = text_of(pages_of(tmp_path, content)[0])
        assert found.text == "Word", name
        assert np.array_equal(found.characters, plain.characters), name


def place_of(folder: Path, content: bytes, page: int) -> PagePlace:
    (folder / "a.pdf").write_bytes(content)
    return PagePlace(InputFile(folder / "a.pdf", "a.pdf", "a"), page)


def crash_on_page_2(connection: Any) -> None:
    answer = pdf_process._answer

    def hostile(files: Any, path: Path, page: int | None, *settings: int) -> Any:
        if page == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return answer(files, path, page, *settings)

    pdf_process._answer = hostile
    pdf_process._serve(connection)


def work_for_ever(connection: Any) -> None:
    pdf_process.PAGE_CPU_S = 0.2
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def busy(*request: Any) -> Any:
        while True:
            pass

    pdf_process._answer = busy
    pdf_process._serve(connection)


def want_too_much(connection: Any) -> None:
    class Greedy(pdf_process.PdfFile):
        def read(self, number: int, longest_side: int) -> PdfPage:
            bytearray(pdf_process.MEMORY_BYTES)
            raise AssertionError

    pdf_process.PdfFile = Greedy  # type: ignore[misc]
    pdf_process._serve(connection)


def test_a_page_that_ends_the_process_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_process, "_serve", crash_on_page_2)
    content = pdf_bytes([Page(text_at(20, 100, f"Word{i}")) for i in range(3)])
    reader = PageReader(longest_side=100, quality=90)
    texts = []
    for number in (0, 1, 2):
        try:
            stored = reader(place_of(tmp_path, content, number))
            assert stored.text is not None
            texts.append(stored.text.text)
        except DataError as error:
            texts.append(str(error))
    assert (texts[0], texts[2]) == ("Word0", "Word2")
    assert re.match(r"page 2 of .*a\.pdf ended the process that reads PDFs \(SIGSEGV\), so it is damaged", texts[1])


def test_a_page_that_takes_for_ever_or_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(tmp_path, WORD, 0)
    monkeypatch.setattr(pdf_process, "_serve", work_for_ever)
    with pytest.raises(DataError, match=r"^page 1 of .*a\.pdf took more than 60 s of computing"):
        PageReader(longest_side=100, quality=90)(place)
    monkeypatch.setattr(pdf_process, "_serve", want_too_much)
    counter = PageCounter()
    assert counter(place.file) == 1
    with pytest.raises(DataError, match=r"^page 1 of .*a\.pdf needs more than 8 GiB of memory"):
        PageReader(longest_side=100, quality=90)(place)


def test_a_file_that_got_shorter_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"page 2 of .*a\.pdf is not there: the file has changed"):
        PageReader(longest_side=100, quality=90)(place_of(tmp_path, WORD, 1))
