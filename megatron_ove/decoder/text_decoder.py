"""`TextDecoder`: token table, causal layers and vocabulary, whole on the last pipeline stage.

One class for three published families; what differs between them is settings. Tensor-parallel ranks split layers, token
table and output; sequence parallelism splits what lies between them. The table of all logits is never made.

Shape letters: T tokens of a pack of texts, t texts, I image tokens, A rows with a loss, h hidden, v padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_ove.config.text_generation import OPT_POSITION_OFFSET, TextDecoderConfig
from megatron_ove.decoder.attention import (
    KeyValueCache,
    TextSegments,
    build_text_segments,
    text_rotary_tables,
)
from megatron_ove.decoder.layers import build_decoder_submodules, decoder_transformer_config
from megatron_ove.decoder.vocabulary_loss import best_tokens, vocabulary_loss
from megatron_ove.model.transformer_config import leave_uninitialised
from megatron_ove.parallel.topology import ParallelTopology


class OutputTable(ColumnParallelLinear):
    """The table of an untied output. A module that is *called*, because that is where overlapped gathering of weights
    waits: a product with its weight from outside would use stale numbers."""

    def forward(self, run: Any) -> Any:  # type: ignore[override]  # not a linear map of its own
        """Returns `run(weight)`, weight [v/tp, h]."""
        return run(self.weight)


class TextDecoder(MegatronModule):
    """Reads texts with image tokens in them; says the losses of answers, or the next tokens."""

    def __init__(self, section: TextDecoderConfig, topology: ParallelTopology, dtype: torch.dtype) -> None:
        """Builds it with uninitialised weights.

        Args:
            section: all sizes known.
            topology: this rank's place.
            dtype: of parameters and activations.
        """
        config = decoder_transformer_config(section, topology, dtype)
        super().__init__(config=config)
        self.section, self.tp_group = section, topology.tensor_group
        self._device = topology.device
        hidden = config.hidden_size
        self.word_embeddings = VocabParallelEmbedding(
            section.padded_vocab, hidden, init_method=leave_uninitialised, config=config, tp_group=self.tp_group
        )
        self.position_embeddings = None
        if not section.uses_rope:
            count = section.max_positions + OPT_POSITION_OFFSET
            self.position_embeddings = torch.nn.Embedding(count, hidden, device=topology.device, dtype=dtype)
        self.transformer = TransformerBlock(
            config, build_decoder_submodules(config, topology.device), pg_collection=topology.process_groups
        )
        self.output_table = None
        if not section.tied:
            self.output_table = OutputTable(
                hidden,
                section.padded_vocab,
                config=config,
                init_method=leave_uninitialised,
                bias=False,
                gather_output=False,
                tp_group=self.tp_group,
            )

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        image_tokens: Tensor,
        image_slots: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns [T, h] after the final norm, whole on every tensor rank.

        Args:
            token_ids: [T] int64; at image slots anything. T is a multiple of the ranks of sequence parallelism.
            cu_seqlens: [t + 1] int32 on the CPU, boundaries of texts; tokens behind the last are padding.
            image_tokens: [I, h], equal on the tensor ranks; their gradient is complete on each of them.
            image_slots: [I] int64, distinct places of the image tokens in the pack.
            cache: filled with keys and values of all texts.
        """
        segments = build_text_segments(cu_seqlens, len(token_ids), self._device)
        segments.cache = cache
        embedded = self.word_embeddings(token_ids)  # [T, h]
        return self._run_layers(embedded.index_copy(0, image_slots, image_tokens.to(embedded.dtype)), segments)

    def read_next(self, token_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Returns [t, h] for one more token of every text, [t] int64."""
        segments = TextSegments(qkv_format="thd", positions=cache.lengths, cache=cache)
        hidden = self._run_layers(self.word_embeddings(token_ids), segments)
        cache.lengths = cache.lengths + 1
        return hidden

    def losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (cross entropy [A] fp32, whether the likeliest token is right [A]) of rows [A, h] and tokens [A]."""
        return self._with_output_weight(
            lambda weight: vocabulary_loss(
                rows, weight, targets, group=self.tp_group, vocab_size=self.section.vocab_size or 0
            )
        )

    def best_tokens(self, rows: Tensor) -> Tensor:
        """Returns [A] int64, the likeliest next token of rows [A, h], the same on every tensor rank."""
        return self._with_output_weight(
            lambda weight: best_tokens(rows, weight, group=self.tp_group, vocab_size=self.section.vocab_size or 0)
        )

    def _with_output_weight(self, run: Any) -> Any:
        # The tied table's weights have been waited for when tokens were looked up.
        return run(self.word_embeddings.weight) if self.output_table is None else self.output_table(run)

    def _run_layers(self, hidden: Tensor, segments: TextSegments) -> Tensor:
        section = self.section
        if self.position_embeddings is not None:
            # Padding may be longer than any text; what stands there influences nothing.
            places = segments.positions.clamp(max=section.max_positions - 1) + OPT_POSITION_OFFSET
            hidden = hidden + self.position_embeddings(places)
        else:
            segments.cos, segments.sin = text_rotary_tables(
                segments.positions, section.head_dim, section.rope_theta, self.config.params_dtype
            )
        hidden = hidden.unsqueeze(1)  # [T, 1, h]
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        hidden = self.transformer(hidden, attention_mask=None, packed_seq_params=segments)
        if self.config.sequence_parallel:
            # What follows is done alike on every rank, so each has the whole gradient: the backward pass only slices.
            hidden = gather_from_sequence_parallel_region(hidden, False, group=self.tp_group)
        return hidden.squeeze(1)
