"""From numpy arrays to tensors that a device fetches without anybody waiting for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def host_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns a CPU tensor with the contents of `array`; in pinned memory if `device` is CUDA, else the array's own.

    `.to(device, non_blocking=True)` of the result lets the host go on; from other memory a copy of more than 64 KB
    waits for everything that the device has still to do.

    Args:
        array: contiguous.
        device: that the tensor will be copied to.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a new thread's device is the first one of the machine
        return tensor.pin_memory()
