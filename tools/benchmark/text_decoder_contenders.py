"""What is compared of reading: ours and plain PyTorch with the same weights; losses in chunks and with all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from encoder_contenders import encoder_config, picture_pack, seeded_encoder
from torch import Tensor, nn

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.config.text_generation import TextDecoderConfig
from megatron_ove.convert.decoder_config import decoder_to_hf
from megatron_ove.convert.decoder_weights import decoder_to_published
from megatron_ove.convert.hf_config import to_hf_config
from megatron_ove.convert.mapping import to_hf
from megatron_ove.decoder.text_decoder import TextDecoder
from megatron_ove.decoder.vocabulary_loss import vocabulary_loss
from megatron_ove.evaluation.huggingface import normalize_pixels
from megatron_ove.hf_model.configuration_onevision_encoder import OneVisionEncoderConfig
from megatron_ove.hf_model.modeling_onevision_encoder import OneVisionEncoderModel
from megatron_ove.model.initialization import initialize_parameters
from megatron_ove.parallel.topology import initialize_topology


@dataclass(frozen=True)
class Reading:
    """What both contenders of `reading` are given: sizes, pictures, and texts of unequal length."""

    size: str = "base"
    encoder_layers: int = 4
    resolution: int = 224
    pictures: int = 4
    hidden: int = 576
    decoder_layers: int = 4
    vocabulary: int = 49_152

    def decoder(self) -> TextDecoderConfig:
        """Returns a decoder of the shape of SmolLM2-135M, with fewer layers."""
        return TextDecoderConfig(
            kind="llama",
            hidden_size=self.hidden,
            num_layers=self.decoder_layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(1, self.hidden // 64 // 3),
            ffn_hidden_size=self.hidden * 8 // 3 // 64 * 64,
            vocab_size=self.vocabulary,
        )

    def pixels(self) -> Tensor:
        """Returns [b, 3, H, H] uint8."""
        shape = (self.pictures, 3, self.resolution, self.resolution)
        return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)

    def texts(self) -> list[Tensor]:
        """Returns the answers, of 32 to 96 tokens."""
        generator = torch.Generator().manual_seed(2)
        lengths = torch.randint(32, 97, (self.pictures,), generator=generator).sort().values.tolist()
        return [torch.randint(self.vocabulary, (length,), generator=generator) for length in lengths]

    def bridge(self, width: int) -> nn.Linear:
        """Returns the same linear map each time."""
        linear = nn.Linear(width, self.hidden)
        with torch.no_grad():
            for number, parameter in enumerate(linear.parameters()):
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
        return linear


class _ForwardBackward:
    """Does the same work every time."""

    def prepare(self) -> None:
        """Nothing is to be made ready."""

    def step(self) -> dict[str, float]:
        """Forward and backward."""
        self._forward_backward()
        return {}

    def _forward_backward(self) -> Tensor:
        raise NotImplementedError


class OurReader(_ForwardBackward):
    """Ours: one pack of pictures, one of texts, losses of the answers only."""

    def __init__(self, work: Reading) -> None:
        topology = initialize_topology(ParallelConfig(), seed=0)
        config = encoder_config(work.size, num_layers=work.encoder_layers)
        self.encoder = seeded_encoder(config, topology, torch.float32)
        self.bridge, self.decoder = work.bridge(config.hidden_size), new_decoder(work.decoder(), topology)
        self.pack = picture_pack(work.pixels(), config.patch_size)
        count = (work.resolution // config.patch_size) ** 2
        ids, slots, predicting, start = [], [], [], 0
        for text in work.texts():
            ids += [torch.zeros(count, dtype=torch.int64), text]
            slots.append(torch.arange(start, start + count))
            predicting.append(torch.arange(start + count - 1, start + count + len(text) - 1))
            start += count + len(text)
        lengths = [0, *(count + len(text) for text in work.texts())]
        self.bounds = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.ids, self.slots, self.predicting = torch.cat(ids), torch.cat(slots), torch.cat(predicting)

    def outputs(self) -> dict[str, Tensor]:
        """Returns the loss, and gradients of bridge and patch embedding."""
        loss = self._forward_backward()
        patch = self.encoder.patch_embed.weight.grad
        assert patch is not None and self.bridge.weight.grad is not None
        return {"loss": loss.detach(), "bridge": self.bridge.weight.grad.clone(), "patches": patch.flatten().clone()}

    def _forward_backward(self) -> Tensor:
        for module in (self.encoder, self.bridge, self.decoder):
            module.zero_grad()
        images = self.bridge(self.encoder(self.pack).tokens.squeeze(1))
        hidden = self.decoder(self.ids, self.bounds, images, self.slots)
        losses, _ = self.decoder.losses(hidden[self.predicting], self.ids[self.predicting + 1])
        loss = losses.mean()
        loss.backward()
        return loss


class PlainReader(_ForwardBackward):
    """What a user would write: dense pictures, transformers' decoder, texts filled up, logits of every place."""

    def __init__(self, work: Reading) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        topology = initialize_topology(ParallelConfig(), seed=0)
        config = encoder_config(work.size, num_layers=work.encoder_layers)
        ours = seeded_encoder(config, topology, torch.float32)
        values = to_hf_config(config, image_size=work.resolution, dtype=torch.float32)
        self.encoder = OneVisionEncoderModel(OneVisionEncoderConfig(**values))
        self.encoder.load_state_dict(to_hf(ours.state_dict(), config))
        self.bridge = work.bridge(config.hidden_size)
        section = work.decoder()
        fields = decoder_to_hf(section, dtype="float32", end_token_id=0)
        self.decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        weights = dict(new_decoder(section, topology).named_parameters())
        self.decoder.load_state_dict(decoder_to_published(weights, section), strict=False)
        self.pixels = normalize_pixels(work.pixels())
        texts, longest = work.texts(), max(len(text) for text in work.texts())
        self.ids = torch.stack([F.pad(text, (0, longest - len(text))) for text in texts])
        self.labels = torch.stack([F.pad(text, (0, longest - len(text)), value=-100) for text in texts])
        self.count = (work.resolution // config.patch_size) ** 2

    def outputs(self) -> dict[str, Tensor]:
        """Returns the loss, and gradients of bridge and patch embedding."""
        loss = self._forward_backward()
        patch = self.encoder.embeddings.patch_embedding.weight.grad
        assert patch is not None and self.bridge.weight.grad is not None
        return {"loss": loss.detach(), "bridge": self.bridge.weight.grad.clone(), "patches": patch.flatten().clone()}

    def _forward_backward(self) -> Tensor:
        for module in (self.encoder, self.bridge, self.decoder):
            module.zero_grad()
        images = self.bridge(self.encoder(self.pixels).last_hidden_state)
        embedded = torch.cat([images, self.decoder.get_input_embeddings()(self.ids)], dim=1)
        labels = F.pad(self.labels, (self.count, 0), value=-100)
        loss = self.decoder(inputs_embeds=embedded, labels=labels).loss
        loss.backward()
        return loss


def new_decoder(section: TextDecoderConfig, topology: Any) -> TextDecoder:
    """Returns a decoder with the same weights each time."""
    decoder = TextDecoder(section, topology, torch.float32)
    initialize_parameters(
        decoder.named_parameters(), seed=0, initializer_range=0.02, layer_offset=0, tensor_rank=0, tensor_size=1
    )
    return decoder


@dataclass(frozen=True)
class LossWork:
    """Answer rows, width and vocabulary of `loss`."""

    rows: int = 4096
    hidden: int = 896
    vocabulary: int = 151_936

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights, rows and the gradients of both, which any way of doing it has."""
        return 2 * 4 * self.hidden * (self.rows + self.vocabulary)


class LossContender(_ForwardBackward):
    """The loss and its backward pass, in chunks or with the logits of all rows."""

    def __init__(self, work: LossWork, is_chunked: bool) -> None:
        self._group = initialize_topology(ParallelConfig(), seed=0).tensor_group
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(work.rows, work.hidden, generator=generator).requires_grad_()
        self.weight = (0.05 * torch.randn(work.vocabulary, work.hidden, generator=generator)).requires_grad_()
        self.targets = torch.randint(work.vocabulary, (work.rows,), generator=generator)
        self._is_chunked, self._vocabulary = is_chunked, work.vocabulary

    def outputs(self) -> dict[str, Tensor]:
        """Returns the loss and a part of both gradients."""
        loss = self._forward_backward()
        assert self.rows.grad is not None and self.weight.grad is not None
        return {"loss": loss.detach(), "rows": self.rows.grad.clone(), "weight": self.weight.grad[:1000].clone()}

    def _forward_backward(self) -> Tensor:
        self.rows.grad = self.weight.grad = None
        if self._is_chunked:
            losses, _ = vocabulary_loss(
                self.rows, self.weight, self.targets, group=self._group, vocab_size=self._vocabulary
            )
            loss = losses.mean()
        else:
            loss = F.cross_entropy(F.linear(self.rows, self.weight), self.targets)
        loss.backward()
        return loss
