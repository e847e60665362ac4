"""Loading of .npy files that may be damaged, or made to do harm: anything but a plain array is a sentence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megatron_ove.errors import DataError


def load_array(path: Path, *, in_memory: bool, advice: str) -> np.ndarray:
    """Opens an .npy file of numbers, texts or records.

    Args:
        path: the file.
        in_memory: whether it is read now; else it is memory-mapped.
        advice: what to do about a file that cannot be used; the end of the sentence.

    Raises:
        DataError: it is missing, unreadable, no such file, or its length is not that of its array.
    """
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            start, end = stream.tell(), stream.seek(0, 2)
        if dtype.hasobject or is_fortran:
            raise ValueError(f"it holds {dtype}" if dtype.hasobject else "its order is Fortran's")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it has {end - start} bytes for an array of shape {list(shape)}")
        if in_memory or math.prod(shape) == 0:
            return np.fromfile(path, dtype, math.prod(shape), offset=start).reshape(shape)
        return np.memmap(path, dtype, "r", start, shape)
    except Exception as error:  # a header is parsed as Python, which fails in many ways
        raise DataError(f"{path} is missing or unreadable ({error}); {advice}") from error
