"""PDFs of all sorts that a folder may hold: strange ones, broken ones, and what only is called so."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from tests.support.pdf_files import Page, codes_at, pdf_bytes, text_at

_WORDS = ("quick", "brown", "foxes", "jump", "over", "lazy", "dogs", "while", "wizards", "read", "every", "page")
_HEBREW = dict(zip("abcdefghij", "\u05d0\u05d1\u05d2\u05d3\u05d4 \u05d5\u05d6\u05d7\u05d8", strict=True))
_BOXES = [(0, 0, 300, 200), (0, 0, 14400, 14400), (-500, -500, 500, 500), (0, 0, 3, 3), (0, 0, 0, 0), (0, 0, 14400, 1)]
_FONTS = [
    "<</Type/Font/Subtype/Type1/BaseFont/Nowhere>>",
    "<</Type/Font/Subtype/TrueType/BaseFont/Nowhere/FirstChar 0/LastChar 1/Widths[0 0]>>",
    "<</Type/Font/Subtype/Type3/FontBBox[0 0 0 0]/FontMatrix[0 0 0 0 0 0]/CharProcs<<>>/Encoding<<>>>>",
    "<</Type/Font/Subtype/Type0/BaseFont/Foo/Encoding/Identity-V/DescendantFonts[<</Type/Font/Subtype/CIDFontType2"
    "/BaseFont/Foo/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)/Supplement 0>>>>]>>",
    "<</Type/Font/Subtype/Type0/BaseFont/Foo/Encoding/UniJIS-UTF16-V/DescendantFonts[<</Type/Font/Subtype/CIDFontType0"
    "/BaseFont/Foo/CIDSystemInfo<</Registry(Adobe)/Ordering(Japan1)/Supplement 6>>>>]>>",
    "<</Type/Font>>",
    "null",
    "[1 2 3]",
]


def write_odd_pdfs(folder: Path, count: int) -> list[str]:
    """Writes `count` files, always the same ones, and returns their names; each name is one whatever its suffix."""
    folder.mkdir(parents=True)
    names = []
    for number, (make, chance) in enumerate(_kinds(count)):
        name = f"{make.__name__.strip('_').replace('_', '')}{number}.pdf"
        (folder / name).write_bytes(make(chance))
        names.append(name)
    return names


def _kinds(count: int) -> list[tuple[Callable[[random.Random], bytes], random.Random]]:
    kinds = cycle(_MAKERS)
    return [(next(kinds), random.Random(number)) for number in range(count)]


def _lines(chance: random.Random, *, box: tuple[float, ...] = (0, 0, 300, 200)) -> str:
    left, bottom, right, top = box
    size = max(right - left, top - bottom) / 20
    return "".join(
        text_at(left + size, top - (i + 2) * size, " ".join(chance.sample(_WORDS, 4)), size=size) for i in range(6)
    )


def _plain_bytes(chance: random.Random, **options: object) -> bytes:
    pages = [Page(_lines(chance)) for _ in range(chance.randint(1, 3))]
    return pdf_bytes(pages, **options)  # type: ignore[arg-type]


def _plain(chance: random.Random) -> bytes:
    return _plain_bytes(chance, compress=chance.random() < 0.5)


def _encrypted(chance: random.Random) -> bytes:
    return _plain_bytes(chance, user_password=chance.choice(["", "secret"]))


def _without_text(chance: random.Random) -> bytes:
    strokes = "".join(f"{chance.randint(0, 290)} {chance.randint(0, 190)} 8 6 re f\n" for _ in range(60))
    return pdf_bytes([Page(chance.choice([strokes, ""]))])


def _turned(chance: random.Random) -> bytes:
    entries = {
        "Rotate": str(chance.choice([90, 180, 270, -90, 450, 45, 100000000000])),
        "CropBox": chance.choice(["[10 10 290 190]", "[-5 -5 1 1]", "[500 500 600 600]", "[200 100 0 0]", "(box)"]),
        "UserUnit": chance.choice(["1", "2.5", "0", "-1", "/No"]),
    }
    return pdf_bytes([Page(_lines(chance), (0, 0, 300, 200), entries)])


def _sized(chance: random.Random) -> bytes:
    box = chance.choice(_BOXES)
    return pdf_bytes([Page(_lines(chance, box=box), box)])


def _right_to_left(chance: random.Random) -> bytes:
    return pdf_bytes([Page("".join(codes_at(20, 20 + 30 * i, "abcdefghij") for i in range(3)))], meanings=_HEBREW)


def _strange_meanings(chance: random.Random) -> bytes:
    strange = ["\U0001f600", "\ufffd", "\ue000", "\x00", "ffi", "\u202e", "\ufeff", "e\u0301", "\x7f", "\uffff"]
    meanings = {code: chance.choice(strange) for code in "abcdefghij"}
    return pdf_bytes([Page(_lines(chance) + codes_at(20, 10, "abcdefghij"))], meanings=meanings)


def _broken_xref(chance: random.Random) -> bytes:
    data = _plain_bytes(chance)
    start = data.index(b"xref\n")
    return data[:start] + bytes(chance.randrange(48, 58) if 48 <= byte < 58 else byte for byte in data[start:])


def _truncated(chance: random.Random) -> bytes:
    data = _plain_bytes(chance, compress=chance.random() < 0.5)
    return data[: chance.randrange(len(data))]


def _flipped(chance: random.Random) -> bytes:
    data = bytearray(_plain_bytes(chance, compress=chance.random() < 0.3))
    for _ in range(chance.choice([1, 10, 100])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _no_pdf(chance: random.Random) -> bytes:
    jpeg, text = b"\xff\xd8\xff\xe0\x00\x10JFIF", b"just text\n" * 20
    return chance.choice([b"", jpeg, text, b"%PDF-1.7\n", b"%PDF-1.7\n%%EOF", chance.randbytes(5000), bytes(1000)])


def _deep_tree(chance: random.Random) -> bytes:
    return _plain_bytes(chance, tree_depth=chance.choice([2, 30, 500, 3000]))


def _forms(chance: random.Random) -> bytes:
    inside = chance.choice([_lines(chance), "/X1 Do\n" * 3, _lines(chance) + "/X1 Do", "q " * 5000])
    return pdf_bytes([Page("/X1 Do\n" * chance.randint(1, 3))], form=inside)


def _broken_fonts(chance: random.Random) -> bytes:
    return pdf_bytes([Page(_lines(chance))], objects={"F1": chance.choice(_FONTS)})


def _broken_content(chance: random.Random) -> bytes:
    content = [
        _lines(chance).replace("ET", ""),
        "BT /F1 1e30 Tf (huge) Tj ET " + _lines(chance),
        "BT /F1 -20 Tf 1 0 0 1 200 100 Tm (mirrored) Tj ET",
        "BT /F1 0 Tf 20 20 Td (nothing) Tj ET " + _lines(chance),
        "0 0 0 0 0 0 cm " + _lines(chance),
        "99999999999999999999 0 0 1 nan inf cm " + _lines(chance),
        "[" * 2000 + _lines(chance),
        "BT /F1 20 Tf 0 0 Td (" + "x" * 20000 + ") Tj ET",
        "".join(chr(chance.randrange(256)) for _ in range(3000)),
    ]
    return pdf_bytes([Page(chance.choice(content))])


def _loops(chance: random.Random) -> bytes:
    data = _plain_bytes(chance)
    return chance.choice(
        [
            data.replace(b"/Kids[", b"/Kids[2 0 R "),
            data.replace(b"/Contents", b"/Contents 1 0 R/Old"),
            data.replace(b"/Count 1", b"/Count 2000000000").replace(b"/Count 2", b"/Count 20000"),
            data.replace(b"/Count", b"/Count -"),
            data.replace(b"/Pages 2 0 R", b"/Pages 1 0 R"),
            data.replace(b"/Length ", b"/Length 9"),
            data.replace(b"/Parent 2 0 R", b"/Parent 99 0 R"),
        ]
    )


_MAKERS: tuple[Callable[[random.Random], bytes], ...] = (
    *(_plain, _encrypted, _without_text, _turned, _sized, _right_to_left, _strange_meanings, _broken_xref),
    *(_truncated, _flipped, _no_pdf, _deep_tree, _forms, _broken_fonts, _broken_content, _loops),
)
