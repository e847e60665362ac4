"""Descriptors and labels of many samples as .npz files between the clustering steps, and the tasks that make them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptors import build_describer, describe_clip
from megatron_ove.preprocess.codec.clip_store import load_clip
from megatron_ove.preprocess.input_files import InputFile
from megatron_ove.preprocess.pictures import load_picture
from megatron_ove.preprocess.record_files import current_rows
from megatron_ove.whole_file import write_whole

_SAMPLE_ARRAYS = ("keys", "files", "sheets", "states", "link_names")
_LATER_ARRAYS = ("link_names",)  # which files of earlier versions lack
_PICTURE_STEP = "1_describe_pictures.py"
_FRAMES = " frames"


def clip_describer_name(describer: str, num_frames: int) -> str:
    """Returns the name of what describes clips by `describer` on `num_frames` of their frames."""
    return f"{describer} x {num_frames}{_FRAMES}"


class PictureDescriber:
    """A picture -> [d] float32."""

    def __init__(self, model_folder: Path | None, *, trust_remote_code: bool = False) -> None:
        """See `descriptors.build_describer`."""
        self._describer = build_describer(model_folder, trust_remote_code=trust_remote_code)

    def __call__(self, file: InputFile) -> np.ndarray:
        """Raises `DataError` when the file is no usable picture."""
        return self._describer.describe(load_picture(file.path, file.sheet, suffix=file.suffix))


class StoredClipDescriber:
    """Path of a stored clip -> (its info, [frames * d] float32)."""

    def __init__(self, model_folder: Path | None, num_frames: int, *, trust_remote_code: bool = False) -> None:
        """See `descriptors.build_describer` and `descriptors.describe_clip`."""
        self._describer = build_describer(model_folder, trust_remote_code=trust_remote_code)
        self._num_frames = num_frames

    def __call__(self, path: Path) -> tuple[Mapping[str, Any], np.ndarray]:
        """Raises `DataError` when the file is no stored clip."""
        clip = load_clip(path)
        return clip.info, describe_clip(clip.decoded_frames(), self._describer, num_frames=self._num_frames)


@dataclass(frozen=True)
class SampleFiles:
    """Where samples came from.

    Attributes:
        keys: [n] unique names.
        files: [n] absolute paths.
        sheets: [n] int32, which picture of a file with several.
        states: [n, 2] int64, size and time of each file when it was looked at (see `record_files.file_state`).
        link_names: [n] see `InputFile.link_name`.
    """

    keys: np.ndarray
    files: np.ndarray
    sheets: np.ndarray
    states: np.ndarray
    link_names: np.ndarray

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> SampleFiles:
        """Makes them of records with `key`, `file`, `file_state`, and what else `record_files.as_record` gives."""
        return cls(
            keys=np.array([record["key"] for record in records]),
            files=np.array([record["file"] for record in records]),
            sheets=np.array([record.get("sheet", 0) for record in records], np.int32),
            states=np.array([record["file_state"] for record in records], np.int64).reshape(-1, 2),
            link_names=np.array([record.get("link_name", "") for record in records], str),
        )

    def records(self) -> list[dict[str, Any]]:
        """Returns them as `from_records` takes them."""
        names = ("key", "file", "sheet", "file_state")
        columns = (self.keys.tolist(), self.files.tolist(), self.sheets.tolist(), self.states.tolist())
        records = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return [
            record | ({"link_name": name} if name else {})
            for record, name in zip(records, self.link_names.tolist(), strict=True)
        ]

    def rows(self, rows: Sequence[int]) -> SampleFiles:
        """Returns those in these places."""
        return SampleFiles(*(getattr(self, name)[rows] for name in _SAMPLE_ARRAYS))

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in _SAMPLE_ARRAYS}


@dataclass(frozen=True)
class DescriptorSet:
    """Descriptors of samples: [n, d] float32 of length 1, and what made them."""

    samples: SampleFiles
    descriptors: np.ndarray
    describer: str

    def current(self) -> tuple[DescriptorSet, str]:
        """Returns those of pictures that are as they were when described, and a sentence on the others, or "".

        Stored clips hold all that is used of them, so they are current whatever becomes of their videos.

        Raises:
            DataError: none is.
        """
        if self.describer.endswith(_FRAMES):
            return self, ""
        looked_at = list(zip(self.samples.files.tolist(), self.samples.states.tolist(), strict=True))
        rows, left_out = current_rows(looked_at, what="pictures", step=f"tools/clustering/{_PICTURE_STEP}")
        if not left_out:
            return self, ""
        return replace(self, samples=self.samples.rows(rows), descriptors=self.descriptors[rows]), left_out

    def save(self, path: str | Path) -> None:
        _save_arrays(path, **self.samples.arrays(), descriptors=self.descriptors, describer=self.describer)

    @classmethod
    def load(cls, path: str | Path) -> DescriptorSet:
        """Raises `DataError` when the file is no descriptor set."""
        stored = _load_arrays(path, (*_SAMPLE_ARRAYS, "descriptors", "describer"), _PICTURE_STEP)
        return cls(_samples(stored), stored["descriptors"], str(stored["describer"]))


@dataclass(frozen=True)
class Centers:
    """Cluster centers: [k, d] float32 of length 1, and the describer they belong to."""

    centers: np.ndarray
    describer: str
    seed: int
    num_samples: int

    def save(self, path: str | Path) -> None:
        _save_arrays(path, centers=self.centers, describer=self.describer, seed=self.seed, num_samples=self.num_samples)

    @classmethod
    def load(cls, path: str | Path) -> Centers:
        """Raises `DataError` when the file holds no centers."""
        stored = _load_arrays(path, ("centers", "describer", "seed", "num_samples"), "2_cluster_descriptors.py")
        return cls(stored["centers"], str(stored["describer"]), int(stored["seed"]), int(stored["num_samples"]))


@dataclass(frozen=True)
class LabelSet:
    """Nearest centers of samples: labels [n, 10] int32 (-1 = none), similarities [n, 10] float16, of num_classes."""

    samples: SampleFiles
    labels: np.ndarray
    similarities: np.ndarray
    num_classes: int

    def save(self, path: str | Path) -> None:
        _save_arrays(
            path,
            **self.samples.arrays(),
            labels=self.labels,
            similarities=self.similarities,
            num_classes=self.num_classes,
        )

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Raises `DataError` when the file holds no labels."""
        names = (*_SAMPLE_ARRAYS, "labels", "similarities", "num_classes")
        stored = _load_arrays(path, names, "2_cluster_descriptors.py")
        return cls(_samples(stored), stored["labels"], stored["similarities"], int(stored["num_classes"]))


def _samples(stored: Mapping[str, np.ndarray]) -> SampleFiles:
    none = np.full(len(stored["keys"]), "")
    return SampleFiles(*(stored.get(name, none) for name in _SAMPLE_ARRAYS))


def _save_arrays(path: str | Path, **arrays: object) -> None:
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    write_whole(Path(path), stream.getvalue())


def _load_arrays(path: str | Path, names: tuple[str, ...], made_by: str) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; make it with tools/clustering/{made_by}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names if name in stored or name not in _LATER_ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} is not a result of tools/clustering/{made_by} ({error}); make it again") from error
