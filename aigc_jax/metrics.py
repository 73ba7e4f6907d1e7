"""Metrics for generative models: features or samples in, floats out.

Nothing here trains a model or draws samples from one. Every metric has a floor: what real data
score against other real data with the same n. Report both.

Samples are arrays [N, ...] of numbers and count as vectors. All computations are in float64.
Distances are Euclidean. Decisions that depend on a distance use the exact sum of squared
differences. So a copy has distance 0, and equal distances compare as equal. Comparing 10,000
samples with 10,000, of 784 numbers each, needs 1 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from math import log, log2, prod
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int, Key, Num
from scipy.spatial.distance import cdist

CHUNK = 500  # rows of one block of distances
LOW_DIMENSION = 16  # up to here differences are as fast as a matrix product
EPS = np.finfo(np.float64).eps
WEIGHTS = Path(__file__).parent / "weights"
CLASSIFIERS = ("digits", "fashion_mnist", "mnist")

SamplesN = Num[Array | np.ndarray, "N ..."]
SamplesM = Num[Array | np.ndarray, "M ..."]
SamplesK = Num[Array | np.ndarray, "K ..."]


def _vectors(at_least: int = 1, **samples) -> list[np.ndarray]:
    """Returns samples as finite float64 vectors [N, D] of one width, with N >= `at_least`."""
    vectors = []
    for name, x in samples.items():
        x = np.asarray(x)
        if x.ndim < 1 or len(x) < at_least:
            got = f"got an array of shape {list(x.shape)}"
            raise ValueError(f"{name} must hold at least {at_least} samples, {got}")
        x = x.reshape(len(x), -1).astype(np.float64)
        if not (np.abs(x) < 1e150).all():  # their squares are finite too
            problem = "values that are not finite, or too large to be squared"
            raise ValueError(f"{name} holds {problem}")
        vectors.append(x)
    widths = {name: x.shape[1] for name, x in zip(samples, vectors, strict=True)}
    if len(set(widths.values())) > 1:
        got = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(f"samples must be equally wide, got {got} numbers per sample")
    return vectors


def _scaled(*sets: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """Returns e and the sets divided by 2^e, so that the largest number lies near 1.

    The squares of small numbers then do not vanish. Powers of 2 round nothing.
    """
    exponent = int(np.frexp(max(np.abs(x).max(initial=0.0) for x in sets))[1])
    return exponent, [np.ldexp(x, -exponent) for x in sets]


def _blocks(x: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    return (x[i : i + chunk] for i in range(0, len(x), chunk))


class _SquaredDistances:
    """Squared distances of each x to all y: fast in blocks, and exact for single pairs."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.y = x, y
        # Equal rows get equal numbers. Pairs of copies then need no differences.
        numbers: dict[bytes, int] = {}

        def number_rows(a: np.ndarray) -> np.ndarray:
            rows = (row.tobytes() for row in a + 0.0)  # + 0.0 turns -0.0 into 0.0
            return np.array([numbers.setdefault(row, len(numbers)) for row in rows])

        self.x_numbers, self.y_numbers = number_rows(x), number_rows(y)

    def blocks(self, chunk: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields (rows of x, their squared distances [B, M], bounds of the errors [B, M]).

        In many dimensions a distance is |a|^2 + |b|^2 - 2ab of centred data. The bound is that of
        a product in floating point.
        """
        y, D = self.y, self.y.shape[1]
        mean = y.mean(0)
        centred = y - mean
        y_norms = np.square(centred).sum(1)
        for i in range(0, len(self.x), chunk):
            rows = slice(i, i + chunk)
            if D <= LOW_DIMENSION:
                squared = cdist(self.x[rows], y, "sqeuclidean")
                yield rows, squared, (D + 8) * EPS * squared
                continue
            block = self.x[rows] - mean
            norms = np.square(block).sum(1)[:, None] + y_norms[None]
            yield rows, norms - 2 * (block @ centred.T), (D + 8) * EPS * norms

    def exact(self, rows: slice, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Returns sums of squared differences of the pairs (rows.start + i, j)."""
        i = rows.start + i
        squared = np.zeros(len(i))
        different = np.flatnonzero(self.x_numbers[i] != self.y_numbers[j])
        for pairs in _blocks(different, 1 + 2**20 // self.y.shape[1]):
            squared[pairs] = np.square(self.x[i[pairs]] - self.y[j[pairs]]).sum(1)
        return squared


# ------------------------------------------------------------------------------------- likelihoods


def _parzen(x, centres, sigmas, chunk: int) -> np.ndarray:
    """Returns log p(x) in nats [S, N] for all S widths, from one pass over the distances."""
    widths = sigmas
    exponent, (x, centres) = _scaled(x, centres)
    sigmas = np.ldexp(widths, -exponent)
    if not ((sigmas > 1e-150) & (sigmas < 1e150)).all():  # their squares are finite and not 0
        size = f"the size of the samples, {2.0**exponent:.3g}"
        raise ValueError(f"sigmas {widths.tolist()} are too far from {size}")
    distances, values = _SquaredDistances(x, centres), []
    for rows, squared, error in distances.blocks(chunk):
        # Exact distances where the error could matter, except for centres too far away to count.
        reach = (squared + error).min(1, keepdims=True) + 100 * sigmas.max() ** 2
        coarse = error > np.maximum(1e-6 * sigmas.min() ** 2, 1e-12 * squared)
        i, j = np.nonzero(coarse & (squared - error < reach))
        squared[i, j] = distances.exact(rows, i, j)
        least = squared.min(1)
        beyond = least[:, None] - squared
        twice_variances = [2 * s * s for s in sigmas]
        values.append([np.log(np.exp(beyond / c).sum(1)) - least / c for c in twice_variances])
    normaliser = np.log(len(centres)) + x.shape[1] * np.log(widths * np.sqrt(2 * np.pi))
    return np.concatenate(values, 1) - normaliser[:, None]


def parzen_log_likelihood(
    centres: SamplesN,
    validation: SamplesM,
    test: SamplesK,
    *,
    sigmas: Sequence[float] | np.ndarray | None = None,
    chunk: int = CHUNK,
) -> tuple[float, float, float]:
    """Returns the mean log density of `test` in nats, its standard error, and the width sigma.

    Goodfellow et al. 2014 (GAN, table 1): an isotropic Gaussian of width sigma around each
    generated sample ("centre"). The width is the one of `sigmas` with the highest mean log density
    of `validation` (in the paper: np.logspace(-1, 0, 10)). The standard error is over the test
    samples. The paper uses 10,000 centres, the first 1,000 images of MNIST's train[50000:60000],
    10,000 test images, and pixels in [0, 1].

    The estimate ranks models badly (Theis et al. 2016). In 784 dimensions it is far below the true
    value, for any number of samples. K-means centroids score higher than the training images
    themselves, which reach 238 to 245 nats, depending on which 10,000 are chosen. A model above
    that ceiling is smooth or has copied; it is not better. Never choose sigma on test. If sigma is
    at an end of the grid, extend the grid.
    """
    centres, validation, test = _vectors(centres=centres, validation=validation, test=test)
    if sigmas is None:
        sigmas = np.logspace(-1, 0, 10)
    sigmas = np.asarray(sigmas, np.float64).reshape(-1)
    if not len(sigmas) or not ((sigmas > 0) & np.isfinite(sigmas)).all():
        raise ValueError(f"sigmas must be positive numbers, got {sigmas.tolist()}")

    sigma = sigmas[_parzen(validation, centres, sigmas, chunk).mean(1).argmax()]
    [values] = _parzen(test, centres, np.array([sigma]), chunk)
    return float(values.mean()), float(values.std() / len(values) ** 0.5), float(sigma)


def bits_per_dim(nll_nats, shape: Sequence[int], *, levels: int | None = None):
    """Returns bits per dimension, nats / (D ln 2), for nats per sample of this shape.

    nll_nats: a number or an array.
    levels: None if the likelihood is that of the levels themselves. Otherwise it is the density of
        data that were scaled to [-1, 1] by 2x / (levels - 1) - 1. Neighbouring levels are then
        2 / (levels - 1) apart, and log2((levels - 1) / 2) is added: 6.994 for 256 levels.
    """
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must hold positive sizes, got {tuple(shape)}")
    if hasattr(nll_nats, "dtype"):  # float16 would lose digits in the division
        nll_nats = nll_nats.astype(jnp.promote_types(nll_nats.dtype, jnp.float32))
    return nll_nats / (prod(shape) * log(2)) + (log2((levels - 1) / 2) if levels else 0.0)


# ---------------------------------------------------------------------- distances of distributions


def psnr(a: SamplesN, b: SamplesM) -> float:
    """Returns the peak signal-to-noise ratio of images in [0, 1] in dB, a mean over images.

    Of one image it is -10 log10 of the mean squared error over its pixels and channels, at most
    100 dB. Without this limit, one image that is reproduced exactly would make the mean infinite.
    The mean over images is above the ratio of the mean error, because the logarithm is concave.
    """
    a, b = _vectors(a=a, b=b)
    if len(a) != len(b):
        raise ValueError(f"psnr compares image by image, got {len(a)} and {len(b)} images")
    mse = np.square(a - b).mean(1)
    return float(np.mean(-10 * np.log10(np.maximum(mse, 1e-10))))


def frechet_distance(a: SamplesN, b: SamplesM) -> float:
    """Returns the Frechet distance of two Gaussians, in squared units.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, eq. 6. With features of
    `load_classifier` it is fid_digits, fid_mnist or fid_fashion. None of these compares with a
    published FID, which uses 2,048 features of Inception.

    The second term is computed as |R_a - U R_b|^2. S = R^T R comes from a QR decomposition, so n
    may be below d. U is the rotation that makes the term smallest. As a sum of squares it is 0
    for equal sets and never negative.

    For equal distributions of unit variance the distance is not 0 but 0.5 to 0.6 d^2 / n. For
    d = 64 that is 2.2 at n = 1,000 and 0.23 at 10,000. Use the same n on both sides, above 10 d,
    and report it.
    """
    a, b = _vectors(2, a=a, b=b)
    a, b = a - a.mean(0), b - a.mean(0)
    scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
    a, b = a / scale, b / scale
    m_a, m_b = a.mean(0), b.mean(0)
    r_a = np.linalg.qr((a - m_a) / (len(a) - 1) ** 0.5, mode="r")
    r_b = np.linalg.qr((b - m_b) / (len(b) - 1) ** 0.5, mode="r")
    rows = max(len(r_a), len(r_b))
    r_a, r_b = (np.pad(r, ((0, rows - len(r)), (0, 0))) for r in (r_a, r_b))
    left, _, right = np.linalg.svd(r_a @ r_b.T)
    squares = np.square(m_a - m_b).sum() + np.square(r_a - left @ right @ r_b).sum()
    return float(squares) * float(scale) ** 2


def kernel_distance(
    a: SamplesN,
    b: SamplesM,
    key: Key[Array, ""],
    *,
    blocks: int = 10,
    size: int = 1000,
) -> tuple[float, float]:
    """Returns the squared MMD with kernel (x.y / d + 1)^3, and its standard error.

    This is KID (Binkowski et al. 2018): the mean of the unbiased estimate over `blocks` pairs of
    blocks of `size` samples, or of fewer samples if the sets are smaller. Our blocks do not
    overlap, so the standard error is honest. The authors' code draws each block from the whole
    set. The estimate has no bias at any n. For equal distributions its mean is 0, and it is
    negative about half of the time.
    """
    if blocks < 2 or size < 2:
        raise ValueError(f"blocks and size must be at least 2, got {blocks} and {size}")
    a, b = _vectors(2 * blocks, a=a, b=b)
    size = min(size, min(len(a), len(b)) // blocks)

    def pick(x, key):
        return x[np.asarray(jax.random.permutation(key, len(x)))[: blocks * size]]

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def squared_mmd(x, y):
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
        return within / (size * (size - 1)) - 2 * kernel(x, y).mean()

    k_a, k_b = jax.random.split(key)
    pairs = zip(np.split(pick(a, k_a), blocks), np.split(pick(b, k_b), blocks), strict=True)
    values = [squared_mmd(x, y) for x, y in pairs]
    return float(np.mean(values)), float(np.std(values, ddof=1) / blocks**0.5)


def sliced_wasserstein(
    a: SamplesN,
    b: SamplesM,
    key: Key[Array, ""],
    *,
    directions: int = 128,
) -> float:
    """Returns the sliced 2-Wasserstein distance of two sets of equal size, in data units.

    It is the root of the mean, over random directions, of the squared 2-Wasserstein distance of
    the projections (Bonneel et al. 2015). With as many samples on both sides, that pairs sorted
    projections in order. The directions are jax.random.normal(key, (directions, d)), normalised.

    It is above 0 for equal distributions: 0.06 to 0.09 for 2,500 points of the 25-mode grid at
    unit variance. It hardly sees a small blur.
    """
    a, b = _vectors(a=a, b=b)
    a, b = a - a.mean(0), b - a.mean(0)
    if len(a) != len(b):
        raise ValueError(f"both sides need as many samples, got {len(a)} and {len(b)}")
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    w = jax.random.normal(key, (directions, a.shape[1]), jnp.float32)
    w = np.asarray(w, np.float64)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    return float(np.sqrt(np.square(np.sort(a @ w.T, 0) - np.sort(b @ w.T, 0)).mean()))


# -------------------------------------------------------------------- nearest neighbours and balls


def _kth_neighbours(x, y, k: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the squared distance of each x to its k-th nearest y, and the row of that y.

    k counts from 0. Of equally near y the one with the lower row comes first.
    """
    distances, found = _SquaredDistances(x, y), []
    for rows, squared, error in distances.blocks(chunk):
        reach = np.partition(squared + error, k, axis=1)[:, k]
        i, j = np.nonzero(squared - error <= reach[:, None])  # candidates for the k nearest
        exact = distances.exact(rows, i, j)
        kth = np.lexsort((j, exact, i))[np.searchsorted(i, np.arange(len(squared))) + k]
        found.append((exact[kth], j[kth]))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def _balls(centres, x, k: int, inside: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Returns in how many balls each x lies, int [N], and which balls hold an x, bool [M].

    A ball reaches to its centre's k-th nearest neighbour among the other centres. In
    `_kth_neighbours` that is rank k, because rank 0 is the centre itself. inside(distance, radius)
    decides whether the border belongs to a ball.
    """
    _, (centres, x) = _scaled(centres, x)
    radii, _ = _kth_neighbours(centres, centres, k, CHUNK)
    distances, counts, held = _SquaredDistances(x, centres), [], np.zeros(len(centres), bool)
    for rows, squared, error in distances.blocks(CHUNK):
        within = squared + error < radii[None]
        i, j = np.nonzero((squared - error <= radii[None]) & ~within)  # too close to call
        within[i, j] = inside(distances.exact(rows, i, j), radii[j])
        counts.append(within.sum(1))
        held |= within.any(0)
    return np.concatenate(counts), held


def precision_recall(real: SamplesN, fake: SamplesM, k: int = 3) -> tuple[float, float]:
    """Returns precision and recall of Kynkaanniemi et al. 2019, eqs. 1 and 2.

    Precision is the share of fakes that lie in the k-nearest-neighbour ball of any real. Recall is
    the same with the roles exchanged. A ball includes its border, as in the paper; the code of
    Naeem et al. excludes it. For equal distributions the values are not 1: 0.62 to 0.64 at k = 3,
    d = 64, n = 1,000, and 0.98 in two dimensions. The ball of one outlier can hold a large share
    of the fakes.
    """
    real, fake = _check_neighbourhoods(real, fake, k)
    in_real, _ = _balls(real, fake, k, np.less_equal)
    in_fake, _ = _balls(fake, real, k, np.less_equal)
    return float((in_real > 0).mean()), float((in_fake > 0).mean())


def density_coverage(real: SamplesN, fake: SamplesM, k: int = 5) -> tuple[float, float]:
    """Returns density and coverage of Naeem et al. 2020, section 3.

    Density is the mean number of reals' balls that a fake lies in, divided by k. Coverage is the
    share of reals whose ball holds a fake. A ball excludes its border, as in the authors' code.
    For equal distributions, N reals and M fakes, the mean density is 1. The coverage is
    1 - prod_{i=1..k} (N - i) / (N + M - i): for large N = M, 0.969 with k = 5 and 0.875 with
    k = 3.
    """
    real, fake = _check_neighbourhoods(real, fake, k)
    counts, held = _balls(real, fake, k, np.less)
    return float(counts.mean() / k), float(held.mean())


def _check_neighbourhoods(real, fake, k: int) -> list[np.ndarray]:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _vectors(k + 1, real=real, fake=fake)


def nearest(
    x: SamplesN,
    reference: SamplesM,
    *,
    chunk: int = CHUNK,
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Returns the distance of each x to the nearest sample in `reference`, and the row of that.

    A copy has distance 0. Of equally near samples the first counts.
    """
    reference, x = _vectors(reference=reference, x=x)
    exponent, (x, reference) = _scaled(x, reference)
    squared, index = _kth_neighbours(x, reference, 0, chunk)
    return np.ldexp(np.sqrt(squared), exponent), index


def nearest_neighbour_error(
    train_x: SamplesN,
    train_y: Num[Array | np.ndarray, " _"],
    test_x: SamplesM,
    test_y: Num[Array | np.ndarray, " _"],
    *,
    chunk: int = CHUNK,
) -> float:
    """Returns the share of test samples whose nearest training sample has another label.

    With samples of a conditional generator as training set it is DCGAN's table 3 (Radford et al.
    2016). With as many real images it is the floor of that.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y):
            raise ValueError(f"{name} has {len(x)} samples and {len(y)} labels")
    _, index = nearest(test_x, train_x, chunk=chunk)
    return float((np.asarray(train_y)[index] != np.asarray(test_y)).mean())


# ------------------------------------------------------------------------------- classes and modes


class ModeCount(NamedTuple):
    """Which modes of a mixture the samples reach."""

    modes: int  # modes with at least one high-quality sample
    high_quality: float  # share of samples that are of high quality
    histogram: np.ndarray  # int [M], high-quality samples by nearest mode


def recall_at_k(
    similarity: Num[Array | np.ndarray, "N M"],
    targets: Int[Array | np.ndarray, " N"] | None = None,
    k: int = 1,
) -> float:
    """Returns the share of rows whose target is among the k most similar columns (R@k).

    similarity: row i compares query i with M candidates; larger is more similar.
    targets: the right column of each row; by default row i belongs to column i.

    A tie does not count: a row counts if fewer than k other columns are at least as similar. So
    features that are all equal score 0. Chance is k / M.
    """
    similarity = np.asarray(similarity)
    rows, columns = similarity.shape
    targets = np.arange(rows) if targets is None else np.asarray(targets)
    if not rows or not 1 <= k <= columns:
        raise ValueError(f"recall needs rows and k in 1..{columns}, got {rows} rows and k = {k}")
    if targets.min() < 0 or targets.max() >= columns:
        low, high = targets.min(), targets.max()
        raise ValueError(f"targets must lie in 0..{columns - 1}, got {low}..{high}")
    if np.isnan(similarity).any():
        raise ValueError("similarity holds values that are not numbers")
    own = similarity[np.arange(rows), targets]
    others = (similarity >= own[:, None]).sum(1) - 1  # the target itself is one of them
    return float((others < k).mean())


def mode_count(
    samples: SamplesN,
    modes: SamplesM,
    std: float,
    *,
    within: float = 3.0,
) -> ModeCount:
    """Counts samples within `within` standard deviations of their nearest mode.

    VEEGAN; Lin et al. 2018 (PacGAN), section 4.1. 2,500 samples are customary.

    A correct model of isotropic modes in two dimensions has 1 - exp(-within^2 / 2) = 0.989 of its
    samples of high quality. More means that the variance has collapsed. In d dimensions the share
    is that of the chi distribution, which is near 0 for large d. A single sample is enough to
    reach a mode, so look at the smallest entry of the histogram and `reverse_kl(histogram)` too.
    """
    if not (std > 0 and within > 0):
        raise ValueError(f"std and within must be positive, got {std} and {within}")
    distance, index = nearest(samples, modes)
    good = distance < within * std
    histogram = np.bincount(index[good], minlength=len(modes))
    return ModeCount(int((histogram > 0).sum()), float(good.mean()), histogram)


def reverse_kl(histogram: Num[Array | np.ndarray, " M"]) -> float:
    """Returns KL(histogram / total || uniform) in nats, where 0 log 0 = 0.

    It is 0 if all M bins are equally full, and log M if all counts are in one bin. This is PacGAN's
    reverse KL. On mixtures use `mode_count(...).histogram`, which holds high-quality samples only.
    On stacked digits use np.bincount(classes, minlength=M) of the predicted classes. For n samples
    of the uniform distribution it is about (M - 1) / 2n. It is NaN for an empty histogram: a model
    without high-quality samples has no such value.
    """
    counts = np.asarray(histogram, np.float64)
    if not counts.size or not np.isfinite(counts).all() or counts.min() < 0:
        raise ValueError(f"a histogram holds counts from 0 on, got {counts.tolist()}")
    if not counts.any():
        return float("nan")
    full = counts[counts > 0] / counts.max()
    mean = full.sum() / counts.size
    return max(0.0, float((full * np.log(full / mean)).sum() / full.sum()))


def classifier_score(probabilities: Float[Array | np.ndarray, "N C"]) -> float:
    """Returns exp(E KL(p(y|x) || p(y))), which lies in [1, classes].

    This is the Inception score of Salimans et al. 2016, with the classifier that gave the
    probabilities. p(y) is their mean. Report the score of real data as the ceiling. The score sees
    neither collapse within a class nor whether an image resembles the data.
    """
    [p] = _vectors(probabilities=probabilities)
    if p.min() < 0 or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise ValueError("probabilities must be rows that sum to 1: take the softmax of logits")
    p = p / p.sum(1, keepdims=True)  # rows of float16 sum to 1 only to 3 digits
    terms = scipy.special.rel_entr(p, p.sum(0)[None]).sum(1) + log(len(p))
    return float(np.clip(np.exp(terms.mean()), 1, p.shape[1]))


# ------------------------------------------------------------------------------------- classifiers


class Classifier(nn.Module):
    """A small convolutional net: images [B, H, W, C] in [0, 1] -> (logits, features).

    logits are [B, classes]; features are [B, width] and at least 0.
    """

    channels: tuple[int, ...] = (16, 32, 48, 32)  # the first at full size, each later one at half
    width: int = 64
    classes: int = 10

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
    ) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        he_normal = nn.initializers.he_normal()
        h = images - 0.5
        for i, channels in enumerate(self.channels):
            stride = 2 if i else 1
            h = nn.relu(nn.Conv(channels, (3, 3), stride, kernel_init=he_normal)(h))
        features = nn.relu(nn.Dense(self.width, kernel_init=he_normal)(h.reshape(len(h), -1)))
        return nn.Dense(self.classes)(features), features


class Pretrained(NamedTuple):
    """A frozen classifier. Report `sha256` with all its values: other weights, other metric."""

    # images [N, *shape] in [0, 1], chunk=500 -> (logits [N, classes], features [N, width]), float32
    apply: Callable
    shape: tuple[int, int, int]
    accuracy: float  # on the held-out test split that `about` names
    sha256: str  # of the file
    about: dict  # how it was trained


def load_classifier(name: str | Path) -> Pretrained:
    """Loads the classifier of digits, mnist or fashion_mnist, or one from a .safetensors file.

    Such a file is written by experiments/classifiers.py.

    Draw the samples of a floor at random. The two halves of MNIST's test split are by different
    writers: at n = 5,000, fid_mnist is 31 between them. Between two sets from the training split it
    is 2.7. fid_fashion is 1.1 in both cases.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if str(name).endswith(".safetensors"):
        path = Path(os.path.expanduser(name))
    if path.parent == WEIGHTS and not path.is_file():
        raise ValueError(f"no classifier {path.stem!r}; there are {', '.join(CLASSIFIERS)}")
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        if "channels" not in about:
            raise ValueError(f"{path} is no classifier: its header does not describe one")
        names = file.keys()
        flat = {key: jnp.asarray(file.get_tensor(key), jnp.float32) for key in names}
    params, shape = unflatten_dict(flat, sep="."), tuple(about["shape"])
    net = Classifier(tuple(about["channels"]), about["width"], about["classes"])

    @jax.jit
    def forward(params, images):
        with jax.default_matmul_precision("highest"):  # gives the same features on a GPU
            return net.apply(params, images)

    def apply(images, chunk: int = CHUNK):
        images = np.asarray(images)
        _check_classifier_input(images, shape)
        blocks = (block.astype(np.float32) for block in _blocks(images, chunk))
        pieces = [forward(params, block) for block in blocks]
        return tuple(np.concatenate(part) for part in zip(*pieces, strict=True))

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Pretrained(apply, shape, about["accuracy"], digest, about)


def _check_classifier_input(images: np.ndarray, shape: tuple[int, ...]) -> None:
    if images.shape[1:] != shape or not len(images):
        expected = f"images [N, {', '.join(map(str, shape))}]"
        channels_first = images.shape[1:] == (shape[-1], *shape[:-1])
        advice = "; channels come last: images.transpose(0, 2, 3, 1)" if channels_first else ""
        raise ValueError(f"the classifier takes {expected}, got {images.shape}{advice}")
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    if not is_float or not (images.min() >= -0.01 and images.max() <= 1.01):
        got = f"{images.dtype} in {images.min()}..{images.max()}"
        raise ValueError(f"the classifier takes floats in [0, 1], got {got}")
