"""Data sets of the head ablation: what the encoder sees, each sample's classes, and a truth to search for.

synthetic: a mixture of many clusters seen through a fixed non-linear map with noise; truth = the cluster.
photos: patches of the photographs that ship with scikit-image and scikit-learn, seen with half of their pixels missing;
classes = k-means clusters of the whole patches; truth = the nearest of them. Held out: the right fifth of each picture.
digits: the 1,797 images of scikit-learn's `load_digits`, seen with half of their pixels missing; classes = k-means
clusters of the whole images; truth = the written digit. So few that every image is seen dozens of times.
words: pictures of single words (ablation_words.py); the one label and the truth are the word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ablation_words import WORDS_HELD_OUT, WORDS_TRAIN, word_list, word_pictures
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ove.preprocess.text_render.typefaces import Split

NUM_LABELS = 10
SYNTHETIC_HELD_OUT = 4_000
SAMPLES_PER_CLASS, MOST_SAMPLES = 3.25, 120_000
"""Of the synthetic training set."""
DIGITS_HELD_OUT = 600
PHOTOS_TRAIN, PHOTOS_HELD_OUT = 60_000, 4_000
KEPT_PIXELS = 0.5
"""Of real images."""
WORDS_SEARCHED = 2_000
"""Training pictures among which neighbours are looked for: to embed them all would take longer than training."""

_LATENT_SIZE, _SEEN_SIZE = 48, 128
_SEARCH_BLOCK = 500
_PHOTOS = (
    *("astronaut", "brick", "camera", "cat", "coffee", "coins"),
    *("grass", "gravel", "hubble_deep_field", "moon", "retina", "rocket"),
)
_PATCH, _FLAT, _KMEANS_ROUNDS = 12, 0.03, 6


@dataclass(frozen=True)
class Samples:
    """One half of a data set.

    Attributes:
        inputs: [n, d] fp32, what the encoder sees (of digits: before pixels are dropped); of words [n, h, w] uint8.
        labels: [n, 10] int64, the nearest classes, nearest first; of words [n, 1], the word.
        truth: [n] int64, what a retrieved neighbour should share with the query.
    """

    inputs: Tensor
    labels: Tensor
    truth: Tensor


@dataclass(frozen=True)
class AblationData:
    """Training and held-out halves.

    Attributes:
        kept_pixels: chance of an input coordinate to be seen; drawn anew for every training view. 1 = all.
        counts_share: what the second figure is. True: the share of the 10 neighbours that have the query's truth;
            False: whether any of them has it.
        num_searched: training samples, the first ones, among which neighbours are looked for. None = all.
    """

    num_classes: int
    train: Samples
    held_out: Samples
    kept_pixels: float
    counts_share: bool
    num_searched: int | None = None

    @property
    def has_one_label(self) -> bool:
        """Whether a sample has a single label."""
        return self.train.labels.shape[1] == 1

    def view(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Returns one view of `inputs` [n, ...]: those coordinates that are seen, the others 0."""
        if self.kept_pixels >= 1:
            return inputs
        return inputs * (torch.rand(inputs.shape, generator=generator) < self.kept_pixels)


def make_data(kind: str, num_classes: int, seed: int) -> AblationData:
    """Makes a data set; the same one for every variant of a seed.

    Args:
        kind: "synthetic", "photos", "digits" or "words".
        num_classes: clusters or words.
        seed: of everything that is drawn.
    """
    makers = {"synthetic": _synthetic, "photos": _photos, "digits": _digits, "words": make_words}
    return makers[kind](num_classes, seed)


def make_words(num_classes: int, seed: int, *, others: bool = False) -> AblationData:
    """Makes pictures of words; with `others` of as many words that the same call without it does not use."""
    words = word_list(num_classes, seed, others=others)
    halves = []
    parts: tuple[tuple[int, Split], ...] = ((WORDS_TRAIN, "train"), (WORDS_HELD_OUT, "siblings"))
    for count, split in parts:
        pictures, classes = word_pictures(words, count, split, seed)
        halves.append(Samples(pictures, classes[:, None], classes))
    return AblationData(
        num_classes, *halves, kept_pixels=1.0, counts_share=False, num_searched=min(WORDS_SEARCHED, WORDS_TRAIN)
    )


def _synthetic(num_classes: int, seed: int) -> AblationData:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, _LATENT_SIZE, generator=generator)
    held_out = min(SYNTHETIC_HELD_OUT, num_classes)
    count = min(int(SAMPLES_PER_CLASS * num_classes), MOST_SAMPLES) + held_out
    truth = torch.randint(num_classes, (count,), generator=generator)
    latent = centers[truth] + 0.9 * torch.randn(count, _LATENT_SIZE, generator=generator)
    first = torch.randn(_LATENT_SIZE, _SEEN_SIZE, generator=generator) / _LATENT_SIZE**0.5
    second = torch.randn(_SEEN_SIZE, _SEEN_SIZE, generator=generator) / _SEEN_SIZE**0.5
    seen = torch.tanh(latent @ first) @ second + 0.1 * torch.randn(count, _SEEN_SIZE, generator=generator)
    labels = nearest(normalize(latent, dim=1), normalize(centers, dim=1), NUM_LABELS)
    return _split(num_classes, seen, labels, truth, held_out, kept_pixels=1.0, counts_share=False)


def _photos(num_classes: int, seed: int) -> AblationData:
    import faiss  # heavy, and not needed for the others

    random = np.random.default_rng(seed)
    pictures = _grey_photos()
    halves = []
    for left, right, count in ((0.0, 0.8, PHOTOS_TRAIN), (0.8, 1.0, PHOTOS_HELD_OUT)):
        parts = [picture[:, int(left * picture.shape[1]) : int(right * picture.shape[1])] for picture in pictures]
        halves.append(np.concatenate([_patches(part, count // len(parts), random) for part in parts]))
    kmeans = faiss.Kmeans(
        _PATCH**2, num_classes, niter=_KMEANS_ROUNDS, seed=seed, spherical=True, min_points_per_centroid=1
    )
    kmeans.train(halves[0])
    pixels = torch.from_numpy(np.concatenate(halves))
    labels = nearest(pixels, torch.from_numpy(kmeans.centroids), NUM_LABELS)
    held_out = len(halves[1])
    inputs = pixels * _PATCH  # coordinates of size 1
    return _split(num_classes, inputs, labels, labels[:, 0], held_out, kept_pixels=KEPT_PIXELS, counts_share=False)


def _grey_photos() -> list[np.ndarray]:
    """Returns the pictures, [h, w] in 0 .. 1."""
    from skimage import color, data, util
    from sklearn.datasets import load_sample_images

    pictures = [getattr(data, name)() for name in _PHOTOS] + load_sample_images().images
    return [color.rgb2gray(picture) if picture.ndim == 3 else util.img_as_float(picture) for picture in pictures]


def _patches(picture: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Returns [count, _PATCH ** 2] fp32 patches that are not flat, of mean 0 and length 1."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (_PATCH, _PATCH))
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        rows, columns = (random.integers(size, size=count) for size in windows.shape[:2])
        patches = windows[rows, columns].reshape(count, -1).astype(np.float32)
        patches -= patches.mean(1, keepdims=True)
        found.append(patches[patches.std(1) > _FLAT])
    patches = np.concatenate(found)[:count]
    return patches / np.linalg.norm(patches, axis=1, keepdims=True)


def _digits(num_classes: int, seed: int) -> AblationData:
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, digits = images[order] / 16.0, digits[order]
    train = images[:-DIGITS_HELD_OUT]
    clusters = KMeans(num_classes, n_init=1, max_iter=30, random_state=seed).fit(train).cluster_centers_
    pixels = torch.from_numpy(images).float()
    distance = torch.cdist(pixels, torch.from_numpy(clusters).float())
    labels = distance.topk(NUM_LABELS, dim=1, largest=False).indices
    return _split(
        num_classes,
        pixels,
        labels,
        torch.from_numpy(digits).long(),
        DIGITS_HELD_OUT,
        kept_pixels=KEPT_PIXELS,
        counts_share=True,
    )


def _split(
    num_classes: int,
    inputs: Tensor,
    labels: Tensor,
    truth: Tensor,
    held_out: int,
    *,
    kept_pixels: float,
    counts_share: bool,
) -> AblationData:
    stop = len(inputs) - held_out
    return AblationData(
        num_classes=num_classes,
        train=Samples(inputs[:stop], labels[:stop], truth[:stop]),
        held_out=Samples(inputs[stop:], labels[stop:], truth[stop:]),
        kept_pixels=kept_pixels,
        counts_share=counts_share,
    )


def nearest(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """Returns [q, count] int64: the keys [k, e] with the largest inner product with each query [q, e], best first."""
    blocks = [(block @ keys.T).topk(count, dim=1).indices for block in queries.split(_SEARCH_BLOCK)]
    return torch.cat(blocks)
