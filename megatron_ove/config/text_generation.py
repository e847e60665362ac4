"""Text generation: a causal decoder that writes down what an encoder's tokens show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megatron_ove.config.base import StrictModel
from megatron_ove.config.objectives import ObjectiveConfig

if TYPE_CHECKING:
    from megatron_ove.config.train import TrainConfig

VOCABULARY_MULTIPLE = 768
"""Stored rows of a token table are a multiple of this whatever the layout, so that a checkpoint has one shape; 3 * 256,
since heads divide over 3 ranks too."""
OPT_POSITION_OFFSET = 2
"""Rows of OPT's position table that no position uses."""

TextView = Literal["text", "turns", "captions"]


def _form_of_views(value: Any) -> str:
    return "map" if isinstance(value, dict) else "name"


TextViews = Annotated[
    Annotated[TextView, Tag("name")] | Annotated[dict[str, TextView], Tag("map")], Discriminator(_form_of_views)
]
"""What is written of all sources, or source -> what is written of it."""

_Positive = Annotated[int, Field(gt=0)]
_SIZES = ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")


class TextDecoderConfig(StrictModel):
    """A decoder-only language model: sizes of one that starts from nothing, or the folder of a published one."""

    path: str | None = None
    """HuggingFace folder whose sizes and weights the decoder starts with; null = random weights, and the sizes below.
    With a folder the sizes are its own and are filled in."""
    kind: Literal["opt", "qwen2", "llama"] | None = None
    """qwen2: RMSNorm, rotary positions, gated SiLU, biases of queries, keys and values; llama: the same without any
    bias; opt: LayerNorm, learned positions, ReLU, all biases."""
    hidden_size: _Positive | None = None
    """Width of the token stream."""
    num_layers: _Positive | None = None
    """Transformer layers."""
    num_attention_heads: _Positive | None = None
    """Heads of queries."""
    num_key_value_heads: _Positive | None = None
    """Heads of keys and values, each shared by equally many heads of queries; null = as many as those."""
    ffn_hidden_size: _Positive | None = None
    """Width of the MLP."""
    vocab_size: _Positive | None = None
    """Token ids are 0 .. vocab_size - 1; null = as many as the tokenizer has."""
    max_positions: _Positive = 2048
    """Most tokens of a text, image tokens included; rows of opt's position table."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of the norms."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary frequencies; opt has none."""
    tied: bool = True
    """Whether output and token table are one."""

    def _check_sizes(self) -> Iterator[str]:
        missing = [name for name in ("kind", *_SIZES) if getattr(self, name) is None]
        if self.path is None and missing:
            yield (
                f"decoder has neither path nor {', '.join(missing)}, so it cannot be built; name the folder of a "
                "published decoder, or give the sizes of a new one"
            )

    def _check_heads(self) -> Iterator[str]:
        if self.hidden_size is None or self.num_attention_heads is None:
            return
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            yield (
                f"decoder.hidden_size = {self.hidden_size} over num_attention_heads = {self.num_attention_heads} gives "
                "no even head dim, which rotary positions pair; change one of the two"
            )
        if self.num_attention_heads % self.key_value_heads:
            yield (
                f"decoder.num_attention_heads = {self.num_attention_heads} is no multiple of num_key_value_heads = "
                f"{self.key_value_heads}, each of which serves equally many; change one of the two"
            )
        if self.kind == "opt" and self.key_value_heads != self.num_attention_heads:
            yield "decoder.num_key_value_heads has no effect with kind: opt, whose heads all have keys of their own"

    @property
    def is_known(self) -> bool:
        """Whether all sizes are there."""
        return all(getattr(self, name) is not None for name in ("kind", "vocab_size", *_SIZES))

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads or 1

    @property
    def head_dim(self) -> int:
        return (self.hidden_size or 0) // (self.num_attention_heads or 1)

    @property
    def padded_vocab(self) -> int:
        """Rows of the stored token table; those behind the vocabulary are never chosen and have gradient 0."""
        return -(-(self.vocab_size or 0) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def uses_rope(self) -> bool:
        return self.kind != "opt"

    def tensor_sizes(self, most: int = 64) -> list[int]:
        """Returns the numbers of tensor-parallel ranks that the decoder divides over."""
        numbers = (self.num_attention_heads, self.key_value_heads, self.ffn_hidden_size, self.padded_vocab)
        return [size for size in range(1, most + 1) if not any((number or 0) % size for number in numbers)]


class BridgeConfig(StrictModel):
    """From the encoder's tokens to the decoder's input."""

    kind: Literal["linear", "pixel_shuffle", "queries"] = "linear"
    """linear: one linear map a token; pixel_shuffle: 2 x 2 neighbours become one token, through a norm and a two-layer
    MLP; queries: learned queries attend to the tokens of each picture."""
    num_queries: _Positive | None = None
    """Image tokens of each picture with kind: queries."""

    def _check_queries(self) -> Iterator[str]:
        if self.kind == "queries" and self.num_queries is None:
            yield "bridge.kind: queries does not say how many; add num_queries, for instance 64"
        if self.kind != "queries" and self.num_queries is not None:
            yield (
                f"bridge.num_queries = {self.num_queries} has no effect with kind: {self.kind}; set kind: queries or "
                "remove it"
            )


class TextTemplate(StrictModel):
    """What stands around image tokens and texts; encoded with the tokenizer, whose special tokens are recognised.

    A text is before_images, the image tokens of all its pictures, after_images, and for each turn before_question, the
    question, before_answer, the answer and end_token. Only answers and their end tokens have a loss.
    """

    before_images: str = ""
    after_images: str = ""
    before_question: str = ""
    before_answer: str = ""
    end_token: str = "<|endoftext|>"
    """Token that ends an answer; must be one of the tokenizer's."""


class TextGenerationConfig(ObjectiveConfig):
    """Cross entropy of answers, token by token, under a causal decoder that sees the encoder's tokens before them."""

    reads_texts: ClassVar[bool] = True
    kind: Literal["text_generation"]  # pyright: ignore[reportIncompatibleVariableOverride]
    texts: TextViews = "text"
    """What is to be written: text = what stands on the pages; turns = the answers of all turns; captions = one of a
    sample's captions, drawn by its seed. Or source -> one of these, of one decoder that serves several."""
    tokenizer: str | None = None
    """Folder with tokenizer.json, or the file; null = that of decoder.path."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer's meaning; filled in, and compared when a run resumes or a reader is exported."""
    normalisation: Literal["none", "nfc"] = "none"
    """What is done to texts before they are encoded; nfc = Unicode's composed form."""
    instructions: dict[str, str] = {}
    """Task -> question that is asked where a text has none: of a text the task is ocr, of a caption caption, of a turn
    its own."""
    template: TextTemplate = TextTemplate()
    max_text_tokens: _Positive = 256
    """Most tokens of a sample besides its image tokens; what is beyond them is cut, and counted at the start."""
    max_written_tokens: _Positive | None = None
    """Most tokens that are written to an answer of a held-out sample; null = max_text_tokens."""
    bridge: BridgeConfig = BridgeConfig()
    decoder: TextDecoderConfig

    def view_of(self, source: str) -> TextView:
        """Returns what is written of a source."""
        return self.texts[source] if isinstance(self.texts, dict) else self.texts

    def _check_texts(self) -> Iterator[str]:
        if isinstance(self.texts, dict) and set(self.texts) != set(self.sources):
            yield (
                f"texts names {', '.join(self.texts) or 'nothing'}, and source names {', '.join(self.sources)}; say of "
                "each source what is written"
            )

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        is_known = self.decoder.is_known and self.tokenizer_fingerprint is not None
        return () if is_known else ("decoder", "tokenizer_fingerprint")

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer or self.decoder.path or ""

    @property
    def starts_from(self) -> dict[str, str]:
        return {"decoder": self.decoder.path} if self.decoder.path else {}

    def _check_tokenizer(self) -> Iterator[str]:
        if self.tokenizer is None and self.decoder.path is None:
            yield (
                "tokenizer is not given, and neither is decoder.path, whose tokenizer would be taken; name a folder "
                "with a tokenizer.json, e.g. one made by tools/documents/train_tokenizer.py"
            )

    def check_run(self, run: TrainConfig, name: str) -> Iterator[str]:
        size = run.parallel.tensor_model_parallel_size
        sizes = self.decoder.tensor_sizes()
        if self.decoder.is_known and size not in sizes:
            yield (
                f"parallel.tensor_model_parallel_size = {size} does not divide the heads, key-value heads and MLP of "
                f"objectives.{name}.decoder; use one of {', '.join(map(str, sizes))}"
            )
        budget = run.data.text_tokens_per_microbatch
        if run.parallel.sequence_parallel and budget is not None and budget % size:
            yield (
                f"data.text_tokens_per_microbatch = {budget} is not divisible by parallel.tensor_model_parallel_size = "
                f"{size}, which sequence_parallel needs; use a multiple of {size}"
            )
