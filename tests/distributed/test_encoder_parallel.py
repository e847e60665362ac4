"""Every parallel layout gives the loss, embeddings and gradients of one process, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_ove.batch import MAIN_PACK, Batch
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.model.encoder import VisionEncoder, build_encoder_chunks
from megatron_ove.model.parameter_names import global_name
from megatron_ove.parallel.random import stateless_generator
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology
from tests.support.distributed import run_distributed
from tests.support.tiny import image_sample, make_batch, mixed_samples, tiny_encoder_config

# fp32 sums in another order; measured 6e-7 relative to the largest gradient of a parameter (pipelines: exactly 0).
FP32_TOLERANCE = 3e-6
# bf16 rounds activations, gradients and weights to 8 bits; measured 4e-2.
BF16_TOLERANCE = 8e-2
# Gradients this much smaller than the largest one are rounding noise and are compared at this scale instead.
NOISE_FLOOR = 1e-4
NUM_PATCHES = 96
SEED = 5

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_sp_pp2_vpp2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    "tp2_sp_dp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@dataclass
class RankResult:
    """What one rank saw of a step: its shards of the parameters and of their gradients, and its samples' embeddings.

    Shards are keyed by global name, with (partition dim or -1, tensor rank).
    """

    loss: float
    pooled: dict[str, Tensor]
    shards: dict[str, tuple[Tensor, Tensor, int, int]]


def microbatches() -> list[Batch]:
    """Four microbatches of the step, unlike each other; one is empty."""
    samples = mixed_samples()
    picks = [samples, samples[2:4], [], [image_sample(4, 6, seed=9), *samples[:1]]]
    return [make_batch(pick, num_patches=NUM_PATCHES, first_key=10 * i) for i, pick in enumerate(picks)]


def toy_loss(pooled: Tensor, batch: Batch) -> Tensor:
    """Sum over samples of a bent function of the embedding that differs per sample."""
    directions = [torch.randn(pooled.shape[1], generator=stateless_generator(SEED, key)) for key in batch.samples.keys]
    weights = torch.stack(directions) if directions else pooled.new_zeros(0, pooled.shape[1])
    return (torch.tanh(pooled.float()) * weights).sum()


def run_step(
    rank: int, world_size: int, parallel: dict[str, Any], encoder: dict[str, Any], dtype: torch.dtype = torch.float32
) -> RankResult:
    """One forward and backward of the step under a layout."""
    topology = initialize_topology(ParallelConfig(**parallel), seed=SEED)
    chunks = build_encoder_chunks(tiny_encoder_config(**encoder), topology, dtype=dtype, seed=SEED)
    models = [wrap(chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)]
    mine = microbatches()[topology.data_rank :: topology.data_size]
    pooled: dict[str, Tensor] = {}

    def forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Any, Any]:
        batch = next(iterator)
        output = model(batch.main)
        if not isinstance(output, Tensor):
            pooled.update(zip(batch.samples.keys, output.pooled.detach(), strict=True))
            output = toy_loss(output.pooled, batch) * len(mine) * topology.data_size
        return output, lambda loss: (loss, {"loss": loss.detach() / (len(mine) * topology.data_size)})

    for model in models:
        model.zero_grad_buffer()
    iterators = [iter(stage_batches(mine, topology, chunk.vp_stage)) for chunk in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(mine),
        seq_length=NUM_PATCHES,
        micro_batch_size=1,
        forward_only=False,
    )
    return RankResult(sum(float(entry["loss"]) for entry in losses), pooled, collect_shards(chunks, topology))


def wrap(chunk: VisionEncoder, *, disable_bucketing: bool) -> DistributedDataParallel:
    """As a trainer does: bf16 modules in Float16Module, everything in megatron-core's data parallelism."""
    chunk.config.finalize_model_grads_func = finalize_model_grads
    module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(chunk.config, settings, module, disable_bucketing=disable_bucketing)


def stage_batches(batches: list[Batch], topology: ParallelTopology, vp_stage: int | None) -> list[Batch]:
    """Patches only where they are used, as the loader delivers them."""
    if topology.is_first_chunk(vp_stage):
        return batches
    return [replace(batch, packs={MAIN_PACK: replace(batch.main, patches=None)}) for batch in batches]


def collect_shards(chunks: list[Any], topology: ParallelTopology) -> dict[str, tuple[Tensor, Tensor, int, int]]:
    shards = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            dim = parameter.partition_dim if parameter.tensor_model_parallel and topology.tensor_size > 1 else -1
            entry = (parameter.detach().clone(), parameter.main_grad.clone(), dim, topology.tensor_rank)
            shards[global_name(name, chunk.layer_offset)] = entry
    return shards


def assemble(results: list[RankResult], which: int) -> dict[str, Tensor]:
    """Whole tensors from the shards of all ranks; copies must be equal."""
    pieces: dict[str, dict[int, Tensor]] = {}
    dims: dict[str, int] = {}
    for result in results:
        for name, shard in result.shards.items():
            dims[name] = shard[2]
            known = pieces.setdefault(name, {}).setdefault(shard[3], shard[which])
            assert torch.equal(known, shard[which]), f"{name} differs between replicas"
    whole = {}
    for name, parts in pieces.items():
        ordered = [parts[rank] for rank in sorted(parts)]
        if dims[name] < 0:
            assert all(torch.equal(part, ordered[0]) for part in ordered), f"{name} differs between tensor ranks"
        whole[name] = ordered[0] if dims[name] < 0 else torch.cat(ordered, dim=dims[name])
    return whole


@pytest.fixture(scope="module")
def expected() -> RankResult:
    return run_distributed(run_step, 1, {}, {})[0]


def compare(results: list[RankResult], expected: RankResult, tolerance: float = FP32_TOLERANCE) -> None:
    weights, gradients = assemble(results, 0), assemble(results, 1)
    whole_weights, whole_gradients = assemble([expected], 0), assemble([expected], 1)
    assert weights.keys() == whole_weights.keys()
    for name, weight in whole_weights.items():
        assert torch.equal(weights[name], weight.to(weights[name].dtype)), f"initial {name} depends on the layout"
    largest = max(gradient.abs().max() for gradient in whole_gradients.values())
    for name, gradient in whole_gradients.items():
        scale = torch.maximum(gradient.abs().max(), NOISE_FLOOR * largest)
        error = (gradients[name] - gradient).abs().max() / scale
        assert error < tolerance, f"gradient of {name}: {error:.1e}"
    seen: set[str] = set()
    for result in results:
        seen |= result.pooled.keys()
        for key, embedding in result.pooled.items():
            whole = expected.pooled[key]
            assert (embedding.float() - whole).abs().max() < tolerance * whole.abs().max()
    assert seen == expected.pooled.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, expected: RankResult) -> None:
    world_size, parallel = LAYOUTS[layout]
    results = run_distributed(run_step, world_size, parallel, {})
    compare(results, expected)
    # Ranks that do not hold the end of the pipeline report none; tensor ranks report the same.
    total = sum(result.loss for result in results) / parallel.get("tensor_model_parallel_size", 1)
    # The terms of the sum all but cancel, so it is their size that its rounding is a part of.
    terms = torch.tanh(torch.cat(list(expected.pooled.values())))
    assert total == pytest.approx(expected.loss, abs=FP32_TOLERANCE * float(terms.norm()))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_under_tensor_and_sequence_parallelism(recompute: str, expected: RankResult) -> None:
    _, parallel = LAYOUTS["tp2_sp"]
    compare(run_distributed(run_step, 2, parallel, {"recompute": recompute}), expected)


def test_recompute_in_a_pipeline(expected: RankResult) -> None:
    _, parallel = LAYOUTS["pp2"]
    compare(run_distributed(run_step, 2, parallel, {"recompute": "full"}), expected)


def test_bf16_in_every_kind_of_parallelism(expected: RankResult) -> None:
    world_size, parallel = LAYOUTS["tp2_sp_pp2_vpp2"]
    results = run_distributed(run_step, world_size, parallel, {}, torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in assemble(results, 0).values())
    compare(results, expected, BF16_TOLERANCE)
