"""Spherical k-means over descriptors, with faiss: every point is used, every center gets one, the seed decides all."""

from __future__ import annotations

import logging

import faiss
import numpy as np

from megatron_ove.errors import DataError

_log = logging.getLogger(__name__)
_MAX_RESEEDINGS = 10


def train_centers(
    descriptors: np.ndarray, num_clusters: int, *, iterations: int = 20, seed: int = 0, threads: int = 1
) -> np.ndarray:
    """Finds cluster centers on the unit sphere.

    Args:
        descriptors: [n, d] float32 of length 1.
        num_clusters: number of centers, at most n.
        iterations: Lloyd iterations.
        seed: draws the starting centers.
        threads: CPU threads.

    Returns:
        [num_clusters, d] float32 of length 1; each is the nearest center of at least one descriptor.

    Raises:
        DataError: fewer (different) descriptors than clusters, or values that are no numbers.
    """
    num_points = len(descriptors)
    if num_clusters < 1 or num_points < num_clusters:
        raise DataError(
            f"{num_points} samples cannot make num_clusters = {num_clusters} clusters, because each cluster needs at "
            "least one of its own; lower --clusters or add samples"
        )
    if not np.isfinite(descriptors).all():
        raise DataError("the descriptors hold values that are not finite, so they cannot be clustered; describe again")
    points = np.ascontiguousarray(descriptors, dtype=np.float32)
    faiss.omp_set_num_threads(threads)
    trainer = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=num_points,  # faiss silently uses only 256 points a center otherwise
    )
    trainer.train(points)
    return _fill_empty(points, np.array(trainer.centroids))


def _fill_empty(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Moves centers that are nearest to no point onto the points that are served worst."""
    for _ in range(_MAX_RESEEDINGS):
        similarity, nearest = _search(points, centers, 1)
        sizes = np.bincount(nearest[:, 0], minlength=len(centers))
        empty = np.flatnonzero(sizes == 0)
        if len(empty) == 0:
            return centers
        _log.info("re-seeding %d empty clusters", len(empty))
        # A point that is alone in its cluster must stay: taking it would only move the hole.
        movable = np.flatnonzero(sizes[nearest[:, 0]] > 1)
        worst = movable[np.argsort(similarity[movable, 0], kind="stable")]
        centers[empty[: len(worst)]] = points[worst[: len(empty)]]
    different = len(np.unique(points, axis=0))
    raise DataError(
        f"{len(centers)} clusters could not all be filled from {len(points)} samples, of which {different} differ; "
        "lower --clusters"
    )


def _search(points: np.ndarray, centers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    index = faiss.IndexFlatIP(centers.shape[1])
    index.add(centers)
    return index.search(points, count)
