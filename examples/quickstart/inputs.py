"""The demo's input: made on the spot, or the user's own folders; split into training and held-out files.

Of a user's folder one file in five is held out, by a hash of its path within the folder, so that the same folder is
always split the same way. A held-out clip is cut into two halves: what the encoder makes of one half should be nearest
to what it makes of the other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
from phases import DemoError, run_tool, say
from sizes import DemoSizes

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_reading import open_container
from megatron_ove.preprocess.folders import list_inputs

KINDS = ("images", "pages", "clips")
SPLITS = ("train", "held_out")
NEW_TYPEFACES = "new_typefaces"
"""A third split of the demo's own cards: typefaces that no training card has."""
MIN_FILES = 5
_HELD_OUT_SHARE = 5
_LONGEST_SIDE = 320  # pixels of a cut; the encoder sees less
_OPTION = {"images": "IMAGES", "pages": "PAGES", "clips": "VIDEOS"}

Folders = Mapping[str, Mapping[str, Path]]
"""Kind -> split -> folder."""


def prepare_inputs(
    input_dir: Path, user_folders: Mapping[str, Path | None], sizes: DemoSizes, rejects: Path
) -> Folders:
    """Makes the demo's input for the kinds without a user's folder, and splits the user's folders by links.

    Raises:
        DemoError: a user's folder that is missing or holds too little.
    """
    user_files = {kind: list_usable(folder, kind) for kind, folder in user_folders.items() if folder is not None}
    made = [kind for kind in KINDS if kind not in user_files]
    if made:
        if user_files:
            say(f"      no folder of your own for {' and '.join(made)}: the demo's input is used there")
        run_tool(
            "tools/demo_input/make_demo_input.py", input_dir / "made", *sizes.input_options(), f"--rejects={rejects}"
        )
    folders = {}
    for kind in KINDS:
        root = input_dir / ("made" if kind in made else "own")
        folders[kind] = {split: root / split / kind for split in SPLITS}
        if kind == "pages" and kind in made:
            folders[kind] = {split: root / split / "cards" for split in (*SPLITS, NEW_TYPEFACES)}
        if kind not in made:
            _split_user_folder(kind, user_files[kind], Path(user_folders[kind] or ""), folders[kind])
    return folders


def list_usable(folder: Path, kind: str) -> dict[str, Path]:
    """Lists a user's files that look like the kind; whether they can be decoded is for preprocessing to find out.

    Returns:
        Name below the folder -> file. What else the folder holds is counted on the screen.

    Raises:
        DemoError: no such folder, or fewer than `MIN_FILES` files of the kind.
    """
    try:
        listing = list_inputs(folder, "video" if kind == "clips" else "picture")
    except DataError as error:
        raise DemoError(str(error)) from error
    if sentence := listing.ignored_sentence():
        say(f"      {sentence}")
    for reason in listing.unreadable.values():
        say(f"      {reason}")
    files = {item.name: item.path for item in listing.inputs}
    if len(files) < MIN_FILES:
        raise DemoError(
            f"{_OPTION[kind]}={folder} holds {len(files)} usable file names, but the demo needs at least {MIN_FILES} "
            f"to train on some and hold others out; add files, or leave {_OPTION[kind]} away to use the demo's own"
        )
    return files


def split_files(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns (training, held-out) names below the folder: the fifth with the smallest hashes is held out."""

    def rank(name: str) -> str:
        return hashlib.sha256(os.fsencode(name)).hexdigest()

    held_out = set(sorted(names, key=rank)[: max(2, len(names) // _HELD_OUT_SHARE)])
    return [name for name in names if name not in held_out], [name for name in names if name in held_out]


def _split_user_folder(kind: str, files: Mapping[str, Path], folder: Path, targets: Mapping[str, Path]) -> None:
    train, held_out = ({name: files[name] for name in names} for names in split_files(files))
    for target in targets.values():
        shutil.rmtree(target, ignore_errors=True)
    _link_files(train, targets["train"])
    if kind == "clips":
        _cut_clips(list(held_out.values()), targets["held_out"])
    else:
        _link_files(held_out, targets["held_out"])
    say(f"      {folder}: {len(train)} {kind} to train on, {len(held_out)} held out")


def _link_files(files: Mapping[str, Path], target: Path) -> None:
    """Links files below `target` at the place they have below their folder."""
    for name, file in files.items():
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


def _cut_clips(files: Sequence[Path], target: Path) -> None:
    """Writes the halves of each clip as `clip<number>-cut0.mp4` and `-cut1.mp4`.

    A file that cannot be decoded is linked as it is, so that preprocessing rejects it with its reason.
    """
    target.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        try:
            frames = _decode(file)
        except (DataError, av.error.FFmpegError, ValueError, IndexError):
            frames = []
        half = len(frames) // 2
        if half < 1:
            (target / f"clip{number:03d}{file.suffix.lower()}").symlink_to(file.resolve())
            continue
        _encode(frames[:half], target / f"clip{number:03d}-cut0.mp4")
        _encode(frames[half:], target / f"clip{number:03d}-cut1.mp4")


def _decode(file: Path) -> list[av.VideoFrame]:
    with open_container(file) as container:
        stream = container.streams.video[0]
        scale = min(1.0, _LONGEST_SIDE / max(stream.width, stream.height))
        width, height = (max(2, round(side * scale / 2) * 2) for side in (stream.width, stream.height))
        return [frame.reformat(width, height, "yuv420p") for frame in container.decode(stream)]


def _encode(frames: Sequence[av.VideoFrame], target: Path) -> None:
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "20", "preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
