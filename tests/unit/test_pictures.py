"""Every kind of picture file a user may have, and every kind that is none."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from megatron_ove.errors import DataError
from megatron_ove.preprocess import pictures
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.ocr.recognition import PageRecord
from megatron_ove.preprocess.ocr.worded_pages import read_worded_pages
from megatron_ove.preprocess.pictures import JpegPreparer, encode_jpeg, fit_longest_side, load_picture
from megatron_ove.preprocess.record_files import as_record, input_of
from megatron_ove.shards.picture_check import PictureChecker, UnusablePictureError


def _photo(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth colour picture whose corners differ, so that rotations and channel swaps show."""
    row, column = np.mgrid[0:height, 0:width]
    return np.stack([row * 255 // height, column * 255 // width, np.full_like(row, 90)], axis=-1).astype(np.uint8)


def _save(path: Path, picture: np.ndarray | Image.Image, **options: object) -> Path:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_common_formats_are_read_as_rgb(tmp_path: Path, suffix: str) -> None:
    picture = load_picture(_save(tmp_path / f"photo.{suffix}", _photo()))
    assert picture.shape == (40, 60, 3)
    assert picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - _photo()).mean() < 12  # GIF has 256 colours


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    path = _save(tmp_path / "turned.jpg", _photo(), exif=exif, quality=95)
    picture = load_picture(path)
    assert picture.shape == (60, 40, 3)
    assert np.abs(picture.astype(int) - np.rot90(_photo(), -1)).mean() < 6


def test_cmyk_is_converted(tmp_path: Path) -> None:
    path = _save(tmp_path / "print.jpg", Image.fromarray(_photo()).convert("CMYK"), quality=95)
    assert np.abs(load_picture(path).astype(int) - _photo()).mean() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    picture = load_picture(_save(tmp_path / "deep.png", Image.fromarray(deep)))
    np.testing.assert_array_equal(picture[..., 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(picture[..., 0], picture[..., 2])


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    pixels = np.dstack([_photo(), np.zeros((40, 60), np.uint8)])
    pixels[:, :30, 3] = 255
    picture = load_picture(_save(tmp_path / "cut_out.png", Image.fromarray(pixels, "RGBA")))
    assert (picture[:, 30:] == 255).all()
    np.testing.assert_array_equal(picture[:, :30], _photo()[:, :30])


def test_palette_with_transparent_entry_becomes_white(tmp_path: Path) -> None:
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    indexed.putpixel((3, 3), 1)
    picture = load_picture(_save(tmp_path / "icon.gif", indexed, transparency=0))
    assert picture[0, 0].tolist() == [255, 255, 255]
    assert picture[3, 3].tolist() == [200, 100, 50]


def test_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    path = tmp_path / "moving.gif"
    red.save(path, save_all=True, append_images=[blue, blue])
    assert load_picture(path)[0, 0].tolist() == [255, 0, 0]


def test_text_renamed_to_jpg_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("Dear diary, this is not a picture.")
    with pytest.raises(DataError, match=r"notes\.jpg is not a picture: its content begins with b'Dear diary, '"):
        load_picture(path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "nothing.png").touch()
    with pytest.raises(DataError, match=r"nothing\.png is empty \(0 bytes\), so it is not a picture"):
        load_picture(tmp_path / "nothing.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_truncated_picture(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3)).astype(np.uint8)
    whole = _save(tmp_path / f"whole.{suffix}", noise).read_bytes()
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        DataError, match=rf"half\.{suffix} is a truncated or damaged picture \(\d+ bytes; decoder: .+\)"
    ):
        load_picture(path)


def test_too_many_pixels(tmp_path: Path) -> None:
    path = _save(tmp_path / "poster.png", Image.new("1", (20000, 20000)))
    with pytest.raises(DataError, match=r"poster\.png has .*more.* than the limit of 178956970"):
        load_picture(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)"):
        load_picture(tmp_path / "absent.jpg")


def test_full_chroma_keeps_colour_edges() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)
    error = {
        full: np.abs(
            np.asarray(Image.open(io.BytesIO(encode_jpeg(stripes, full_chroma=full)))) - stripes.astype(int)
        ).mean()
        for full in (False, True)
    }
    assert error[True] < 10 < error[False]


def test_fit_longest_side_keeps_aspect_and_never_enlarges() -> None:
    assert fit_longest_side(_photo(40, 60), 30).shape == (20, 30, 3)
    assert fit_longest_side(_photo(40, 60), 100).shape == (40, 60, 3)


def test_preparer_passes_plain_jpeg_on_and_reencodes_the_rest(tmp_path: Path) -> None:
    def prepare(path: Path) -> bytes:
        return JpegPreparer(longest_side=100, quality=90)(InputFile(path, path.name, "key"))

    plain = _save(tmp_path / "plain.jpg", _photo())
    assert prepare(plain) == plain.read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = prepare(_save(tmp_path / "turned.jpg", _photo(), exif=exif))
    assert Image.open(io.BytesIO(turned)).size == (40, 60)
    large = prepare(_save(tmp_path / "large.jpg", _photo(200, 300)))
    assert Image.open(io.BytesIO(large)).size == (100, 67)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jfif", "JPEG"),
        ("b.jpe", "JPEG"),
        ("c.avif", "AVIF"),
        ("d.jp2", "JPEG2000"),
        ("e.ppm", "PPM"),
        ("h.tga", "TGA"),
        ("i.pcx", "PCX"),
        ("j.ico", "ICO"),
        ("k.qoi", "QOI"),
        ("no_suffix", "JPEG"),
        ("f.jpg.bak", "PNG"),
        ("really_png.jpg", "PNG"),
    ],
)
def test_what_pillow_reads_is_read_whatever_it_is_called(tmp_path: Path, name: str, form: str) -> None:
    Image.fromarray(_photo()).save(tmp_path / name, format=form)
    (item,) = list_inputs(tmp_path, "picture").inputs
    picture = load_picture(item.path, item.sheet)
    assert picture.shape[0] / picture.shape[1] == pytest.approx(40 / 60, abs=0.05)
    middle = picture[len(picture) // 2, picture.shape[1] // 2].astype(int)
    assert np.abs(middle - [127, 127, 90]).max() < 30


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "IMG_1.HEIC",
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
            "a HEIC picture, which needs the package pillow-heif",
        ),
        ("a.pdf", b"%PDF-1.7\n", "a PDF document, which is not rendered here; write its pages as PNG"),
        ("scan.jpg", b"%PDF-1.7\n", "a PDF document"),
        ("photo.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript program, which is never run here"),
        ("x.svg", b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg>", "an SVG drawing"),
        ("x.dng", b"II*\0" + bytes(100), "a camera's raw file"),
        ("x.png", b"\0\0\0\x20ftypisom" + bytes(100), "a video, not a picture"),
    ],
)
def test_forms_that_are_not_read_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    (item,) = list_inputs(tmp_path, "picture").inputs
    with pytest.raises(DataError, match=rf"{name} is {reason}"):
        load_picture(item.path)


def test_postscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of PostScript under any name must not reach Ghostscript, which runs it as a program."""
    bait = tmp_path / "bin" / "gs"
    bait.parent.mkdir()
    bait.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    bait.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bait.parent}:/usr/bin:/bin")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("photo.jpg", "photo.eps", "photo"):
        (tmp_path / name).write_bytes(program)
        with pytest.raises(DataError, match="PostScript"):
            load_picture(tmp_path / name)
    with pytest.raises(UnusablePictureError, match="no known format"):
        PictureChecker().measure([program])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("ink", "ground"), [(255, 0), (230, 0), (0, 255), (120, 255)])
def test_transparent_parts_get_the_ground_that_contrasts(tmp_path: Path, ink: int, ground: int) -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[5:9, 5:15] = (ink, ink, ink, 255)
    picture = load_picture(_save(tmp_path / "text.png", Image.fromarray(pixels, "RGBA")))
    assert (picture[0, 0] == ground).all()
    assert (picture[6, 6] == ink).all()


@pytest.mark.parametrize(
    ("values", "dtype", "name", "expected"),
    [
        (np.linspace(0, 255, 64), np.int32, "a.tif", np.linspace(0, 255, 64)),
        (np.linspace(0, 4000, 64), np.uint16, "a.tif", np.linspace(0, 4000, 64) / 4095 * 255),
        (np.linspace(0, 65535, 64), np.uint16, "a.tif", np.linspace(0, 255, 64)),
        (np.linspace(0, 10**6, 64), np.int32, "a.tif", np.linspace(0, 255, 64)),
        (np.linspace(0, 4000, 64), np.uint16, "a.png", np.linspace(0, 4000, 64) / 65535 * 255),
        (np.linspace(0, 1, 64), np.float32, "a.tif", np.linspace(0, 255, 64)),
        (np.linspace(0, 255, 64), np.float32, "a.tif", np.linspace(0, 255, 64)),
        (np.linspace(0, 900, 64), np.float32, "a.tif", np.linspace(0, 255, 64)),
        (np.full(64, np.nan), np.float32, "a.tif", np.zeros(64)),
    ],
)
def test_deep_greys_keep_their_contrast(tmp_path: Path, values, dtype, name: str, expected) -> None:
    path = _save(tmp_path / name, Image.fromarray(values.astype(dtype).reshape(8, 8)))
    assert np.abs(load_picture(path)[..., 1].ravel() - expected).max() <= 1.5


def test_sheets_of_a_tiff_are_pictures_of_their_own(tmp_path: Path) -> None:
    colours = ("red", "lime", "blue")
    sheets = [Image.new("RGB", (20, 10), colour) for colour in colours]
    sheets[0].save(tmp_path / "scan.tif", save_all=True, append_images=sheets[1:])
    items = list_inputs(tmp_path, "picture").inputs
    assert [str(item) for item in items] == [f"{tmp_path}/scan.tif{end}" for end in ("", " (sheet 2)", " (sheet 3)")]
    assert len({item.key for item in items}) == 3
    pixels = [load_picture(item.path, item.sheet)[0, 0].tolist() for item in items]
    assert pixels == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert JpegPreparer(longest_side=99, quality=90)(items[1]) != JpegPreparer(longest_side=99, quality=90)(items[2])


def test_the_suffix_of_a_link_counts_until_the_page_is_written(tmp_path: Path) -> None:
    """As in HuggingFace's cache, where all names are links to files that are called by a digest."""
    for name, content in (("a.tga", b""), ("b.dng", b"II*\0" + bytes(100))):
        blob = tmp_path / "blobs" / name.removesuffix(".tga").removesuffix(".dng")
        blob.parent.mkdir(exist_ok=True)
        Image.fromarray(_photo()).save(blob, format="TGA") if not content else blob.write_bytes(content)
        (tmp_path / "pages" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pages" / name).symlink_to(blob)
    for item in list_inputs(tmp_path / "pages", "picture").inputs:
        record = {**as_record(item), "lines": []}
        for found in (item, input_of(record), PageRecord.from_record(record).input_file):
            prepare = functools.partial(JpegPreparer(longest_side=100, quality=90), found)
            if item.name == "a.tga":
                np.testing.assert_array_equal(load_picture(found.path, suffix=found.suffix), _photo())
                assert Image.open(io.BytesIO(prepare())).size == (60, 40)
            else:
                with pytest.raises(DataError, match=r"blobs/b is a camera's raw file"):
                    prepare()
    (tmp_path / "t.jsonl").write_text('{"file": "pages/a.tga", "text": "law"}\n')
    (page,) = read_worded_pages(tmp_path / "t.jsonl").pages
    assert (page.input_file.path.name, page.input_file.suffix) == ("a", ".tga")
    with pytest.raises(DataError, match="has the link_name 5, which is no name"):
        PageRecord.from_record({**record, "link_name": 5})


def _readable_sheets(folder: Path) -> list[bool]:
    """Says of every sheet that is found whether it can be read; what cannot must get the sentence of damaged ones."""
    found = []
    for item in list_inputs(folder, "picture").inputs:
        assert item.sheet == len(found)
        try:
            found.append(load_picture(item.path, item.sheet).shape == (40, 60, 3))
        except DataError as error:
            assert "is a truncated or damaged picture" in str(error)
            found.append(False)
    return found


def _scan(path: Path, **options: object) -> bytes:
    """A TIFF of five sheets."""
    sheets = [Image.fromarray(_photo()) for _ in range(5)]
    return _save(path, sheets[0], save_all=True, append_images=sheets[1:], **options).read_bytes()


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_a_cut_tiff_keeps_its_whole_sheets_and_names_the_first_that_is_not(tmp_path: Path, options) -> None:
    content = _scan(tmp_path / "scan.tif", **options)
    assert _readable_sheets(tmp_path) == [True] * 5
    (tmp_path / "scan.tif").write_bytes(content[: len(content) * 7 // 10])
    found = _readable_sheets(tmp_path)
    assert found[:3] == [True] * 3
    assert len(found) > 3 and not any(found[3:])


def test_only_the_sheet_that_is_wanted_is_read_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Image.new("L", (40, 30), 9), Image.new("L", (400, 300), 9)
    for name, sheets in (("a", [large, small]), ("b", [small, large])):
        sheets[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=sheets[1:])
    monkeypatch.setattr(pictures, "MAX_PIXELS", 50 * 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 50)
    monkeypatch.setattr(pictures, "io", SimpleNamespace(SEEK_END=io.SEEK_END))  # nothing to hold a whole file in
    shapes = []
    for item in list_inputs(tmp_path, "picture").inputs:
        try:
            shapes.append(load_picture(item.path, item.sheet).shape[:2])
        except DataError as error:
            assert "has 400 x 300 pixels, more than the limit of 2500" in str(error)
            shapes.append(None)
    assert shapes == [None, (30, 40), (30, 40), None]


def test_a_sheet_of_an_unknown_form_hides_none_behind_it(tmp_path: Path) -> None:
    content = _scan(tmp_path / "scan.tif")
    photometric = struct.pack("<HHLHH", 262, 3, 1, 2, 0)
    parts = content.split(photometric)
    assert len(parts) == 6
    odd = [photometric, struct.pack("<HHLHH", 262, 3, 1, 999, 0), *[photometric] * 3, b""]
    (tmp_path / "scan.tif").write_bytes(b"".join(part + end for part, end in zip(parts, odd, strict=True)))
    assert _readable_sheets(tmp_path) == [True, False, True, True, True]


def test_frames_and_previews_are_no_sheets(tmp_path: Path) -> None:
    first, other = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    for name, form in (("a.gif", "GIF"), ("b.webp", "WEBP"), ("c.png", "PNG"), ("d.jpg", "MPO"), ("e.avif", "AVIF")):
        first.save(tmp_path / name, format=form, save_all=True, append_images=[other])
    reduced = TiffImagePlugin.ImageFileDirectory_v2()
    reduced[254] = 1
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "f.tif"), True) as out:
        first.save(out, format="TIFF")
        out.newFrame()
        other.resize((10, 5)).save(out, format="TIFF", tiffinfo=reduced)
        out.newFrame()
    items = list_inputs(tmp_path, "picture").inputs
    assert [item.sheet for item in items] == [0] * 6


def test_many_comments_do_not_hold_up_a_worker(tmp_path: Path) -> None:
    """Without an atomic group the search for an SVG's beginning doubles with every comment."""
    (tmp_path / "x.png").write_bytes(b"<!---->" * 85)
    with pytest.raises(DataError, match="is not a picture"):
        load_picture(tmp_path / "x.png")
