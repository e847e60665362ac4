"""Memory of a training process on a CPU: what is freed is kept for the next step, kernels of past shapes are not.

glibc gives large freed blocks back to the system; the next activation of the same size then costs thousands of page
faults, each of which fills a page with zeros: a fifth of a base encoder's step. Kept, as torch's own allocator does on
a GPU, they are used again; the process stays as large as its fullest moment, and larger where blocks of different sizes
leave gaps. oneDNN on the other hand keeps a compiled kernel for each of the last 1,024 shapes, about a megabyte each,
and packs differ in length from step to step; a smaller cache is as fast.

Source: mallopt(3); oneDNN, Primitive Cache.
"""

from __future__ import annotations

import ctypes
import logging
import os

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt's names
_GROWTH = 64 * 2**20  # bytes asked of the system at a time
_GLIBC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
_KERNELS, _CACHED_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 64


def prepare_cpu_memory() -> bool:
    """Makes this process keep what it frees, and fewer of oneDNN's kernels; returns whether it keeps what it frees.

    Holds for the whole process and cannot be undone; call it before the first matrix product. What the environment
    sets goes first: ONEDNN_PRIMITIVE_CACHE_CAPACITY, or any of glibc's MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_,
    MALLOC_MMAP_MAX_ and MALLOC_MMAP_THRESHOLD_. C libraries other than glibc are left alone.
    """
    os.environ.setdefault(_KERNELS, str(_CACHED_KERNELS))
    given = [name for name in _GLIBC_VARIABLES if name in os.environ]
    if given:
        logger.info("%s decides what becomes of freed memory.", " and ".join(given))
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _GROWTH}
    accepted = [library.mallopt(name, value) for name, value in settings.items()]
    return all(accepted)
