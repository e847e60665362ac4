"""What may name a sample, wherever it is stored."""

from __future__ import annotations

import re

MAX_KEY_LENGTH = 80
"""Keeps `{key}.positions.npy` within the 100 bytes that a USTAR name field holds."""

_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")


def is_valid_key(key: str) -> bool:
    """Whether `key` can name a sample: no dot, because what follows the first dot is the member's name."""
    return _KEY.fullmatch(key) is not None
