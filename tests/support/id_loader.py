"""A step loader over id shard sets of all three kinds, and a topology for a single process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.loader import config_from_dict
from megatron_ove.config.train import TrainConfig
from megatron_ove.data.build import build_loader
from megatron_ove.data.sample_reader import SampleReader
from megatron_ove.data.step_loader import StepLoader
from tests.support.id_shards import NUM_CLASSES, sample_ids, write_id_shard_set

KINDS = ("image", "ocr", "video")
SIZES = {"image": 23, "ocr": 17, "video": 11}


def write_id_sources(directory: Path) -> Path:
    """Writes one id shard set of each kind into `directory`."""
    for kind in KINDS:
        write_id_shard_set(directory / kind, kind, SIZES[kind], label_width=4 if kind == "ocr" else 3)
    return directory


def id_config(directory: Path, *, changes: dict[str, dict[str, object]] | None = None, **options: Any) -> TrainConfig:
    """Returns a configuration over the id sources; `changes` change single sources (with a kind: replace them)."""
    sources: dict[str, dict[str, object]] = {
        "image": {"kind": "image", "path": str(directory / "image"), "image_size": 42, "weight": 2.0},
        "ocr": {"kind": "ocr", "path": str(directory / "ocr"), "max_patches": 20},
        "video": {"kind": "video", "path": str(directory / "video"), "num_frames": 4, "max_patches": 12},
    }
    for name, change in (changes or {}).items():
        sources[name] = change if "kind" in change else {**sources[name], **change}
    return config_from_dict(
        {
            "name": "id",
            "run_dir": str(directory / "run"),
            "seed": options.get("seed", 3),
            "encoder": {
                **{"hidden_size": 32, "num_layers": 2, "num_attention_heads": 1, "ffn_hidden_size": 64},
                "rope_temporal_size": 16,
            },
            "objectives": {kind: {"kind": "partial_fc", "source": kind, "num_classes": NUM_CLASSES} for kind in KINDS},
            "data": {
                "sources": sources,
                "tokens_per_microbatch": options.get("tokens", 40),
                "num_threads": 1,
                "prefetch_steps": options.get("prefetch_steps", 2),
            },
            "train": {"num_steps": 100, "global_batch_size": options.get("batch", 12)},
        },
        "id",
    )


def single_process(**changes: Any) -> Any:
    """Returns what the loader reads of a topology, for one process without communication."""
    values = {
        **{"tensor_rank": 0, "tensor_size": 1, "data_rank": 0, "data_size": 1},
        **{"pipeline_size": 1, "virtual_pipeline_size": None},
        **{"is_first_stage": True, "is_last_stage": True, "tensor_group": None, "device": torch.device("cpu")},
        "replica_host_group": SimpleNamespace(size=lambda: 1, rank=lambda: 0),
    }
    return SimpleNamespace(**{**values, **changes})


def collate_labels(samples: Samples, pack: PatchPack, reader: SampleReader) -> dict[str, torch.Tensor]:
    """Makes the inputs of one objective for each source, which has its name."""
    return {name: reader.labels(samples, name) for name in samples.source_names}


def start_loader(config: TrainConfig, topology: Any, start_step: int = 0, **options: Any) -> StepLoader:
    """Starts a loader that collates labels on the last stage."""
    collate = collate_labels if topology.is_last_stage else None
    return build_loader(config, topology, start_step=start_step, collate=collate, **options)


def check_pairing(batch: Batch) -> list[tuple[str, int]]:
    """Checks that keys, pixels, labels and padding of a batch belong together; returns (source, number) of samples."""
    ids, pack, samples = sample_ids(batch), batch.main, batch.samples
    names = [samples.source_names[i] for i in samples.source.tolist()]
    assert list(samples.keys) == [f"{name}{number}" for name, number in zip(names, ids, strict=True)]
    assert samples.row.tolist() == ids
    for name in samples.source_names:
        labels = batch.inputs[name]
        assert labels.dtype == torch.int32
        assert labels[:, 0].tolist() == [ids[row] for row in samples.of(name).tolist()]
        assert (labels[:, 1:] == -1).all()
    end = int(pack.cu_seqlens[-1])
    assert pack.patches is not None
    assert not pack.patches[end:].any()
    assert not pack.positions[end:].any()
    assert samples.seed.shape == samples.is_valid.shape == (batch.num_samples,)
    assert pack.sample.tolist() == list(range(batch.num_samples))
    return list(zip(names, ids, strict=True))


def take_steps(loader: StepLoader, first: int, count: int) -> list[list[Batch]]:
    """Returns the batches of `count` steps and closes the loader."""
    try:
        return [list(loader.load_step(step).batches) for step in range(first, first + count)]
    finally:
        loader.close()


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Returns every tensor of a batch."""
    pack, samples = batch.main, batch.samples
    fields = [pack.positions, pack.cu_seqlens, pack.grids, pack.sample]
    fields += [samples.source, samples.row, samples.seed, samples.is_valid]
    patches = [] if pack.patches is None else [pack.patches]
    return [*fields, *patches, *(batch.inputs[name] for name in sorted(batch.inputs))]


def assert_same_batches(left: list[Batch], right: list[Batch]) -> None:
    """Checks that two lists of batches are equal bit by bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert list(a.samples.keys) == list(b.samples.keys)
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
