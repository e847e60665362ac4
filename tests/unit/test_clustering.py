"""Descriptors, spherical k-means, and exact nearest centers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering import kmeans
from megatron_ove.preprocess.clustering.descriptor_sets import Centers, DescriptorSet, LabelSet, SampleFiles
from megatron_ove.preprocess.clustering.descriptors import ColourAndGradientDescriber, describe_clip
from megatron_ove.preprocess.clustering.kmeans import train_centers
from megatron_ove.preprocess.clustering.nearest import nearest_centers
from megatron_ove.preprocess.demo_input.images import draw_variant
from megatron_ove.preprocess.record_files import file_state
from tests.support.clips import textured_background
from tests.support.tool_scripts import run_script


def _blobs(num_blobs: int, per_blob: int, size: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centers = random.normal(size=(num_blobs, size))
    points = np.repeat(centers, per_blob, axis=0) + 0.05 * random.normal(size=(num_blobs * per_blob, size))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float32), np.repeat(np.arange(num_blobs), per_blob)


def test_descriptors_have_length_one_and_group_crops_of_a_photograph() -> None:
    describer = ColourAndGradientDescriber()
    names = ["cat", "coffee", "galaxies", "rocket"]
    vectors = {n: [describer.describe(draw_variant(n, np.random.default_rng(i))) for i in range(6)] for n in names}
    table = np.stack([vector for name in names for vector in vectors[name]])
    assert table.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1.0, atol=1e-5)
    similarity = table @ table.T
    group = np.repeat(np.arange(4), 6)
    same = (group[:, None] == group[None]) & ~np.eye(24, dtype=bool)
    assert similarity[same].mean() > similarity[group[:, None] != group[None]].mean() + 0.15


def test_descriptor_does_not_depend_on_the_picture_size() -> None:
    picture = textured_background(64, 64)
    describe = ColourAndGradientDescriber().describe
    assert describe(picture) @ describe(picture.repeat(2, 0).repeat(2, 1)) > 0.999
    assert np.isfinite(describe(np.zeros((5, 7, 3), np.uint8))).all()


def test_clip_descriptor_joins_frames_in_order() -> None:
    frames = np.stack([textured_background(32, 32, seed) for seed in range(8)])
    describer = ColourAndGradientDescriber()
    vector = describe_clip(frames, describer, num_frames=4)
    parts = vector.reshape(4, -1) * 2.0  # four unit vectors, jointly of length 1
    for part, index in zip(parts, (1, 3, 5, 7), strict=True):
        np.testing.assert_allclose(part, describer.describe(frames[index]), atol=1e-5)
    assert vector @ describe_clip(frames[::-1], describer, num_frames=4) < 0.95
    with pytest.raises(DataError, match=r"num_frames = 9 frames cannot be taken of a clip with 8"):
        describe_clip(frames, describer, num_frames=9)


def test_kmeans_finds_the_groups_and_follows_the_seed() -> None:
    points, group = _blobs(6, 40)
    centers = train_centers(points, 6, seed=3)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1.0, atol=1e-5)
    labels, similarities = nearest_centers(points, centers, num_labels=1)
    purity = sum(np.bincount(labels[group == g, 0]).max() for g in range(6)) / len(points)
    assert purity > 0.8
    assert similarities.dtype == np.float16
    np.testing.assert_array_equal(centers, train_centers(points, 6, seed=3))
    assert not np.array_equal(centers, train_centers(points, 6, seed=4))


def test_kmeans_uses_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = _blobs(2, 700)  # 350 points a center: faiss would keep 256 of them by default
    seen: list[dict[str, object]] = []
    original = kmeans.faiss.Kmeans

    def spy(*args: object, **options: object) -> object:
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(kmeans.faiss, "Kmeans", spy)
    train_centers(points, 4)
    assert seen[0]["max_points_per_centroid"] >= len(points) / 4
    assert seen[0]["min_points_per_centroid"] == 1


def test_empty_clusters_are_filled() -> None:
    points, _ = _blobs(4, 10)
    centers = np.repeat(points[:1], 5, axis=0)  # five equal centers: four of them are empty
    filled = kmeans._fill_empty(points, centers)
    labels, _ = nearest_centers(points, filled, num_labels=1)
    assert len(np.unique(labels)) == 5


def _near_copies(num_groups: int, copies: int, noise: float, seed: int, size: int = 912) -> np.ndarray:
    """Returns `copies` of each of `num_groups` descriptors, made different by a little noise, in random order."""
    random = np.random.default_rng(seed)
    points = np.repeat(random.normal(size=(num_groups, size)), copies, axis=0)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points += noise * random.normal(size=points.shape)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return random.permutation(points).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("seed", range(2))
def test_near_copies_leave_no_cluster_without_a_sample(noise: float, seed: int) -> None:
    """Whoever asks, and for however many centers: no cluster lives by a rounding error alone."""
    points = _near_copies(40, 5, noise, seed)
    centers = train_centers(points, 40, seed=seed)
    for num_labels in (1, 2, 10):
        for part in (points, points[::-1]):
            labels, _ = nearest_centers(part, centers, num_labels=num_labels, threads=1 + num_labels % 2)
            assert set(labels[:, 0].tolist()) == set(range(40))
    one_by_one = [int(nearest_centers(point[None], centers)[0][0, 0]) for point in points]
    assert set(one_by_one) == set(range(40))


@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize("num_clusters", [13, 60])
def test_more_clusters_than_samples_that_can_be_told_apart(noise: float, num_clusters: int) -> None:
    """Only as many are made, rather than none after hours."""
    points = _near_copies(12, 6, noise, seed=1)
    centers = train_centers(points, num_clusters)
    assert len(centers) == 12
    labels, similarities = nearest_centers(points, centers)
    assert (np.bincount(labels[:, 0]) == 6).all()
    assert (similarities[:, 0] > 0.99).all()


def test_more_copies_than_are_looked_at_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    points = _near_copies(12, 6, 1e-7, seed=1)
    monkeypatch.setattr(kmeans, "_MOST_COPIES", 3)
    monkeypatch.setattr(kmeans, "_MOST_COMPARED", 3)
    assert len(train_centers(points, 60)) == 12
    assert len(kmeans._without_empty(points, np.concatenate([points, points, -points[:5]]))) == 12


def test_missing_clusters_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = []
    for number in range(72):
        (tmp_path / str(number)).write_bytes(b"")
        state = file_state(tmp_path / str(number))
        records.append({"key": f"k{number}", "file": str(tmp_path / str(number)), "file_state": state})
    descriptors = _near_copies(12, 6, 0.0, seed=1)
    DescriptorSet(SampleFiles.from_records(records), descriptors, "colours").save(tmp_path / "d.npz")
    cluster = [tmp_path / "d.npz", tmp_path / "l.npz", "--clusters", 20, "--centers", tmp_path / "c.npz"]
    assert run_script("clustering/2_cluster_descriptors.py", *cluster) == 0
    output = capsys.readouterr().out
    assert "12 clusters instead of the 20 asked for, because no more could be told apart among 72 samples" in output
    assert "72 samples, 12 clusters, 6 labels a sample" in output
    assert LabelSet.load(tmp_path / "l.npz").num_classes == 12


def test_as_many_clusters_as_points() -> None:
    points, _ = _blobs(12, 1)
    labels, similarities = nearest_centers(points, train_centers(points, 12), num_labels=1)
    assert len(np.unique(labels)) == 12
    assert (similarities > 0.99).all()


def test_too_few_samples_and_too_few_different_ones() -> None:
    points, _ = _blobs(3, 2)
    with pytest.raises(
        DataError, match=r"6 samples cannot make num_clusters = 7 clusters, .*; lower --clusters or add"
    ):
        train_centers(points, 7)
    same = np.repeat(points[:1], 6, axis=0)
    assert len(train_centers(same, 3)) == 1
    points[0, 0] = np.nan
    with pytest.raises(DataError, match=r"the descriptors hold values that are not finite"):
        train_centers(points, 2)


def test_nearest_centers_are_exact_and_sorted() -> None:
    random = np.random.default_rng(0)
    centers, points = (random.normal(size=(n, 8)).astype(np.float32) for n in (50, 30))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    labels, similarities = nearest_centers(points, centers)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.argsort(-(points @ centers.T), axis=1)[:, :10])
    np.testing.assert_allclose(similarities, -np.sort(-(points @ centers.T), axis=1)[:, :10], atol=2e-3)


def test_fewer_centers_than_labels_leaves_none() -> None:
    points, _ = _blobs(3, 2)
    labels, similarities = nearest_centers(points, points[::2])
    assert (labels[:, 3:] == -1).all()
    assert (similarities[:, 3:] == 0).all()
    assert sorted(labels[0, :3].tolist()) == [0, 1, 2]


def test_descriptors_of_another_describer_are_refused() -> None:
    with pytest.raises(DataError, match=r"descriptors have 8 values but the centers have 16, so they were made with"):
        nearest_centers(np.ones((2, 8), np.float32), np.ones((3, 16), np.float32))


def test_result_files_round_trip_and_name_their_maker(tmp_path: Path) -> None:
    points, _ = _blobs(2, 2)
    records = [{"key": key, "file": "é/a.jpg", "sheet": 1, "file_state": [5, 2**60]} for key in "abcd"]
    records[1]["link_name"] = "a.tga"
    described = DescriptorSet(SampleFiles.from_records(records), points, "colours")
    described.save(tmp_path / "d.npz")
    loaded = DescriptorSet.load(tmp_path / "d.npz")
    np.testing.assert_array_equal(loaded.descriptors, points)
    assert (loaded.describer, loaded.samples.records()) == ("colours", records)
    with np.load(tmp_path / "d.npz") as stored:  # as earlier versions wrote them
        np.savez(tmp_path / "e.npz", **{name: stored[name] for name in stored if name != "link_names"})
    del records[1]["link_name"]
    assert DescriptorSet.load(tmp_path / "e.npz").samples.records() == records
    Centers(points[:2], "colours", 5, 4).save(tmp_path / "c.npz")
    assert Centers.load(tmp_path / "c.npz").seed == 5
    labels, similarities = nearest_centers(points, points[:2])
    LabelSet(loaded.samples, labels, similarities, 2).save(tmp_path / "l.npz")
    assert LabelSet.load(tmp_path / "l.npz").num_classes == 2
    with pytest.raises(DataError, match=r"absent\.npz does not exist; make it with tools/clustering/2_cluster_desc"):
        Centers.load(tmp_path / "absent.npz")
    with pytest.raises(DataError, match=r"d\.npz is not a result of tools/clustering/2_cluster_descriptors\.py"):
        LabelSet.load(tmp_path / "d.npz")
    (tmp_path / "x.npz").write_text("nonsense")
    with pytest.raises(DataError, match=r"x\.npz is not a result of tools/clustering/1_describe_pictures\.py"):
        DescriptorSet.load(tmp_path / "x.npz")
