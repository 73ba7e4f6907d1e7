"""Image sets: scikit-learn's digits, MNIST, Fashion-MNIST and CIFAR-10.

The last three are downloaded and prepared by TFDS builders that need no TensorFlow. Your own
pictures (`images:FOLDER`) are in `pictures.py`.
"""

from __future__ import annotations

import functools

import numpy as np

from . import Data, from_arrays
from .pictures import load_pictures as pictures  # noqa: F401 (its former place and name)
from .prepare import cuts, prepared


def digits(split: str) -> Data:
    """Loads scikit-learn's 8x8 digits with 17 grey levels: 1,437 train and 360 test images.

    scikit-learn has no splits. Ours keep its order: the last 360 images are test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    image, label = bunch.images.astype(np.uint8)[..., None], bunch.target
    splits = {
        "train": {"image": image[:1437], "label": label[:1437]},
        "test": {"image": image[1437:], "label": label[1437:]},
    }
    sizes = {name: len(part["label"]) for name, part in splits.items()}
    return _select("digits", split, sizes, splits.get, levels=17)


def mnist(split: str, *, folder: str | None = None) -> Data:
    """Loads MNIST: 28x28, 60,000 train and 10,000 test images, in the official order."""
    return _load_tfds("mnist", split, folder)


def fashion_mnist(split: str, *, folder: str | None = None) -> Data:
    """Loads Fashion-MNIST: 28x28, 60,000 train and 10,000 test images, in the official order.

    Debian's package dataset-fashion-mnist is used if it is installed.
    """
    return _load_tfds("fashion_mnist", split, folder)


def cifar10(split: str, *, folder: str | None = None) -> Data:
    """Loads CIFAR-10: 32x32 RGB, 50,000 train and 10,000 test images, in the official order."""
    return _load_tfds("cifar10", split, folder)


def _select(name: str, split: str, sizes: dict[str, int], read, *, levels: int) -> Data:
    """Returns the examples that `split` names.

    read: `read(split)` returns the arrays of a whole split, whose lengths are in `sizes`.
    """
    pieces = []
    for part, start, stop in cuts(name, split, sizes):
        pieces.append({key: array[start:stop] for key, array in read(part).items()})
    arrays = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    if not len(arrays["image"]):
        raise ValueError(f"{name}: the split {split!r} is empty")
    return from_arrays(arrays, levels=levels, classes=10, source={"name": name, "split": split})


def _load_tfds(name: str, split: str, folder: str | None) -> Data:
    builder = prepared(name, folder)
    sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    read = functools.partial(_read, str(builder.data_path))
    return _select(name, split, sizes, read, levels=256)


@functools.lru_cache(maxsize=4)  # a training slice and a validation slice share one reading
def _read(path: str, split: str) -> dict:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(path).as_data_source(split)
    examples = source.__getitems__(range(len(source)))
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }
