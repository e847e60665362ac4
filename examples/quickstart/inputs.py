"""The demo's input: made on the spot, or the user's own folders; split into training and held-out files.

A file is held out by a hash of its path within the folder, so the same folder is always split the same way. Held-out
clips are cut into two halves each: what the encoder makes of one half should be nearest to what it makes of the other.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from phases import DemoError, run_tool, say
from sizes import DemoSizes

from megatron_ove.errors import DataError
from megatron_ove.preprocess.folders import list_clips, list_pictures

KINDS = ("images", "pages", "videos")
HELD_OUT_SHARE = 5  # one in five
MIN_FILES = 10
_CUTS = ((0.0, 0.5), (0.5, 1.0))


def prepare_inputs(run_dir: Path, user_folders: dict[str, Path | None], sizes: DemoSizes, *, seed: int) -> None:
    """Fills `run_dir`/input/{images,pages,clips}/{train,heldout}; user folders are linked, not copied.

    Raises:
        DemoError: a user's folder that is missing or holds too little.
    """
    made = run_dir / "input/made"
    missing = [kind for kind in KINDS if user_folders[kind] is None]
    if missing:
        if len(missing) < len(KINDS):
            say(f"      no folder of your own for {' and '.join(missing)}: the demo's input is used there")
        counts = [f"--{kind}={getattr(sizes, 'clips' if kind == 'videos' else kind)}" for kind in missing]
        run_tool("tools/demo_input/make_demo_input.py", made, *counts, f"--seed={seed}")
    for kind in KINDS:
        folder = user_folders[kind] or made / kind
        files = list_usable(folder, kind)
        train, held_out = split_files(files, folder)
        target = run_dir / "input" / ("clips" if kind == "videos" else kind)
        shutil.rmtree(target, ignore_errors=True)
        link_files(train, folder, target / "train")
        if kind == "videos":
            cut_clips(held_out, target / "heldout")
        else:
            link_files(held_out, folder, target / "heldout")
        say(f"      {kind}: {len(train)} to train on, {len(held_out)} held out, from {folder}")


def list_usable(folder: Path, kind: str) -> list[Path]:
    """Lists a folder's files by their names; whether they can be decoded is for preprocessing to find out.

    Raises:
        DemoError: no such folder, or fewer than `MIN_FILES` files of the kind.
    """
    try:
        files = list_clips(folder) if kind == "videos" else list_pictures(folder)
    except DataError as error:
        raise DemoError(str(error)) from error
    if len(files) < MIN_FILES:
        raise DemoError(
            f"{folder} holds {len(files)} {kind}, but the demo needs at least {MIN_FILES} to train on some and hold "
            f"others out; add some, or leave {kind.upper()} out to use the demo's own"
        )
    return files


def split_files(files: Sequence[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns (training, held-out) files: the fifth with the smallest hashes of their relative paths is held out."""

    def rank(path: Path) -> str:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest()

    held_out = set(sorted(files, key=rank)[: max(2, len(files) // HELD_OUT_SHARE)])
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


def link_files(files: Sequence[Path], folder: Path, target: Path) -> None:
    """Links `files` below `target` at the place they have below `folder`."""
    for file in files:
        link = target / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


def cut_clips(files: Sequence[Path], target: Path) -> None:
    """Writes both halves of each clip as `<number>-cut0.mp4` and `-cut1.mp4`.

    A file that cannot be decoded is linked as it is, so that preprocessing rejects it with its reason.
    """
    target.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        try:
            frames = _decode(file)
        except (av.error.FFmpegError, ValueError, IndexError):
            frames = []
        if len(frames) < 2 * len(_CUTS):
            (target / f"clip{number:03d}{file.suffix.lower()}").symlink_to(file.resolve())
            continue
        for cut, (start, stop) in enumerate(_CUTS):
            part = frames[int(start * len(frames)) : int(stop * len(frames))]
            _encode(part, target / f"clip{number:03d}-cut{cut}.mp4")


def _decode(file: Path) -> list[av.VideoFrame]:
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        scale = min(1.0, 320 / max(stream.width, stream.height))
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
