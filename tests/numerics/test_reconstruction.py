"""Reconstruction against its formulas, written down densely in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ove.batch import Batch, PatchPack, Samples
from megatron_ove.config.reconstruction import PixelReconstructionConfig
from megatron_ove.data.patchify import write_patches
from megatron_ove.objectives.reconstruction.objectives import FeatureReconstruction, PixelReconstruction
from megatron_ove.objectives.reconstruction.pictures import resample_features, scale_patches, to_patches, to_pictures
from megatron_ove.objectives.reconstruction.segment_groups import group_segments
from megatron_ove.objectives.reconstruction.structure import edge_distances, soft_edges, structure_distance
from megatron_ove.outputs import VisionFeatures

SIDE, WIDTH = 4, 6
GRIDS = [(1, 2, 3), (1, 2, 2), (0, 0, 0), (1, 2, 3), (2, 1, 2)]
LENGTHS = [6, 4, 3, 6, 4]
CPU = torch.device("cpu")


def microbatch() -> tuple[Batch, VisionFeatures]:
    """Five samples of two sources; the second cannot be read, the third has no grid; two patches of padding."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(bounds[-1]) + 2
    pack = PatchPack(
        positions=torch.zeros(total, 3, dtype=torch.int32),
        cu_seqlens=bounds,
        grids=torch.tensor(GRIDS, dtype=torch.int32),
        sample=torch.arange(5, dtype=torch.int32),
        patches=torch.randint(0, 256, (total, 3 * SIDE * SIDE), generator=generator, dtype=torch.uint8),
    )
    samples = Samples(
        source_names=("a", "b"),
        source=torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32),
        row=torch.arange(5),
        seed=torch.zeros(5, dtype=torch.int64),
        is_valid=torch.tensor([True, False, True, True, True]),
        keys=tuple("vwxyz"),
    )
    tokens = torch.randn(total, 1, WIDTH, generator=generator)
    features = VisionFeatures(tokens, bounds, pack.grids, pack.sample)
    return Batch({"main": pack}, samples), features


def rows_of(*segments: int) -> list[int]:
    starts = np.cumsum([0, *LENGTHS])
    return [row for segment in segments for row in range(starts[segment], starts[segment + 1])]


class FixedTeacher:
    """Features of its own, without an encoder."""

    width = 5

    def __init__(self) -> None:
        self.table = torch.randn(40, self.width, generator=torch.Generator().manual_seed(7))

    def shown(self, grid):
        return grid

    def features(self, pack, groups):
        return self.table[groups.rows(CPU)]


def build(kind, **attributes):
    """An objective without a run around it."""
    from megatron_ove.objectives.reconstruction.objectives import TokenHead

    objective = object.__new__(kind)
    size = attributes.pop("size")
    objective.name, objective.sources, objective._device = "keep", ("a",), CPU
    objective.head = TokenHead(WIDTH, size)
    with torch.no_grad():
        for number, parameter in enumerate(objective.head.parameters()):
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(number))
    for name, value in attributes.items():
        setattr(objective, name, value)
    return objective


def with_inputs(objective, batch: Batch) -> Batch:
    return Batch(batch.packs, batch.samples, {"keep": objective.collate(batch.samples, batch.main, None)})


def head64(objective, tokens: torch.Tensor) -> torch.Tensor:
    fc1, fc2 = objective.head.fc1, objective.head.fc2
    hidden = F.gelu(F.linear(tokens.double(), fc1.weight.double(), fc1.bias.double()))
    return F.linear(hidden, fc2.weight.double(), fc2.bias.double())


def test_features_are_compared_by_cosine_and_smooth_l1() -> None:
    batch, features = microbatch()
    objective = build(FeatureReconstruction, size=5, _teacher=FixedTeacher(), _mu=0.3)
    batch = with_inputs(objective, batch)
    rows = rows_of(0, 2, 3)  # readable samples of the source, with or without a grid
    assert objective.num_items(batch) == len(rows) == 15
    tokens = features.tokens.clone().requires_grad_()
    terms = objective.forward(VisionFeatures(tokens, features.cu_seqlens, features.grids, features.sample), batch)
    terms.loss_sum.backward()

    plain = features.tokens.double().clone().requires_grad_()
    said, wanted = head64(objective, plain[rows, 0]), objective._teacher.table[rows].double()
    cosine = (said * wanted).sum(1) / said.norm(dim=1) / wanted.norm(dim=1)
    gap = (said - wanted).abs()
    smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(1)
    expected = (1 - cosine + 0.3 * smooth).sum()
    expected.backward()
    assert float(terms.loss_sum) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(tokens.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)
    assert not tokens.grad[rows_of(1, 4)].any()
    assert [float(x) for x in terms.metrics["cosine"]] == pytest.approx([float(cosine.sum()), 15.0], rel=1e-5)


def test_pixels_are_compared_by_squares() -> None:
    batch, features = microbatch()
    config = PixelReconstructionConfig(kind="pixel_reconstruction", source="a")
    objective = build(PixelReconstruction, size=3 * SIDE * SIDE, _config=config)
    batch = with_inputs(objective, batch)
    rows = rows_of(0, 2, 3)
    terms = objective.forward(features, batch)
    said = head64(objective, features.tokens[rows, 0])
    expected = (said - batch.main.patches[rows].double() / 255).square().mean(1).sum()
    assert float(terms.loss_sum) == pytest.approx(float(expected), rel=1e-6)
    assert [float(terms.metrics["loss"][1]), set(terms.metrics)] == [15.0, {"loss", "squared_error"}]


def test_structure_counts_every_picture_by_its_patches() -> None:
    batch, features = microbatch()
    config = PixelReconstructionConfig(kind="pixel_reconstruction", source="a", structure_weight=0.5, edge_reach=3)
    objective = build(PixelReconstruction, size=3 * SIDE * SIDE, _config=config)
    batch = with_inputs(objective, batch)
    terms = objective.forward(features, batch)
    said = head64(objective, features.tokens[:, 0])
    pixels = batch.main.patches.double() / 255
    expected = (said - pixels)[rows_of(0, 2, 3)].square().mean(1).sum()
    for segment in (0, 3):  # the third sample has no grid, so no neighbours
        own = rows_of(segment)
        pictures = [to_pictures(x[own], 1, 2, 3) for x in (said, pixels)]
        assert pictures[0].shape == (1, 3, 2 * SIDE, 3 * SIDE)
        expected = expected + 0.5 * dense_structure(*pictures, beta=0.25, tau=0.08, reach=3) * 6
    assert float(terms.loss_sum) == pytest.approx(float(expected), rel=1e-5)


def dense_structure(said: torch.Tensor, wanted: torch.Tensor, *, beta: float, tau: float, reach: int) -> float:
    """The printed formulas for one picture [1, 3, H, W], pixel by pixel."""

    def edges(picture: np.ndarray) -> np.ndarray:
        gray = np.pad(picture.mean(0), 1, mode="edge")
        height, width = gray.shape[0] - 2, gray.shape[1] - 2
        magnitude = np.empty((height, width))
        for y in range(height):
            for x in range(width):
                window = gray[y : y + 3, x : x + 3]
                gx = (window[:, 2] - window[:, 0]) @ [1, 2, 1]
                gy = (window[2] - window[0]) @ [1, 2, 1]
                magnitude[y, x] = np.sqrt(gx**2 + gy**2 + 1e-12)
        return 1 / (1 + np.exp(-(magnitude - magnitude.mean()) / tau))

    def distances(edge: np.ndarray) -> np.ndarray:
        found = reach * (1 - edge)
        for _ in range(reach):
            padded = np.pad(found, 1, constant_values=np.inf)
            near = np.array(
                [[padded[y : y + 3, x : x + 3].min() for x in range(edge.shape[1])] for y in range(edge.shape[0])]
            )
            found = np.minimum(found, near + 1)
        return found

    a, b = (edges(picture[0].detach().numpy()) for picture in (said, wanted))
    return np.abs(distances(a) - distances(b)).mean() + beta * np.abs(a - b).mean()


def test_structure_has_a_gradient_everywhere() -> None:
    """Also where a picture is even, whose Sobel magnitude is 0."""
    said = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    said[1] += 0.2 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    said.requires_grad_()
    structure_distance(said, wanted, edge_weight=0.25, temperature=0.08, reach=4).sum().backward()
    assert torch.isfinite(said.grad).all() and said.grad[1].any()
    noise = wanted[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: structure_distance(x, wanted[1:], edge_weight=0.25, temperature=0.08, reach=2), noise, atol=1e-4
    )


def test_distances_grow_from_an_edge() -> None:
    picture = torch.zeros(1, 3, 9, 9)
    picture[..., 4:] = 1.0
    edges = soft_edges(picture, 0.02)
    assert (edges[0, 0, 4] > 0.9).nonzero().flatten().tolist() == [3, 4]
    steps = edge_distances(edges, 16)[0, 0, 4].tolist()
    assert steps == pytest.approx([3, 2, 1, 0, 0, 1, 2, 3, 4], abs=0.05)


def test_a_microbatch_without_any_picture_gives_gradients_of_zero() -> None:
    batch, features = microbatch()
    empty = Batch(batch.packs, Samples(("a", "b"), *[x[:0] for x in (batch.samples.source, batch.samples.row)],
                                       batch.samples.seed[:0], batch.samples.is_valid[:0], ()))  # fmt: skip
    pack = PatchPack(batch.main.positions, torch.zeros(1, dtype=torch.int32), batch.main.grids[:0],
                     batch.main.sample[:0], batch.main.patches)  # fmt: skip
    config = PixelReconstructionConfig(kind="pixel_reconstruction", source="a", structure_weight=0.5)
    for objective in (
        build(FeatureReconstruction, size=5, _teacher=FixedTeacher(), _mu=0.1),
        build(PixelReconstruction, size=3 * SIDE * SIDE, _config=config),
    ):
        given = with_inputs(objective, Batch({"main": pack}, empty.samples))
        terms = objective.forward(features, given)
        terms.loss_sum.backward()
        assert float(terms.loss_sum) == 0 and objective.num_items(given) == 0
        assert all(not parameter.grad.any() for parameter in objective.head.parameters())


def test_pictures_and_patches_are_one_another() -> None:
    picture = torch.randint(0, 256, (2 * SIDE, 3 * SIDE, 3), dtype=torch.uint8)
    patches = torch.empty(6, 3 * SIDE * SIDE, dtype=torch.uint8)
    write_patches(picture, patches, SIDE)
    found = to_pictures(patches, 1, 2, 3)
    assert torch.equal(found[0].permute(1, 2, 0), picture)
    assert torch.equal(to_patches(found, SIDE), patches)


def test_a_scaled_picture_is_what_the_library_s_resizing_makes_of_it() -> None:
    """Within two of 255 levels; and features that vary evenly still do."""
    cv2 = pytest.importorskip("cv2")
    ramp = np.add.outer(np.linspace(20, 200, 8 * SIDE), np.linspace(0, 50, 6 * SIDE)).astype(np.uint8)
    picture = np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)
    patches = torch.empty(48, 3 * SIDE * SIDE, dtype=torch.uint8)
    write_patches(torch.from_numpy(picture.copy()), patches, SIDE)
    scaled = to_pictures(scale_patches(patches, 1, (8, 6), (4, 3)), 1, 4, 3)[0].permute(1, 2, 0).numpy()
    wanted = cv2.resize(picture, (3 * SIDE, 4 * SIDE), interpolation=cv2.INTER_AREA)
    assert np.abs(scaled.astype(int) - wanted)[1:-1, 1:-1].max() <= 2

    rows = torch.arange(4.0).repeat_interleave(3)[:, None]
    finer = resample_features(rows, 1, (4, 3), (8, 6)).view(8, 6)
    assert finer[:, 0].tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]


def test_pictures_of_one_size_are_grouped() -> None:
    batch, _ = microbatch()
    groups = group_segments(batch.samples, batch.main, ("a", "b"), CPU, lambda grid: (1, 1, 1) if grid[1] > 1 else grid)
    assert [(group.count, group.grid, group.shown) for group in groups.groups] == [
        (2, (1, 2, 3), (1, 1, 1)),
        (1, (0, 0, 0), (0, 0, 0)),
        (1, (2, 1, 2), (2, 1, 2)),
    ]
    assert groups.rows(CPU).tolist() == rows_of(0, 3, 2, 4)
