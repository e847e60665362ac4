"""A run small enough for tests: three synthetic shard sets, three heads, a tiny encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary

NUM_CLASSES = {"image": 11, "ocr": 13, "video": 7}


def write_tiny_sources(folder: Path) -> dict[str, str]:
    """Writes one shard set a kind; returns kind -> path."""
    shapes: dict[str, dict[str, Any]] = {
        "image": {"num_samples": 24, "picture_size": (56, 56)},
        "ocr": {"num_samples": 20, "picture_size": (42, 56), "label_width": 12},
        "video": {"num_samples": 14, "grid_height": 2, "grid_width": 2, "frames": 16, "selected_patches": 16},
    }
    for kind, shape in shapes.items():
        write_synthetic_shard_set(folder / kind, kind=kind, num_classes=NUM_CLASSES[kind], **shape)
    return {kind: str(folder / kind) for kind in shapes}


def write_tiny_vocabulary(folder: Path | str, *, start: str = "word") -> Vocabulary:
    """Puts a vocabulary beside the shard set of pages: class 3 is the word "<start>3"."""
    words = tuple(f"{start}{number}" for number in range(NUM_CLASSES["ocr"]))
    vocabulary = Vocabulary(words, (1,) * len(words), {"num_pages": 20})
    vocabulary.save(Path(folder) / VOCABULARY_FILE)
    return vocabulary


def tiny_config(sources: dict[str, str], run_dir: Path | str, *, sample_rate: float = 1.0, **sections: Any) -> dict:
    """Returns a configuration as plain values; `sections` are merged into its sections one level deep."""
    data: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "seed": 11,
        "encoder": {
            "hidden_size": 64,
            "num_layers": 4,
            "num_attention_heads": 2,
            "ffn_hidden_size": 96,
            "rope_temporal_size": 16,
        },
        "objectives": {
            f"{kind}_labels": {
                "kind": "partial_fc",
                "source": kind,
                "num_classes": NUM_CLASSES[kind],
                "labels_per_step": 4,
                "sample_rate": sample_rate,
                "logit_scale": 16.0,
                "loss_weight": weight,
            }
            for kind, weight in (("image", 1.0), ("ocr", 0.5), ("video", 2.0))
        },
        "data": {
            "sources": {
                "image": {"kind": "image", "path": sources["image"], "image_size": 28, "weight": 2.0},
                "ocr": {"kind": "ocr", "path": sources["ocr"], "max_patches": 16},
                "video": {"kind": "video", "path": sources["video"], "num_frames": 4, "max_patches": 16},
            },
            "tokens_per_microbatch": 48,
            "num_threads": 1,
        },
        "optim": {"lr": 2e-3, "schedule": {"warmup_steps": 2}, "class_centers": {"lr_multiplier": 2.0}},
        "parallel": {"timeout_s": 60},
        "train": {"num_steps": 20, "global_batch_size": 8, "precision": "fp32", "log_interval_steps": 1},
        "checkpoint": {"interval_steps": 100},
        "tracking": {"tensorboard": False},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return data


def check(data: dict) -> TrainConfig:
    """Returns the configuration as the program sees it."""
    return config_from_dict(data, "tiny")


def write_config(data: dict, path: Path) -> Path:
    """Writes a configuration file; returns its path."""
    path.write_text(yaml.safe_dump(data))
    return path
