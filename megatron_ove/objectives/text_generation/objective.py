"""`TextGeneration`: image tokens, a bridge, a causal decoder, and the loss of answers alone.

The decoder lies whole on the last pipeline stage and is split over its tensor ranks. Items are answer tokens, end
tokens included; they are known before the first forward pass, so the step's loss is their exact mean whatever the
layout. A microbatch without texts runs a pack of padding, so that every weight has a gradient, which is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.text_generation import TextGenerationConfig
from megatron_ove.convert.decoder_weights import PublishedDecoder
from megatron_ove.decoder.bridge import build_bridge
from megatron_ove.decoder.text_decoder import TextDecoder
from megatron_ove.decoder.writing import write_greedily
from megatron_ove.model.initialization import fill_parameters
from megatron_ove.model.pooling import heads_of_width
from megatron_ove.objectives.base import Objective, ObjectiveContext
from megatron_ove.objectives.text_generation.measures import WrittenText, measure_texts
from megatron_ove.objectives.text_generation.text_layout import (
    TextLayout,
    TextTemplates,
    lay_out,
    questions_of,
    tokenizer_at,
)
from megatron_ove.objectives.text_generation.text_pack import Pictures, TextPack, build_text_pack, readable_samples
from megatron_ove.outputs import LossTerms, VisionFeatures
from megatron_ove.shards.token_cache import Role, cached_texts

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


@dataclass(frozen=True)
class HeldOutTexts:
    """Inputs of a microbatch of held-out samples.

    Attributes:
        pack: with the answers, for the loss.
        prompts: what stands before each answer, for writing; no pack has more tokens than the one with the answers.
        wanted: the answers of each pack as they are stored.
    """

    pack: TextPack
    prompts: list[TextPack]
    wanted: list[list[str]]


class TextGeneration(Objective):
    """Cross entropy of answer tokens under a decoder that sees the encoder's tokens."""

    def __init__(self, name: str, config: TextGenerationConfig, context: ObjectiveContext) -> None:
        self.name, self.sources = name, config.sources
        self._config, self._topology = config, context.topology
        self._tokenizer = tokenizer_at(config.tokenizer_path, config.normalisation)
        self._templates = TextTemplates(config, self._tokenizer)
        self._multiple = context.topology.tensor_size if context.topology.sequence_parallel else 1
        self.decoder = TextDecoder(config.decoder, context.topology, context.dtype)
        self.bridge = build_bridge(
            config.bridge,
            context.embedding_size,
            config.decoder.hidden_size or 0,
            num_heads=heads_of_width(context.embedding_size),
            device=context.topology.device,
            dtype=context.dtype,
        )

    def modules(self) -> Mapping[str, nn.Module]:
        return {"bridge": self.bridge, "decoder": self.decoder}

    def load_named_weights(self) -> None:
        """Takes over the weights of `decoder.path`."""
        section = self._config.decoder
        if section.path is None:
            return
        published = PublishedDecoder(section.path, section)
        fill_parameters(
            self.decoder.named_parameters(),
            lambda name, shape: published.whole(name),
            layer_offset=0,
            tensor_rank=self._topology.tensor_rank,
            tensor_size=self._topology.tensor_size,
        )

    def collate(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> TextPack:
        return self._build(self._layouts(samples, reader), pack)

    def collate_held_out(self, samples: Samples, pack: PatchPack, reader: SampleReader) -> HeldOutTexts:
        layouts = self._layouts(samples, reader)
        answers = [(sample, layout, start, place) for sample, layout in layouts for start, place in layout.answers]
        whole = self._build(layouts, pack)
        prompts = [(sample, layout_before(layout, start)) for sample, layout, start, _ in answers]
        stored = self._stored_texts([sample for sample, _ in layouts], samples, reader)
        wanted = [stored[sample][place] for sample, _, _, place in answers]
        packs, texts = [], []
        for own in self._shares(prompts, pack, most=len(whole.token_ids)):
            packs.append(self._build([prompts[i] for i in own], pack))
            texts.append([wanted[own[i]] for i in packs[-1].order])
        return HeldOutTexts(whole, packs, texts)

    def num_items(self, batch: Batch) -> int:
        """Returns the number of answer tokens."""
        inputs = batch.inputs[self.name]
        return len((inputs.pack if isinstance(inputs, HeldOutTexts) else inputs).predicting)

    def forward(self, features: VisionFeatures, batch: Batch) -> LossTerms:
        pack: TextPack = batch.inputs[self.name].to(self._topology.device)
        losses, is_right = self._losses(features, pack)
        count = torch.tensor(float(len(losses)), device=losses.device)
        cut, texts = (torch.tensor(float(x), device=losses.device) for x in (pack.num_lost, len(pack.order)))
        loss = losses.sum()
        right = is_right.sum().float()
        metrics = {"loss": (loss.detach(), count), "token_accuracy": (right, count), "cut_tokens": (cut, texts)}
        return LossTerms(loss, metrics)

    def observe_held_out(self, features: VisionFeatures, batch: Batch) -> dict[str, Any]:
        inputs: HeldOutTexts = batch.inputs[self.name]
        device = self._topology.device
        losses, is_right = self._losses(features, inputs.pack.to(device))
        texts = []
        for prompts, wanted in zip(inputs.prompts, inputs.wanted, strict=True):
            texts += self._write(features, prompts.to(device), wanted)
        return {"losses": losses, "is_right": is_right, "texts": texts}

    def _write(self, features: VisionFeatures, prompts: TextPack, wanted: Sequence[str]) -> list[WrittenText]:
        """Writes an answer behind each prompt of a pack on the device."""
        most = self._config.max_written_tokens or self._config.max_text_tokens
        lengths = prompts.cu_seqlens.diff().tolist()
        written = write_greedily(
            self.decoder,
            prompts.token_ids[: sum(lengths)],
            lengths,
            self._image_tokens(features, prompts),
            prompts.image_slots,
            end_token=self._templates.end_token,
            most=most,
        )
        return [
            WrittenText(text, self._tokenizer.decode(ids), is_cut=len(ids) >= most)
            for text, ids in zip(wanted, written, strict=True)
        ]

    def measure_held_out(
        self, observed: Sequence[dict[str, Any]], inputs: Sequence[Any], sample_counts: np.ndarray
    ) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Returns loss and accuracy of answer tokens, and how near to the answers what is written greedily comes."""
        del inputs, sample_counts
        losses = sum(float(one["losses"].sum()) for one in observed)
        right = sum(float(one["is_right"].sum()) for one in observed)
        count = float(sum(len(one["losses"]) for one in observed))
        texts = [text for one in observed for text in one["texts"]]
        figures = {"samples": (float(len(texts)), 1.0), "loss": (losses, count), "token_accuracy": (right, count)}
        return {**figures, **measure_texts(texts)}

    def _shares(self, prompts: Sequence[tuple[int, TextLayout]], pack: PatchPack, *, most: int) -> Iterator[list[int]]:
        """Yields the prompts that are written to together, in order: each brings its pictures with it once more, so
        several turns of a sample would be several times the microbatch. At least one, else at most `most` tokens."""
        pictures, own, size = Pictures(pack, self._config.bridge), [], 0
        for place, (sample, layout) in enumerate(prompts):
            length = len(layout.before) + pictures.count_of(sample) + len(layout.rest)
            if own and size + length > most:
                yield own
                own, size = [], 0
            own.append(place)
            size += length
        if own:
            yield own

    def _stored_texts(self, chosen: Sequence[int], samples: Samples, reader: SampleReader) -> dict[int, list[str]]:
        """Returns sample -> its texts as they are stored, in the order of a token cache."""
        found: dict[int, list[str]] = {}
        for source in self.sources:
            own = [place for place in chosen if samples.source_names[int(samples.source[place])] == source]
            documents = reader.documents(source, samples.row[own]) if own else []
            for place, document in zip(own, documents, strict=True):
                texts = [
                    document.text if role == Role.ANSWER_IS_TEXT else text for role, _, text in cached_texts(document)
                ]
                found[place] = [self._tokenizer.normalise(text) for text in texts]
        return found

    def _layouts(self, samples: Samples, reader: SampleReader) -> list[tuple[int, TextLayout]]:
        """Returns the texts of samples that have an answer, with their places in the microbatch."""
        found = []
        for place in readable_samples(samples, *self.sources):
            source = samples.source_names[int(samples.source[place])]
            texts = reader.texts(source, self._tokenizer.fingerprint).tokens(int(samples.row[place]))
            view = self._config.view_of(source)
            questions = questions_of(texts, view, self._templates, int(samples.seed[place]))
            layout = lay_out(questions, self._templates, self._config.max_text_tokens)
            if layout.is_answer.any():
                found.append((place, layout))
        return found

    def _build(self, layouts: Sequence[tuple[int, TextLayout]], pack: PatchPack) -> TextPack:
        return build_text_pack(
            layouts,
            pack,
            self._config.bridge,
            filler=self._templates.end_token,
            multiple=self._multiple,
            device=self._topology.device,
        )

    def _image_tokens(self, features: VisionFeatures, pack: TextPack) -> Tensor:
        return self.bridge(features.tokens.squeeze(1), pack.bridge_rows, pack.picture_lengths)

    def _losses(self, features: VisionFeatures, pack: TextPack) -> tuple[Tensor, Tensor]:
        """Returns losses [A] and whether each answer token is the likeliest [A], of a pack on the device."""
        image_tokens = self._image_tokens(features, pack)
        hidden = self.decoder(pack.token_ids, pack.cu_seqlens, image_tokens, pack.image_slots)
        return self.decoder.losses(hidden[pack.predicting], pack.token_ids[pack.predicting + 1])


def layout_before(layout: TextLayout, stop: int) -> TextLayout:
    """Returns what of a sample's text stands before place `stop` behind its image tokens."""
    return TextLayout(layout.before, layout.rest[:stop], np.zeros(stop, dtype=bool), [], 0)
