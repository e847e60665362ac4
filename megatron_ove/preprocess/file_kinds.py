"""What a file is: by its suffix where that is a known one, else by its first bytes; and why a form cannot be read.

The suffix alone would leave out what cameras, browsers and archives call by other names or by none; opening every file
would be slow. So a file with a known suffix is taken at its word (decoding tells the truth later), and only the others
are looked into, for `HEAD_BYTES` bytes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Literal

FileKind = Literal["picture", "video", "document"]

HEAD_BYTES = 600
"""Enough for three packets of an MPEG transport stream."""

PICTURE_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM"),
    *("PSD", "QOI", "SGI", "SUN", "ICO", "ICNS", "DDS", "XBM", "XPM"),
)
"""Pillow's names of what is read; JPEG includes MPO. Not among them: formats that start another program (EPS, WMF),
scientific ones of which Pillow knows the name only, and those that any file may look like (`WEAKLY_MARKED`)."""
WEAKLY_MARKED = {".tga": "TGA", ".icb": "TGA", ".vda": "TGA", ".vst": "TGA", ".pcx": "PCX"}
"""Suffix -> a format without a signature worth the name, tried for files of this suffix only."""


def _suffixes(*names: str) -> frozenset[str]:
    return frozenset(f".{name}" for group in names for name in group.split())


_RAW_SUFFIXES = _suffixes("dng nef nrw cr2 cr3 crw arw srf sr2 orf rw2 raf pef srw 3fr iiq erf kdc")
PICTURE_SUFFIXES = _RAW_SUFFIXES | _suffixes(
    "jpg jpeg jpe jfif jif mpo png apng gif bmp dib tif tiff webp avif avifs heic heif hif",
    "jp2 j2k j2c jpc jpf jpx ppm pgm pbm pnm pfm psd qoi sgi rgb rgba bw ras tga icb vda vst pcx",
    "ico icns dds xbm xpm pdf eps ps ai svg svgz jxl djvu djv wmf emf",
)
"""Files that a picture tool tries; what it cannot read of them is rejected with its reason."""
VIDEO_SUFFIXES = _suffixes(
    "mp4 m4v mov qt mkv webm avi divx mpg mpeg mpe m1v m2v mpv vob evo ts m2ts mts m2t ogv ogm wmv asf flv f4v",
    "3gp 3g2 mxf gxf dv nut y4m ivf rm rmvb wtv amv bik nsv gif mjpg mjpeg",
    "h261 h263 h264 264 avc h265 265 hevc vc1 obu av1",
)
"""Files that a clip tool tries."""
DOCUMENT_SUFFIXES = frozenset({".pdf"})
"""Files that a tool for documents tries."""

_FTYP_PICTURES = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_QUICKTIME_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_TS_PACKET, _M2TS_PACKET = 188, 192


def _starts(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(signatures)


def _is_heif_family(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _FTYP_PICTURES


def _is_riff(head: bytes, *forms: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] in forms


def _is_transport_stream(head: bytes) -> bool:
    """Whether the sync byte 0x47 comes back at the right distance, with or without time stamps before packets."""
    return any(
        len(head) > first + 2 * step and all(head[first + number * step] == 0x47 for number in range(3))
        for first, step in ((0, _TS_PACKET), (4, _M2TS_PACKET))
    )


_PICTURE_SIGNS: tuple[Callable[[bytes], bool], ...] = (
    _starts(
        b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"
    ),
    _starts(b"\x00\x00\x00\x0cjP  \r\n", b"\xff\x4f\xff\x51", b"8BPS", b"qoif", b"\x59\xa6\x6a\x95", b"icns", b"DDS "),
    _starts(b"/* XPM */", b"%!PS-Adobe", b"%PDF-", b"AT&TFORM", b"\xff\x0a", b"\x00\x00\x00\x0cJXL "),
    lambda head: head[:2] == b"BM" and head[6:10] == bytes(4) and len(head) >= 26,
    lambda head: re.match(rb"P[1-6fF][\s#]", head) is not None,
    lambda head: _is_riff(head, b"WEBP"),
    _is_heif_family,
)
_VIDEO_SIGNS: tuple[Callable[[bytes], bool], ...] = (
    _starts(b"\x1aE\xdf\xa3", b"OggS", b"FLV\x01", b"0&\xb2u\x8ef\xcf\x11", b"\x06\x0e+4", b"YUV4MPEG2 ", b"DKIF"),
    _starts(b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b".RMF", b"GIF87a", b"GIF89a"),
    lambda head: head[4:8] in _QUICKTIME_ATOMS and not _is_heif_family(head),
    lambda head: _is_riff(head, b"AVI "),
    _is_transport_stream,
)
_DOCUMENT_SIGNS: tuple[Callable[[bytes], bool], ...] = (
    lambda head: re.match(rb"(\xef\xbb\xbf)?\s*%PDF-", head) is not None,
)
_SIGNS: Mapping[FileKind, tuple[Callable[[bytes], bool], ...]] = {
    "picture": _PICTURE_SIGNS,
    "video": _VIDEO_SIGNS,
    "document": _DOCUMENT_SIGNS,
}
SUFFIXES: Mapping[FileKind, frozenset[str]] = {
    "picture": PICTURE_SUFFIXES,
    "video": VIDEO_SUFFIXES,
    "document": DOCUMENT_SUFFIXES,
}


def looks_like(head: bytes, kind: FileKind) -> bool:
    """Whether a file that begins with `head` (`HEAD_BYTES` bytes, or all of it) is of a form of this kind."""
    return any(sign(head) for sign in _SIGNS[kind])


def unreadable_form(head: bytes, suffix: str) -> str | None:
    """Returns why a picture of this form is not read and what to do, as the end of a sentence; None if it can be.

    Args:
        head: first bytes of the file.
        suffix: of its name, in lower case; camera raws look like TIFF files that hold a thumbnail.
    """
    if suffix in _RAW_SUFFIXES:
        return "is a camera's raw file, whose picture has yet to be developed; convert it to JPEG or TIFF first"
    if _is_heif_family(head) and head[8:12] not in (b"avif", b"avis") and not _reads_heif():
        return "is a HEIC picture, which needs the package pillow-heif; pip install pillow-heif, or convert it to JPEG"
    for sign, sentence in _UNREADABLE:
        if sign(head):
            return sentence
    return None


_UNREADABLE: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (_starts(b"%PDF-"), "is a PDF document, which is not rendered here; write its pages as PNG first (pdftoppm -png)"),
    (
        lambda head: head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")),
        "is a PostScript program, which is never run here; convert it to PNG first",
    ),
    (
        lambda head: (
            re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(?>(?>\s|<!--.*?-->)*)(<!DOCTYPE svg|<svg)", head, re.S)
            is not None
        ),
        "is an SVG drawing, which is not rendered here; convert it to PNG first",
    ),
    (
        _starts(b"\xff\x0a", b"\x00\x00\x00\x0cJXL "),
        "is a JPEG XL picture, which is not read here; convert it to PNG",
    ),
    (_starts(b"AT&TFORM"), "is a DjVu document, which Pillow cannot read; convert its pages to PNG"),
    (
        lambda head: head.startswith(b"\xd7\xcd\xc6\x9a") or head[40:44] == b" EMF",
        "is a Windows metafile, which is not drawn here; convert it to PNG first",
    ),
    (lambda head: not looks_like(head, "picture") and looks_like(head, "video"), "is a video, not a picture"),
)


def _reads_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None
