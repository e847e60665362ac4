"""The class table between steps: checkpoints at any group size, clipping, refused steps and refused labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ove.checkpoint.manager import CheckpointManager
from megatron_ove.config.optim import ClassCenterOptimConfig
from megatron_ove.convert.class_centers import load_class_head
from megatron_ove.errors import CheckpointError, DataError
from megatron_ove.heads.class_centers import initial_rows
from megatron_ove.objectives.objective_set import ObjectiveSet
from megatron_ove.parallel.class_order import rows_of_classes
from megatron_ove.parallel.topology import ParallelTopology
from tests.support.distributed import run_distributed
from tests.support.head_steps import (
    EXACT_OPTIM,
    NAME,
    SEED,
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
from tests.support.objective_steps import begin

KEYS = ("weight", "exp_avg", "exp_avg_sq", "steps")
WHOLE = list(range(9))
STEP_LAYOUTS = {1: [[WHOLE]], 2: [[WHOLE[:4]], [WHOLE[4:]]], 3: [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]}


STORAGE: dict[str, dict[str, Any]] = {
    "exact": {"first_moment": "float32", "second_moment": "element"},
    "default": {},
    "bf16 everywhere": {"weight_dtype": "bfloat16", "first_moment": "bfloat16", "second_moment": "row"},
    "bf16 dense": {
        "weight_dtype": "bfloat16",
        "first_moment": "bfloat16",
        "second_moment": "element",
        "update": "dense",
    },
    "bf16 bare": {"weight_dtype": "bfloat16", "first_moment": "none", "second_moment": "row"},
}
State = dict[str, torch.Tensor | None]


def state_of(objectives: ObjectiveSet) -> State:
    """Copies of what a table holds, and whether its norms are those of its weights."""
    table = table_of(objectives)
    state = {key: getattr(table, key) for key in KEYS}
    true = torch.linalg.vector_norm(table.weight.double(), dim=1)
    torch.testing.assert_close(table._update.norms[:-1].double(), true, rtol=1e-6, atol=0)
    return {key: None if value is None else value.clone() for key, value in state.items()}


def step_once(case: Case, objectives: ObjectiveSet, topology: ParallelTopology, step: int) -> None:
    run_microbatches(replace(case, step=step), objectives, STEP_LAYOUTS[topology.data_size], topology)
    objectives.step(0.1)


def train_and_save(
    rank: int, world_size: int, cases: dict[str, Case], folder: str, tensor_size: int
) -> dict[str, tuple[State, State]]:
    """Two steps, so that rows differ in their number of updates; a checkpoint; one more. (Saved, after one more)."""
    topology = start(tensor_size)
    results = {}
    for name, case in cases.items():
        objectives = build(case, topology)
        for step in range(2):
            step_once(case, objectives, topology, step)
        saved = state_of(objectives)
        state = {"objectives": objectives.sharded_state_dict("objectives."), "step": 2}
        path = Path(folder) / name.replace(" ", "_")
        CheckpointManager(path, keep=1, verify="full", data_group=topology.data_group).save(2, state)
        step_once(case, objectives, topology, 2)
        results[name] = saved, state_of(objectives)
    return results


def load(
    rank: int, world_size: int, cases: dict[str, Case], folder: str, tensor_size: int
) -> dict[str, tuple[State, State]]:
    return load_all(cases, folder, start(tensor_size))


def load_all(cases: dict[str, Case], folder: str, topology: ParallelTopology) -> dict[str, tuple[State, State]]:
    """(Loaded, after one more step)."""
    results = {}
    for name, case in cases.items():
        objectives = build(case, topology)
        path = Path(folder) / name.replace(" ", "_")
        manager = CheckpointManager(path, keep=1, verify="full", data_group=topology.data_group)
        newest = manager.latest()
        assert newest is not None
        loaded = manager.load(newest, {"objectives": objectives.sharded_state_dict("objectives.")})
        objectives.load_state(loaded["objectives"])
        before = state_of(objectives)
        step_once(case, objectives, topology, 2)
        results[name] = before, state_of(objectives)
    return results


def load_errors(rank: int, world_size: int, cases: dict[str, Case], folder: str) -> dict[str, str]:
    """Loads "saved" with other options; returns the sentences."""
    topology, found = start(1), {}
    for name, case in cases.items():
        with pytest.raises(CheckpointError) as caught:
            load_all({"saved": case}, folder, topology)
        found[name] = str(caught.value)
    return found


def exact(**options: float) -> ClassCenterOptimConfig:
    return EXACT_OPTIM.model_copy(update=options)


def joined(results: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.cat([result[key] for result in results])


def whole(results: Sequence[dict[str, tuple[State, State]]], name: str, when: int) -> State:
    """A table put together from its ranks, before (0) or after (1) the last step."""
    parts = [result[name][when] for result in results]
    return {key: None if parts[0][key] is None else joined(parts, key) for key in KEYS}


def assert_same_bits(first: State, second: State) -> None:
    for key in KEYS:
        one, other = first[key], second[key]
        if one is None or other is None:
            assert one is other is None
        else:
            assert one.dtype == other.dtype and torch.equal(one, other), key


def test_a_resumed_table_goes_on_bit_for_bit_with_every_storage(tmp_path: Path):
    cases = {
        name: make_case(sample_rate=0.2, optim=ClassCenterOptimConfig(**options)) for name, options in STORAGE.items()
    }
    cases["three classes"] = make_case(num_classes=3, sample_rate=0.3)
    cases["factors"] = make_case(sample_rate=0.2, embedding_size=12, optim=ClassCenterOptimConfig())
    saved = run_distributed(train_and_save, 2, cases, str(tmp_path), 1)
    resumed = run_distributed(load, 2, cases, str(tmp_path), 1)
    for name, case in cases.items():
        for when in (0, 1):
            assert_same_bits(whole(resumed, name, when), whole(saved, name, when))
        before, after = whole(saved, name, 0), whole(saved, name, 1)
        steps = before["steps"]
        assert steps is not None and after["weight"] is not None
        assert case.config.num_classes == 3 or case.optim.update == "dense" or len(steps.unique()) > 1
        assert not torch.equal(after["weight"], before["weight"])
    elsewhere = run_distributed(load, 3, cases, str(tmp_path), 1)
    for name in cases:
        assert_same_bits(whole(elsewhere, name, 0), whole(saved, name, 0))


def test_a_table_per_replica_is_saved_once_and_its_copies_stay_equal(tmp_path: Path):
    cases = {
        name: make_case(sample_rate=0.3, class_group="tensor", optim=ClassCenterOptimConfig(**STORAGE[name]))
        for name in ("exact", "bf16 everywhere")
    }
    saved = run_distributed(train_and_save, 4, cases, str(tmp_path), 2)
    for name in cases:
        for when in (0, 1):
            assert_same_bits(whole(saved[:2], name, when), whole(saved[2:], name, when))
    stage_wide = {name: make_case(sample_rate=0.3, optim=ClassCenterOptimConfig(**STORAGE[name])) for name in cases}
    loaded = run_distributed(load, 3, stage_wide, str(tmp_path), 1)
    for name in cases:
        assert_same_bits(whole(loaded, name, 0), whole(saved[:2], name, 0))


def test_a_table_of_another_size_or_storage_is_refused(tmp_path: Path):
    run_distributed(train_and_save, 1, {"saved": make_case()}, str(tmp_path), 1)
    other = {
        "classes": make_case(num_classes=38),
        "embedding": make_case(embedding_size=8),
        "moments": make_case(optim=exact(second_moment="row")),
    }
    for sentences in run_distributed(load_errors, 2, other, str(tmp_path)):
        for name, text in sentences.items():
            assert "Global shape mismatch for loaded (torch.Size([37, 6]))" in text and "objectives.tags." in text, name
            assert text.endswith("use the configuration it was saved with, or another run_dir to start anew")


def teach_one_class(rank: int, world_size: int, case: Case, label: int, folder: str) -> None:
    """A step in which all samples have one label and hardly any other class is active; its checkpoint."""
    topology = start(1)
    case.labels[:], case.embeddings[:] = label, case.embeddings[0]
    objectives = build(case, topology)
    step_once(case, objectives, topology, 0)
    state = objectives.sharded_state_dict("objectives.")[NAME] | {"config": {"objectives": {NAME: {}}}, "step": 1}
    CheckpointManager(folder, keep=1, verify="full", data_group=topology.data_group).save(1, state)


@pytest.mark.parametrize("label", [1, 36])
def test_centers_are_read_in_the_order_of_class_ids(tmp_path: Path, label: int):
    """However they are striped over ranks: what moved is the center of the class that was learned."""
    optim = exact(first_moment="none", second_moment="row")  # steps along the gradient
    case = make_case(num_sampled=2, negatives="shared", interclass_filter=1.0, optim=optim)
    run_distributed(teach_one_class, 2, case, label, str(tmp_path))
    fresh = initial_rows(SEED, NAME, 0, 37, 6)[rows_of_classes(torch.arange(37), 37)]
    read = load_class_head(tmp_path / "step_00000001", NAME).centers
    moved = (read != fresh).any(1).nonzero().flatten().tolist()
    assert label in moved and len(moved) in (2, 3)
    # The center came closer to the samples, the negatives went away from them.
    before, after = (torch.nn.functional.normalize(table, dim=1) @ case.embeddings[0] for table in (fresh, read))
    turn = after - before
    assert turn[label] > 0 and all(turn[row] < 0 for row in moved if row != label)


def test_the_clip_looks_at_the_whole_table():
    """With gradients far above the limit, what reaches AdamW is the gradient at exactly the limit, on any ranks."""
    limit = 0.01
    case = make_case(optim=exact(clip_grad_norm=limit, beta1=0.0))
    reference = dense_step(case).center_gradient
    assert reference.norm() > 20 * limit
    for world_size in (1, 3):
        results = run_distributed(step_on_rank, world_size, case, STEP_LAYOUTS[world_size], 1, 0.1)
        assert [result["norm"] for result in results] == pytest.approx([float(reference.norm())] * world_size)
        # Without a running mean the first moment is the clipped gradient itself.
        assert_close(joined(results, "exp_avg"), reference * limit / reference.norm(), 1e-5)


def test_a_gradient_below_the_limit_is_not_touched():
    case = make_case(optim=exact(clip_grad_norm=1e6, beta1=0.0))
    (result,) = run_distributed(step_on_rank, 1, case, STEP_LAYOUTS[1], 1, 0.1)
    assert torch.equal(result["exp_avg"], result["row_gradient"])


def begin_with_bad_label(rank: int, world_size: int, case: Case, bad: int, samples: list[int]) -> tuple[str, bool]:
    topology = start(1)
    objectives = build(case, topology)
    case.labels[samples, 3] = bad
    batches = [make_batch(case, samples) for samples in STEP_LAYOUTS[world_size][topology.data_rank]]
    with pytest.raises(DataError) as caught:
        begin(objectives, 0, batches)
    return str(caught.value), caught.value.on_every_rank


@pytest.mark.parametrize(("world_size", "bad", "samples"), [(2, -2, [7]), (3, 2**31 - 1, [8, 4])])
def test_a_label_out_of_range_is_one_sentence_on_every_rank(world_size, bad, samples):
    """That of the first replica that has one."""
    answers = run_distributed(begin_with_bad_label, world_size, make_case(), bad, samples)
    expected = (
        f"sample 'page-{min(samples)}' of source 'pages' has the label id {bad}, but objective 'tags' has "
        "num_classes = 37, so ids are 0 to 36 (-1 for none); raise objectives.tags.num_classes or write the shards of "
        "'pages' again with right labels"
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
    norm = float(objectives.gradient_norms()[NAME])
    objectives.discard()
    kept = all(torch.equal(old, getattr(table, key)) for old, key in zip(before, KEYS, strict=True))
    return norm, kept


def test_a_nan_on_one_replica_is_seen_by_all_and_changes_nothing():
    for norm, kept in run_distributed(poisoned_step, 3, make_case(sample_rate=0.5)):
        assert norm != norm and kept
