"""What each FP8 recipe is called in megatron-core, and what it asks of shapes and of the device.

Source: megatron-core 0.16.1; Transformer Engine 2.11, recipes and their defaults, `check_recipe_support`,
`is_quantizable`.
"""

from __future__ import annotations

from typing import NamedTuple


class Fp8Recipe(NamedTuple):
    """One recipe of Transformer Engine.

    Attributes:
        name: megatron-core's `fp8_recipe`.
        number_format: megatron-core's `fp8`: "hybrid" = e4m3 forward, e5m2 for gradients; "e4m3" = e4m3 for both.
        multiple: what tokens of a rank and widths of a rank's matrix products must be multiples of.
        oldest, below: compute capabilities it runs on: oldest <= capability < below.
        cuda: the oldest CUDA version.
        devices: the same in words.
    """

    name: str
    number_format: str
    multiple: int
    oldest: tuple[int, int]
    below: tuple[int, int]
    cuda: tuple[int, int]
    devices: str


_ANY = (99, 0)

# cuBLAS multiplies FP8 matrices whose sides are multiples of 16. MXFP8 has one scale for 32 values in a row or column.
# Blockwise has blocks of 128; Transformer Engine pads in places and asserts in others, so whole blocks are asked for.
FP8_RECIPES = {
    "delayed": Fp8Recipe("delayed", "hybrid", 16, (8, 9), _ANY, (12, 1), "Ada, Hopper and Blackwell"),
    "current": Fp8Recipe("tensorwise", "hybrid", 16, (8, 9), _ANY, (12, 1), "Ada, Hopper and Blackwell"),
    "mxfp8": Fp8Recipe("mxfp8", "e4m3", 32, (10, 0), (12, 0), (12, 8), "Blackwell of compute capability 10"),
    "blockwise": Fp8Recipe("blockwise", "e4m3", 128, (9, 0), _ANY, (12, 9), "Hopper and Blackwell"),
}
