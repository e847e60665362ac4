"""Every layout of up to four ranks is one rank: losses, gradients of all parameters and of all class-center rows.

Three heads, over gloo. A few steps show a wrong gradient, and a wrong update by the gradients after it; twenty show
what adds up. `make test` runs as few layouts as hold every pair of features, three of them over twenty steps;
`make test-full` runs all of them over twenty. A group of processes walks many layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from typing import Any

import pytest

from tests.support.layout_grid import NUM_STEPS, RunRecord, compare_gradients, compare_losses, run_layouts
from tests.support.tiny_run import write_tiny_sources

pytestmark = pytest.mark.timeout(1500)  # the first test of a world size waits for all its layouts

TOLERANCE = 1e-5
FEW_STEPS = 4


def grid(
    tensor: int = 1,
    pipeline: int = 1,
    chunks: int | None = None,
    *options: str,
    first: int | None = None,
    last: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Returns a layout; options: sequence, optimizer (distributed), reduce, gather (overlapped)."""
    names = {
        "sequence": "sequence_parallel",
        "optimizer": "use_distributed_optimizer",
        "reduce": "overlap_grad_reduce",
        "gather": "overlap_param_gather",
    }
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": chunks,
        "num_layers_in_first_stage": first,
        "num_layers_in_last_stage": last,
        **{names[option]: True for option in options},
        **others,
    }


DEEP = {"layers": 8}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": grid(),
        "one_deep": grid(**DEEP),
        "one_microbatch": grid(tokens=192),
        "one_optimizer": grid(1, 1, None, "optimizer", "reduce", "gather"),
    },
    2: {
        "tp2": grid(2, tokens=96),
        "tp2_sp": grid(2, 1, None, "sequence", tokens=96),
        "pp2": grid(1, 2),
        "pp2_uneven": grid(1, 2, last=1),
        "pp2_vpp2": grid(1, 2, 2),
        "pp2_vpp4": grid(1, 2, 4, **DEEP),
        "pp2_vpp2_uneven": grid(1, 2, 2, last=2, **DEEP),
        "dp2": grid(),
        "dp2_tables_over_tensor": grid(class_group="tensor"),
        "dp2_one_microbatch": grid(tokens=96),
        "dp2_reduce": grid(1, 1, None, "reduce"),
        "dp2_optimizer": grid(1, 1, None, "optimizer"),
        "dp2_optimizer_reduce_gather": grid(1, 1, None, "optimizer", "reduce", "gather"),
    },
    3: {
        "pp3_uneven": grid(1, 3, first=2),
        "pp3_vpp2_uneven": grid(1, 3, 2, first=2, last=2, **DEEP),
        "dp3_optimizer": grid(1, 1, None, "optimizer"),
    },
    4: {
        "tp4_sp": grid(4, 1, None, "sequence", tokens=96),
        "tp2_pp2": grid(2, 2, tokens=96),
        "tp2_sp_pp2_uneven": grid(2, 2, None, "sequence", last=1),
        "tp2_sp_pp2_vpp2": grid(2, 2, 2, "sequence"),
        "tp2_pp2_vpp2_uneven": grid(2, 2, 2, first=2, **DEEP),
        "tp2_dp2": grid(2),
        "tp2_dp2_tables_over_tensor": grid(2, class_group="tensor", tokens=96),
        "tp2_sp_dp2_optimizer": grid(2, 1, None, "sequence", "optimizer"),
        "tp2_sp_dp2_optimizer_reduce_gather": grid(2, 1, None, "sequence", "optimizer", "reduce", "gather"),
        "pp4": grid(1, 4),
        "pp4_uneven": grid(1, 4, first=3, last=1, **DEEP),
        "pp4_vpp2": grid(1, 4, 2, **DEEP),
        "pp2_dp2": grid(1, 2),
        "pp2_dp2_uneven_optimizer_reduce": grid(1, 2, None, "optimizer", "reduce", last=1),
        "pp2_vpp2_dp2_optimizer": grid(1, 2, 2, "optimizer"),
        "everything": grid(1, 2, 2, "optimizer", "reduce", "gather", last=2, **DEEP),
        "dp4": grid(),
        "dp4_optimizer": grid(1, 1, None, "optimizer"),
    },
}


REFERENCES = ("one", "one_deep")
ALWAYS_LONG = (*REFERENCES, "tp2_sp_pp2_vpp2", "dp2_optimizer", "everything")
# With the three above every two features that are together in any layout are together in one of these.
FEW_STEP_LAYOUTS = (
    *("one_optimizer", "dp2_tables_over_tensor", "dp2_reduce", "dp2_optimizer_reduce_gather", "tp2_sp"),
    *("pp2_vpp2_uneven", "pp3_uneven", "pp3_vpp2_uneven", "dp3_optimizer"),
    *("tp4_sp", "pp4_vpp2", "dp4_optimizer", "tp2_sp_pp2_uneven", "tp2_dp2_tables_over_tensor"),
    "tp2_sp_dp2_optimizer_reduce_gather",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


class Grid:
    """Runs by layout and number of steps. The first that is asked for runs all that are asked for in the same tests."""

    def __init__(self, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
        self._sources, self._factory = sources, tmp_path_factory
        self._records: dict[tuple[int, int, bool], dict[str, RunRecord]] = {}

    def __getitem__(self, run: tuple[str, int]) -> RunRecord:
        name, num_steps = run
        world_size = next(size for size, layouts in LAYOUTS.items() if name in layouts)
        is_always_long = name in ALWAYS_LONG
        group = world_size, num_steps, is_always_long
        if group not in self._records:
            self._records[group] = {}  # a failure is not tried again for every layout
            self._records[group] = run_layouts(
                self._sources,
                self._factory.mktemp(f"ranks{world_size}_steps{num_steps}_"),
                world_size,
                {
                    other: {**layout, "stop_after": num_steps}
                    for other, layout in LAYOUTS[world_size].items()
                    if (other in ALWAYS_LONG) == is_always_long
                    and (num_steps == NUM_STEPS or other in (*REFERENCES, *FEW_STEP_LAYOUTS))
                },
                timeout_s=1450,
            )
        return self._records[group][name]

    def reference_of(self, name: str, num_steps: int) -> RunRecord:
        """Returns the run of one rank with as many layers and steps."""
        is_deep = any(layouts.get(name, {}).get("layers") for layouts in LAYOUTS.values())
        return self["one_deep" if is_deep else "one", num_steps]


@pytest.fixture(scope="module")
def runs(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(sources, tmp_path_factory)


def compared_runs() -> Iterator[Any]:
    """Layout and number of steps of every run that is compared with one rank's."""
    for name in chain(*LAYOUTS.values()):
        if name in REFERENCES:
            continue
        if name in FEW_STEP_LAYOUTS:
            yield pytest.param(name, FEW_STEPS, id=f"{name}-{FEW_STEPS}")
        marks = () if name in ALWAYS_LONG else pytest.mark.full
        yield pytest.param(name, NUM_STEPS, id=f"{name}-{NUM_STEPS}", marks=marks)


def test_the_reference_run_moves_and_sees_everything(runs: Grid) -> None:
    expected = {"loss", "loss/image_labels", "loss/ocr_labels", "loss/video_labels", "grad_norm"}
    one = runs["one", NUM_STEPS]
    assert expected <= set(one.losses[0])
    assert len({row["loss"] for row in one.losses}) == NUM_STEPS
    assert set(one.gradients) == {0, NUM_STEPS - 1}
    for gradients in one.gradients.values():
        assert {"image_labels rows", "ocr_labels rows", "video_labels rows", "head.probe"} <= set(gradients)
        assert sum(name.startswith("decoder.layers.3.") for name in gradients) == 12


def test_the_few_layouts_hold_every_pair_of_features() -> None:
    held = set().union(*(pairs(name) for name in (*ALWAYS_LONG, *FEW_STEP_LAYOUTS)))
    assert held == set().union(*map(pairs, chain(*LAYOUTS.values())))


def pairs(name: str) -> set[tuple[tuple[str, Any], ...]]:
    """Returns every two features of a layout: what it has and has not, and the size of each of its dimensions."""
    world_size, layout = next((size, layouts[name]) for size, layouts in LAYOUTS.items() if name in layouts)
    tensor, pipeline = (layout[f"{way}_model_parallel_size"] for way in ("tensor", "pipeline"))
    flags = ("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    features = {
        "tensor": tensor > 1,
        "stages": pipeline > 1,
        "chunks": layout["virtual_pipeline_model_parallel_size"] is not None,
        "replicas": world_size > tensor * pipeline,
        "uneven": layout["num_layers_in_first_stage"] is not None or layout["num_layers_in_last_stage"] is not None,
        "class group": layout.get("class_group", "stage"),
        "ranks": world_size,
        **{flag: layout.get(flag, False) for flag in flags},
    }
    sizes = {("size", (tensor, 1, 1)), ("size", (1, pipeline, 1)), ("size", (1, 1, world_size // (tensor * pipeline)))}
    return set(combinations(sorted(features.items(), key=str), 2)) | {(size,) for size in sizes}


def test_few_steps_are_the_first_of_many(runs: Grid) -> None:
    few, many = runs["one", FEW_STEPS], runs["one", NUM_STEPS]
    assert few.losses == many.losses[:FEW_STEPS]
    assert set(few.gradients) == {0, FEW_STEPS - 1}


@pytest.mark.parametrize(("layout", "num_steps"), compared_runs())
def test_layout_is_one_rank(runs: Grid, layout: str, num_steps: int) -> None:
    record, reference = runs[layout, num_steps], runs.reference_of(layout, num_steps)
    losses, gradients = compare_losses(record, reference), compare_gradients(record, reference)
    worst = max(gradients, key=lambda key: gradients[key])
    print(f"GRID | {layout} | {num_steps} | {losses:.1e} | {gradients[worst]:.1e} | {worst}")
    assert len(record.losses) == num_steps
    assert losses < TOLERANCE
    assert gradients[worst] < TOLERANCE, worst
    assert record.tables.keys() == reference.tables.keys()
    for name, expected in reference.tables.items():
        difference = float((record.tables[name] - expected).float().norm() / expected.float().norm())
        print(f"TABLE | {layout} | {name} | {difference:.1e}")
        assert difference < TOLERANCE, name
