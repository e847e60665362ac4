"""What a text decoder and its bridge need on a rank of the last stage, counted from the modules in `decoder/`."""

from __future__ import annotations

from megatron_ove.config.text_generation import TextDecoderConfig, TextGenerationConfig
from megatron_ove.config.train import TrainConfig
from megatron_ove.convert.decoder_weights import published_shapes
from megatron_ove.planning.footprint import ChunkActivations, ObjectiveFootprint, activation_bytes
from megatron_ove.planning.layout import Layout
from megatron_ove.planning.parameters import Parameter

LOGIT_BYTES = 32 << 20
"""Logits that `decoder/vocabulary_loss.py` has at a time."""


class TextGenerationFootprint(ObjectiveFootprint):
    """A bridge and a decoder."""

    def parameters(self, config: TrainConfig, name: str, layout: Layout) -> list[Parameter]:
        section = config.objectives[name]
        assert isinstance(section, TextGenerationConfig)
        return [*_bridge(section, config.encoder.hidden_size), *_decoder(section.decoder, layout.tensor)]

    def activations(self, config: TrainConfig, name: str, layout: Layout) -> ChunkActivations:
        """Counts a full text pack: per layer norms, projections, attention and MLP as for the encoder's local layers,
        the embedded tokens, and the logits of a few rows."""
        section = config.objectives[name]
        assert isinstance(section, TextGenerationConfig)
        decoder, item, tokens = section.decoder, activation_bytes(config), config.data.text_tokens_per_microbatch or 0
        hidden, ffn = decoder.hidden_size or 0, decoder.ffn_hidden_size or 0
        share = tokens // layout.token_share
        keys = decoder.key_value_heads * decoder.head_dim
        mlp = (2 if decoder.kind == "opt" else 4) * ffn  # gate, up, their product and the activation
        layer = 4 * share * hidden + tokens * (4 * hidden + 4 * keys + mlp) // layout.tensor
        kept = ((decoder.num_layers or 0) * layer + 3 * tokens * hidden) * item
        # The table's gradient is added up in fp32 beside the product of a few rows, then rounded.
        table = decoder.padded_vocab // layout.tensor * hidden * (4 + (0 if item == 4 else 4 + item))
        return ChunkActivations(kept, 0, 3 * LOGIT_BYTES + table + 2 * tokens * (hidden + ffn // layout.tensor) * item)


def _decoder(section: TextDecoderConfig, tensor: int) -> list[Parameter]:
    found = []
    for name, shape in published_shapes(section).items():
        module, _, kind = name.rpartition(".")
        rows_split = module.endswith(("linear_qkv", "linear_fc1", "word_embeddings", "output_table"))
        columns_split = kind == "weight" and module.endswith(("linear_proj", "linear_fc2"))
        share = list(shape)
        if rows_split:
            share[0] //= tensor
        elif columns_split:
            share[1] //= tensor
        is_sharded = rows_split or columns_split
        sees_sequence = not is_sharded and module.startswith("transformer")
        found.append(Parameter(f"decoder.{name}", tuple(share), is_sharded, sees_sequence))
    return found


def _bridge(section: TextGenerationConfig, width: int) -> list[Parameter]:
    hidden, kind = section.decoder.hidden_size or 0, section.bridge.kind
    linears: dict[str, tuple[int, int]] = {"linear": (hidden, width)}
    norms: dict[str, int] = {}
    own: list[Parameter] = []
    if kind == "pixel_shuffle":
        linears = {"fc1": (hidden, 4 * width), "fc2": (hidden, hidden)}
        norms = {"norm": 4 * width}
    elif kind == "queries":
        own = [Parameter("bridge.queries", (section.bridge.num_queries or 0, width))]
        linears = {"query": (width, width), "key_value": (2 * width, width), "out": (width, width)}
        linears |= {"fc1": (4 * width, width), "fc2": (width, 4 * width), "linear": (hidden, width)}
        norms = dict.fromkeys(("norm_queries", "norm_tokens", "norm"), width)
    found = [*own]
    for name, shape in linears.items():
        found += [Parameter(f"bridge.{name}.weight", shape), Parameter(f"bridge.{name}.bias", shape[:1])]
    for name, size in norms.items():
        found += [Parameter(f"bridge.{name}.{one}", (size,)) for one in ("weight", "bias")]
    return found
