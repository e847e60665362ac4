"""The arithmetic of `megatron-ove plan`: what must hold for any layout, its sentences, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.cli.main import main
from megatron_ove.config.loader import load_config
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.errors import ConfigError
from megatron_ove.heads.active_classes import choose_active_rows, collect_positives, draw_negatives
from megatron_ove.parallel import gradient_buckets
from megatron_ove.planning.activations import peak_activations
from megatron_ove.planning.alternatives import rank_knobs, suggest_layouts
from megatron_ove.planning.class_tables import count_active_rows
from megatron_ove.planning.communication import Traffic
from megatron_ove.planning.devices import find_device
from megatron_ove.planning.footprint import ChunkActivations
from megatron_ove.planning.layout import Layout, Place, layout_of
from megatron_ove.planning.parameters import gradient_buffer
from megatron_ove.planning.plan import Plan, make_plan
from megatron_ove.planning.vit_footprint import chunk_parameters
from megatron_ove.planning.workload import assumed_workload

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGE2 = EXAMPLES / "stage2_joint/config.yaml"
DISTRIBUTED_OFF = "parallel.use_distributed_optimizer=false"


def planned(*overrides: str, path: Path = STAGE2, world_size: int = 128, gpu: str = "a100-80g") -> Plan:
    device = find_device(gpu, world_size=world_size)
    return make_plan(load_config(path, overrides), world_size=world_size, device=device)


def layout(**changes: Any) -> Layout:
    sizes = {"tensor": 1, "pipeline": 1, "data": 1, "chunks": 1, **changes}
    stages = (24 // sizes["pipeline"],) * sizes["pipeline"]
    return Layout(**{"stage_layers": stages, "sequence_parallel": False, "distributed_optimizer": False, **sizes})


def test_encoder_sizes_are_the_published_ones():
    """Parameters of base, large and huge as counted on the published models."""
    sizes = {"base": 92_595_456, "large": 315_509_760, "huge": 650_110_720}
    for name, size in sizes.items():
        overrides = [
            f"encoder.{key}={value}"
            for key, value in zip(
                ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size"),
                {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "huge": (1280, 32, 20, 5120)}[name],
                strict=True,
            )
        ]
        plan = planned(*overrides)
        assert plan.num_parameters[0] == size


def test_a_replica_sees_the_published_batches():
    """16 images, 8 pages and 16 clips a GPU, four times a step."""
    config = load_config(STAGE2)
    workload = assumed_workload(config, layout_of(config, 128))
    for source, batch in {"images": 16, "pages": 8, "clips": 16}.items():
        assert workload.sample_counts[source].sum() == 4 * batch * 128
    assert workload.padding_share == 0
    assert workload.real_tokens.sum() == 4 * 57_344 * 128


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tensor": 2},
        {"pipeline": 4},
        {"tensor": 4, "pipeline": 3, "chunks": 2},
        {"pipeline": 3, "stage_layers": (9, 10, 5)},
        {"pipeline": 3, "chunks": 2, "stage_layers": (8, 10, 6)},
    ],
)
def test_shards_add_up_to_the_whole_encoder(changes):
    encoder = load_config(STAGE2).encoder
    grid = layout(**changes)
    places = [(stage, chunk) for stage in range(grid.pipeline) for chunk in range(grid.chunks)]
    layers = [index for stage, chunk in places for index in grid.layers_of(stage, chunk)]
    assert sorted(layers) == list(range(24))
    parts = [chunk_parameters(encoder, grid, stage=stage, chunk=chunk) for stage, chunk in places]
    sharded = ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight", "fc1.weight", "fc1.bias", "fc2.weight")
    whole = sum(
        one.size * (grid.tensor if one.name.startswith("decoder.layers") and one.name.endswith(sharded) else 1)
        for part in parts
        for one in part
    )
    assert whole == 315_509_760


@pytest.mark.parametrize("data", [1, 2, 3, 5])
def test_optimizer_shares_cover_every_parameter_once(data):
    encoder = load_config(STAGE2).encoder
    grid = layout(data=data, distributed_optimizer=True)
    parameters = chunk_parameters(encoder, grid, stage=0, chunk=0)
    buffer = gradient_buffer(parameters, grid, stage=0, chunk=0)
    assert buffer.size % np.lcm(128, data) == 0
    assert sum(sum(buffer.owned(rank, data)) for rank in range(data)) == 315_509_760


@pytest.mark.parametrize("stage", range(4))
def test_plain_schedule_holds_as_many_microbatches_as_stages_remain(stage):
    grid, part = layout(pipeline=4), ChunkActivations(kept=10, again=3, work=0)
    assert peak_activations(grid, stage, 20, [part]) == (10 * (4 - stage) + 3, [4 - stage])
    assert peak_activations(grid, stage, 2, [part])[1] == [min(2, 4 - stage)]


def test_interleaving_holds_more():
    part = ChunkActivations(kept=10, again=0, work=0)
    plain = peak_activations(layout(pipeline=4), 0, 16, [ChunkActivations(kept=20, again=0, work=0)])
    interleaved = peak_activations(layout(pipeline=4, chunks=2), 0, 16, [part, part])
    assert interleaved[0] == 110 > plain[0] == 80  # (4 - 1) * 2 + 4 + 1 chunk passes


def test_wire_bytes_of_rings():
    assert Traffic("data", "all_reduce", 1, 800).wire_bytes(4) == 1200
    assert Traffic("data", "all_gather", 1, 800).wire_bytes(4) == 600
    assert Traffic("pipeline", "send", 1, 800).wire_bytes(4) == 800


def test_a_layout_changes_neither_the_operations_nor_the_samples():
    plans = [planned(), planned("parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true")]
    first, second = (plan.operations for plan in plans)
    for name in ("patch embedding", "linear layers", "attention", "pooling head"):
        assert second[name] == pytest.approx(first[name])
    assert len({plan.num_samples for plan in plans}) == 1


def test_the_distributed_optimizer_divides_its_state():
    whole, shared = planned(DISTRIBUTED_OFF), planned()
    assert whole.fullest.memory.optimizer == pytest.approx(128 * shared.fullest.memory.optimizer, rel=0.01)


def test_recompute_trades_memory_for_time():
    none, selective, full = (planned(f"encoder.recompute={mode}") for mode in ("none", "selective", "full"))
    memory = [plan.fullest.memory.activations for plan in (none, selective, full)]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    assert none.time.total < selective.time.total < full.time.total
    assert none.operations == full.operations


def test_a_world_that_does_not_fit_gets_its_sentence():
    with pytest.raises(ConfigError, match=r"world size 10 is not divisible by .* = 2 x 2 = 4, so some processes"):
        planned(path=EXAMPLES / "huge/config.yaml", world_size=10)


def test_an_unknown_device_gets_its_sentence(capsys):
    assert main(["plan", str(STAGE2), "--world-size", "128", "--gpu", "v100"]) == 2
    error = capsys.readouterr().err
    assert "--gpu v100 is not a device whose figures are known" in error and "a100-80g, h100-80g" in error
    assert main(["plan", str(STAGE2), "--world-size", "0"]) == 2
    assert "--world-size 0 is no number of ranks; give at least 1" in capsys.readouterr().err
    assert main(["plan", str(STAGE2), "--world-size", str(10**11)]) == 2
    assert "is more ranks than any machine has" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu", "recipe"), [("a100-80g", "current"), ("h100-80g", "mxfp8"), ("cpu", "delayed")])
def test_a_plan_for_a_device_without_this_fp8_is_refused(capsys, gpu, recipe):
    """Where a run would be refused too."""
    assert main(["plan", str(STAGE2), "--world-size", "128", "--gpu", gpu, "--set", f"encoder.fp8={recipe}"]) == 2
    assert f"encoder.fp8 = {recipe} runs on " in capsys.readouterr().err


def test_running_out_of_memory_names_rank_and_remedy(capsys):
    arguments = ["plan", str(STAGE2), "--world-size", "8", "--gpu", "a100-80g"]
    assert main([*arguments, "--set", "data.tokens_per_microbatch=131072", "--set", DISTRIBUTED_OFF]) == 2
    text = capsys.readouterr().out
    assert "It does not fit: rank 0 (stage 0) runs out of memory" in text
    assert "the largest part is activations" in text
    assert "encoder.recompute: full ->" in text and "which fits" in text


def test_knobs_save_what_they_say():
    plan = planned("data.tokens_per_microbatch=131072", world_size=8)
    knobs = rank_knobs(plan)
    assert not plan.fits and knobs[0].plan.fits
    assert [knob.memory for knob in knobs] == sorted(knob.memory for knob in knobs)
    assert all(knob.memory < plan.fullest.memory.total for knob in knobs)


def test_suggested_layouts_fit_and_are_ranked():
    config = load_config(EXAMPLES / "huge/config_8gpu.yaml")
    device = find_device("h100-80g", world_size=8)
    plans = suggest_layouts(config, world_size=8, device=device)
    times = [plan.time.total for plan in plans]
    assert times == sorted(times) and all(plan.fits and plan.layout.world_size == 8 for plan in plans)
    grids = {(plan.layout.tensor, plan.layout.pipeline, plan.layout.data) for plan in plans}
    assert {(1, 1, 8), (2, 2, 2)} <= grids
    assert not any(tensor == 8 for tensor, _, _ in grids)  # 20 attention heads


def test_a_lighter_last_stage_is_suggested_where_heads_are_heavy():
    """Without sampling and with few ranks to share the tables, the heads cost as much as several layers."""
    everything = [f"objectives.{name}.sample_rate=1.0" for name in ("image_clusters", "page_words", "clip_clusters")]
    config = load_config(STAGE2, [*everything, "data.tokens_per_microbatch=4096"])
    plans = suggest_layouts(config, world_size=8, device=find_device("h200-141g", world_size=8))
    stages = [plan.layout.stage_layers for plan in plans if (plan.layout.tensor, plan.layout.pipeline) == (1, 4)]
    assert (6, 6, 6, 6) in stages
    assert stages[0][-1] < stages[0][0] and sum(stages[0]) == 24


def test_stages_of_other_sizes_hold_and_do_what_their_layers_ask_for():
    overrides = ["parallel.pipeline_model_parallel_size=2", "parallel.num_layers_in_last_stage=8"]
    plan = planned(*overrides)
    assert [one.num_layers for one in plan.ranks] == [16, 8] and plan.layout.stage_layers == (16, 8)
    even = planned(overrides[0])
    assert plan.ranks[1].memory.total < even.ranks[1].memory.total
    assert plan.ranks[0].memory.total > even.ranks[0].memory.total
    assert plan.operations == even.operations and plan.time.encoder > even.time.encoder
    changes = [knob.change for knob in rank_knobs(plan)]
    assert any(change.startswith("parallel.num_layers_in_first_stage: 15") for change in changes)


@pytest.mark.parametrize("distributed", [False, True])
def test_buckets_are_the_buffer_in_parts(distributed, monkeypatch):
    monkeypatch.setattr(gradient_buckets, "bucket_size", lambda data_size: 20_000_000)
    encoder = load_config(STAGE2).encoder
    grid = layout(data=3, distributed_optimizer=distributed, overlaps_reduce=True)
    parameters = chunk_parameters(encoder, grid, stage=0, chunk=0)
    buffer = gradient_buffer(parameters, grid, stage=0, chunk=0)
    assert len(buffer.buckets) > 10 and all(size >= 20_000_000 for size in buffer.buckets[:-1])
    assert len(gradient_buffer(parameters, grid, stage=1, chunk=0).buckets) == 1
    if distributed:
        assert sum(sum(buffer.owned(rank, 3)) for rank in range(3)) == 315_509_760
    else:
        assert buffer.size == 315_509_760


def test_overlap_takes_time_off_the_exchange_and_nothing_else():
    plain, reduce = planned(), planned("parallel.overlap_grad_reduce=true")
    both = planned("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    assert plain.time.data > reduce.time.data > both.time.data > 0
    assert plain.time.encoder == both.time.encoder and plain.time.other == both.time.other


def test_the_command_writes_json_and_a_picture(tmp_path, capsys):
    files = ["--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]
    path = str(EXAMPLES / "huge/config_8gpu.yaml")
    assert main(["plan", path, "--world-size", "8", "--gpu", "h200-141g", *files]) == 0
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["fits"] and len(content["ranks"]) == 2 and content["ranks"][1]["rank"] == 4
    parts = content["ranks"][0]["memory_bytes"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert content["samples"] == 1_280_000_000
    assert content["device_hours"] == pytest.approx(content["step_time_s"]["total"] * 1_250_000 * 8 / 3600)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "rank 4, 16 layers" in capsys.readouterr().out
    assert main(["plan", path, "--world-size", "8", "--picture", str(tmp_path / "plan.doc")]) == 2
    assert "ends in '.doc', which is no kind of picture" in capsys.readouterr().err


def test_class_tables_are_sharded_over_their_group():
    wide, narrow = planned(), planned("objectives.image_clusters.class_group=tensor")
    table = next(table for table in wide.ranks[-1].tables if table.name == "image_clusters")
    assert table.num_rows == 2_000_000 // 128
    table = next(table for table in narrow.ranks[-1].tables if table.name == "image_clusters")
    assert table.num_rows == 2_000_000 and table.is_dense
    assert layout_of(wide.config, 128).rank_of(Place(0, 127, 0)) == 127


@pytest.mark.parametrize("negatives", ["per_label", "shared"])
def test_active_rows_are_as_many_as_are_chosen(negatives):
    num_classes, first, rows, samples = 20_000, 5_000, 5_000, 64
    objective = PartialFCConfig(
        kind="partial_fc", source="images", num_classes=num_classes, sample_rate=0.1, negatives=negatives
    )
    sets = objective.slots_of_sets
    draw = draw_negatives(num_classes, probability=0.1, num_sets=len(sets), key=7)
    labels = torch.randint(0, num_classes, (samples, 8), generator=torch.Generator().manual_seed(1)).numpy()
    set_of_slot = np.array([index for index, slots in enumerate(sets) for _ in slots])
    positives = collect_positives(labels, set_of_slot, len(sets))
    chosen = choose_active_rows(draw, positives, first_row=first, num_rows=rows, device=torch.device("cpu"))
    assert count_active_rows(objective, rows, samples) == pytest.approx(chosen.rows.numel(), rel=0.05)


@pytest.mark.parametrize(("sample_rate", "share"), [(0.1, 0.60), (0.02, 0.20)])
def test_a_rank_of_many_is_planned_with_the_rows_that_are_meant(sample_rate, share):
    """Stage 1 on 128 GPUs: not the whole shard, which it was while shapes were fixed in advance."""
    path = EXAMPLES / "stage1_image/config.yaml"
    plan = planned(f"objectives.image_clusters.sample_rate={sample_rate}", path=path, gpu="h100-80g")
    table = next(table for table in plan.ranks[-1].tables if table.name == "image_clusters")
    assert table.num_rows == 15_625 and table.num_active / table.num_rows == pytest.approx(share, abs=0.01)
