"""From uint8 patches to tokens: CLIP normalisation and one linear map, which is the Conv2d over flattened patches."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ove.model.linear import linear

# Mean and standard deviation per colour of pixel values in 0..1. Source: CLIP (Radford et al., 2021), its image
# preprocessing; the OneVision-Encoder keeps them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbed(torch.nn.Module):
    """Linear patch embedding without bias.

    Attributes:
        weight: [h, 3 * p * p], equal to the Conv2d weight [h, 3, p, p] flattened from dim 1.
    """

    def __init__(self, patch_size: int, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        area = patch_size * patch_size
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, 3 * area, device=device, dtype=dtype))
        # Plain attributes, not buffers: casting the module to bf16 must not round them.
        self._mean = torch.tensor(CLIP_MEAN, device=device).repeat_interleave(area)  # [3 * p * p]
        self._std = torch.tensor(CLIP_STD, device=device).repeat_interleave(area)

    def forward(self, patches: Tensor) -> Tensor:
        """Embeds patches.

        Args:
            patches: [s, 3 * p * p], channel-major; uint8 pixel values, or floating point that is already normalised.

        Returns:
            [s, h] in the weight's dtype.
        """
        if not patches.is_floating_point():
            patches = (patches.float() / 255 - self._mean) / self._std
        return linear(patches.to(self.weight.dtype), self.weight)
