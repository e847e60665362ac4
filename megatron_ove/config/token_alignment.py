"""Token alignment: what stands in a token's pixels is the language model's embedding of the token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ove.config.base import StrictModel
from megatron_ove.config.objectives import ObjectiveConfig

_Weight = Annotated[float, Field(ge=0)]


class TokenTableConfig(StrictModel):
    """The frozen rows that pixels are aligned with, one a token."""

    path: str | None = None
    """HuggingFace folder of a language model, whose token embeddings are the rows; read at every start."""
    width: Annotated[int, Field(gt=0)] | None = None
    """Channels of a table of fixed random rows instead, the same for every seed: enough to find what is learned, and
    of no use to a language model. With a path, that of its rows, filled in."""

    fingerprint: str | None = None
    """Of the rows of a path; filled in, and compared when a run resumes."""

    def _check_source(self) -> Iterator[str]:
        if self.path is None and self.width is None:
            yield (
                "table has neither path nor width; name the folder of a language model, or the width of a table of "
                "random rows, for instance 256"
            )


class TokenAlignmentConfig(ObjectiveConfig):
    """L1 + (1 - cosine) + a sigmoid loss between a token's row and the mean feature of the pixels that show it."""

    kind: Literal["token_alignment"]  # pyright: ignore[reportIncompatibleVariableOverride]
    table: TokenTableConfig
    tokenizer: str | None = None
    """Folder with tokenizer.json, or the file; null = that of table.path."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer's meaning; filled in, and compared when a run resumes."""
    unit: Literal["token", "character"] = "token"
    """What is aligned: every token of a text, or every character as the tokenizer writes it by itself."""
    upsample: Annotated[int, Field(ge=0, le=3)] = 2
    """Times that the map of the encoder's tokens is doubled in both directions: 2 = 16 cells a patch."""
    max_tokens: Annotated[int, Field(gt=0)] = 128
    """Most tokens of a sample in a step, drawn by its seed from those that can be seen."""
    l1_weight: _Weight = 1.0
    """Of the L1 distance, a mean over channels."""
    cosine_weight: _Weight = 1.0
    """Of 1 - cosine."""
    sigmoid_weight: _Weight = 1.0
    """Of the sigmoid loss over pairs of a sample's tokens."""

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        is_known = self.table.width is not None and self.tokenizer_fingerprint is not None
        return () if is_known else ("table", "tokenizer_fingerprint")

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer or self.table.path or ""

    def map_widths(self, width: int) -> list[int]:
        """Returns the channels of an encoder's map of `width` before the first doubling and behind each: as released,
        half of them between two doublings, and all behind the last."""
        return [width] + [width // 2] * max(0, self.upsample - 1) + [width] * min(1, self.upsample)

    def _check_tokenizer(self) -> Iterator[str]:
        if self.tokenizer is None and self.table.path is None:
            yield (
                "tokenizer is not given, and neither is table.path, whose tokenizer would be taken; name a folder with "
                "a tokenizer.json, e.g. one made by tools/documents/train_tokenizer.py"
            )

    def _check_weights(self) -> Iterator[str]:
        if not (self.l1_weight or self.cosine_weight or self.sigmoid_weight):
            yield "l1_weight, cosine_weight and sigmoid_weight are all 0, so nothing is learned; raise one of them"
