"""Small PDF files, written byte by byte, so that what a page says and where it says it is known."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        content: its content stream; `/F1` is Helvetica, `/F2` a font of `unicode_font`, `/X1` a form of `form`.
        box: media box in points.
        entries: further entries of the page's dictionary, e.g. {"Rotate": "90", "CropBox": "[10 10 100 100]"}.
    """

    content: str = ""
    box: tuple[float, float, float, float] = (0, 0, 300, 200)
    entries: Mapping[str, str] = field(default_factory=dict)


def text_at(x: float, y: float, text: str, *, size: float = 20, font: str = "F1", more: str = "") -> str:
    """Returns the operators that write `text` with its base line beginning at (x, y), in points from below left."""
    escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT /{font} {size} Tf {more} 1 0 0 1 {x} {y} Tm ({escaped}) Tj ET\n"


def codes_at(x: float, y: float, codes: str, *, size: float = 20) -> str:
    """As `text_at` for the font of `unicode_font`: the letters select its glyphs."""
    return f"BT /F2 {size} Tf 1 0 0 1 {x} {y} Tm <{codes.encode('latin-1').hex()}> Tj ET\n"


def pdf_bytes(
    pages: Sequence[Page],
    *,
    meanings: Mapping[str, str] | None = None,
    form: str | None = None,
    objects: Mapping[str, str] | None = None,
    user_password: str | None = None,
    compress: bool = False,
    tree_depth: int = 1,
) -> bytes:
    """Returns a PDF.

    Args:
        pages: its pages.
        meanings: code -> text of the font F2, which draws Helvetica's glyphs and says they mean something else.
        form: content of the form XObject X1.
        objects: name -> dictionary of fonts that replace F1 or F2.
        user_password: encrypts the file (40-bit RC4); "" = it opens without asking.
        compress: whether content streams are compressed.
        tree_depth: levels of page-tree nodes above the pages.
    """
    body: list[bytes] = [b"", b""]  # the catalog and the root of the tree

    def add(content: bytes) -> int:
        body.append(content)
        return len(body)

    fonts = {"F1": "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>", **(objects or {})}
    if meanings is not None:
        cmap = add(_stream(_to_unicode(meanings).encode()))
        fonts["F2"] = f"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/ToUnicode {cmap} 0 R>>"
    resources = f"/Font<<{''.join(f'/{name} {value}' for name, value in fonts.items())}>>"
    if form is not None:
        number = add(_stream(form.encode(), f"/Type/XObject/Subtype/Form/BBox[0 0 9999 9999]/Resources<<{resources}>>"))
        resources += f"/XObject<</X1 {number} 0 R>>"
    parent = 2
    for _ in range(tree_depth - 1):
        parent = add(b"/Type/Pages/Parent %d 0 R" % parent)
    kids = []
    for page in pages:
        content = add(_stream(page.content.encode("latin-1"), compress=compress))
        box = " ".join(f"{value:.10g}" for value in page.box)
        entries = "".join(f"/{name} {value}" for name, value in page.entries.items())
        own = f"/Type/Page/Parent {parent} 0 R/MediaBox[{box}]/Contents {content} 0 R/Resources<<{resources}>>{entries}"
        kids.append(add(f"<<{own}>>".encode()))
    listed = " ".join(f"{kid} 0 R" for kid in kids)
    body[0] = b"<</Type/Catalog/Pages 2 0 R>>"
    count = f"/Count {len(pages)}"
    if tree_depth == 1:
        body[1] = f"<</Type/Pages/Kids[{listed}]{count}>>".encode()
    else:
        nodes = [2, *(i + 1 for i, one in enumerate(body) if one.startswith(b"/Type/Pages"))]
        body[1] = f"<</Type/Pages/Kids[{nodes[1]} 0 R]{count}>>".encode()
        for place, node in enumerate(nodes[1:], start=1):
            below = f"{nodes[place + 1]} 0 R" if place + 1 < len(nodes) else listed
            body[node - 1] = b"<<" + body[node - 1] + f"/Kids[{below}]{count}>>".encode()
    return _file(body, user_password)


def _stream(content: bytes, entries: str = "", *, compress: bool = False) -> bytes:
    if compress:
        content, entries = zlib.compress(content), entries + "/Filter/FlateDecode"
    return f"<<{entries}/Length {len(content)}>>\nstream\n".encode() + content + b"\nendstream"


def _to_unicode(meanings: Mapping[str, str]) -> str:
    lines = [f"<{ord(code):02x}> <{text.encode('utf-16-be').hex()}>" for code, text in meanings.items()]
    return (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /M def /CMapType 2 def\n"
        "1 begincodespacerange <00> <ff> endcodespacerange\n"
        f"{len(lines)} beginbfchar\n" + "\n".join(lines) + "\nendbfchar endcmap end end"
    )


def _file(body: Sequence[bytes], user_password: str | None) -> bytes:
    identity = hashlib.md5(b"identity").digest()
    key, encrypt = b"", ""
    if user_password is not None:
        key, encrypt = _encryption(user_password, identity)
    data, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(body, start=1):
        offsets.append(len(data))
        if key and b"stream\n" in content:
            head, _, tail = content.partition(b"stream\n")
            plain = tail.removesuffix(b"\nendstream")
            own = hashlib.md5(key + number.to_bytes(3, "little") + bytes(2)).digest()[:10]
            content = head + b"stream\n" + _rc4(own, plain) + b"\nendstream"
        data += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(body) + 1)
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    names = f"/ID[<{identity.hex()}><{identity.hex()}>]"
    data += f"trailer <</Size {len(body) + 1}/Root 1 0 R{names}{encrypt}>>\nstartxref\n{start}\n%%EOF\n".encode()
    return bytes(data)


def _encryption(user_password: str, identity: bytes) -> tuple[bytes, str]:
    """The standard handler, revision 2 (PDF 32000-1, 7.6.3); the owner's password is "owner"."""
    padded = (user_password.encode() + _PADDING)[:32]
    owner = _rc4(hashlib.md5((b"owner" + _PADDING)[:32]).digest()[:5], padded)
    key = hashlib.md5(padded + owner + (0xFFFFFFFC).to_bytes(4, "little") + identity).digest()[:5]
    user = _rc4(key, _PADDING)
    return key, f"/Encrypt<</Filter/Standard/V 1/R 2/O<{owner.hex()}>/U<{user.hex()}>/P -4>>"


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
