"""Step 2 of the clustering pipeline (pictures and clips): descriptors.npz -> centers.npz and labels.npz.

With --clusters the centers are trained on these descriptors; with --use-centers existing ones are used, so that
held-out samples get the labels of the training set. Pictures whose file has changed or is gone are left out, as in
step 3: a folder that was renamed would count twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.errors import DataError
from megatron_ove.preprocess.clustering.descriptor_sets import Centers, DescriptorSet, LabelSet
from megatron_ove.preprocess.clustering.kmeans import train_centers
from megatron_ove.preprocess.clustering.nearest import NUM_LABELS, nearest_centers
from megatron_ove.preprocess.tool_arguments import report, run_tool, whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("descriptors", type=Path, help="descriptors.npz of step 1")
    parser.add_argument("labels", type=Path, help="labels.npz to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clusters", type=whole_number(1), help="number of clusters to train")
    source.add_argument("--use-centers", type=Path, help="centers.npz of an earlier run")
    parser.add_argument("--centers", type=Path, help="centers.npz to write (needed with --clusters)")
    parser.add_argument(
        "--iterations", type=whole_number(1), default=20, help="k-means iterations (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the starting centers (default: %(default)s)"
    )
    parser.add_argument(
        "--num-labels",
        type=whole_number(1),
        help=f"labels per sample, fewer than clusters (default: {NUM_LABELS}, or half the clusters if that is fewer)",
    )
    parser.add_argument("--threads", type=whole_number(1), default=2, help="CPU threads (default: %(default)s)")
    return parser


def _centers(arguments: argparse.Namespace, described: DescriptorSet) -> Centers:
    if arguments.use_centers is not None:
        centers = Centers.load(arguments.use_centers)
        if centers.describer != described.describer:
            raise DataError(
                f"{arguments.descriptors} was described by {described.describer}, but the centers in "
                f"{arguments.use_centers} belong to {centers.describer}; describe both alike"
            )
        return centers
    if arguments.centers is None:
        raise DataError("--clusters trains centers, so --centers must say where to keep them for held-out samples")
    trained = train_centers(
        described.descriptors,
        arguments.clusters,
        iterations=arguments.iterations,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    if len(trained) < arguments.clusters:
        report(
            f"{len(trained)} clusters instead of the {arguments.clusters} asked for, because no more could be told "
            f"apart among {len(described.descriptors)} samples, most likely for copies of one picture; their number is "
            "that of the classes"
        )
    centers = Centers(trained, described.describer, arguments.seed, len(described.descriptors))
    centers.save(arguments.centers)
    return centers


def _num_labels(asked_for: int | None, num_clusters: int) -> int:
    """Returns how many of its nearest clusters are a sample's labels.

    Raises:
        DataError: as many as there are: samples would be all alike.
    """
    half = max(1, num_clusters // 2)
    num_labels = min(NUM_LABELS, half) if asked_for is None else asked_for
    if num_labels >= num_clusters:
        advice = f"give --num-labels {half} or fewer, or more clusters" if num_clusters > 1 else "give more clusters"
        raise DataError(
            f"--num-labels {num_labels} with {num_clusters} cluster{'s' if num_clusters > 1 else ''} would make every "
            f"cluster a label of every sample, so that training could not tell samples apart and would learn nothing; "
            f"{advice}"
        )
    return num_labels


def _work(arguments: argparse.Namespace) -> None:
    if arguments.clusters is not None:
        _num_labels(arguments.num_labels, arguments.clusters)  # now rather than after hours of k-means
    described, left_out = DescriptorSet.load(arguments.descriptors).current()
    if left_out:
        report(left_out)
    centers = _centers(arguments, described)
    num_labels = _num_labels(arguments.num_labels, len(centers.centers))
    labels, similarities = nearest_centers(
        described.descriptors, centers.centers, num_labels=num_labels, threads=arguments.threads
    )
    LabelSet(described.samples, labels, similarities, len(centers.centers)).save(arguments.labels)
    report(
        f"{len(labels)} samples, {len(centers.centers)} clusters, {num_labels} labels a sample, mean similarity to the "
        f"nearest {float(similarities[:, 0].mean(dtype='float32')):.3f} -> {arguments.labels}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    return run_tool(_work, _parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
