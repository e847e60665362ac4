"""The encoders that the head ablation trains: a perceptron for vectors, the project's own small ViT for pictures."""

from __future__ import annotations

import torch
from ablation_data import AblationData
from torch import Tensor, nn

from megatron_ove.evaluation.huggingface import normalize_pixels
from megatron_ove.hf_model.configuration_onevision_encoder import OneVisionEncoderConfig
from megatron_ove.hf_model.modeling_onevision_encoder import OneVisionEncoderModel

EMBEDDING_SIZE, HIDDEN_SIZE = 128, 512
"""Of the perceptron."""
VIT_SIZE, VIT_LAYERS, VIT_HEADS, PATCH_SIZE = 96, 3, 3, 14
INITIAL_RANGE = 0.05
"""Of the ViT's weights unless another is asked for; about 1 / sqrt(3 * VIT_SIZE), as in examples/read_words."""


class PictureEncoder(nn.Module):
    """The encoder in its HuggingFace form, on grey pictures."""

    def __init__(self, initializer_range: float) -> None:
        """`initializer_range`: standard deviation of fresh weights."""
        super().__init__()
        self.vit = OneVisionEncoderModel(
            OneVisionEncoderConfig(
                hidden_size=VIT_SIZE,
                intermediate_size=4 * VIT_SIZE,
                num_hidden_layers=VIT_LAYERS,
                num_attention_heads=VIT_HEADS,
                patch_size=PATCH_SIZE,
                initializer_range=initializer_range,
            )
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps [n, h, w] uint8 to [n, VIT_SIZE]."""
        colours = pictures[:, None].expand(-1, 3, -1, -1)
        pooled: Tensor = self.vit(normalize_pixels(colours)).pooler_output
        return pooled

    @torch.no_grad()
    def shift(self, offset: Tensor | float) -> None:
        """Adds `offset` [VIT_SIZE] to every embedding."""
        assert self.vit.head is not None
        self.vit.head.mlp.fc2.bias.add_(offset)


def make_encoder(data: AblationData, initializer_range: float | None) -> tuple[nn.Module, int]:
    """Returns a fresh encoder of what `data` shows, and the size of its embeddings.

    Args:
        data: pictures or vectors.
        initializer_range: of the ViT; the perceptron has torch's own initial weights and takes None.
    """
    if data.train.inputs.dim() == 3:
        assert initializer_range is not None
        return PictureEncoder(initializer_range), VIT_SIZE
    perceptron = nn.Sequential(
        nn.Linear(data.train.inputs.shape[1], HIDDEN_SIZE),
        nn.GELU(),
        nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE),
        nn.GELU(),
        nn.Linear(HIDDEN_SIZE, EMBEDDING_SIZE),
    )
    return perceptron, EMBEDDING_SIZE


def mean_cosine(directions: Tensor) -> float:
    """Returns the mean cosine of two different rows of `directions` [n, e], which have length 1."""
    count = len(directions)
    total = float(torch.linalg.vector_norm(directions.double().sum(0)) ** 2)
    return (total - count) / (count * (count - 1))
