"""Made the checkpoints and shard sets in golden.tar.xz, with the version of the package before kinds (19f1886).

    PYTHONPATH=<that tree> python tests/golden/make_golden.py <new folder>
    tar cJf tests/golden/golden.tar.xz -C <new folder> .

They stay as they are: `tests/integration/test_golden.py` resumes, exports, starts from and opens them with every later
version. A change of what is stored adds files made with the version before it, and a step in `config/upgrade.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_ove.config.loader import config_from_dict
from megatron_ove.data.synthetic import write_synthetic_shard_set
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.support.distributed import run_distributed

PATCH = 4
CLASSES = {"image": 11, "ocr": 13, "video": 7}
SHAPES: dict[str, dict[str, Any]] = {
    "image": {"num_samples": 12, "picture_size": (16, 16)},
    "ocr": {"num_samples": 10, "picture_size": (12, 16), "label_width": 6},
    "video": {"num_samples": 4, "grid_height": 2, "grid_width": 2, "frames": 4, "selected_patches": 6},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_distributed_optimizer": {"use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
}
WIDTHS = {"dp2_distributed_optimizer": (32, 1), "tp2": (64, 2)}
"""(hidden size, heads) of each run: as small as the layout allows."""
NUM_STEPS, SAVED_STEP = 4, 2


def config_of(layout: str, shards: Path | str, run_dir: Path | str) -> dict[str, Any]:
    """Returns a run as plain values, in the form of that version."""
    hidden, heads = WIDTHS[layout]
    encoder = {"hidden_size": hidden, "num_attention_heads": heads, "num_layers": 1, "ffn_hidden_size": 8}
    return {
        "name": layout,
        "run_dir": str(run_dir),
        "seed": 11,
        "encoder": {**encoder, "patch_size": PATCH, "rope_temporal_size": 4, "initializer_range": 0.1},
        "objectives": {
            f"{kind}_labels": {
                "kind": "partial_fc",
                "source": kind,
                "num_classes": count,
                "labels_per_step": 2,
                "sample_rate": 1.0,
                "logit_scale": 16.0,
                "centering": "embeddings" if kind == "ocr" else "none",
            }
            for kind, count in CLASSES.items()
        },
        "data": {
            "sources": {
                "image": {"kind": "image", "path": f"{shards}/image", "image_size": 12},
                "ocr": {"kind": "ocr", "path": f"{shards}/ocr", "max_patches": 8},
                "video": {"kind": "video", "path": f"{shards}/video", "num_frames": 2, "max_patches": 8},
            },
            "tokens_per_microbatch": 32,
            "num_threads": 1,
        },
        "optim": {"lr": 2e-3, "schedule": {"warmup_steps": 1}},
        "parallel": {"timeout_s": 60, **LAYOUTS[layout]},
        "train": {"num_steps": NUM_STEPS, "global_batch_size": 8, "precision": "fp32", "log_interval_steps": 1},
        "checkpoint": {"interval_steps": SAVED_STEP, "keep": 9},
        "tracking": {"tensorboard": False},
    }


def train(rank: int, world_size: int, data: dict[str, Any]) -> None:
    """Trains one run."""
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = config_from_dict(data, "golden")
    Trainer(config, initialize_topology(config.parallel, seed=config.seed)).run()


def losses_after(run_dir: Path) -> list[dict[str, float]]:
    """Returns losses and gradient norms of the steps behind the saved one."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: row[name] for name in sorted(row) if name.split("/")[0] in ("loss", "grad_norm")}
        for row in rows
        if row["step"] > SAVED_STEP
    ]


def main(folder: Path) -> None:
    """Writes everything."""
    from megatron_ove.convert.hf_export import export_checkpoint
    from megatron_ove.convert.hf_import import import_pretrained

    for kind, shape in SHAPES.items():
        path = folder / "shards" / kind
        write_synthetic_shard_set(path, kind=kind, num_classes=CLASSES[kind], patch_size=PATCH, **shape)
    words = tuple(f"word{number}" for number in range(CLASSES["ocr"]))
    Vocabulary(words, (1,) * len(words), {"num_pages": 10}).save(folder / "shards" / "ocr" / VOCABULARY_FILE)
    scratch = folder / "scratch"
    figures = {}
    for layout in LAYOUTS:
        run_distributed(train, 2, config_of(layout, folder / "shards", scratch / layout))
        figures[layout] = losses_after(scratch / layout)
        saved = f"step_{SAVED_STEP:08d}"
        shutil.copytree(scratch / layout / "checkpoints" / saved, folder / "runs" / layout / "checkpoints" / saved)
    checkpoint = folder / "runs" / "dp2_distributed_optimizer" / "checkpoints" / f"step_{SAVED_STEP:08d}"
    export_checkpoint(checkpoint, scratch / "export")
    import_pretrained(scratch / "export", folder / "imported")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
