"""Fixed order of additions on a GPU, so that a resumed run is bit-equal to an uninterrupted one.

One switch of torch's for the whole process. Scaled-dot-product attention and indexed additions ask it, and so do
flash-attn (as called here) and Transformer Engine's attention when it is built; so it is thrown before the model is.
"""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels() -> None:
    """Makes this process add in a fixed order from here on; an operation that cannot, warns."""
    # cuBLAS reads it when its first product runs; without it, products on several streams may differ.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every tensor
