"""What token alignment needs on a rank of the last stage: an upsampler, a head, and a frozen table of tokens."""

from __future__ import annotations

from itertools import pairwise

from megatron_ove.config.token_alignment import TokenAlignmentConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.planning.footprint import ChunkActivations, ObjectiveFootprint, activation_bytes
from megatron_ove.planning.layout import Layout
from megatron_ove.planning.parameters import Parameter


class TokenAlignmentFootprint(ObjectiveFootprint):
    """An aligner; the table keeps neither gradients nor moments."""

    def parameters(self, config: TrainConfig, name: str, layout: Layout) -> list[Parameter]:
        section, width = _section(config, name), config.encoder.hidden_size
        table = section.table.width or 0
        found = [Parameter("aligner.scale_offset", (1,)), Parameter("aligner.shift_offset", (1,))]
        widths = section.map_widths(width)
        for number, (before, after) in enumerate(pairwise(widths)):
            place = f"aligner.doublings.{number}"
            found.append(Parameter(f"{place}.conv.weight", (before, after, 4, 4)))
            found += [Parameter(f"{place}.norm.weight", (after,)), Parameter(f"{place}.norm.bias", (after,))]
        found += [Parameter("aligner.norm.weight", (width,)), Parameter("aligner.norm.bias", (width,))]
        found += [Parameter("aligner.fc1.weight", (table, width)), Parameter("aligner.fc1.bias", (table,))]
        return [*found, Parameter("aligner.fc2.weight", (table, table)), Parameter("aligner.fc2.bias", (table,))]

    def activations(self, config: TrainConfig, name: str, layout: Layout) -> ChunkActivations:
        """Counts all maps doubled, what each convolution and norm reads; of the head a tenth of the cells, which is
        more than print covers."""
        section, tokens, item = _section(config, name), config.data.tokens_per_microbatch, activation_bytes(config)
        widths = section.map_widths(config.encoder.hidden_size)
        kept = sum(
            tokens * 4**number * before + tokens * 4 ** (number + 1) * 2 * after
            for number, (before, after) in enumerate(pairwise(widths))
        )
        cells = tokens * 4**section.upsample
        head = cells // 10 * (2 * config.encoder.hidden_size + 3 * (section.table.width or 0))
        return ChunkActivations((kept + head) * item, 0, cells * widths[-1] * item)

    def frozen_bytes(self, config: TrainConfig, name: str, layout: Layout) -> int:
        section = _section(config, name)
        if section.table.path is not None:
            from megatron_ove.convert.token_table import token_table_shape

            rows, width = token_table_shape(section.table.path)
        else:
            from megatron_ove.shards.token_cache import TextTokenizer

            rows, width = TextTokenizer(section.tokenizer_path).vocab_size, section.table.width or 0
        return rows * width * activation_bytes(config)


def _section(config: TrainConfig, name: str) -> TokenAlignmentConfig:
    section = config.objectives[name]
    assert isinstance(section, TokenAlignmentConfig)
    return section
