"""Delivery over real ranks: equal inside tensor parallel groups, disjoint over replicas, per-stage fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_ove.batch import Batch
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.data import read_ahead
from megatron_ove.data.bad_samples import read_bad_samples
from megatron_ove.parallel.topology import initialize_topology
from megatron_ove.shards.shard_set import ShardSet
from tests.support.distributed import WorkerError, run_distributed
from tests.support.id_loader import (
    assert_same_batches,
    check_pairing,
    id_config,
    single_process,
    start_loader,
    take_steps,
    tensors_of,
    write_id_sources,
)

STEPS = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_id_sources(tmp_path_factory.mktemp("id"))


def deliver(rank: int, world_size: int, directory: Path, sizes: dict[str, int], start: int) -> dict[str, Any]:
    """Takes STEPS steps on this rank."""
    del rank, world_size
    names = {"tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size"}
    parallel = ParallelConfig(**{names[name]: size for name, size in sizes.items()})
    topology = initialize_topology(parallel, seed=0)
    loader = start_loader(id_config(directory), topology, start_step=start)
    steps = take_steps(loader, start, STEPS)
    return {
        "steps": steps,
        "place": (topology.tensor_rank, topology.data_rank, topology.pipeline_rank),
        "decodes": loader._decoding is not None,
    }


def alone(directory: Path, **changes: Any) -> list[list[Batch]]:
    return take_steps(start_loader(id_config(directory), single_process(**changes)), 0, STEPS)


def test_tensor_parallel_ranks_get_identical_batches_decoded_once(directory: Path) -> None:
    first, second = run_distributed(deliver, 2, directory, {"tensor": 2}, 0)
    assert (first["decodes"], second["decodes"]) == (True, False)
    for a, b, c in zip(first["steps"], second["steps"], alone(directory), strict=True):
        assert_same_batches(a, b)
        assert_same_batches(a, c)
        for batch in b:
            check_pairing(batch)


def test_two_replicas_that_resume_take_what_one_replica_goes_on_with(directory: Path) -> None:
    running = take_steps(start_loader(id_config(directory), single_process()), 0, STEPS + 2)
    resumed = run_distributed(deliver, 2, directory, {}, 2)
    for step, whole in enumerate(running[2:]):
        shared = [sample for result in resumed for batch in result["steps"][step] for sample in segments(batch)]
        assert sorted(shared) == sorted(sample for batch in whole for sample in segments(batch))
        assert len({len(result["steps"][step]) for result in resumed}) == 1


def segments(batch: Batch) -> list[tuple[str, int, bytes, bytes]]:
    """Returns key, seed, pixels and positions of every sample."""
    check_pairing(batch)
    pack = batch.main
    bounds = pack.cu_seqlens.tolist()
    assert pack.patches is not None
    return [
        (
            key,
            seed,
            pack.patches[bounds[i] : bounds[i + 1]].numpy().tobytes(),
            pack.positions[bounds[i] : bounds[i + 1]].numpy().tobytes(),
        )
        for i, (key, seed) in enumerate(zip(batch.samples.keys, batch.samples.seed.tolist(), strict=True))
    ]


def test_tensor_by_pipeline_ranks_get_the_fields_of_their_stage(directory: Path) -> None:
    results = run_distributed(deliver, 4, directory, {"tensor": 2, "pipeline": 2}, 0)
    for step, whole in enumerate(alone(directory)):
        for result in results:
            _, _, stage = result["place"]
            for batch, reference in zip(result["steps"][step], whole, strict=True):
                assert torch.equal(batch.main.positions, reference.main.positions)
                assert list(batch.samples.keys) == list(reference.samples.keys)
                assert (batch.main.patches is not None) == (stage == 0)
                assert set(batch.inputs) == (set(reference.inputs) if stage == 1 else set())
                for name, labels in batch.inputs.items():
                    assert torch.equal(labels, reference.inputs[name])
                if batch.main.patches is not None:
                    assert torch.equal(batch.main.patches, reference.main.patches)


def lose_pages(rank: int, world_size: int, directory: Path) -> list[list[Batch]]:
    """Takes steps whose pages the decoding rank cannot decode."""
    del world_size
    read_ahead.PAUSES_S = (0.0, 0.0, 0.0)
    topology = initialize_topology(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    config = id_config(directory).model_copy(update={"run_dir": str(directory / "lost")})
    opened = ShardSet.open
    with mock.patch.object(ShardSet, "open", lambda path, **_: halved(opened(path)) if rank == 0 else opened(path)):
        loader = start_loader(config, topology)
    return take_steps(loader, 0, STEPS)


def halved(shards: ShardSet) -> ShardSet:
    """Makes every page end in its middle."""
    if shards.info.kind == "ocr":
        place = shards.index.place

        def half(row: int, member: str) -> tuple[int, int]:
            offset, size = place(row, member)
            return offset, size // 2

        shards.index.place = half  # type: ignore[method-assign]
    return shards


def test_what_one_rank_cannot_decode_is_empty_on_all_ranks_of_its_replica(directory: Path) -> None:
    first, second = run_distributed(lose_pages, 2, directory)
    lost = 0
    for a, b, reference in zip(first, second, alone(directory), strict=True):
        assert_same_batches(a, b)
        for batch, whole in zip(a, reference, strict=True):
            pack, expected, samples = batch.main, whole.main, batch.samples
            assert pack.patches is not None and expected.patches is not None
            assert (batch.inputs["ocr"] == -1).all()
            for name in ("image", "video"):
                assert torch.equal(batch.inputs[name], whole.inputs[name])
            for row, source in enumerate(samples.source.tolist()):
                place = slice(*pack.cu_seqlens[row : row + 2].tolist())
                is_page = samples.source_names[source] == "ocr"
                lost += is_page
                assert bool(samples.is_valid[row]) != is_page
                assert torch.equal(pack.patches[place], expected.patches[place] * (not is_page))
                assert torch.equal(pack.positions[place], expected.positions[place] * (not is_page))
    records = list(read_bad_samples(directory / "lost"))
    assert sum(record.step <= STEPS for record in records) == lost > 0


def fail_while_preparing(rank: int, world_size: int, directory: Path) -> None:
    """Breaks the labels of one rank after opening; it must raise, and no rank may wait for ever."""
    del world_size
    topology = initialize_topology(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    loader = start_loader(id_config(directory), topology)
    if rank == 0:
        pages = next(source for source in loader._sources if source.name == "ocr")
        pages.shards.columns["labels"] = np.full_like(pages.shards.labels, 300)
    try:
        for step in range(50):
            loader.load_step(step)
    finally:
        loader.close()


def test_an_error_while_preparing_ends_the_world_with_its_sentence(directory: Path) -> None:
    with pytest.raises(WorkerError, match=r"label 300 of sample 'ocr\d+' in .* is outside 0\.\.255"):
        run_distributed(fail_while_preparing, 2, directory, timeout_s=60)


def test_batches_are_on_the_topology_device(directory: Path) -> None:
    for batches in alone(directory):
        assert all(tensor.device.type == "cpu" for batch in batches for tensor in tensors_of(batch))
