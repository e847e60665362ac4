"""One embedding per region from the tokens that lie in it; regions may share tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RegionPool(nn.Module):
    """A learned query attends, in several heads, to the tokens of each region and to no others.

    Replicated over the tensor group: every rank holds the module and all tokens, so each has the complete gradient.
    Work follows the pairs (token, region): no mask is made.
    """

    def __init__(self, width: int, num_heads: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.probe = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.key_value = nn.Linear(width, 2 * width, device=device, dtype=dtype)
        self.out = nn.Linear(width, width, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, token_rows: Tensor, regions: Tensor, num_regions: int) -> Tensor:
        """Pools each region.

        Args:
            tokens: [T, h].
            token_rows: [M] int64, tokens in regions.
            regions: [M] int64, the region of each.
            num_regions: R.

        Returns:
            [R, h]; of a region without tokens the bias of the last map, which says nothing.
        """
        # Called as a module: its weights may still be on their way until then (overlap_param_gather).
        key, value = self.key_value(tokens[token_rows]).chunk(2, dim=-1)
        key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in (key, value))  # [M, n, d]
        query = self.probe.unflatten(-1, (self.num_heads, -1))
        scores = (key * query).sum(-1, dtype=torch.float32) * key.shape[-1] ** -0.5  # [M, n]
        weights = softmax_of_regions(scores, regions, num_regions)
        summed = value.new_zeros(num_regions, *value.shape[1:], dtype=torch.float32)
        summed = summed.index_add(0, regions, weights[..., None] * value.float())
        return self.out(summed.flatten(1).to(value.dtype))


def softmax_of_regions(scores: Tensor, regions: Tensor, num_regions: int) -> Tensor:
    """Returns [M, n] fp32: the softmax of scores [M, n] fp32 over the entries of each region."""
    places = regions[:, None].expand_as(scores)
    largest = scores.new_full((num_regions, scores.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, places, scores.detach(), "amax")
    exponentials = (scores - largest[regions]).exp()
    sums = scores.new_zeros(num_regions, scores.shape[1]).index_add(0, regions, exponentials)
    return exponentials / sums[regions]


def mean_of_regions(tokens: Tensor, token_rows: Tensor, regions: Tensor, num_regions: int) -> Tensor:
    """Returns [R, h] fp32, the mean of the tokens of each region; 0 of a region without any. See `RegionPool`."""
    sums = tokens.new_zeros(num_regions, tokens.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, regions, tokens[token_rows].float())
    return sums / regions.bincount(minlength=num_regions).clamp(min=1)[:, None]
