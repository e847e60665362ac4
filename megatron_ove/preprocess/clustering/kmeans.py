"""Spherical k-means over descriptors, with faiss: every point is used, every center gets one, the seed decides all.

Where points are copies of one another, there may be fewer places for centers than were asked for: the rest is left out
at the end, because hours of work would be lost by refusing then, and nothing tells before.

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
_MOST_COPIES = 16
"""Copies of a center that are looked at at a time; of more, some stay until the next round."""


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
        [k, d] float32 of length 1; each is the nearest center of at least one descriptor, by more than rounding. k is
        `num_clusters`, or less if so many descriptors cannot be told apart.

    Raises:
        DataError: fewer descriptors than clusters, or values that are no numbers.
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
    """Moves centers that no point is clearly nearest to onto the points that are served worst; leaves out the rest."""
    for _ in range(_MAX_RESEEDINGS):
        similarity, nearest, is_clear = _search(points, centers)
        sizes = np.bincount(nearest[is_clear], minlength=len(centers))
        empty = np.flatnonzero(sizes == 0)
        if len(empty) == 0:
            return centers
        _log.info("re-seeding %d empty clusters", len(empty))
        spare = _spare(centers, empty)
        # A point that is alone in its cluster must stay: taking it would only move the hole. One that lies on its
        # center could not be told from it.
        is_alone = is_clear & (sizes[nearest] == 1)
        movable = np.flatnonzero(~is_alone & (similarity < 1 - _ROUNDING))
        worst = movable[np.argsort(similarity[movable], kind="stable")]
        chosen = _different(points, worst, len(spare)) if len(spare) <= _MOST_COMPARED else worst[: len(spare)]
        if len(chosen) == 0:
            break
        centers[spare[: len(chosen)]] = points[chosen]
    return _without_empty(points, centers)


def _without_empty(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Leaves out the centers that no point is clearly nearest to; of several that are the same, one stays.

    None of the others becomes empty by that: their points lose a rival at most.
    """
    while True:
        _, nearest, is_clear = _search(points, centers)
        empty = np.flatnonzero(np.bincount(nearest[is_clear], minlength=len(centers)) == 0)
        if len(empty) == 0:
            return centers
        spare = _spare(centers, empty)
        if len(spare) == 0:
            spare = empty
        centers = np.delete(centers, spare[1:] if len(spare) == len(centers) else spare, axis=0)


def _spare(centers: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Returns those of the empty centers that serve no point, or the same points as another empty one that stays.

    Args:
        centers: [k, d] float32 of length 1.
        empty: [e] places of those that no point is clearly nearest to.
    """
    similarity, other = _nearest(centers[empty], centers[empty], _MOST_COPIES)
    own = np.arange(len(empty))[:, None]
    # Two centers of which each differs from a point by rounding differ from one another by up to four times that.
    is_copy = (similarity >= 1 - 8 * _ROUNDING) & (other != own)
    return empty[(is_copy & (other < own)).any(1) | ~is_copy.any(1)]


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


def _search(points: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns [n] float32 cosine of each point and its nearest center, [n] its place, [n] whether no other is as near.

    As near is what differs by no more than rounding.
    """
    similarity, nearest = _nearest(points, centers, 2)
    is_clear = similarity[:, 0] - similarity[:, -1] > _ROUNDING if len(centers) > 1 else np.ones(len(points), bool)
    return similarity[:, 0], nearest[:, 0], is_clear


def _nearest(points: np.ndarray, centers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns [n, count] float32 cosines of each point and its nearest centers, and [n, count] their places."""
    index = faiss.IndexFlatIP(centers.shape[1])
    index.add(centers)
    return index.search(points, min(count, len(centers)))
