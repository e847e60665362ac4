"""Greedy writing: the likeliest token, again and again, with a cache of keys and values; for evaluation in a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ove.decoder.attention import KeyValueCache
from megatron_ove.decoder.text_decoder import TextDecoder

_LOOKS = 8
"""Tokens between looks at whether all texts have ended: a look waits for the device."""


@torch.no_grad()
def write_greedily(
    decoder: TextDecoder,
    token_ids: Tensor,
    lengths: Sequence[int],
    image_tokens: Tensor,
    image_slots: Tensor,
    *,
    end_token: int,
    most: int,
) -> list[list[int]]:
    """Continues texts; collective over the tensor group, and the same on every rank of it.

    Args:
        decoder: of this rank.
        token_ids: [sum of lengths] int64 on the device, one text after the other; at image slots anything.
        lengths: tokens of each text, at least 1.
        image_tokens: [I, h].
        image_slots: [I] int64, their places in `token_ids`.
        end_token: ends a text.
        most: tokens that are written to a text, unless it ends before.

    Returns:
        What was written to each text, without the end token; a text that was not ended has `most` tokens.
    """
    if not lengths or most < 1:
        return [[] for _ in lengths]
    ranks = decoder.tp_group.size() if decoder.config.sequence_parallel else 1
    # Sequence parallelism shares out equal numbers of tokens, also when each text brings one: so some are dummies.
    sizes = [*lengths, *[1] * (-len(lengths) % ranks)]
    rest = -sum(sizes) % ranks
    ids = torch.cat([token_ids, token_ids.new_full((len(sizes) - len(lengths) + rest,), end_token)])
    bounds = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lasts = (bounds[1:].long() - 1).to(ids.device)
    cache = KeyValueCache(torch.tensor(sizes, device=ids.device), max(sizes) + most)
    hidden = decoder(ids, bounds, image_tokens, image_slots, cache)[lasts]
    cache.is_reading = False
    written = [decoder.best_tokens(hidden)]
    has_ended = written[0] == end_token
    while len(written) < most:
        if len(written) % _LOOKS == 0 and bool(has_ended[: len(lengths)].all()):
            break
        written.append(decoder.best_tokens(decoder.read_next(written[-1], cache)))
        has_ended |= written[-1] == end_token
    rows = torch.stack(written, dim=1)[: len(lengths)].tolist()
    return [row[: row.index(end_token)] if end_token in row else row for row in rows]
