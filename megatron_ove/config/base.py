"""`StrictModel`: the base of every configuration section.

Unknown keys are refused, types are strict (an int is accepted where a float is meant, nothing else is converted),
objects are frozen, and the docstring under an attribute is its description. A section's cross-field checks are methods
named `_check_*` that yield one sentence per mistake; all of them run, so that one report holds every mistake.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """A configuration section: strict, frozen, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _run_checks(self) -> Self:
        messages: list[str] = []
        for name in dir(type(self)):
            if name.startswith("_check_"):
                messages.extend(getattr(self, name)())
        if messages:
            raise ValueError("\n".join(messages))
        return self
