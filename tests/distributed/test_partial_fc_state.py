"""The class table between steps: checkpoints at any group size, clipping, refused steps and refused labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.errors import CheckpointError, DataError
from tests.support.distributed import run_distributed
from tests.support.head_steps import (
    NAME,
    Case,
    assert_close,
    build,
    dense_step,
    make_batch,
    make_case,
    run_microbatches,
    start,
    step_on_rank,
    table_of,
)

KEYS = ("weight", "exp_avg", "exp_avg_sq", "steps")
WHOLE = list(range(9))
STEP_LAYOUTS = {1: [[WHOLE]], 2: [[WHOLE[:4]], [WHOLE[4:]]], 3: [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]}


def train_and_save(rank: int, world_size: int, case: Case, folder: str, tensor_size: int) -> dict[str, torch.Tensor]:
    """Two sampled steps, so that rows differ in their number of updates; then a checkpoint."""
    topology = start(tensor_size)
    objectives = build(case, topology)
    for step in range(2):
        run_microbatches(replace(case, step=step), objectives, STEP_LAYOUTS[topology.data_size], topology)
        objectives.apply_update(0.1)
    state = {"objectives": objectives.sharded_state_dict("objectives."), "step": 2}
    CheckpointManager(folder, keep=1, verify="full", data_group=topology.data_group).save(2, state)
    return {key: getattr(table_of(objectives), key) for key in KEYS}


def load(rank: int, world_size: int, case: Case, folder: str, tensor_size: int) -> dict[str, torch.Tensor]:
    topology = start(tensor_size)
    objectives = build(case, topology)
    manager = CheckpointManager(folder, keep=1, verify="full", data_group=topology.data_group)
    path = manager.latest()
    assert path is not None
    loaded = manager.load(path, {"objectives": objectives.sharded_state_dict("objectives.")})
    objectives.load_state(loaded["objectives"])
    return {key: getattr(table_of(objectives), key) for key in KEYS}


def load_error(rank: int, world_size: int, case: Case, folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(rank, world_size, case, folder, 1)
    return str(caught.value)


def joined(results: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.cat([result[key] for result in results])


@pytest.mark.parametrize("num_classes", [37, 3])
def test_a_table_saved_by_two_ranks_is_bit_equal_at_any_group_size(tmp_path: Path, num_classes: int):
    case = make_case(num_classes=num_classes, sample_rate=0.3)
    saved = run_distributed(train_and_save, 2, case, str(tmp_path), 1)
    assert joined(saved, "exp_avg").any() and (num_classes == 3 or len(set(joined(saved, "steps").tolist())) > 1)
    for world_size in (1, 3, 4):
        loaded = run_distributed(load, world_size, case, str(tmp_path), 1)
        for key in KEYS:
            assert torch.equal(joined(loaded, key), joined(saved, key)), (world_size, key)


def test_a_table_per_replica_is_saved_once_and_its_copies_stay_equal(tmp_path: Path):
    case = make_case(sample_rate=0.3, class_group="tensor")
    saved = run_distributed(train_and_save, 4, case, str(tmp_path), 2)
    for key in KEYS:
        assert torch.equal(joined(saved[:2], key), joined(saved[2:], key))
    stage_wide = make_case(sample_rate=0.3)
    loaded = run_distributed(load, 3, stage_wide, str(tmp_path), 1)
    for key in KEYS:
        assert torch.equal(joined(loaded, key), joined(saved[:2], key))


def test_a_table_of_another_size_is_refused(tmp_path: Path):
    run_distributed(train_and_save, 1, make_case(), str(tmp_path), 1)
    for changed in (make_case(num_classes=38), make_case(embedding_size=8)):
        for text in run_distributed(load_error, 2, changed, str(tmp_path)):
            assert "Global shape mismatch for loaded (torch.Size([37, 6]))" in text and "objectives.tags." in text
            assert text.endswith("use the configuration it was saved with, or another run_dir to start anew")


def test_the_clip_looks_at_the_whole_table():
    """With gradients far above the limit, what reaches AdamW is the gradient at exactly the limit, on any ranks."""
    limit = 0.01
    case = make_case(optim=ClassCenterOptimConfig(clip_grad_norm=limit, beta1=0.0))
    reference = dense_step(case).center_gradient
    assert reference.norm() > 20 * limit
    for world_size in (1, 2, 3):
        results = run_distributed(step_on_rank, world_size, case, STEP_LAYOUTS[world_size], 1, 0.1)
        assert [result["norm"] for result in results] == pytest.approx([float(reference.norm())] * world_size)
        # Without a running mean the first moment is the clipped gradient itself.
        assert_close(joined(results, "exp_avg"), reference * limit / reference.norm(), 1e-5)


def test_a_gradient_below_the_limit_is_not_touched():
    case = make_case(optim=ClassCenterOptimConfig(clip_grad_norm=1e6, beta1=0.0))
    (result,) = run_distributed(step_on_rank, 1, case, STEP_LAYOUTS[1], 1, 0.1)
    assert torch.equal(result["exp_avg"], result["row_gradient"])


def begin_with_bad_label(rank: int, world_size: int, case: Case, bad: int, sample: int) -> tuple[str, bool]:
    topology = start(1)
    objectives = build(case, topology)
    case.labels[sample, 3] = bad
    batches = [make_batch(case, samples) for samples in STEP_LAYOUTS[world_size][topology.data_rank]]
    with pytest.raises(DataError) as caught:
        objectives.begin_step(0, batches)
    return str(caught.value), caught.value.on_every_rank


@pytest.mark.parametrize(("world_size", "bad", "sample"), [(1, 37, 0), (2, -2, 7), (2, 2_000_000, 1)])
def test_a_label_out_of_range_is_one_sentence_on_every_rank(world_size, bad, sample):
    answers = run_distributed(begin_with_bad_label, world_size, make_case(), bad, sample)
    expected = (
        f"sample 'page-{sample}' of source 'pages' has the label id {bad}, but objective 'tags' has num_classes = 37, "
        "so ids are 0 to 36 (-1 for none); raise objectives.tags.num_classes or write the shards of 'pages' again with "
        "right labels"
    )
    assert answers == [(expected, True)] * world_size


def initial_table(rank: int, world_size: int, case: Case) -> torch.Tensor:
    return table_of(build(case, start(1))).weight


def test_a_fresh_table_does_not_depend_on_the_ranks():
    case = make_case(num_classes=2050)  # more than two blocks of the initialisation
    whole = torch.cat(run_distributed(initial_table, 1, case))
    assert torch.equal(torch.cat(run_distributed(initial_table, 3, case)), whole)
    assert abs(float(whole.std()) - 0.01) < 2e-4 and len(whole.unique()) > whole.numel() * 0.99


def poisoned_step(rank: int, world_size: int, case: Case) -> tuple[float, bool]:
    """Only replica 0 sees the NaN; every rank must know of it and keep its rows."""
    topology = start(1)
    objectives = build(case, topology)
    table = table_of(objectives)
    before = [getattr(table, key).clone() for key in KEYS]
    if topology.data_rank == 0:
        case.embeddings[0, 0] = float("nan")
    run_microbatches(case, objectives, STEP_LAYOUTS[world_size], topology)
    norm = float(objectives.row_gradient_norms()[NAME])
    objectives.discard_update()
    kept = all(torch.equal(old, getattr(table, key)) for old, key in zip(before, KEYS, strict=True))
    return norm, kept


def test_a_nan_on_one_replica_is_seen_by_all_and_changes_nothing():
    for norm, kept in run_distributed(poisoned_step, 3, make_case(sample_rate=0.5)):
        assert norm != norm and kept
