"""Shared by the scripts that generate pictures: data, distances with their floors, D's memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from aigc_jax import data, metrics
from aigc_jax.data.pictures import picture_splits
from experiments._rows import DataError, Row
from experiments._runs import Source

ACCURACY = "class accuracy of the samples (%, our classifier)"
COVERAGE = "coverage (k=5)"
LEAST = 10  # own pictures per split: with fewer no metric means anything


@functools.cache
def say(line: str) -> None:
    """Prints a line on stderr, unless it was printed before."""
    print(line, file=sys.stderr)


def parts(source: Source, *named: str, training: int | None = None) -> list[data.Data]:
    """Returns a training set, a validation set if `named` has three slices, and a test set.

    named: these slices of a named set. Own pictures: see `shares`. Raises DataError for what cannot
        be measured later.
    """
    if not source.pictures:
        return [source.load(split) for split in named]
    try:
        sizes = picture_splits(source.name, folder=source.folder)
    except OSError as e:
        raise DataError(str(e)) from e
    splits = shares(source.name, sizes, watched=len(named) == 3, training=training)
    found = [source.load(split) for split in splits]
    for split, part in zip(splits, found, strict=True):
        if part.info.examples < LEAST:
            raise DataError(
                f"{source.name} has {sum(sizes.values())} pictures, {part.info.examples} of them "
                f"in {split}: at least "
                f"{LEAST} are needed in each of {', '.join(splits)}"
            )
        if part.resident is None:
            raise DataError(
                f"{source.name} takes more than 2 GiB: make it smaller with --data.size 64"
            )
    if splits[-1].startswith("train"):
        counts = ", ".join(
            f"{split} ({part.info.examples})" for split, part in zip(splits, found, strict=True)
        )
        say(f"{source.name}: no test folder, so train is cut by shares: {counts}")
    return found


def shares(
    name: str, sizes: dict[str, int], *, watched: bool, training: int | None = None
) -> list[str]:
    """Returns slices of own pictures: training, validation if `watched`, and test.

    Test is test/, else validation/, else the last tenth of train. Validation is validation/ if
    there is a test/ too, else the last tenth of what remains of train.

    training: the number of pictures to train on.
    """
    if "train" not in sizes:
        raise DataError(f"{name} has the splits {', '.join(sizes)} and no train")
    if training is not None and not 0 < training < sizes["train"]:
        raise DataError(
            f"training must lie in 1..{sizes['train'] - 1} of the pictures of {name}, got "
            f"{training}"
        )
    there = [part for part in ("validation", "test") if part in sizes][-1 - watched :]
    missing = 1 + watched - len(there)
    if training is None:
        marks = [f"{100 - 10 * i}%" for i in range(missing, 0, -1)]
    else:
        rest = sizes["train"] - training
        marks = [str(training + rest * i // missing) for i in range(missing)] or [str(training)]
    cut = [f"train[{a}:{b}]" for a, b in zip(["", *marks], [*marks, ""], strict=True)]
    cut = ["train"] if not marks else cut[:1] if not missing else cut
    return [*cut, *there]


def three(source: Source, training: int | None, otherwise: int) -> list[data.Data]:
    """Returns `parts` of train[:n], train[n:] and test.

    n is `training`; by default 1,237 for digits and `otherwise` for other sets.
    """
    if training is not None and training < 1:
        raise DataError(f"training must be at least 1, got {training}")
    n = training if training is not None else 1237 if source.name == "digits" else otherwise
    return parts(source, f"train[:{n}]", f"train[{n}:]", "test", training=training)


def adopt(setup, scales: dict, info: data.Info, *, classes: bool = False):
    """Returns the Setup with a model of this set's shape, levels and, if asked, classes.

    A field that the user set, so that it is none of the script's own, stays. Raises DataError where
    the model cannot take such pictures.
    """
    if info.kind != "image":
        setup.model.check(info)
    model, found = setup.model, {"shape": tuple(info.shape), "levels": info.levels}
    if classes:
        if info.classes is None:
            raise DataError(
                f"{setup.data.name} has no classes, which this model needs: give each class a "
                "sub-folder, or use "
                "python -m experiments.own_pictures"
            )
        found["classes"] = info.classes
    defaults = [scale.setup.model for scale in scales.values()]
    change = {
        field: v
        for field, v in found.items()
        if getattr(model, field) in [getattr(d, field) for d in defaults]
    }
    try:
        model = replace(model, **change)
    except ValueError as e:
        raise DataError(f"{e}{fitting(model, change) if setup.data.pictures else ''}") from e
    model.check(info)
    return replace(setup, model=model)


def fitting(model, change: dict) -> str:
    """Returns advice on a --data.size that the model accepts; "" if there is none."""
    height, width, channels = change.get("shape", model.shape)
    for size in sorted(range(4, 257), key=lambda size: abs(size - min(height, width))):
        try:
            replace(model, **{**change, "shape": (size, size, channels)})
        except ValueError:
            continue
        return f"; --data.size {size} makes them {size} x {size}"
    return ""


def health(training: data.Data, n: int = 500) -> Callable:
    """Returns an `on_eval` that reports D's logit, and its accuracy, on n training examples.

    `fit` reports the same on its validation set. The gap shows how far D has memorised the
    training set. There is an accuracy only for losses that define one.
    """
    batch = jax.tree.map(jax.numpy.asarray, training.batch(0, 0, n))

    def on_eval(family, state, step):
        values = jax.jit(family.evaluate)(state, batch, jax.random.key(0))
        return {
            f"seen_{name}": value.mean()
            for name, value in values.items()
            if name.startswith("real")
        }

    return on_eval


def distances(
    name: str, fake: np.ndarray, real: np.ndarray, seen: np.ndarray, fake_label=None
) -> list[Row]:
    """Returns rows that compare samples with held-out images `real`, all in [0, 1].

    The features are those of our classifier of the set `name`. For own pictures, which no
    classifier of ours knows, they are pixels. The oracle of each row is its floor: the value of
    as many training images, drawn from `seen`, in place of the samples.
    """
    n = min(len(fake), len(real), len(seen))
    if name.startswith(("images:", "pairs:")):
        say(
            f"{name}: no classifier of ours knows these pictures. Frechet and kernel distance, "
            "classifier score and class accuracy are left out. "
            "Precision, recall, density and coverage are measured on pixels."
        )
        return in_pixels(fake, real, seen)
    # In random order: the first digits of a set are by a few writers, so they are no fair floor.
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
        if n >= 1000:  # with fewer it is noise
            blocks = metrics.kernel_distance(features["real"], features[who], jax.random.key(0))
            kernel["kernel distance x 1000, same features (+- s.e. over blocks)"] = 1000 * np.array(
                blocks
            )
        fid = f"fid_{name.removesuffix('_mnist')}, n = {n} ({about})"
        return {
            fid: metrics.frechet_distance(features["real"], features[who]),
            **kernel,
            "precision (k=3)": precision,
            "recall (k=3)": recall,
            "density (k=5)": density,
            COVERAGE: coverage,
            "classifier score": metrics.classifier_score(p[who]),
        }

    floor, rows = measured("seen"), []
    for what, value in measured("fake").items():
        (value, *error), (best, *_) = np.atleast_1d(value), np.atleast_1d(floor[what])
        error, words = float(error[0]) if error else None, f"{what}; oracle: training images"
        rows.append(Row(words, float(value), error=error, oracle=float(best)))
    if fake_label is not None:
        right = logits["fake"].argmax(-1) == fake_label[:n]
        rows.append(Row(ACCURACY, 100 * float(right.mean())))
    return rows


def in_pixels(fake: np.ndarray, real: np.ndarray, seen: np.ndarray) -> list[Row]:
    """Returns rows of the distances that need no classifier, on pixels.

    The oracle of each row is the value of as many training images, drawn at random.
    """
    n = min(len(fake), len(real), len(seen))
    seen = seen[np.random.default_rng(0).permutation(len(seen))]
    fake, real, seen = (x[:n].reshape(n, -1) for x in (fake, real, seen))
    values = {}
    for who, x in (("fake", fake), ("seen", seen)):
        values[who] = (*metrics.precision_recall(real, x), *metrics.density_coverage(real, x))
    words = ("precision (k=3)", "recall (k=3)", "density (k=5)", COVERAGE)
    return [
        Row(
            f"{what} of pixels, n = {len(real)}; oracle: training images",
            float(value),
            oracle=float(best),
        )
        for what, value, best in zip(words, values["fake"], values["seen"], strict=True)
    ]


def caption(found: list[Row]) -> str:
    """Returns class accuracy and coverage as text, as far as they were measured."""
    accuracy = [f"class accuracy {row.ours:.1f} %" for row in found if row.quantity == ACCURACY]
    coverage = [row for row in found if row.quantity.startswith(COVERAGE)]
    covered = [
        f"coverage{' of pixels' if 'of pixels' in row.quantity else ''} {row.ours:.2f}"
        for row in coverage[:1]
    ]
    return ", ".join([*accuracy, *covered])


def by_class(images: np.ndarray, label: np.ndarray, columns: int, *, most: int = 20) -> np.ndarray:
    """Returns the first `columns` pictures of each class, one class per row.

    A class with fewer pictures is filled with white. Only the first `most` classes are shown.
    """
    rows = np.ones((min(label.max() + 1, most), columns, *images.shape[1:]), images.dtype)
    for c, row in enumerate(rows):
        of_class = images[label == c][:columns]
        row[: len(of_class)] = of_class
    return rows.reshape(-1, *images.shape[1:])


def check_known(source: Source, script: str) -> None:
    """Refuses a set of which we have no classifier."""
    if source.name in metrics.CLASSIFIERS:
        return
    instead = "; for own pictures: python -m experiments.own_pictures" if source.pictures else ""
    raise DataError(
        f"{script} measures by our classifier of the set: data.name must be one of "
        f"{', '.join(metrics.CLASSIFIERS)}{instead}"
    )


def check(setup, script: str, *, conditional: bool, own: bool = False) -> None:
    """Refuses flags with which the metrics after training could not be computed.

    own: whether the script can measure own pictures.
    """
    if not (own and setup.data.pictures):
        check_known(setup.data, script)
    if bool(setup.model.classes) != conditional:
        kind = "a conditional" if conditional else "an unconditional"
        raise DataError(
            f"{script} trains {kind} model: model.classes cannot be {setup.model.classes}"
        )


def pixels(source: data.Data, n: int | None = None) -> np.ndarray:
    """Returns the first n images of a finite set, in [0, 1]."""
    images = source.resident[0]["image"][:n]
    return np.asarray(images, np.float32) / (source.info.levels - 1)


def neighbours(fake: np.ndarray, training: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Returns how near samples are to training images: a ratio, and the smallest distance.

    The ratio is that of two medians: the distance of a sample to its nearest training image, and
    the same distance of a test image.
    """
    near, _ = metrics.nearest(fake, training)
    near_test, _ = metrics.nearest(test[: len(fake)], training)
    return float(np.median(near) / np.median(near_test)), float(near.min())
