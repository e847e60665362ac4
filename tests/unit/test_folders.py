"""Every file below a folder is an input, unreadable, or counted as ignored, whatever its name, links and content."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ove.errors import DataError
from megatron_ove.preprocess.folders import Listing, list_inputs
from megatron_ove.preprocess.input_files import sample_key

JPEG, MP4, TEXT = b"\xff\xd8\xff\xe0 a picture", b"\0\0\0\x18ftypmp42" + bytes(40), b"just text"


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def names(listing: Listing) -> list[str]:
    return [item.name for item in listing.inputs]


def test_files_are_known_by_suffix_or_content_and_the_rest_is_counted(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            **{"b.PNG": TEXT, "a.jpg": JPEG, "sub/c.webp": b"", "sub/no_suffix": JPEG, "d.jpg.bak": JPEG},
            **{"notes.txt": TEXT, "more.TXT": TEXT, "README": TEXT, "clip.mp4": MP4, "empty": b""},
            **{".hidden.jpg": JPEG, ".cache/x.jpg": JPEG},
        },
    )
    listing = list_inputs(tmp_path, "picture")
    assert names(listing) == ["a.jpg", "b.PNG", "d.jpg.bak", "sub/c.webp", "sub/no_suffix"]
    assert listing.other_files == {".txt": 2, "": 2, ".mp4": 1}
    assert listing.ignored_sentence() == (
        f"ignored below {tmp_path}: 5 files that hold no picture (without suffix 2, .txt 2, .mp4 1); 1 hidden files; 1 "
        "hidden folders"
    )
    assert names(list_inputs(tmp_path, "video")) == ["clip.mp4"]


def test_pdfs_are_known_by_suffix_or_content(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            **{"a.pdf": TEXT, "b.PDF": b"", "drawing.ai": b"%PDF-1.4\n", "download": b"\xef\xbb\xbf\r\n%PDF-1.7"},
            **{"notes.txt": TEXT, "about.txt": TEXT + b"%PDF-", "c.jpg": JPEG},
        },
    )
    listing = list_inputs(tmp_path, "document")
    assert names(listing) == ["a.pdf", "b.PDF", "download", "drawing.ai"]
    assert listing.ignored_sentence() == f"ignored below {tmp_path}: 3 files that hold no PDF (.txt 2, .jpg 1)"


def test_links_are_followed_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, {"sub/a.jpg": JPEG})
    fill(outside, {"deep/b.jpg": JPEG, "c.txt": TEXT})
    (root / "0_to_outside").symlink_to(outside)
    (root / "1_again").symlink_to(outside / "deep")
    (root / "sub/up").symlink_to(root)
    (root / "0_file.jpg").symlink_to(root / "sub/a.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nothing")
    (root / "gone.txt").symlink_to(tmp_path / "nothing")
    (root / "circle").symlink_to(root / "circle")
    listing = list_inputs(root, "picture")
    assert names(listing) == ["0_to_outside/deep/b.jpg", "gone.jpg", "sub/a.jpg"]
    assert listing.inputs[0].path == outside / "deep/b.jpg"
    assert listing.other_files == {".txt": 1}
    assert listing.skipped == {
        "links to folders that are looked through already": 2,
        "links to nothing": 2,
    }
    assert listing.again == {"0_file.jpg": root / "sub/a.jpg"}
    assert "1 files that hold no picture (.txt 1); 1 more paths to the same file; 2 links" in listing.ignored_sentence()


def test_a_folder_by_another_path_holds_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "pictures", {"a.jpg": JPEG})
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    listings = [list_inputs(folder, "picture") for folder in ("pictures", "./link", tmp_path / "x" / ".." / "link")[:2]]
    assert listings[0].inputs == listings[1].inputs


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    fill(tmp_path, {"a.jpg": JPEG})
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    listing = list_inputs(tmp_path, "picture")
    assert names(listing) == ["a.jpg"]
    assert listing.skipped == {"pipes, sockets and devices": 1}


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a.jpg": JPEG, "locked/b.jpg": JPEG})
    scandir = os.scandir

    def refuse(folder: Path):  # the tests may run as a user who may read everything
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_inputs(tmp_path, "picture")
    reason = f"the folder {tmp_path}/locked cannot be looked through (Permission denied); check its permissions"
    assert listing.unreadable == {tmp_path / "locked": reason}


@pytest.mark.parametrize(("kind", "name"), [("picture", "picture"), ("video", "clip"), ("document", "PDF")])
def test_folder_without_inputs(tmp_path: Path, kind, name: str) -> None:
    with pytest.raises(
        DataError, match=rf"the {name} folder .* holds no {name}, not even in its subfolders; it is empty"
    ):
        list_inputs(tmp_path, kind)
    fill(tmp_path, {"file.txt": TEXT})
    with pytest.raises(DataError, match=rf"1 files that hold no {name} \(\.txt 1\); put {name}s there"):
        list_inputs(tmp_path, kind)
    with pytest.raises(DataError, match=rf"the {name} folder .*absent does not exist"):
        list_inputs(tmp_path / "absent", kind)
    with pytest.raises(DataError, match=rf"the {name} folder .*file.txt is a file, not a folder"):
        list_inputs(tmp_path / "file.txt", kind)


def test_sample_keys_are_unique_dotless_and_ascii() -> None:
    files = ["a.b/photo.jpg", "a_b/photo.jpg", "a b/photo.jpg", "日本語.png"]
    keys = [sample_key(name, sheet) for name in files for sheet in (0, 1)]
    assert len(set(keys)) == 8
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys)


_PART = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=6).filter(
    lambda text: text not in (".", "..") and len(os.fsencode(text)) < 60
)
_SUFFIX = st.sampled_from(["", ".jpg", ".JPEG", ".png", ".tif", ".heic", ".pdf", ".txt", ".json", ".mp4", ".bak", "."])
_CONTENT = st.sampled_from([b"", JPEG, MP4, TEXT, b"II*\0", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n", b"P6 1 1 255 abc"])


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(st.tuples(st.lists(_PART, max_size=2).map(tuple), _PART, _SUFFIX), _CONTENT, max_size=12),
    links=st.lists(st.tuples(_PART, _SUFFIX, st.integers(0, 99)), max_size=6),
)
def test_used_rejected_and_ignored_are_all_files(files, links) -> None:
    root = Path(tempfile.mkdtemp()).resolve() / "root"
    root.mkdir()
    try:
        for (folders, stem, suffix), content in files.items():
            try:
                fill(root, {"/".join([*folders, stem + suffix]): content})
            except OSError:  # a file and a folder of one name
                continue
        targets = [root, *sorted(root.rglob("*")), root.parent / "nothing"]
        for stem, suffix, target in links:
            link = root / (stem + suffix)
            if not link.exists() and not link.is_symlink():
                link.symlink_to(targets[target % len(targets)])
        check_all_are_counted(root)
    finally:
        shutil.rmtree(root.parent)


def check_all_are_counted(root: Path) -> None:
    """Compares with a plain search: a file is reached through entries that are not hidden, behind links or not."""
    folders, reached, broken = [root], set(), set()
    visited = {root}
    while folders:
        for entry in folders.pop().iterdir():
            if entry.name.startswith("."):
                continue
            real = Path(os.path.realpath(entry))
            if real.is_dir() and real not in visited:
                visited.add(real)
                folders.append(real)
            elif real.is_file():
                reached.add(real)
            elif not real.exists():
                broken.add(entry)
    try:
        listing = list_inputs(root, "picture")
    except DataError as error:
        assert "holds no picture" in str(error)
        return
    used = {item.path for item in listing.inputs}
    assert used <= reached | broken
    assert len(used & reached) + listing.other_files.total() + len(listing.unreadable) == len(reached)
    assert len(used & broken) + listing.skipped["links to nothing"] == len(broken)
