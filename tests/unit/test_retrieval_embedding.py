"""Embedding shard sets: batches follow the index, nothing is augmented, the HuggingFace form gets the right patches."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch, PatchPack, Samples
from megatron_ove.errors import ConfigError
from megatron_ove.evaluation.embedding import (
    SampleSettings,
    embed_shard_set,
    iterate_batches,
)
from megatron_ove.evaluation.huggingface import huggingface_encoder, load_exported_model, normalize_pixels
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.shards.writer import ShardWriter

PATCH = 14
SETTINGS = SampleSettings(patch_size=PATCH, image_size=28, max_patches=6, tokens_per_batch=10)


def jpeg(height: int, width: int, value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_pictures(folder: Path, kind: str, sizes: list[tuple[int, int]]) -> ShardSet:
    with ShardWriter(folder, kind=kind, num_classes=9, label_width=2) as writer:  # type: ignore[arg-type]
        for number, (height, width) in enumerate(sizes):
            labels = np.array([number, -1], np.int32)
            assert writer.add(f"s{number}", {"jpg": jpeg(height, width, 40 * number + 20)}, labels)
    return ShardSet.open(folder)


def mean_of_patches(batch: Batch) -> Tensor:
    """An encoder to check with: mean pixel and number of patches of every sample, [b, 2]."""
    patches = batch.main.patches
    assert patches is not None
    bounds = batch.main.cu_seqlens.tolist()
    return torch.stack(
        [torch.tensor([patches[start:stop].float().mean().item(), stop - start]) for start, stop in pairwise(bounds)]
    )


def test_images_come_whole_in_index_order(tmp_path: Path) -> None:
    shards = write_pictures(tmp_path / "images", "image", [(28, 28), (60, 40), (30, 90)])
    result = embed_shard_set(mean_of_patches, shards, SETTINGS)
    assert result.keys == ("s0", "s1", "s2")
    assert result.embeddings[:, 1].tolist() == [4, 4, 4]
    assert result.embeddings[:, 0].tolist() == pytest.approx([20, 60, 100], abs=1.5)
    assert result.labels.tolist() == [[0, -1], [1, -1], [2, -1]]
    again = embed_shard_set(mean_of_patches, shards, SETTINGS, indices=[2, 0])
    assert torch.equal(again.embeddings, result.embeddings[[2, 0]])


def test_pages_keep_their_shape_within_the_budget_and_batches_within_theirs(tmp_path: Path) -> None:
    shards = write_pictures(tmp_path / "pages", "ocr", [(28, 28), (28, 42), (140, 140), (14, 14)])
    batches = list(iterate_batches(shards, SETTINGS, np.arange(4), torch.device("cpu")))
    assert [batch.main.cu_seqlens.tolist() for batch in batches] == [[0, 4, 10], [0, 4, 5]]
    assert batches[0].main.positions[4:].tolist() == [[0, h, w] for h in range(2) for w in range(3)]


def test_a_sample_above_the_batch_budget_goes_alone(tmp_path: Path) -> None:
    shards = write_pictures(tmp_path / "images", "image", [(28, 28), (28, 28)])
    settings = SampleSettings(patch_size=PATCH, image_size=56, tokens_per_batch=3)
    assert [b.num_samples for b in iterate_batches(shards, settings, np.arange(2), torch.device("cpu"))] == [1, 1]


def test_image_size_must_be_whole_patches(tmp_path: Path) -> None:
    shards = write_pictures(tmp_path / "images", "image", [(28, 28)])
    with pytest.raises(ConfigError, match=r"image_size = 30 is not a multiple of encoder\.patch_size = 14.*use 28"):
        embed_shard_set(mean_of_patches, shards, SampleSettings(patch_size=PATCH, image_size=30))


def test_huggingface_form_gets_the_patches_and_positions_of_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (5, 3 * PATCH * PATCH), dtype=torch.uint8, generator=generator)
    positions = torch.randint(0, 9, (5, 3), dtype=torch.int32, generator=generator)
    pack = PatchPack.of_whole_samples(positions, torch.tensor([0, 2, 5], dtype=torch.int32), patches)
    batch = Batch({MAIN_PACK: pack}, Samples.of_one_source("x", ("a", "b")))
    weight = torch.randn(4, 3, PATCH, PATCH, generator=generator)
    seen: list[Tensor] = []

    def model(pixel_values: Tensor, patch_positions: Tensor) -> SimpleNamespace:
        seen.append(patch_positions)
        tokens = torch.nn.functional.conv2d(pixel_values, weight, stride=PATCH).flatten(2).transpose(1, 2)  # [1, n, 4]
        return SimpleNamespace(pooler_output=(tokens * patch_positions.sum(-1, keepdim=True)).sum(1))

    pooled = huggingface_encoder(model, PATCH)(batch)
    flat = normalize_pixels(patches.view(5, 3, PATCH, PATCH)).flatten(1) @ weight.flatten(1).T
    expected = flat * positions.sum(-1, keepdim=True)
    assert torch.equal(torch.cat(seen, dim=1)[0], positions.long())
    torch.testing.assert_close(pooled, torch.stack([expected[:2].sum(0), expected[2:].sum(0)]), rtol=1e-4, atol=1e-3)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json; make one with megatron-ove convert export"):
        load_exported_model(tmp_path)


def test_a_document_has_the_mean_embedding_of_its_pages(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", kind="document") as writer:
        for key, values in {"one": [10], "three": [50, 60, 100], "two": [200, 100]}.items():
            pages = {f"page{page:04d}.jpg": jpeg(28, 28, value) for page, value in enumerate(values)}
            writer.add(key, {"json": b'{"text": ""}', **pages})

    def model(pixel_values: Tensor, patch_positions: Tensor) -> SimpleNamespace:
        del patch_positions
        return SimpleNamespace(pooler_output=pixel_values.mean(dim=(2, 3)))

    shards = ShardSet.open(tmp_path / "set")
    found = embed_shard_set(huggingface_encoder(model, PATCH), shards, SETTINGS)
    assert found.keys == ("one", "three", "two") and found.labels.tolist() == [[-1], [-1], [-1]]
    grey = torch.tensor([10.0, 70.0, 150.0])
    expected = normalize_pixels(grey.to(torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1)).view(3, 3)
    assert torch.allclose(found.embeddings, expected, atol=0.02)
