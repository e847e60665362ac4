"""Options that the page maker's tools share: looks with their shares, and pairs of numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ove.preprocess.text_render.looks import LOOKS, Look
from megatron_ove.preprocess.tool_arguments import whole_number


def pair_of_numbers(first: str, second: str) -> dict[str, Any]:
    """Returns what argparse needs for two numbers of at least 1."""
    return {"nargs": 2, "type": whole_number(1), "metavar": (first, second)}


def look_among(looks: Mapping[str, Look]) -> Callable[[str], tuple[str, float]]:
    """Returns an argparse type: NAME or NAME=SHARE of one of `looks`."""

    def parse(text: str) -> tuple[str, float]:
        name, _, share = text.partition("=")
        if name not in looks:
            raise argparse.ArgumentTypeError(f"there is no look '{name}'; choose among {', '.join(looks)}")
        try:
            value = float(share or 1)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"the share '{share}' of {name} is no number above 0; write e.g. {name}=0.5"
            )
        return name, value

    return parse


look_share = look_among(LOOKS)
"""An argparse type: a look of scattered words."""
