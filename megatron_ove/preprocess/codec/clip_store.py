"""A selected clip as one .npz file between the codec steps: mosaic, positions, and the 64 grid frames."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.mosaic import make_mosaic
from megatron_ove.preprocess.codec.selection import select_clip
from megatron_ove.preprocess.codec.settings import CodecSettings
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.pictures import decode_picture, encode_jpeg
from megatron_ove.preprocess.record_files import file_state
from megatron_ove.whole_file import write_whole

MOSAIC_QUALITY = 95  # patches of side 14 straddle JPEG's 8 x 8 blocks, so less would bleed between neighbours
FRAME_QUALITY = 90
CLIP_FIELDS = ("stored", "key", "file", "file_state", "patches", "settings")
"""What a line of clips.jsonl must have."""


@dataclass(frozen=True)
class StoredClip:
    """What a .npz holds.

    Attributes:
        mosaic: JPEG of the selected patches, 16 a row, 4:4:4.
        positions: [k, 3] int32 (t, h, w), sorted.
        frames: JPEG of every grid frame.
        info: file, key, source codec and frame count, settings.
    """

    mosaic: bytes
    positions: np.ndarray
    frames: tuple[bytes, ...]
    info: Mapping[str, Any]

    def decoded_frames(self) -> np.ndarray:
        """Returns the grid frames, [t, height, width, 3] uint8 RGB."""
        return np.stack([decode_picture(frame, name="frame of a stored clip") for frame in self.frames])

    def positions_npy(self) -> bytes:
        """Returns the positions as the bytes of a .npy file."""
        stream = io.BytesIO()
        np.save(stream, self.positions)
        return stream.getvalue()


class ClipSelector:
    """Selects a clip's patches and stores them; a clip that is stored with the same settings is left alone."""

    def __init__(self, output: Path, settings: CodecSettings) -> None:
        """Files go to `output`/{key}.npz."""
        self._output, self._settings = output, settings

    def __call__(self, file: InputFile) -> str:
        """Returns the stored file's name; raises `DataError` for a file that is no usable clip."""
        path = file.path
        target = self._output / f"{file.key}.npz"
        info = {
            "key": file.key,
            "file": str(path),
            "file_state": file_state(path),
            "settings": self._settings.as_record(),
        }
        if _is_current(target, info):
            return target.name
        selected = select_clip(path, self._settings)
        clip, positions = selected.clip, selected.positions
        info |= {
            "source_codec": clip.codec,
            "source_frames": clip.num_source_frames,
            "spoilt_packets": clip.spoilt_packets,
            "source_indices": clip.source_indices.tolist(),
            "duplicates": int(clip.is_duplicate.sum()),
            "patches": len(positions),
        }
        mosaic = make_mosaic(clip.frames, positions, self._settings.patch_size)
        frames = [np.frombuffer(encode_jpeg(frame, quality=FRAME_QUALITY), np.uint8) for frame in clip.frames]
        stream = io.BytesIO()
        np.savez(
            stream,
            info=np.frombuffer(json.dumps(info).encode(), np.uint8),
            mosaic=np.frombuffer(encode_jpeg(mosaic, quality=MOSAIC_QUALITY, full_chroma=True), np.uint8),
            positions=positions,
            frame_bytes=np.concatenate(frames),
            frame_sizes=np.array([len(frame) for frame in frames], np.int64),
        )
        write_whole(target, stream.getvalue())
        return target.name


def load_clip(path: str | Path) -> StoredClip:
    """Reads a stored clip.

    Raises:
        DataError: the file is none.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            ends = np.cumsum(stored["frame_sizes"])
            parts = np.split(stored["frame_bytes"], ends[:-1])
            return StoredClip(
                mosaic=stored["mosaic"].tobytes(),
                positions=stored["positions"],
                frames=tuple(part.tobytes() for part in parts),
                info=json.loads(stored["info"].tobytes()),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{path} is not a stored clip ({error}); make it again with tools/codec/1_select_patches.py"
        ) from error


def _is_current(target: Path, info: Mapping[str, Any]) -> bool:
    if not target.exists():
        return False
    try:
        stored = load_clip(target).info
    except DataError:
        return False
    return all(stored.get(name) == info[name] for name in ("file", "file_state", "settings"))
