"""Every layout of up to four ranks is one rank: losses, gradients of all parameters and of all class-center rows.

Twenty steps of three heads, over gloo. A group of processes walks all layouts of its size.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from tests.support.layout_grid import NUM_STEPS, RunRecord, compare_gradients, compare_losses, run_layouts
from tests.support.tiny_run import write_tiny_sources

TOLERANCE = 1e-5


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
        "pp2_vpp2_dp2_uneven_optimizer_reduce_gather": grid(1, 2, 2, "optimizer", "reduce", "gather", last=2, **DEEP),
        "dp4": grid(),
        "dp4_optimizer": grid(1, 1, None, "optimizer"),
    },
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_sources(tmp_path_factory.mktemp("sources"))


class Grid:
    """Runs all layouts of a world size when the first of them is asked for."""

    def __init__(self, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
        self._sources, self._factory = sources, tmp_path_factory
        self._records: dict[int, dict[str, RunRecord]] = {}

    def __getitem__(self, name: str) -> RunRecord:
        world_size = next(size for size, layouts in LAYOUTS.items() if name in layouts)
        if world_size not in self._records:
            self._records[world_size] = {}  # a failure is not tried again for every layout
            folder = self._factory.mktemp(f"ranks{world_size}_")
            self._records[world_size] = run_layouts(self._sources, folder, world_size, LAYOUTS[world_size])
        return self._records[world_size][name]

    def reference_of(self, name: str) -> RunRecord:
        """Returns the run of one rank with as many layers."""
        return self["one_deep" if any(layouts.get(name, {}).get("layers") for layouts in LAYOUTS.values()) else "one"]


@pytest.fixture(scope="module")
def runs(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(sources, tmp_path_factory)


def test_the_reference_run_moves_and_sees_everything(runs: Grid) -> None:
    expected = {"loss", "loss/image_labels", "loss/ocr_labels", "loss/video_labels", "grad_norm"}
    assert expected <= set(runs["one"].losses[0])
    assert len({row["loss"] for row in runs["one"].losses}) == NUM_STEPS
    for gradients in runs["one"].gradients.values():
        assert {"image_labels rows", "ocr_labels rows", "video_labels rows", "head.probe"} <= set(gradients)
        assert sum(name.startswith("decoder.layers.3.") for name in gradients) == 12


@pytest.mark.parametrize("layout", [name for name in chain(*LAYOUTS.values()) if name not in ("one", "one_deep")])
def test_layout_is_one_rank(runs: Grid, layout: str) -> None:
    record, reference = runs[layout], runs.reference_of(layout)
    losses, gradients = compare_losses(record, reference), compare_gradients(record, reference)
    worst = max(gradients, key=lambda key: gradients[key])
    print(f"GRID | {layout} | {losses:.1e} | {gradients[worst]:.1e} | {worst}")
    assert len(record.losses) == NUM_STEPS
    assert losses < TOLERANCE
    assert gradients[worst] < TOLERANCE, worst
    assert record.tables.keys() == reference.tables.keys()
    for name, expected in reference.tables.items():
        difference = float((record.tables[name] - expected).float().norm() / expected.float().norm())
        print(f"TABLE | {layout} | {name} | {difference:.1e}")
        assert difference < TOLERANCE, name
