"""What the scripts that draw pictures share: distances of samples beside their floors, and D on what it has seen."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from aigc_jax import data, metrics
from experiments._cli import Row

ACCURACY = "class accuracy of the samples (%, our classifier)"
COVERAGE = "coverage (k=5)"


def health(training: data.Data, n: int = 500) -> Callable:
    """An `on_eval`: D's logit, and its accuracy where it has one, on n training examples.

    `fit` reports the same of held-out examples (its `valid`): the gap is what D knows by heart.
    """
    batch = jax.tree.map(jax.numpy.asarray, training.batch(0, 0, n))

    def on_eval(family, state, step):
        values = jax.jit(family.evaluate)(state, batch, jax.random.key(0))
        return {f"seen_{name}": value.mean() for name, value in values.items() if name.startswith("real")}

    return on_eval


def distances(name: str, fake: np.ndarray, real: np.ndarray, seen: np.ndarray, fake_label=None) -> list[Row]:
    """Rows for samples against held-out images `real`, in the features of our classifier of the set `name`.

    The oracle of each is its floor: as many training images, drawn from `seen`, in place of the samples. Images in
    [0, 1].
    """
    n = min(len(fake), len(real), len(seen))
    # At random: the first digits of a set are those of a few writers, and so no floor.
    seen = seen[np.random.default_rng(0).permutation(len(seen))]
    net = metrics.load_classifier(name)
    logits, features = {}, {}
    for who, x in (("fake", fake), ("real", real), ("seen", seen)):
        logits[who], features[who] = net.apply(x[:n])
    p = {who: np.asarray(jax.nn.softmax(a, -1)) for who, a in logits.items()}

    about = f"classifier {net.sha256[:8]}, {100 * net.accuracy:.1f} % accurate"

    def measured(who):
        precision, recall = metrics.precision_recall(features["real"], features[who])
        density, coverage = metrics.density_coverage(features["real"], features[who])
        kernel = {}
        if n >= 1000:  # of fewer it is noise
            blocks = metrics.kernel_distance(features["real"], features[who], jax.random.key(0))
            kernel["kernel distance x 1000, same features (+- s.e. over blocks)"] = 1000 * np.array(blocks)
        return {
            f"fid_{name.removesuffix('_mnist')}, n = {n} ({about})":
                metrics.frechet_distance(features["real"], features[who]),
            **kernel,
            "precision (k=3)": precision,
            "recall (k=3)": recall,
            "density (k=5)": density,
            COVERAGE: coverage,
            "classifier score": metrics.classifier_score(p[who]),
        }  # fmt: skip

    floor, rows = measured("seen"), []
    for what, value in measured("fake").items():
        (value, *error), (best, *_) = np.atleast_1d(value).tolist(), np.atleast_1d(floor[what]).tolist()
        rows.append(Row(f"{what}; oracle: training images", value, error=error[0] if error else None, oracle=best))
    if fake_label is not None:
        rows.append(Row(ACCURACY, 100 * float((logits["fake"].argmax(-1) == fake_label[:n]).mean())))
    return rows


def check(setup, script: str, *, conditional: bool) -> None:
    """Refuses flags that the measurements after the training could not take."""
    known = [file.stem for file in sorted(metrics.WEIGHTS.glob("*.safetensors"))]
    if setup.data.name not in known:
        raise ValueError(f"{script} measures by our classifier of the set: data.name must be one of {', '.join(known)}")
    if bool(setup.model.classes) != conditional:
        kind = "a conditional" if conditional else "an unconditional"
        raise ValueError(f"{script} trains {kind} model: model.classes cannot be {setup.model.classes}")


def pixels(source: data.Data, n: int | None = None) -> np.ndarray:
    """The first n images of a finite set, in [0, 1]."""
    images = source.resident[0]["image"][:n]
    return np.asarray(images, np.float32) / (source.info.levels - 1)


def neighbours(fake: np.ndarray, training: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Median distance of samples to their nearest training image, over that of test images; the smallest distance."""
    near = metrics.nearest(fake, training)[0]
    return float(np.median(near) / np.median(metrics.nearest(test[: len(fake)], training)[0])), float(near.min())
