"""OneVisionReaderModel for transformers 4.57 and 5.x: what stands on pictures, written down by a text decoder.

Self-contained: this file is shipped with exported readers and imports torch, transformers and its neighbours only.

Shape letters: S tokens of a picture, D width of the encoder, I image tokens of a picture, H width of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_onevision_reader import OneVisionReaderConfig
from .modeling_onevision_encoder import OneVisionEncoderModel

_SIDE = 2  # tokens of a side that pixel_shuffle joins


class OneVisionReaderBridge(nn.Module):
    """From the encoder's tokens of a picture to the image tokens that the decoder sees."""

    def __init__(self, config: OneVisionReaderConfig) -> None:
        super().__init__()
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        self.kind = config.bridge["kind"]
        if self.kind == "linear":
            self.linear = nn.Linear(width, hidden)
        elif self.kind == "pixel_shuffle":
            self.norm = nn.LayerNorm(_SIDE**2 * width)
            self.fc1 = nn.Linear(_SIDE**2 * width, hidden)
            self.fc2 = nn.Linear(hidden, hidden)
        elif self.kind == "queries":
            self.num_heads = config.bridge["num_heads"]
            self.queries = nn.Parameter(torch.empty(config.bridge["num_queries"], width))
            self.norm_queries, self.norm_tokens, self.norm = (nn.LayerNorm(width) for _ in range(3))
            self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.out = nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.linear = nn.Linear(width, hidden)
        else:
            raise ValueError(f"bridge.kind = {self.kind!r} is unknown; use linear, pixel_shuffle or queries")

    def forward(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Returns [I, H].

        Args:
            tokens: [S, D] of a picture, row by row.
            rows, columns: of its patches.
        """
        if self.kind == "linear":
            return self.linear(tokens)
        if self.kind == "queries":
            return self._look(tokens)
        grid = tokens.unflatten(0, (rows, columns))
        grid = F.pad(grid, (0, 0, 0, -columns % _SIDE, 0, -rows % _SIDE))
        blocks = grid.unflatten(1, (-1, _SIDE)).unflatten(0, (-1, _SIDE)).transpose(1, 2)  # [h, w, 2, 2, D]
        return self.fc2(F.gelu(self.fc1(self.norm(blocks.flatten(2).flatten(0, 1)))))

    def _look(self, tokens: Tensor) -> Tensor:
        query = self.query(self.norm_queries(self.queries)).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        both = self.key_value(self.norm_tokens(tokens)).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        key, value = both.chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1).flatten(1)
        states = self.queries + self.out(attended)
        states = states + self.fc2(F.gelu(self.fc1(self.norm(states))))
        return self.linear(states)


class OneVisionReaderModel(PreTrainedModel):
    """Reads pictures. `generate` writes answers; `forward` gives the loss of given ones."""

    config: OneVisionReaderConfig
    config_class = OneVisionReaderConfig
    base_model_prefix = "onevision_reader"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ["OneVisionEncoderLayer"]

    def __init__(self, config: OneVisionReaderConfig) -> None:
        super().__init__(config)
        self.vision = OneVisionEncoderModel(config.vision_config)
        self.bridge = OneVisionReaderBridge(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # each part asks its own configuration

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        queries = getattr(module, "queries", None) if isinstance(module, OneVisionReaderBridge) else None
        if queries is not None and not getattr(queries, "_is_hf_initialized", False):
            with torch.no_grad():
                queries.normal_(0.0, 0.02)

    def read_pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """Returns the image tokens of the pictures of one text, [sum of I, H].

        Args:
            pictures: [3, height, width] each, normalised; sides are cut to whole patches.
        """
        found = []
        for picture in pictures:
            side = self.config.vision_config.patch_size
            tokens = self.vision(picture[None]).last_hidden_state[0]
            found.append(self.bridge(tokens, picture.shape[-2] // side, picture.shape[-1] // side))
        return torch.cat(found)

    def embed_texts(
        self, pixel_values: Tensor | Sequence[Sequence[Tensor]], questions: Sequence[Sequence[int]] | None
    ) -> list[Tensor]:
        """Returns what stands before each answer, [T, H] each.

        Args:
            pixel_values: [B, 3, height, width], a picture a text; or B lists of pictures [3, height, width].
            questions: token ids of B questions; None = the question that the template has.
        """
        template, found = self.config.template, []
        embed: Any = self.get_input_embeddings()
        for number, pictures in enumerate(pixel_values):
            pictures = [pictures] if isinstance(pictures, Tensor) and pictures.dim() == 3 else list(pictures)
            images = self.read_pictures(pictures)
            asked = template["question"] if questions is None else list(questions[number])
            after = [*template["after_images"], *template["before_question"], *asked, *template["before_answer"]]
            ids = [
                torch.tensor(part, dtype=torch.long, device=images.device)
                for part in (template["before_images"], after)
            ]
            found.append(torch.cat([embed(ids[0]), images.to(embed.weight.dtype), embed(ids[1])]))
        return found

    def forward(
        self,
        pixel_values: Tensor | Sequence[Sequence[Tensor]],
        labels: Sequence[Sequence[int]],
        questions: Sequence[Sequence[int]] | None = None,
    ) -> CausalLMOutputWithPast:
        """Returns the mean loss of answers' tokens, and the logits of each answer's places, one text after the other.

        Args:
            pixel_values, questions: as for `embed_texts`.
            labels: token ids of B answers, their end tokens included.
        """
        embed, losses, logits = self.get_input_embeddings(), [], []
        for before, answer in zip(self.embed_texts(pixel_values, questions), labels, strict=True):
            ids = torch.tensor(list(answer), dtype=torch.long, device=before.device)
            self._check_room(len(before), len(ids))
            output = self.language_model(inputs_embeds=torch.cat([before, embed(ids)])[None])
            own = output.logits[0, len(before) - 1 : -1].float()
            losses.append(F.cross_entropy(own, ids, reduction="none"))
            logits.append(own)
        loss: Any = torch.cat(losses).mean()
        every: Any = torch.cat(logits)
        return CausalLMOutputWithPast(loss=loss, logits=every)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | Sequence[Sequence[Tensor]],
        questions: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> Tensor:
        """Returns the written token ids, [B, longest], as the decoder's own `generate` does.

        Args:
            pixel_values, questions: as for `embed_texts`.
            options: of transformers' `generate`, e.g. max_new_tokens or num_beams.
        """
        texts = self.embed_texts(pixel_values, questions)
        longest = max(len(text) for text in texts)
        embedded = torch.stack([F.pad(text, (0, 0, longest - len(text), 0)) for text in texts])
        seen = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        end = self.config.end_token_id
        defaults = {"eos_token_id": end, "pad_token_id": end, "do_sample": False, "max_new_tokens": 256}
        mask = torch.tensor(seen, device=embedded.device)
        given = {**defaults, **options}
        self._check_room(longest, int(given["max_new_tokens"]))
        return self.language_model.generate(inputs_embeds=embedded, attention_mask=mask, **given)

    def _check_room(self, before: int, written: int) -> None:
        """Raises `ValueError` if a text has more tokens than the decoder has learned places; rotary ones never end."""
        most = self.config.text_config.max_position_embeddings
        if self.config.text_config.model_type == "opt" and before + written > most:
            raise ValueError(
                f"{before} tokens with the pictures and {written} to be written are more than the {most} positions of "
                "the decoder; show smaller pictures or write less"
            )
