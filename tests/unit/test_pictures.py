"""Every kind of picture file a user may have, and every kind that is none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.preprocess.folders import list_clips, list_pictures, sample_key
from megatron_ove.preprocess.pictures import JpegPreparer, encode_jpeg, fit_longest_side, load_picture


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
    prepare = JpegPreparer(longest_side=100, quality=90)
    plain = _save(tmp_path / "plain.jpg", _photo())
    assert prepare(plain) == plain.read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = prepare(_save(tmp_path / "turned.jpg", _photo(), exif=exif))
    assert Image.open(io.BytesIO(turned)).size == (40, 60)
    large = prepare(_save(tmp_path / "large.jpg", _photo(200, 300)))
    assert Image.open(io.BytesIO(large)).size == (100, 67)


def test_folder_is_listed_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/c.webp", ".hidden.jpg", ".cache/x.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_pictures(tmp_path)] == ["a.jpg", "b.PNG", "sub/c.webp"]


@pytest.mark.parametrize("lister, kind", [(list_pictures, "picture"), (list_clips, "video")])
def test_folder_without_files(tmp_path: Path, lister, kind: str) -> None:
    with pytest.raises(DataError, match=rf"the {kind} folder .* holds no {kind} file, not even in its subfolders"):
        lister(tmp_path)
    with pytest.raises(DataError, match=rf"the {kind} folder .*absent does not exist"):
        lister(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"the {kind} folder .*file is a file, not a folder"):
        lister(tmp_path / "file")


def test_sample_keys_are_unique_dotless_and_independent_of_the_root(tmp_path: Path) -> None:
    names = ["a.b/photo.jpg", "a_b/photo.jpg", "a b/photo.jpg", "日本語.png"]
    keys = [sample_key(tmp_path / name, tmp_path) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys)
    assert keys == [sample_key(Path("/elsewhere") / name, "/elsewhere") for name in names]
