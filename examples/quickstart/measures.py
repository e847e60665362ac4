"""What the demo measures: that the export equals the trained model, and what training was good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ove.batch import PatchPack
from megatron_ove.convert.class_centers import ClassHead, load_class_head
from megatron_ove.convert.encoder_inference import load_encoder_for_inference
from megatron_ove.evaluation.embedding import (
    EmbeddedSet,
    EncoderCallable,
    SampleSettings,
    embed_shard_set,
    iterate_batches,
)
from megatron_ove.evaluation.evaluate_shards import group_names
from megatron_ove.evaluation.huggingface import huggingface_encoder, load_exported_model, normalize_pixels
from megatron_ove.evaluation.retrieval import (
    cosine_scores,
    first_right,
    label_retrieval,
    mean_over_queries,
    reciprocal_rank,
    same_group,
)
from megatron_ove.parallel.topology import destroy_topology
from megatron_ove.shards.shard_set import ShardSet

_CLIP_NAME = r"^(.+?)(?:-cut\d+)?-[0-9a-f]+$"


@dataclass(frozen=True)
class Model:
    """One stage of training: its encoder as exported, and the heads of its checkpoint.

    Attributes:
        encode: the exported encoder.
        heads: objective name -> head.
    """

    encode: EncoderCallable
    heads: Mapping[str, ClassHead]


def load_model(export_dir: Path, checkpoint: Path, objectives: list[str], patch_size: int) -> Model:
    """Loads an export and the heads it was trained with."""
    model = load_exported_model(export_dir)
    heads = {name: load_class_head(checkpoint, name) for name in objectives}
    return Model(huggingface_encoder(model, patch_size), heads)


def export_difference(
    export_dir: Path, checkpoint: Path, shard_sets: Mapping[str, ShardSet], settings: SampleSettings
) -> dict[str, float]:
    """Compares an export, called as its users call it, with the encoder of the checkpoint.

    Args:
        export_dir: HuggingFace folder.
        checkpoint: the checkpoint it was made from.
        shard_sets: name -> shard set; the first sample of each is embedded.
        settings: how samples become patches.

    Returns:
        Name -> largest absolute difference of pooled embedding and of tokens, fp32.
    """
    exported = load_exported_model(export_dir)
    encoder, _ = load_encoder_for_inference(checkpoint)
    differences = {}
    for name, shards in shard_sets.items():
        (batch,) = iterate_batches(shards, settings, np.array([0]), torch.device("cpu"))
        with torch.inference_mode():
            ours = encoder(batch.main)
            theirs = exported(**_published_form(batch.main, shards.info.kind, settings.patch_size))
        pooled = (ours.pooled - theirs.pooler_output).abs().max()
        tokens = (ours.tokens[:, 0] - theirs.last_hidden_state[0]).abs().max()
        differences[name] = max(float(pooled), float(tokens))
    destroy_topology()
    return differences


def _published_form(pack: PatchPack, kind: str, patch_size: int) -> dict[str, Tensor]:
    """A picture goes in as pixels; selected patches as a strip of patches with their positions."""
    assert pack.patches is not None
    rows, columns = 1, pack.num_patches
    form = {}
    if kind == "video":
        form["patch_positions"] = pack.positions[None].long()
    else:
        rows, columns = int(pack.positions[:, 1].max()) + 1, int(pack.positions[:, 2].max()) + 1
    cells = normalize_pixels(pack.patches.view(rows, columns, 3, patch_size, patch_size))
    pixels = cells.permute(2, 0, 3, 1, 4).reshape(1, 3, rows * patch_size, columns * patch_size)
    return {"pixel_values": pixels, **form}


@dataclass(frozen=True)
class HeldOut:
    """Embeddings of one model: held-out samples, and the training samples that neighbours are looked for among.

    Attributes:
        new_typefaces: cards in typefaces that no training card has; None for a user's own pages.
    """

    images: EmbeddedSet
    train_images: EmbeddedSet
    pages: EmbeddedSet
    new_typefaces: EmbeddedSet | None
    clips: EmbeddedSet
    train_clips: EmbeddedSet


def embed_held_out(model: Model, data_dir: Path, settings: SampleSettings) -> HeldOut:
    """Embeds the shard sets that the figures need."""

    def embed(folder: str) -> EmbeddedSet:
        return embed_shard_set(model.encode, ShardSet.open(data_dir / folder), settings)

    return HeldOut(
        images=embed("images/held_out"),
        train_images=embed("images/train"),
        pages=embed("pages/held_out"),
        new_typefaces=embed("pages/new_typefaces") if (data_dir / "pages/new_typefaces").exists() else None,
        clips=embed("clips/held_out"),
        train_clips=embed("clips/train"),
    )


def retrieval_figures(held_out: HeldOut, model: Model) -> dict[str, dict[str, float]]:
    """Page -> its words, image -> its clusters, clip -> another cut of it; held-out queries throughout."""
    images = held_out.images
    return {
        **{
            name: label_retrieval(pages.embeddings, model.heads["page_words"], pages.labels, k=10)
            for name, pages in (("page_to_words", held_out.pages), ("new_typefaces_to_words", held_out.new_typefaces))
            if pages is not None
        },
        "image_to_clusters": label_retrieval(
            images.embeddings, model.heads["image_clusters"], images.labels, k=images.labels.shape[1]
        ),
        "clip_to_other_cut": other_cut_figures(held_out.clips, held_out.train_clips),
    }


def other_cut_figures(cuts: EmbeddedSet, train: EmbeddedSet) -> dict[str, float]:
    """How often the nearest of all other clips (held-out cuts and training clips) is a cut of the same clip.

    Cuts of one clip have the same name but for "-cut<number>"; keys end in a hash that says nothing.
    """
    names = group_names((*cuts.keys, *train.keys), _CLIP_NAME)
    count = len(cuts.keys)
    scores = cosine_scores(cuts.embeddings, torch.cat([cuts.embeddings, train.embeddings]))
    relevant = same_group(names[:count], names)
    itself = torch.eye(count, len(names), dtype=torch.bool)
    relevant, scores = relevant & ~itself, scores.masked_fill(itself, -torch.inf)
    return {
        "recall_at_1": mean_over_queries(first_right(scores, relevant)),
        "mean_reciprocal_rank": mean_over_queries(reciprocal_rank(scores, relevant)),
        "chance_recall_at_1": mean_over_queries(relevant.sum(dim=1) / (len(names) - 1)),
        "queries": int(relevant.any(dim=1).sum()),
    }
