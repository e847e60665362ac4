"""`ShardWriter`: tar shards and their index, written together; a bad picture or label never gets in.

Everything goes to a temporary folder beside the target, which is renamed when complete (see `new_folder`): a shard set
that can be seen is whole. Not for concurrent writers: each process writes its own shard set.
"""

from __future__ import annotations

import io
import logging
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ove.data import shard_format as layout
from megatron_ove.data.picture_check import PictureChecker, UnusablePictureError
from megatron_ove.errors import DataError
from megatron_ove.new_folder import NewFolder
from megatron_ove.rejects import RejectsFile
from megatron_ove.sample_keys import MAX_KEY_LENGTH, is_valid_key

_log = logging.getLogger(__name__)

PARTS = ("shards", "index")
COMPANIONS = ("codec_settings.json", "vocabulary.json")
"""Files that may lie beside a shard set's own."""
INDEX_FILES = ("offsets", "sizes", "shard", "labels", "width", "height", "num_patches", "keys")
_IN_PARTS = re.compile(rf"shards/\d{{6,}}\.tar(\.idx)?|index/({'|'.join(INDEX_FILES)})\.npy")


class ShardWriter:
    """Writes one shard set; use as a context manager. An error inside the block leaves nothing behind."""

    def __init__(
        self,
        directory: str | Path,
        *,
        kind: layout.Kind,
        num_classes: int,
        label_width: int,
        rejects: RejectsFile | None = None,
        samples_per_shard: int = 4096,
        patch_size: int = 14,
        frames: int = 64,
        grid_height: int | None = None,
        grid_width: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Starts a shard set.

        Args:
            directory: target folder; must not exist or be empty, but see `overwrite`.
            kind: image, ocr or video.
            num_classes: label ids are 0 .. num_classes - 1; -1 = none.
            label_width: labels per sample.
            rejects: where refused samples are recorded; without it they are logged.
            samples_per_shard: samples per tar file.
            patch_size: side of a patch in pixels.
            frames: frames of a clip's temporal grid (video only).
            grid_height: patches of a frame from top to bottom (video only).
            grid_width: patches of a frame from left to right (video only).
            overwrite: whether an earlier shard set may be replaced, once the new one is whole; never another folder.

        Raises:
            DataError: the folder exists, or a value makes no shard set.
        """
        self.directory = Path(directory)
        if samples_per_shard < 1:
            raise DataError(
                f"samples_per_shard = {samples_per_shard} must be at least 1; correct it for {self.directory}"
            )
        is_video = kind == "video"
        self._info = layout.DatasetInfo(
            kind=kind,
            num_samples=0,
            num_classes=num_classes,
            label_width=label_width,
            members=layout.member_names(kind, frames),
            patch_size=patch_size,
            frames=frames if is_video else 0,
            grid_height=grid_height if is_video else None,
            grid_width=grid_width if is_video else None,
            created_by="megatron_ove",
        )
        _check_settings(self._info, self.directory)
        self._rejects = rejects
        self._samples_per_shard = samples_per_shard
        self._checker = PictureChecker()
        self._keys: dict[str, None] = {}
        self._columns = {name: array(code) for name, code in zip(INDEX_FILES[:-1], "QIIiiii", strict=True)}
        self._shard: _OpenShard | None = None
        self._first_reason = ""
        self._folder = NewFolder(self.directory, replace_if=is_shard_set if overwrite else None)
        try:
            for part in PARTS:
                (self._folder.path / part).mkdir()
        except BaseException:
            self.discard()
            raise

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, members: Mapping[str, bytes], labels: np.ndarray, *, source: str | None = None) -> bool:
        """Checks one sample and appends it.

        Args:
            key: unique name: letters, digits, `_`, `-`.
            members: member name -> bytes, all but the labels ("cls"), which are made from `labels`.
            labels: [label_width] integers, -1 = none.
            source: file named in the rejects instead of the key.

        Returns:
            False when the sample was rejected (its pictures or positions are bad); the reason is recorded.

        Raises:
            DataError: a key used twice, a label out of range, a missing member: mistakes of the caller.
        """
        values = self._check_call(key, members, labels)
        try:
            width, height, num_patches = self._measure(members)
        except UnusablePictureError as error:
            name = [n for n in self._info.members if n.endswith(".jpg") or n == "jpg"][error.index]
            return self._reject(source or key, f"{key}.{name}: {error}")
        except DataError as error:
            return self._reject(source or key, f"{key}: {error}")
        self._write_sample(key, {**members, layout.LABELS_MEMBER: values.tobytes()})
        self._columns["labels"].frombytes(values.tobytes())
        for name, value in (("width", width), ("height", height), ("num_patches", num_patches)):
            self._columns[name].append(value)
        self._keys[key] = None
        return True

    def add_file(self, name: str, content: bytes) -> None:
        """Puts a companion file (a vocabulary, a tool's settings) into the set's folder; it appears with the set.

        Raises:
            DataError: `name` is no plain file name, or one of the set's own.
        """
        if not re.fullmatch(r"\w[\w.-]*", name) or name in (layout.INFO_FILE, *PARTS):
            raise DataError(
                f"'{name}' cannot name a companion file of {self.directory}, because it is no plain file name or "
                "belongs to the set itself; choose another"
            )
        (self._folder.path / name).write_bytes(content)

    def close(self) -> None:
        """Writes the index and makes the shard set visible; after an error nothing is left.

        Raises:
            DataError: no sample was accepted.
            OSError: it cannot be written.
        """
        try:
            if not self._keys:
                first = self._first_reason or (self._rejects.first_reason if self._rejects is not None else "")
                reason = f"; the first one was refused because: {first}" if first else ""
                raise DataError(
                    f"no sample was accepted for {self.directory}, and an empty shard set cannot be trained on{reason}"
                )
            self._close_shard()
            self._write_index()
            self._folder.publish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes everything written so far, also where the disk is full."""
        try:
            self._close_shard()
        except OSError:
            pass  # what is thrown away need not be whole
        finally:
            self._folder.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _reject(self, file: str, reason: str) -> bool:
        self._first_reason = self._first_reason or reason
        if self._rejects is not None:
            self._rejects.add(file, reason)
        else:
            _log.warning("rejected %s: %s", file, reason)
        return False

    def _check_call(self, key: str, members: Mapping[str, bytes], labels: np.ndarray) -> np.ndarray:
        info = self._info
        if not is_valid_key(key):
            raise DataError(
                f"key '{key}' cannot name a sample, because names in a shard are 1 to {MAX_KEY_LENGTH} letters, "
                "digits, '_' or '-' (a dot would end the key); choose another"
            )
        if key in self._keys:
            raise DataError(
                f"key '{key}' is used twice in {self.directory}, and keys tell samples apart; make it unique"
            )
        expected = set(info.members) - {layout.LABELS_MEMBER}
        if set(members) != expected:
            odd = ", ".join(sorted(set(members) ^ expected)[:3])
            raise DataError(f"sample '{key}' lacks or has unknown members for kind {info.kind}: {odd}; correct them")
        values = np.asarray(labels)
        if values.dtype.kind not in "iu" or values.shape != (info.label_width,):
            raise DataError(
                f"labels of '{key}' are {values.dtype} of shape {list(values.shape)}, but {self.directory} has "
                f"label_width = {info.label_width}; give [{info.label_width}] integers, with -1 for none"
            )
        bad = values[(values < -1) | (values >= info.num_classes)]
        if bad.size:
            raise DataError(
                f"label {bad[0]} of '{key}' is outside 0..{info.num_classes - 1} (num_classes = {info.num_classes}; "
                "-1 = none); correct the label or num_classes"
            )
        return np.ascontiguousarray(values, np.dtype("<i4"))

    def _measure(self, members: Mapping[str, bytes]) -> tuple[int, int, int]:
        """Returns (width, height, number of patches) after decoding every picture of the sample."""
        info = self._info
        if info.kind != "video":
            ((height, width),) = self._checker.measure([members[layout.PICTURE_MEMBER]])
            return width, height, -(-height // info.patch_size) * -(-width // info.patch_size)
        positions = read_positions(members[layout.POSITIONS_MEMBER], info)
        names = [name for name in info.members if name.endswith(".jpg")]
        sizes = self._checker.measure([members[name] for name in names])
        _, rows, columns = info.clip_grid
        frame = (rows * info.patch_size, columns * info.patch_size)
        wanted = [layout.mosaic_size(len(positions), info.patch_size), *[frame] * info.frames]
        for name, size, want in zip(names, sizes, wanted, strict=True):
            if size != want:
                raise DataError(f"{name} has {size[1]} x {size[0]} pixels where the grid needs {want[1]} x {want[0]}")
        return frame[1], frame[0], len(positions)

    def _write_sample(self, key: str, members: Mapping[str, bytes]) -> None:
        number, place = divmod(len(self._keys), self._samples_per_shard)
        if self._shard is None or place == 0:
            self._close_shard()
            self._shard = _OpenShard(self._folder.path / "shards" / layout.shard_name(number))
        for offset, size in self._shard.write(key, [(name, members[name]) for name in self._info.members]):
            self._columns["offsets"].append(offset)
            self._columns["sizes"].append(size)
        self._columns["shard"].append(number)

    def _close_shard(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.close()

    def _write_index(self) -> None:
        count, columns = len(self._keys), len(self._info.members)
        shapes = {"offsets": (count, columns), "sizes": (count, columns), "labels": (count, self._info.label_width)}
        for name, column in self._columns.items():
            values = np.asarray(column).reshape(shapes.get(name, (count,)))
            np.save(self._folder.path / "index" / f"{name}.npy", values)
        np.save(self._folder.path / "index" / "keys.npy", np.array([key.encode() for key in self._keys]))
        info = layout.DatasetInfo(**{**vars(self._info), "num_samples": count})
        info.write(self._folder.path)


def is_shard_set(directory: Path) -> bool:
    """Whether `directory` holds a shard set and nothing else, so that replacing it loses nothing of a user's."""
    try:
        layout.DatasetInfo.read(directory)
        names = {entry.name for entry in directory.iterdir()}
        parts = [f"{part}/{entry.name}" for part in names.intersection(PARTS) for entry in (directory / part).iterdir()]
    except (DataError, OSError):
        return False
    return names <= {layout.INFO_FILE, *PARTS, *COMPANIONS} and all(map(_IN_PARTS.fullmatch, parts))


def _check_settings(info: layout.DatasetInfo, directory: Path) -> None:
    if min(info.num_classes, info.label_width, info.patch_size) < 1:
        raise DataError(
            f"num_classes = {info.num_classes}, label_width = {info.label_width} and patch_size = {info.patch_size} "
            f"must all be at least 1; correct them for {directory}"
        )
    if info.kind == "video" and (not info.grid_height or not info.grid_width or not 1 <= info.frames <= 100):
        raise DataError(
            f"a video shard set needs grid_height and grid_width (given: {info.grid_height}, {info.grid_width}) and 1 "
            f"to 100 frames (given: {info.frames}); correct them for {directory}"
        )


class _OpenShard:
    """A tar file and its DALI index ("v1.2", as DALI's wds2idx writes it) in the making."""

    def __init__(self, path: Path) -> None:
        self._tar = path.open("wb")
        self._index_path = path.with_name(path.name + ".idx")
        self._lines: list[str] = []

    def write(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[tuple[int, int]]:
        """Appends a sample; returns (offset, size) of each member's bytes."""
        places = []
        for name, data in members:
            self._tar.write(layout.tar_header(f"{key}.{name}", len(data)))
            places.append((self._tar.tell(), len(data)))
            self._tar.write(data + b"\0" * (-len(data) % layout.TAR_BLOCK))
        entries = zip(members, places, strict=True)
        self._lines.append(" ".join(f"{name} {offset} {size} {key}.{name}" for (name, _), (offset, size) in entries))
        return places

    def close(self) -> None:
        """Ends the tar file and writes the index."""
        with self._tar:
            self._tar.write(b"\0" * (2 * layout.TAR_BLOCK))
        text = "\n".join([f"v1.2 {len(self._lines)}", *self._lines, ""])
        self._index_path.write_text(text, encoding="ascii")


def read_positions(data: bytes, info: layout.DatasetInfo) -> np.ndarray:
    """Reads a clip's positions.npy.

    Returns:
        [K, 3] int32 (t, h, w), strictly increasing, inside the clip's grid.

    Raises:
        DataError: anything else.
    """
    try:
        positions = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"positions.npy cannot be read ({error})") from error
    if positions.dtype != np.int32 or positions.ndim != 2 or positions.shape[1] != 3 or not len(positions):
        raise DataError(
            f"positions.npy holds {positions.dtype} {list(positions.shape)} instead of int32 [K, 3], K >= 1"
        )
    grid = info.clip_grid
    if (positions < 0).any() or (positions >= np.array(grid)).any():
        raise DataError(f"positions.npy leaves the grid of {' x '.join(map(str, grid))} (frames, rows, columns)")
    flat = np.ravel_multi_index(tuple(positions.T), grid)
    if (np.diff(flat) <= 0).any():
        raise DataError("positions.npy is not sorted by (t, h, w), or holds a patch twice")
    return positions
