"""Named data sets as batches: `load(name, split)`, or your own arrays through `from_arrays`.

Batch i is a pure function of (seed, i), so a resumed run needs no iterator state and any number of processes sees the
same global batches. A set that fits in memory is `resident`: its arrays are placed on the device once, and a step takes
its rows there.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Info:
    """What a set is. A run folder records it, and a Config's `check(info)` compares itself with it."""

    kind: str  # image | points | text | roll: how figures show a sample
    shape: tuple[int, ...]  # of one example, (H, W, C) for images
    levels: int | None = None  # images and tokens are whole numbers in 0..levels-1
    classes: int | None = None  # labels lie in 0..classes-1; None: unlabelled
    examples: int | None = None  # None: endless
    source: dict[str, Any] | None = None  # name, split and options, a folder only in images:FOLDER; None: from arrays
    fingerprint: str = ""  # sha256 of the arrays; of the source for an endless set
    tokenizer: str = ""  # of text: `data.text.Tokenizer(content)`
    bytes_per_token: float | None = None  # of text, UTF-8


class Data(NamedTuple):
    """A data set.

    batch(seed, i, size) -> dict of host arrays with `size` rows (image uint8 [B,H,W,C], points float32 [B,d],
        tokens int32 [B,T+1], roll uint8 [B,T,88], label int32 [B], index int32 [B] for finite sets, mask [B,T] of what
        counts)
    resident: (arrays, rows, take) of a set that fits in memory. rows(seed, i, size) -> int32 [size] says on the host
        which examples; take(arrays, rows) -> dict is jit-able; `batch` is the take of the rows.
    """

    info: Info
    batch: Callable[[int, int, int], dict]
    resident: tuple | None = None


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    # Raw Philox bits and a stable sort: unlike Generator.permutation, the same in every version of numpy.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int32)


def order(n: int, seed: int, i: int, size: int) -> np.ndarray:
    """Rows of batch i, int32 [size]: epochs are laid end to end, each a permutation of its own, then cut into batches.

    So every epoch sees each of the n examples once, and no batch is short: the one at a seam takes from both epochs.
    """
    rows, at = [], i * size
    while size:
        epoch, offset = divmod(at, n)
        rows.append(_permutation(seed, epoch, n)[offset : offset + size])
        at, size = at + len(rows[-1]), size - len(rows[-1])
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def _take(arrays: dict, rows) -> dict:
    return {**{name: a[rows] for name, a in arrays.items()}, "index": rows}


def from_arrays(
    arrays: dict,
    *,
    levels: int = 256,
    classes: int | None = None,
    source: dict | None = None,
    fingerprint: str | None = None,
) -> Data:
    """A finite set of your own: {"image": uint8 [N,H,W,C] or "points": float [N,d] or "tokens": int [N,T+1] or
    "roll": 0 or 1 [N,T,keys]}, with "label": int [N] if there are any; tokens and rolls with "mask": [N,T] of what
    counts if not all does.

    Images and tokens are whole numbers in 0..levels-1. `classes` defaults to the largest label + 1, `fingerprint` to
    the sha256 of the arrays. Raises ValueError for anything that does not fit this description, and for images that
    look like PyTorch's [N, C, H, W]: [N, 1 or 3, H, W] unless W is 1 or 3, as channels are (where H = W = 1 or 3 too,
    they must be as many as axis 1); [N, 4, S, S] with S above 4.
    """
    kinds = [kind for kind in ("image", "points", "tokens", "roll") if kind in arrays]
    if len(kinds) != 1:
        raise ValueError(f"arrays must hold one of image, points, tokens, roll, got {', '.join(arrays) or 'nothing'}")
    also = ("label", "mask") if kinds[0] in ("tokens", "roll") else ("label",)
    if unknown := set(arrays) - {*kinds, *also}:
        said = ", ".join(sorted(unknown))
        raise ValueError(f"beside {kinds[0]} from_arrays takes {' and '.join(also)}, not {said}")
    kind, arrays = kinds[0], {name: np.asarray(a) for name, a in arrays.items()}
    x = arrays[kind]
    if len(x) == 0:
        raise ValueError("a data set needs at least one example")
    if kind == "image":
        if x.dtype != np.uint8 or x.ndim != 4 or _channels_first(x.shape):
            raise ValueError(f"image must be uint8 [N, H, W, C], got {x.dtype} {list(x.shape)}{_advice(x)}")
        if not 2 <= levels <= 256:
            raise ValueError(f"levels must lie in 2..256, got {levels}")
        if x.max() >= levels:
            raise ValueError(f"an image value of {x.max()} does not fit levels={levels} (0..{levels - 1})")
    elif kind == "tokens":
        if x.ndim != 2 or x.shape[1] < 2 or not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"tokens must be whole numbers [N, T+1], got {x.dtype} {list(x.shape)}")
        if x.min() < 0 or x.max() >= levels:
            raise ValueError(f"tokens must lie in 0..{levels - 1} (levels={levels}), got {x.min()}..{x.max()}")
        arrays[kind] = x.astype(np.int32)
    elif kind == "roll":
        if x.ndim != 3 or not np.isin(x, (0, 1)).all():
            raise ValueError(f"roll must be 0 or 1 [N, T, keys], got {x.dtype} {list(x.shape)}")
        arrays[kind] = x.astype(np.uint8)
        arrays.setdefault("mask", np.ones(x.shape[:2]))
    elif x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"points must be floats [N, d], got {x.dtype} {list(x.shape)}")
    elif not np.isfinite(x).all():
        raise ValueError("points hold values that are not finite")
    else:
        arrays[kind] = x.astype(np.float32)
    if "mask" in arrays:
        mask, expected = arrays["mask"], (len(x), x.shape[1] - (kind == "tokens"))
        if mask.shape != expected or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"mask must be 0 or 1 {list(expected)}, got {mask.dtype} {list(mask.shape)}")
        arrays["mask"] = mask.astype(np.float32)
    if "label" in arrays:
        y = arrays["label"]
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"label must be whole numbers [{len(x)}], got {y.dtype} {list(y.shape)}")
        classes = classes or int(y.max()) + 1
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"labels must lie in 0..{classes - 1}, got {y.min()}..{y.max()}")
        arrays["label"] = y.astype(np.int32)

    info = Info(
        kind="text" if kind == "tokens" else kind,
        shape=x.shape[1:],
        levels=levels if kind in ("image", "tokens") else None,
        classes=classes if "label" in arrays else None,
        examples=len(x),
        source=source,
        fingerprint=fingerprint or _digest(arrays),
    )
    rows = functools.partial(order, len(x))
    return Data(info, lambda seed, i, size: _take(arrays, rows(seed, i, size)), (arrays, rows, _take))


def _channels_first(shape: tuple[int, ...]) -> bool:
    """Whether images look like [N, C, H, W], as PyTorch has them: see from_arrays."""
    if len(shape) != 4:
        return False
    _, first, second, last = shape
    if first in (1, 3):
        return last not in (1, 3) or (second == last != first)
    return first == 4 < second == last


def _advice(x: np.ndarray) -> str:
    """What makes uint8 [N, H, W, C] of other images."""
    to_do = []
    if _channels_first(x.shape):
        to_do.append("channels come last: x.transpose(0, 2, 3, 1)")
    if x.ndim == 3:
        to_do.append("a single channel is an axis too: x[..., None]")
    if np.issubdtype(x.dtype, np.floating):
        to_do.append("of floats in [0, 1] take (x * 255).round().astype(np.uint8)")
    return f"; {'; '.join(to_do)}" if to_do else ""


def _digest(arrays: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def from_source(
    examples,
    *,
    levels: int = 256,
    classes: int | None = None,
    source: dict | None = None,
    fingerprint: str | None = None,
) -> Data:
    """A finite set of images that need not fit in memory: read example by example, in the order of `from_arrays`.

    examples: `len(examples)` and `examples[i] -> {"image": uint8 [H,W,C], "label": int}` in any order and from any
        thread, as grain's and TFDS's data sources have them. `fit` reads ahead in threads.
    classes: how many, where there are labels. fingerprint: what tells this set from others; by default a sha256 of its
        length and of 64 examples spread over it.

    Raises ValueError for examples that do not fit this description: for the first at once, for others when read.
    """
    n = len(examples)
    if n == 0:
        raise ValueError("a data set needs at least one example")

    def stack(rows) -> dict:
        found = [examples[int(row)] for row in rows]
        for row, example in zip(rows, found, strict=True):
            if missing := [name for name in names if name not in example]:
                raise ValueError(f"example {row} has no {missing[0]}, example 0 has one")
            if np.shape(example["image"]) != shape:
                raise ValueError(f"image {row} is {np.shape(example['image'])}, image 0 is {shape}")
        arrays = {name: np.stack([e[name] for e in found]) for name in names}
        return from_arrays(arrays, levels=levels, classes=classes, fingerprint="of a batch").resident[0]

    zeroth = examples[0]
    if "image" not in zeroth:
        raise ValueError(f"examples must hold 'image', got {', '.join(zeroth) or 'nothing'}")
    names, shape = [name for name in ("image", "label") if name in zeroth], np.shape(zeroth["image"])
    first = from_arrays(stack([0]), levels=levels, classes=classes)
    if "label" in first.resident[0] and classes is None:
        raise ValueError("from_source needs to be told how many classes there are")
    if fingerprint is None:
        spread = stack(np.linspace(0, n - 1, min(n, 64)).astype(int))
        fingerprint = hashlib.sha256(f"{n} {_digest(spread)}".encode()).hexdigest()

    def batch(seed, i, size):
        rows = order(n, seed, i, size)
        return {**stack(rows), "index": rows}

    return Data(replace(first.info, examples=n, source=source, fingerprint=fingerprint), batch)


def endless(draw: Callable, shape: tuple[int, ...], source: dict) -> Data:
    """Points drawn afresh for every batch: `draw(rng, size) -> float [size, d]` from a numpy Generator."""

    stream = int(hashlib.sha256(source["split"].encode()).hexdigest()[:16], 16)  # splits draw different points

    def batch(seed, i, size):
        rng = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, i, 0]))
        return {"points": draw(rng, size).astype(np.float32)}

    fingerprint = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    return Data(Info(kind="points", shape=shape, source=source, fingerprint=fingerprint), batch)


def load(name: str, split: str = "train", *, folder: str | None = None, **options) -> Data:
    """The named set: digits, mnist, fashion_mnist, cifar10; ring, grid, swiss_roll, ppca; python_source,
    tiny_shakespeare, jsb_chorales; images:FOLDER and text:FILE for your own pictures and text.

    split: train or test, sliced as in TFDS where wished ("train[:50000]", "train[90%:]", "train+test"); synthetic sets
        take any name, and another name draws other points; images:FOLDER see `images.pictures`; text is cut into
        train and validation.
    folder: where the original files of a downloaded set lie (else AIGC_DATA/<name>, else a prepared copy, else the
        network). Files are known by their checksums, whatever their names. For images: and text:, where they are now.
    options: the set's own (synthetic: std, examples ...; text: length, stride, tokenizer; images: size, stream,
        labels); unknown ones are refused.

    Raises ValueError for a name, split, option or file that does not fit, FileNotFoundError where files are missing.
    """
    from . import images, music, points, text

    sets = {
        "digits": images.digits,
        "mnist": images.mnist,
        "fashion_mnist": images.fashion_mnist,
        "cifar10": images.cifar10,
        "ring": points.ring,
        "grid": points.grid,
        "swiss_roll": points.swiss_roll,
        "ppca": points.ppca,
        "jsb_chorales": music.jsb_chorales,
        **{name: functools.partial(text.load_text, name) for name in ("python_source", "tiny_shakespeare")},
    }
    if name.startswith("images:"):
        sets[name] = functools.partial(images.pictures, name)
    if name.startswith("text:"):
        sets[name] = functools.partial(text.load_text, name)
    if name not in sets:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(sets)}, images:FOLDER and text:FILE")
    known = inspect.signature(sets[name]).parameters
    downloaded = "folder" in known
    if folder is not None and not downloaded:
        raise ValueError(f"{name} needs no files, so it takes no folder")
    for option in options:
        if option not in known or option in ("split", "folder"):
            own = [p for p in known if p not in ("split", "folder")]
            flags = {"size": "images:FOLDER", "tokenizer": "text:FILE, python_source and tiny_shakespeare"}
            hint = f": --data.{option} is for {flags[option]}" if option in flags else ""
            raise ValueError(f"{name} has no option {option!r}; it takes {', '.join(own) or 'none'}{hint}")
    return sets[name](split, **({"folder": folder} if downloaded else {}), **options)
