"""Configuration of OneVisionReaderModel: an encoder, a bridge and a text decoder.

Self-contained: this file is shipped with exported readers and imports nothing but transformers and its neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .configuration_onevision_encoder import OneVisionEncoderConfig


class OneVisionReaderConfig(PretrainedConfig):
    """What a reader is made of.

    Args:
        vision_config: of the encoder.
        text_config: of the decoder, as its own config.json has it.
        bridge: {"kind": "linear" | "pixel_shuffle" | "queries", "num_queries", "num_heads"}.
        template: token ids that stand around image tokens and texts: "before_images", "after_images",
            "before_question", "before_answer", lists of them, and "question", what is asked if nothing else is.
        end_token_id: ends an answer.
        normalisation: what was done to texts before they were encoded: "none", or "nfc", Unicode's composed form.
        trained_on: "texts": what it learned to write ("text", "turns" or "captions"), "max_patches": the most patches
            of a page, "max_text_tokens": the most tokens of a text.
    """

    model_type = "onevision_reader"
    # Without an annotation, which would make it a field of a dataclass in transformers 5.
    sub_configs = {"vision_config": OneVisionEncoderConfig, "text_config": AutoConfig}  # pyright: ignore

    def __init__(
        self,
        vision_config: Mapping[str, Any] | OneVisionEncoderConfig | None = None,
        text_config: Mapping[str, Any] | PretrainedConfig | None = None,
        bridge: Mapping[str, Any] | None = None,
        template: Mapping[str, list[int]] | None = None,
        end_token_id: int = 0,
        normalisation: str = "none",
        trained_on: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if vision_config is None or isinstance(vision_config, Mapping):
            vision_config = OneVisionEncoderConfig(**(vision_config or {}))
        if text_config is None or isinstance(text_config, Mapping):
            values = dict(text_config or {"model_type": "llama"})
            text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.vision_config, self.text_config = vision_config, text_config
        self.bridge = dict(bridge or {"kind": "linear"})
        names = ("before_images", "after_images", "before_question", "before_answer", "question")
        self.template = {name: list((template or {}).get(name, [])) for name in names}
        self.end_token_id, self.normalisation = end_token_id, normalisation
        self.trained_on = dict(trained_on or {})
        kwargs.pop("tie_word_embeddings", None)  # the decoder's own configuration says it
        super().__init__(tie_word_embeddings=False, **kwargs)
