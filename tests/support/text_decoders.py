"""Tiny published decoders, and a pack of texts with image tokens for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ove.config.text_generation import TextDecoderConfig

# Small, but with what is special kept: fewer heads of keys, vocabularies that need padding, tied and untied.
SECTIONS = {
    "qwen2": TextDecoderConfig(
        kind="qwen2",
        hidden_size=112,
        num_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
        ffn_hidden_size=160,
        vocab_size=301,
        norm_epsilon=1e-6,
        rope_theta=1e6,
    ),
    "llama": TextDecoderConfig(
        kind="llama",
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        ffn_hidden_size=96,
        vocab_size=256,
        tied=False,
    ),
    "opt": TextDecoderConfig(
        kind="opt",
        hidden_size=48,
        num_layers=3,
        num_attention_heads=12,
        ffn_hidden_size=96,
        vocab_size=301,
        max_positions=64,
    ),
}


def published_model(section: TextDecoderConfig, *, scale: float = 0.15) -> Any:
    """Returns transformers' model of a decoder, fp32, with random weights large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_ove.convert.decoder_config import decoder_to_hf

    values = decoder_to_hf(section, dtype="float32", end_token_id=0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1 too
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter == 1).float())
    return model


def write_published_decoder(folder: Path, section: TextDecoderConfig, *, scale: float = 0.15) -> Path:
    """Writes such a model as a HuggingFace folder."""
    published_model(section, scale=scale).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Texts:
    """Three texts of a pack, two of equal length, then padding; image tokens behind the first token, answers last."""

    token_ids: Tensor
    cu_seqlens: Tensor
    image_tokens: Tensor
    image_slots: Tensor
    predicting: Tensor


def texts_for(section: TextDecoderConfig) -> Texts:
    """Returns random texts for a decoder; T is a multiple of 4."""
    generator = torch.Generator().manual_seed(5)
    lengths, images, answers = [17, 17, 11], [6, 4, 5], [5, 8, 3]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts, stops = bounds[:-1].tolist(), bounds[1:].tolist()
    return Texts(
        token_ids=torch.randint(0, section.vocab_size, (48,), generator=generator),
        cu_seqlens=bounds,
        image_tokens=torch.randn(sum(images), section.hidden_size, generator=generator),
        image_slots=torch.cat([torch.arange(at + 1, at + 1 + n) for at, n in zip(starts, images, strict=True)]),
        predicting=torch.cat([torch.arange(at - n - 1, at - 1) for at, n in zip(stops, answers, strict=True)]),
    )


@dataclass(frozen=True)
class Expected:
    """What transformers says of `texts_for`: weights, losses of the answer tokens, and gradients of their sum."""

    state: dict[str, Tensor]
    losses: Tensor
    gradients: dict[str, Tensor]
    image_gradient: Tensor


def expected_of(section: TextDecoderConfig) -> Expected:
    """Runs transformers' model, one text at a time."""
    model, texts = published_model(section), texts_for(section)
    images = texts.image_tokens.clone().requires_grad_()
    embedded = model.get_input_embeddings()(texts.token_ids).index_copy(0, texts.image_slots, images)
    losses = []
    bounds = texts.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        logits = model(inputs_embeds=embedded[None, start:stop]).logits[0]
        mine = texts.predicting[(texts.predicting >= start) & (texts.predicting < stop)]
        losses.append(F.cross_entropy(logits[mine - start], texts.token_ids[mine + 1], reduction="none"))
    torch.cat(losses).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Expected(dict(model.state_dict()), torch.cat(losses).detach(), gradients, images.grad)
