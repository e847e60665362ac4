"""What a sample of each kind must be, looked at before it is stored and again by the deep check of a set."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.shards import format as layout
from megatron_ove.shards.documents import Document
from megatron_ove.shards.format import DatasetInfo
from megatron_ove.shards.picture_check import PictureChecker, UnusablePictureError


@dataclass(frozen=True)
class Measures:
    """What the index keeps of a sample's members.

    Attributes:
        sizes: (height, width) in pixels of each page; of the one picture, or of a frame.
        num_patches: selected patches of a clip, or those that cover the pictures at their own size.
        columns: further columns of the index.
    """

    sizes: tuple[tuple[int, int], ...]
    num_patches: int
    columns: Mapping[str, int]


class UnusableSampleError(DataError):
    """A sample that must not enter a shard; the text is the reason alone.

    Attributes:
        member: the one that is wrong.
    """

    def __init__(self, reason: str, member: str) -> None:
        super().__init__(reason)
        self.member = member


class SampleChecker:
    """Looks at all members of samples."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info, self._pictures = info, PictureChecker()

    def measure(self, members: Mapping[str, bytes]) -> Measures:
        """Decodes every picture of a sample and reads what else it has.

        Args:
            members: name -> bytes, all but the labels.

        Raises:
            UnusableSampleError: the first of them that cannot be used.
        """
        info = self._info
        if info.kind == "video":
            return self._measure_clip(members)
        names = (
            [layout.PICTURE_MEMBER] if info.kind != "document" else sorted(members.keys() - {layout.DOCUMENT_MEMBER})
        )
        sizes = tuple(self._measure_pictures(members, names))
        num_patches = sum(-(-height // info.patch_size) * -(-width // info.patch_size) for height, width in sizes)
        if info.kind != "document":
            return Measures(sizes, num_patches, {})
        with _about(layout.DOCUMENT_MEMBER):
            document = Document.decode(members[layout.DOCUMENT_MEMBER], sizes)
        return Measures(sizes, num_patches, columns_of(document))

    def _measure_clip(self, members: Mapping[str, bytes]) -> Measures:
        info = self._info
        with _about(layout.POSITIONS_MEMBER):
            positions = read_positions(members[layout.POSITIONS_MEMBER], info)
        names = [name for name in info.members if name.endswith(".jpg")]
        _, rows, columns = info.clip_grid
        frame = (rows * info.patch_size, columns * info.patch_size)
        wanted = [layout.mosaic_size(len(positions), info.patch_size), *[frame] * info.frames]
        for name, size, want in zip(names, self._measure_pictures(members, names), wanted, strict=True):
            if size != want:
                reason = f"it has {size[1]} x {size[0]} pixels where the grid needs {want[1]} x {want[0]}"
                raise UnusableSampleError(reason, name)
        return Measures((frame,), len(positions), {})

    def _measure_pictures(self, members: Mapping[str, bytes], names: list[str]) -> list[tuple[int, int]]:
        try:
            return self._pictures.measure([members[name] for name in names])
        except UnusablePictureError as error:
            raise UnusableSampleError(str(error), names[error.index]) from error


@contextmanager
def _about(member: str) -> Iterator[None]:
    """Says which member an error is about."""
    try:
        yield
    except DataError as error:
        raise UnusableSampleError(str(error), member) from error


def columns_of(document: Document) -> dict[str, int]:
    """Returns what the index knows of a document, see `DOCUMENT_COLUMNS`."""
    return {
        "characters": len(document.text),
        "boxes": sum(map(len, document.boxes.values())),
        "turns": len(document.turns) + len(document.captions),
    }


def read_positions(data: bytes, info: DatasetInfo) -> np.ndarray:
    """Reads a clip's positions.npy.

    Returns:
        [K, 3] int32 (t, h, w), strictly increasing, inside the clip's grid.

    Raises:
        DataError: anything else.
    """
    try:
        positions = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"it cannot be read ({error})") from error
    if positions.dtype != np.int32 or positions.ndim != 2 or positions.shape[1] != 3 or not len(positions):
        raise DataError(f"it holds {positions.dtype} {list(positions.shape)} instead of int32 [K, 3], K >= 1")
    grid = info.clip_grid
    if (positions < 0).any() or (positions >= np.array(grid)).any():
        raise DataError(f"it leaves the grid of {' x '.join(map(str, grid))} (frames, rows, columns)")
    flat = np.ravel_multi_index(tuple(positions.T), grid)
    if (np.diff(flat) <= 0).any():
        raise DataError("it is not sorted by (t, h, w), or holds a patch twice")
    return positions
