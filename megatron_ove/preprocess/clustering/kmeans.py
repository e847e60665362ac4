"""Spherical k-means over descriptors, with faiss: every point is used, every center gets one, the seed decides all.

A center "gets a point" only if it is nearer to it than to any other center by more than rounding: which of two equally
near centers a search names first depends on how many it is asked for, on threads and on the machine.
"""

from __future__ import annotations

import logging

import faiss
import numpy as np

from megatron_ove.errors import DataError

_log = logging.getLogger(__name__)
_MAX_RESEEDINGS = 20
_ROUNDING = 1e-6
"""Cosines that differ by less are taken for equal: fp32 products of vectors of length 1 are off by a few 1e-7."""
_MOST_COMPARED = 2048
"""Moved centers whose new places are compared with one another; where there are more, the next round finds copies."""


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
        [num_clusters, d] float32 of length 1; each is the nearest center of at least one descriptor, by more than
        rounding.

    Raises:
        DataError: fewer descriptors than clusters, or fewer that can be told apart; or values that are no numbers.
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
    """Moves centers that no point is clearly nearest to onto the points that are served worst."""
    for _ in range(_MAX_RESEEDINGS):
        similarity, nearest = _search(points, centers, min(2, len(centers)))
        is_clear = similarity[:, 0] - similarity[:, 1] > _ROUNDING if len(centers) > 1 else np.ones(len(points), bool)
        sizes = np.bincount(nearest[is_clear, 0], minlength=len(centers))
        empty = np.flatnonzero(sizes == 0)
        if len(empty) == 0:
            return centers
        _log.info("re-seeding %d empty clusters", len(empty))
        # A point that is alone in its cluster must stay: taking it would only move the hole. One that lies on its
        # center could not be told from it.
        is_alone = is_clear & (sizes[nearest[:, 0]] == 1)
        movable = np.flatnonzero(~is_alone & (similarity[:, 0] < 1 - _ROUNDING))
        worst = movable[np.argsort(similarity[movable, 0], kind="stable")]
        chosen = _different(points, worst, len(empty)) if len(empty) <= _MOST_COMPARED else worst[: len(empty)]
        if len(chosen) == 0:
            break
        centers[empty[: len(chosen)]] = points[chosen]
    different = len(np.unique(points.round(5), axis=0))
    raise DataError(
        f"{len(centers)} clusters could not all be filled from {len(points)} samples, of which about {different} "
        "differ by more than rounding; lower --clusters, or leave out copies of one picture"
    )


def _different(points: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Returns up to `count` of the candidates, first come first served, no two of which are the same but for rounding.

    Args:
        points: [n, d] float32 of length 1.
        candidates: [c] places in it, best first.
        count: how many.
    """
    candidates = candidates[: 4 * count]
    is_same = points[candidates] @ points[candidates].T >= 1 - _ROUNDING
    kept: list[int] = []
    for place in range(len(candidates)):
        if len(kept) < count and not is_same[place, kept].any():
            kept.append(place)
    return candidates[kept]


def _search(points: np.ndarray, centers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    index = faiss.IndexFlatIP(centers.shape[1])
    index.add(centers)
    return index.search(points, count)
