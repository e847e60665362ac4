"""`TokenAligner`: from the encoder's tokens to the mean feature of every text token, in the width of its table."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ove.objectives.token_alignment.cells import AlignmentInputs, MapGroup

FIRST_LOG_SCALE, FIRST_BIAS = math.log(10.0), -2.71
"""Of the sigmoid loss, as TokenFD starts them."""


class Doubling(nn.Module):
    """A map of twice the rows and columns: transposed convolution, then LayerNorm over channels.

    The published one has a batch norm over all GPUs, which would make a sample's loss depend on what shares its
    microbatch.
    """

    def __init__(self, width: int, new_width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.conv = nn.ConvTranspose2d(width, new_width, 4, stride=2, padding=1, bias=False, **placement)
        self.norm = nn.LayerNorm(new_width, **placement)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [n, rows, columns, c] to [n, 2 rows, 2 columns, c']."""
        return self.norm(self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class TokenAligner(nn.Module):
    """Upsampler and head, replicated over the tensor group. Source: TokenFD (Guan et al., 2025), as released."""

    def __init__(self, widths: list[int], table_width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        """`widths` are the channels of the maps, see `TokenAlignmentConfig.map_widths`."""
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        width = widths[-1]
        self.doublings = nn.ModuleList(Doubling(before, after, **placement) for before, after in pairwise(widths))
        self.norm = nn.LayerNorm(width, **placement)
        self.fc1 = nn.Linear(width, table_width, **placement)
        self.fc2 = nn.Linear(table_width, table_width, **placement)
        # What is learned is how far they are from where they start, and so begins with 0.
        self.scale_offset = nn.Parameter(torch.empty(1, device=device))
        self.shift_offset = nn.Parameter(torch.empty(1, device=device))

    def forward(self, tokens: Tensor, inputs: AlignmentInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (mean features [N, D] fp32, scale and bias of the sigmoid loss, fp32).

        Args:
            tokens: [T, h], of the encoder.
            inputs: of the microbatch, on the device.
        """
        shown = self.project(self.cells(tokens, inputs.groups)[inputs.cells]).float()  # [U, D]
        means = mean_of_cells(shown, inputs.pair_cells, inputs.pair_tokens, inputs.num_tokens)
        scale = (FIRST_LOG_SCALE + self.scale_offset.float()).exp()
        return means, scale, FIRST_BIAS + self.shift_offset.float()

    def cells(self, tokens: Tensor, groups: tuple[MapGroup, ...]) -> Tensor:
        """Returns [C, h], all cells of all maps."""
        # Every rank calls every layer, also without a picture: their weights are gathered in that order.
        pictures = [tokens[group.rows].unflatten(0, (-1, *group.grid)) for group in groups] or [tokens[:0, None, None]]
        found = []
        for maps in pictures:
            for doubling in self.doublings:
                maps = doubling(maps)
            found.append(maps.flatten(0, 2))
        return torch.cat(found)

    def project(self, cells: Tensor) -> Tensor:
        """Maps cells [n, h] to [n, D]; not linear, so it comes before the mean."""
        return self.fc2(F.gelu(self.fc1(self.norm(cells))))


def mean_of_cells(features: Tensor, cells: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Returns [N, D], the mean feature of each token's cells, from pairs (cell, token) and not from masks.

    Args:
        features: [U, D].
        cells, tokens: [M] int64; every token has a cell.
        num_tokens: N.
    """
    sums = features.new_zeros(num_tokens, features.shape[1]).index_add(0, tokens, features[cells])
    return sums / tokens.bincount(minlength=num_tokens).clamp(min=1)[:, None]


def alignment_losses(
    means: Tensor, rows: Tensor, identity: Tensor, lengths: list[int], scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums over tokens of L1 (a mean over channels), 1 - cosine and the sigmoid loss.

    A token's sigmoid loss is the sum over all tokens of its own sample, so it does not depend on which samples share a
    microbatch; a pair is positive where the tokens are the same, wherever they stand.

    Args:
        means: [N, D] fp32, what the picture shows.
        rows: [N, D] fp32, of the table.
        identity: [N] int64, equal for equal tokens of a sample.
        lengths: tokens of each sample, which are neighbours.
        scale, bias: of the sigmoid.
    """
    l1 = (means - rows).abs().mean(-1).sum()
    unit, wanted = F.normalize(means, dim=-1), F.normalize(rows, dim=-1)
    cosine = (1 - (unit * wanted).sum(-1)).sum()
    sigmoid = means.new_zeros(()) + 0 * (scale + bias).sum()
    for features, targets, own in zip(*(x.split(lengths) for x in (unit, wanted, identity)), strict=True):
        logits = scale * (features @ targets.T) + bias
        sigmoid = sigmoid - F.logsigmoid(torch.where(own[:, None] == own[None], logits, -logits)).sum()
    return l1, cosine, sigmoid
