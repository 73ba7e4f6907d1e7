"""Numbers for generative models: features or samples in, floats out. Nothing here draws a sample or trains.

Every metric has a floor: what real data score against other real data at the same n. Report both beside the value.
Samples are arrays of numbers [N, ...] and count as vectors. Everything is computed in float64. Distances are Euclidean:
whatever depends on one is decided by the sum of squared differences, so a copy has distance 0 and ties are ties.
10,000 x 10,000 samples of 784 numbers need 1 GB.
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
FEW = 16  # up to so many dimensions differences are as fast as a matrix product
EPS = np.finfo(np.float64).eps
WEIGHTS = Path(__file__).parent / "weights"

A = Num[Array | np.ndarray, "N ..."]
B = Num[Array | np.ndarray, "M ..."]
C = Num[Array | np.ndarray, "K ..."]


def _vectors(at_least: int = 1, **samples) -> list[np.ndarray]:
    """Samples as finite float64 vectors [N, D] of one width, with `at_least` rows each."""
    found = []
    for name, x in samples.items():
        x = np.asarray(x)
        if x.ndim < 1 or len(x) < at_least:
            raise ValueError(f"{name} must hold at least {at_least} samples, got an array of shape {list(x.shape)}")
        x = x.reshape(len(x), -1).astype(np.float64)
        if not (np.abs(x) < 1e150).all():  # whose squares are finite too
            raise ValueError(f"{name} holds values that are not finite, or too large to be squared")
        found.append(x)
    if len({x.shape[1] for x in found}) > 1:
        widths = ", ".join(f"{name} {x.shape[1]}" for name, x in zip(samples, found, strict=True))
        raise ValueError(f"samples must be equally wide, got {widths} numbers a sample")
    return found


def _scaled(*sets: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """e, and the sets over 2^e, whose largest number is next to 1: squares do not vanish, and nothing is rounded."""
    e = int(np.frexp(max(np.abs(x).max(initial=0.0) for x in sets))[1])
    return e, [np.ldexp(x, -e) for x in sets]


def _blocks(x: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    return (x[i : i + chunk] for i in range(0, len(x), chunk))


class _Distances:
    """Squared distances of each x to all y, block by block, and exactly where a decision needs it."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.x, self.y = x, y
        # Rows that are equal have equal numbers: sets with many copies would else need all differences.
        seen: dict[bytes, int] = {}
        self.x_copy, self.y_copy = (
            np.array([seen.setdefault(row.tobytes(), len(seen)) for row in a + 0.0]) for a in (x, y)
        )

    def blocks(self, chunk: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Which rows of x, their squared distances [B, M], and how far each of those may be off.

        In many dimensions they are |a|^2 + |b|^2 - 2ab of centred data. The bound is that of a product of floats.
        """
        y, D = self.y, self.y.shape[1]
        mean = y.mean(0)
        centred = y - mean
        size = np.square(centred).sum(1)
        for i in range(0, len(self.x), chunk):
            rows = slice(i, i + chunk)
            if D <= FEW:
                squared = cdist(self.x[rows], y, "sqeuclidean")
                yield rows, squared, (D + 8) * EPS * squared
                continue
            block = self.x[rows] - mean
            sizes = np.square(block).sum(1)[:, None] + size[None]
            yield rows, sizes - 2 * (block @ centred.T), (D + 8) * EPS * sizes

    def exact(self, rows: slice, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Sums of squared differences of the pairs (rows.start + i, j)."""
        i = rows.start + i
        found, apart = np.zeros(len(i)), np.flatnonzero(self.x_copy[i] != self.y_copy[j])
        for part in _blocks(apart, 1 + 2**20 // self.y.shape[1]):
            found[part] = np.square(self.x[i[part]] - self.y[j[part]]).sum(1)
        return found


# ---------------------------------------------------------------------------------------------------------- likelihoods


def _parzen(x, centres, sigmas, chunk: int) -> np.ndarray:
    """log p(x) in nats [S, N], for every width from one pass over the distances."""
    widths = sigmas
    e, (x, centres) = _scaled(x, centres)
    sigmas = np.ldexp(widths, -e)
    if not ((sigmas > 1e-150) & (sigmas < 1e150)).all():  # whose squares are numbers
        raise ValueError(f"sigmas {widths.tolist()} are too far from the size of the samples, {2.0**e:.3g}")
    distances, found = _Distances(x, centres), []
    for rows, squared, error in distances.blocks(chunk):
        # Differences where the bound could be felt, but for centres too far off to count.
        reach = (squared + error).min(1, keepdims=True) + 100 * sigmas.max() ** 2
        i, j = np.nonzero((error > np.maximum(1e-6 * sigmas.min() ** 2, 1e-12 * squared)) & (squared - error < reach))
        squared[i, j] = distances.exact(rows, i, j)
        least = squared.min(1)
        beyond = least[:, None] - squared
        found.append([np.log(np.exp(beyond / (2 * s * s)).sum(1)) - least / (2 * s * s) for s in sigmas])
    scale = np.log(len(centres)) + x.shape[1] * np.log(widths * np.sqrt(2 * np.pi))
    return np.concatenate(found, 1) - scale[:, None]


def parzen_log_likelihood(
    centres: A, validation: B, test: C, *, sigmas: Sequence[float] | np.ndarray | None = None, chunk: int = CHUNK
) -> tuple[float, float, float]:
    """Mean log density of `test` in nats, its standard error over the test samples, and the width sigma.

    Goodfellow et al. 2014 (GAN, table 1): an isotropic Gaussian of width sigma round each generated sample ("centre");
    sigma has the highest mean log density of `validation` among `sigmas` (theirs: np.logspace(-1, 0, 10)). The paper:
    10,000 centres, the first 1,000 of MNIST's train[50000:60000], 10,000 test images, pixels in [0, 1].

    It ranks models badly (Theis et al. 2016): in 784 dimensions it is far below the true value, which no number of
    samples mends, and k-means centroids beat the training images themselves (238 to 245 nats, by the 10,000 chosen).
    A model above that ceiling is smooth or has copied, not better. Never choose sigma on test; a sigma at an end of the
    grid asks for another grid.
    """
    centres, validation, test = _vectors(centres=centres, validation=validation, test=test)
    sigmas = np.logspace(-1, 0, 10) if sigmas is None else np.asarray(sigmas, np.float64).reshape(-1)
    if not len(sigmas) or not ((sigmas > 0) & np.isfinite(sigmas)).all():
        raise ValueError(f"sigmas must be positive numbers, got {sigmas.tolist()}")

    sigma = sigmas[_parzen(validation, centres, sigmas, chunk).mean(1).argmax()]
    [values] = _parzen(test, centres, np.array([sigma]), chunk)
    return float(values.mean()), float(values.std() / len(values) ** 0.5), float(sigma)


def bits_per_dim(nll_nats, shape: Sequence[int], *, levels: int | None = None):
    """Bits a dimension from nats a sample of this shape: nats / (D ln 2); a number or an array.

    levels: for the density of data scaled to [-1, 1] by 2x / (levels - 1) - 1, whose levels lie 2 / (levels - 1) apart:
        adds log2((levels - 1) / 2), 6.994 for 256 levels. None: the likelihood is one of the levels themselves.
    """
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must hold positive sizes, got {tuple(shape)}")
    if hasattr(nll_nats, "dtype"):  # a float16 would lose what the division leaves
        nll_nats = nll_nats.astype(jnp.promote_types(nll_nats.dtype, jnp.float32))
    return nll_nats / (prod(shape) * log(2)) + (log2((levels - 1) / 2) if levels else 0.0)


# ------------------------------------------------------------------------------------------- distances of distributions


def frechet_distance(a: A, b: B) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the Frechet distance of two Gaussians, in squared units.

    Heusel et al. 2017, eq. 6. With features of `load_classifier` it is fid_digits, fid_mnist, fid_fashion; none
    compares with a published FID, which takes Inception's 2,048 features. The second term is |R_a - U R_b|^2, where
    S = R^T R comes from a QR decomposition, so n may be below d, and U is the rotation that makes it least: a sum of
    squares, so that equal sets are at 0 and none below. For equal
    distributions of unit variance it is not 0 but .5 to .6 d^2 / n (d = 64: 2.2 at n = 1,000, .23 at 10,000): give
    both sides the same n, above 10 d, and report it.
    """
    a, b = _vectors(2, a=a, b=b)
    a, b = a - a.mean(0), b - a.mean(0)
    scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
    a, b = a / scale, b / scale
    means = a.mean(0), b.mean(0)
    roots = [np.linalg.qr((x - m) / (len(x) - 1) ** 0.5, mode="r") for x, m in zip((a, b), means, strict=True)]
    rows = max(len(r) for r in roots)
    r_a, r_b = (np.pad(r, ((0, rows - len(r)), (0, 0))) for r in roots)
    left, _, right = np.linalg.svd(r_a @ r_b.T)
    squares = np.square(means[0] - means[1]).sum() + np.square(r_a - left @ right @ r_b).sum()
    return float(squares) * float(scale) ** 2


def kernel_distance(a: A, b: B, key: Key[Array, ""], *, blocks: int = 10, size: int = 1000) -> tuple[float, float]:
    """Squared MMD with kernel (x.y / d + 1)^3 (KID, Binkowski et al. 2018), and its standard error.

    The mean of the unbiased estimate over `blocks` pairs of blocks of `size` samples, or fewer where the
    sets are smaller: blocks never overlap, so that the error is honest, whereas the authors' code draws each anew from
    the whole set. The estimate has no bias at any n: 0 for equal distributions, and about as often below.
    """
    if blocks < 2 or size < 2:
        raise ValueError(f"blocks and size must be at least 2, got {blocks} and {size}")
    a, b = _vectors(2 * blocks, a=a, b=b)
    size = min(size, min(len(a), len(b)) // blocks)
    k_a, k_b = jax.random.split(key)
    a, b = (x[np.asarray(jax.random.permutation(k, len(x)))[: blocks * size]] for x, k in ((a, k_a), (b, k_b)))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def squared_mmd(x, y):
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))) / (size * (size - 1))
        return within - 2 * kernel(x, y).mean()

    pairs = zip(*(np.split(x, blocks) for x in (a, b)), strict=True)
    values = [squared_mmd(x, y) for x, y in pairs]
    return float(np.mean(values)), float(np.std(values, ddof=1) / blocks**0.5)


def sliced_wasserstein(a: A, b: B, key: Key[Array, ""], *, directions: int = 128) -> float:
    """The root of the mean over random directions of the squared 2-Wasserstein distance of the projections, data units.

    Bonneel et al. 2015, with as many samples on both sides: sorted projections meet in order. Directions are
    jax.random.normal(key, (directions, d)), normalised. Above 0 for equal distributions (.06 to .09 for 2,500 points of
    the 25-grid at unit variance); blind to small blur.
    """
    a, b = _vectors(a=a, b=b)
    a, b = a - a.mean(0), b - a.mean(0)
    if len(a) != len(b):
        raise ValueError(f"both sides need as many samples, got {len(a)} and {len(b)}")
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    w = np.asarray(jax.random.normal(key, (directions, a.shape[1]), jnp.float32), np.float64)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    return float(np.sqrt(np.square(np.sort(a @ w.T, 0) - np.sort(b @ w.T, 0)).mean()))


# ----------------------------------------------------------------------------------------- nearest neighbours and balls


def _neighbours(x, y, k: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance of each x to its k-th nearest y, counted from 0, and that one's row, of equals the first."""
    distances, found = _Distances(x, y), []
    for rows, squared, error in distances.blocks(chunk):
        reach = np.partition(squared + error, k, axis=1)[:, k]
        i, j = np.nonzero(squared - error <= reach[:, None])  # all that may be among the k nearest
        exact = distances.exact(rows, i, j)
        kth = np.lexsort((j, exact, i))[np.searchsorted(i, np.arange(len(squared))) + k]
        found.append((exact[kth], j[kth]))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def _balls(centres, x, k: int, inside: Callable) -> tuple[np.ndarray, np.ndarray]:
    """In how many balls each x lies [B]; which balls hold an x [N].

    They reach to each centre's k-th neighbour among the others (rank 0 is the centre itself). inside(distance, radius)
    says whether the border belongs to a ball.
    """
    _, (centres, x) = _scaled(centres, x)
    radii, _ = _neighbours(centres, centres, k, CHUNK)
    distances, counts, held = _Distances(x, centres), [], np.zeros(len(centres), bool)
    for rows, squared, error in distances.blocks(CHUNK):
        within = squared + error < radii[None]
        i, j = np.nonzero((squared - error <= radii[None]) & ~within)
        within[i, j] = inside(distances.exact(rows, i, j), radii[j])
        counts.append(within.sum(1))
        held |= within.any(0)
    return np.concatenate(counts), held


def precision_recall(real: A, fake: B, k: int = 3) -> tuple[float, float]:
    """The share of fakes that lie in the k-nearest-neighbour ball of any real, and the same with the roles swapped.

    Kynkaanniemi et al. 2019, eqs. 1 and 2: a ball includes its border, which the code of Naeem et al. leaves out here
    too. For equal distributions they are not 1: .62 to .64 at k = 3, d = 64, n = 1,000, .98 in two dimensions. One
    outlier's ball can hold a large share of the fakes.
    """
    real, fake = _neighbourhoods(real, fake, k)
    counts = _balls(real, fake, k, np.less_equal)[0], _balls(fake, real, k, np.less_equal)[0]
    return float((counts[0] > 0).mean()), float((counts[1] > 0).mean())


def density_coverage(real: A, fake: B, k: int = 5) -> tuple[float, float]:
    """Density, how many reals' balls a fake lies in, over k; coverage, the share of reals whose ball holds a fake.

    Naeem et al. 2020, section 3; a ball excludes its border, as in the authors' code. For equal distributions, N reals
    and M fakes: density 1 on average, coverage 1 - prod_{i=1..k} (N - i) / (N + M - i), which is .969 for k = 5 and
    N = M large, .875 for k = 3.
    """
    real, fake = _neighbourhoods(real, fake, k)
    counts, held = _balls(real, fake, k, np.less)
    return float(counts.mean() / k), float(held.mean())


def _neighbourhoods(real, fake, k: int) -> list[np.ndarray]:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _vectors(k + 1, real=real, fake=fake)


def nearest(x: A, reference: B, *, chunk: int = CHUNK) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Distance of each x to the nearest in `reference`, and its row there, of equals the first: 0 is a copy."""
    reference, x = _vectors(reference=reference, x=x)
    e, (x, reference) = _scaled(x, reference)
    squared, index = _neighbours(x, reference, 0, chunk)
    return np.ldexp(np.sqrt(squared), e), index


def nearest_neighbour_error(
    train_x: A,
    train_y: Num[Array | np.ndarray, " _"],
    test_x: B,
    test_y: Num[Array | np.ndarray, " _"],
    *,
    chunk: int = CHUNK,
) -> float:
    """The share of test samples whose nearest training sample has another label.

    With a conditional generator's samples as training set it is DCGAN's table 3 (Radford et al. 2016); the same with
    as many real images is its floor.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y):
            raise ValueError(f"{name} has {len(x)} samples and {len(y)} labels")
    _, index = nearest(test_x, train_x, chunk=chunk)
    return float((np.asarray(train_y)[index] != np.asarray(test_y)).mean())


# --------------------------------------------------------------------------------------------------- classes and modes


class ModeCount(NamedTuple):
    """Which modes of a mixture the samples reach."""

    modes: int  # modes with a high-quality sample
    high_quality: float  # share of samples that are one
    histogram: np.ndarray  # int [M], high-quality samples by nearest mode


def mode_count(samples: A, modes: B, std: float, *, within: float = 3.0) -> ModeCount:
    """Counts samples nearer than `within` standard deviations to their nearest mode (VEEGAN; PacGAN 2018, sec. 4.1).

    2,500 samples by custom. A correct model of isotropic modes in two dimensions has 1 - exp(-within^2 / 2) = .989 of
    high quality: more is collapsed variance. In d dimensions it is the chi distribution's share, next to 0 for large d.
    One sample reaches a mode, so read the histogram's smallest entry and `reverse_kl(histogram)` too.
    """
    if not (std > 0 and within > 0):
        raise ValueError(f"std and within must be positive, got {std} and {within}")
    distance, index = nearest(samples, modes)
    good = distance < within * std
    histogram = np.bincount(index[good], minlength=len(modes))
    return ModeCount(int((histogram > 0).sum()), float(good.mean()), histogram)


def reverse_kl(histogram: Num[Array | np.ndarray, " M"]) -> float:
    """KL(histogram / total || uniform) in nats, 0 log 0 = 0: 0 where all M bins are equally full, log M for one alone.

    PacGAN's reverse KL: on mixtures `mode_count(...).histogram`, high-quality samples only; on stacked digits
    np.bincount(classes, minlength=M) of the predicted classes. About (M - 1) / 2n for n samples of the uniform
    distribution. Not a number for an empty histogram: a model without any high-quality sample has no such value.
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
    """exp(E KL(p(y|x) || p(y))), in [1, classes]: the Inception score of Salimans et al. 2016 with this classifier.

    p(y) is the mean over the samples given. The real data's own value is the ceiling to report; it sees neither
    collapse within a class nor whether an image resembles the data.
    """
    [p] = _vectors(probabilities=probabilities)
    if p.min() < 0 or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise ValueError("probabilities must be rows that sum to 1: take the softmax of logits")
    p = p / p.sum(1, keepdims=True)  # those of float16 do so to 3 digits
    terms = scipy.special.rel_entr(p, p.sum(0)[None]).sum(1) + log(len(p))
    return float(np.clip(np.exp(terms.mean()), 1, p.shape[1]))


# ---------------------------------------------------------------------------------------------------------- classifiers


class Classifier(nn.Module):
    """A small convolutional net, [B, H, W, 1] in [0, 1] -> logits [B, classes] and features [B, width], at least 0."""

    channels: tuple[int, ...] = (16, 32, 48, 32)  # the first at full size, each further one at half the size
    width: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 1"]) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        h = images - 0.5
        for i, channels in enumerate(self.channels):
            h = nn.relu(nn.Conv(channels, (3, 3), 2 if i else 1, kernel_init=nn.initializers.he_normal())(h))
        features = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(h.reshape(len(h), -1)))
        return nn.Dense(self.classes)(features), features


class Pretrained(NamedTuple):
    """A frozen classifier. Whatever is measured with it names `sha256`: other weights are another metric."""

    apply: Callable  # images [N, *shape] in [0, 1], chunk=500 -> (logits [N, classes], features [N, width]), float32
    shape: tuple[int, int, int]
    accuracy: float  # on the held-out test split that `about` names
    sha256: str  # of the file
    about: dict  # how it was trained


def load_classifier(name: str | Path) -> Pretrained:
    """The classifier of digits, mnist or fashion_mnist, or one in a file that experiments/classifiers.py wrote.

    Draw the samples of a floor at random: the two halves of MNIST's test split are by other writers, and at n = 5,000
    fid_mnist is 31 between them, 2.7 between two sets from its training split (1.1 for fid_fashion, in both).
    """
    path = Path(os.path.expanduser(name)) if str(name).endswith(".safetensors") else WEIGHTS / f"{name}.safetensors"
    if path.parent == WEIGHTS and not path.is_file():
        shipped = sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))
        raise ValueError(f"no classifier {path.stem!r}; there are {', '.join(shipped)}")
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        if "channels" not in about:
            raise ValueError(f"{path} is no classifier: its header says nothing of one")
        flat = {key: jnp.asarray(file.get_tensor(key), jnp.float32) for key in file.keys()}  # noqa: SIM118
    params, shape = unflatten_dict(flat, sep="."), tuple(about["shape"])
    net = Classifier(tuple(about["channels"]), about["width"], about["classes"])

    @jax.jit
    def forward(params, images):
        with jax.default_matmul_precision("highest"):  # the same features on a GPU
            return net.apply(params, images)

    def apply(images, chunk: int = CHUNK):
        images = np.asarray(images)
        if images.shape[1:] != shape or not len(images):
            first = images.shape[1:] == (shape[-1], *shape[:-1])
            advice = "; channels come last: images.transpose(0, 2, 3, 1)" if first else ""
            raise ValueError(
                f"the classifier takes images [N, {', '.join(map(str, shape))}], got {images.shape}{advice}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating) or not (images.min() >= -0.01 and images.max() <= 1.01):
            said = f"{images.dtype} in {images.min()}..{images.max()}"
            raise ValueError(f"the classifier takes floats in [0, 1], got {said}")
        pieces = [forward(params, block.astype(np.float32)) for block in _blocks(images, chunk)]
        return tuple(np.concatenate(part) for part in zip(*pieces, strict=True))

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Pretrained(apply, shape, about["accuracy"], digest, about)
