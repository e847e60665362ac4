"""The token embeddings of a language model in a HuggingFace folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ove.errors import CheckpointError

_NAMES = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight")
"""Ends of its name: Llama, Qwen, OPT and most others; InternLM2; GPT-2; Bloom."""
_LOOKED_AT = 256
"""Rows that a fingerprint is made of."""


def read_token_table(folder: str | Path) -> Tensor:
    """Returns [v, D] fp32, one row a token.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file, name = _find(Path(folder))
    with _opened(file) as stored:
        return stored.get_tensor(name).to(torch.float32)


def token_table_shape(folder: str | Path) -> tuple[int, int]:
    """Returns (v, D); reads no weights.

    Raises:
        CheckpointError: as `read_token_table`.
    """
    file, name = _find(Path(folder))
    with _opened(file) as stored:
        rows, width = stored.get_slice(name).get_shape()
    return int(rows), int(width)


def token_table_fingerprint(folder: str | Path) -> str:
    """Returns 16 hex digits of the table's size and of rows spread over it, by which a run knows it again.

    Raises:
        CheckpointError: as `read_token_table`.
    """
    file, name = _find(Path(folder))
    with _opened(file) as stored:
        table = stored.get_slice(name)
        rows, width = table.get_shape()
        digest = hashlib.sha256(f"{rows} {width}".encode())
        for number in range(min(rows, _LOOKED_AT)):
            row = number * rows // min(rows, _LOOKED_AT)
            digest.update(table[row : row + 1].to(torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch the folder again") from error


def _find(folder: Path) -> tuple[Path, str]:
    """Returns (file, name of the table in it)."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if any(Path(file).name != file for file in names.values()):
                raise ValueError("its index names files of other folders")
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as stored:
                names = dict.fromkeys(stored.keys(), "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no readable model.safetensors ({error}); name the folder of a language model with "
            "safetensors"
        ) from error
    found = [name for name in names if name.endswith(_NAMES)]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} has {len(found)} weights that may be a table of tokens ({', '.join(found) or 'none'}), where "
            f"one ending in {' or '.join(_NAMES)} is looked for; name the folder of a language model"
        )
    return folder / names[found[0]], found[0]
