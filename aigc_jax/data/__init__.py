"""Named data sets as batches: `load(name, split)`, or your own arrays through `from_arrays`.

Batch i is a pure function of (seed, i). A resumed run therefore needs no iterator state, and any
number of processes sees the same global batches. A set that fits in memory is `resident`: its
arrays are placed on the device once, and each step gathers its rows there.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Info:
    """Describes a data set. A run folder records it, and a Config's `check(info)` verifies it."""

    kind: str  # image | points | text | roll; decides how figures show a sample
    shape: tuple[int, ...]  # of one example; (H, W, C) for images
    levels: int | None = None  # images and tokens are whole numbers in 0..levels-1
    classes: int | None = None  # labels lie in 0..classes-1; None: there are no labels
    examples: int | None = None  # number of examples; None: endless
    # Name, split and options. It holds no folder, except within images:FOLDER, pairs:FOLDER and
    # text:FILE.
    # None: the set was made from arrays.
    source: dict[str, Any] | None = None
    fingerprint: str = ""  # sha256 of arrays and tokenizer; of `source` for an endless set
    # Content for `data.text.Tokenizer(content)`, where the set is text or has captions.
    tokenizer: str = ""
    bytes_per_token: float | None = None  # UTF-8 bytes, where the set is text
    class_names: tuple[str, ...] = ()  # name of each label, where they have names
    title_length: int | None = None  # so many first tokens of a text are its title, padded with 0
    # Images with captions have `tokens` [B, caption_length], padded with 0; see `captions.py`.
    caption_length: int | None = None
    caption_vocab: int | None = None  # tokens of captions are whole numbers in 0..caption_vocab-1
    context: tuple[int, int] | None = None  # (L, E) of the `context` [B, L, E] of each example
    # Of two sets side by side, the shape of an example of the second one, and whether row i of both
    # belongs together; see `pair`.
    other: tuple[int, ...] | None = None
    aligned: bool | None = None


class Data(NamedTuple):
    """A data set.

    batch: `batch(seed, i, size)` returns a dict of host arrays with B = `size` rows. It holds one
        of these:
        - image uint8 [B, H, W, C], and with captions also tokens int32 [B, L], padded with 0;
        - points float32 [B, d], or latents float32 [B, h, w, c] under the same name, and with
          either also context float32 [B, L, E];
        - tokens int32 [B, T+1];
        - roll uint8 [B, T, 88].
        With image or points there may be `other`, the same of a second set. There may be label
        int32 [B]; index int32 [B] for finite sets; and mask float32 [B, T] with tokens and roll,
        which is 1 where a position counts.
    part: None, or `part(seed, i, size, rows)`, which returns these rows of that batch and reads no
        others: each of several processes reads its own.
    resident: None, or (arrays, rows, take) for a set that fits in memory. `rows(seed, i, size)`
        returns on the host which examples make up a batch, int32 [size]; of two sets side by side
        [size, 2]. `take(arrays, rows)` returns the batch and can be jitted. `batch` is `take`
        applied to `rows`.
    """

    info: Info
    batch: Callable[[int, int, int], dict]
    resident: tuple | None = None
    part: Callable[[int, int, int, np.ndarray], dict] | None = None


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    # Raw Philox bits and a stable sort give the same order in every version of numpy.
    # Generator.permutation does not promise that.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int32)


def order(n: int, seed: int, i: int, size: int) -> np.ndarray:
    """Returns the rows of batch i, int32 [size], for a set of n examples.

    Each epoch is a permutation of its own. The epochs are laid end to end and then cut into
    batches. So each epoch shows every example once, and no batch is short: a batch at the
    border takes rows from both epochs.
    """
    pieces, position = [], i * size
    while size:
        epoch, offset = divmod(position, n)
        piece = _permutation(seed, epoch, n)[offset : offset + size]
        pieces.append(piece)
        position, size = position + len(piece), size - len(piece)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def _gather(arrays: dict, rows) -> dict:
    return {**{name: a[rows] for name, a in arrays.items()}, "index": rows}


# --------------------------------------------------------------------------------- your own arrays


def from_arrays(
    arrays: dict,
    *,
    levels: int = 256,
    classes: int | None = None,
    class_names: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
    source: dict | None = None,
    fingerprint: str | None = None,
) -> Data:
    """Makes a finite data set from arrays in memory.

    arrays: exactly one of "image" uint8 [N, H, W, C], "points" float [N, d], "tokens" int
        [N, T+1] and "roll" [N, T, keys] of 0 and 1. With it optionally "label" int [N]; with
        tokens and roll also "mask" [N, T], which is 1 where a position counts. With image also
        captions, "tokens" int [N, L] padded with 0. Points may be latents [N, h, w, c]; with them
        also "context" float [N, L, E], which a model attends to.
    levels: images and tokens are whole numbers in 0..levels-1; tokens of captions are not bound.
    classes: number of classes; the largest label + 1 by default.
    class_names: the name of each class.
    tokenizer: the tokenizer of words that made the captions; see `captions.encode`.
    fingerprint: identifies the set; by default the sha256 of the arrays and, with captions, of
        their tokenizer.

    Raises ValueError for anything that does not fit this description, and for images that look
    like PyTorch's [N, C, H, W]. Those are:
    - [N, 1 or 3, H, W], unless W is 1 or 3, which are taken as channels. If H = W = 1 or 3 too,
      axis 1 must be as long as they are;
    - [N, 4, S, S] with S above 4.
    """
    kind = _kind_of(arrays)
    arrays = _checked_arrays(kind, arrays, levels)
    n, shape = len(arrays[kind]), arrays[kind].shape[1:]
    if "label" in arrays:
        arrays["label"], classes = _checked_labels(arrays["label"], n, classes)
        if class_names and len(class_names) != classes:
            raise ValueError(f"there are {classes} classes, but {len(class_names)} class_names")
    captions = {}
    if kind == "image" and "tokens" in arrays:
        arrays["tokens"], captions = _checked_captions(arrays["tokens"], n, tokenizer)
    info = Info(
        kind="text" if kind == "tokens" else kind,
        shape=shape,
        levels=levels if kind in ("image", "tokens") else None,
        classes=classes if "label" in arrays else None,
        class_names=class_names if "label" in arrays else (),
        examples=n,
        source=source,
        fingerprint=fingerprint or _digest(arrays, captions.get("tokenizer", "")),
        context=arrays["context"].shape[1:] if "context" in arrays else None,
        **captions,
    )
    rows = functools.partial(order, n)
    resident = (arrays, rows, _gather)
    return Data(info, lambda seed, i, size: _gather(arrays, rows(seed, i, size)), resident)


def _kind_of(arrays: dict) -> str:
    """Returns which of the four kinds the arrays are; refuses names that do not belong to it."""
    kinds = [kind for kind in ("image", "points", "tokens", "roll") if kind in arrays]
    if kinds == ["image", "tokens"]:  # pictures with captions
        kinds = ["image"]
    if len(kinds) != 1:
        given = ", ".join(arrays) or "nothing"
        raise ValueError(f"arrays must hold one of image, points, tokens, roll, got {given}")
    [kind] = kinds
    optional = {
        "image": ("label", "tokens"),
        "points": ("label", "context"),
        "tokens": ("label", "mask"),
        "roll": ("label", "mask"),
    }[kind]
    if unknown := sorted(set(arrays) - {kind, *optional}):
        names = " and ".join(optional)
        raise ValueError(f"with {kind}, arrays may hold {names} only, got {', '.join(unknown)}")
    return kind


def _checked_arrays(kind: str, arrays: dict, levels: int) -> dict[str, np.ndarray]:
    """Returns the arrays in their types, without a check of labels and captions."""
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    x = arrays[kind]
    n = len(x)
    if n == 0:
        raise ValueError("a data set needs at least one example")
    if kind == "image":
        _check_images(x, levels)
    elif kind == "tokens":
        arrays[kind] = _checked_tokens(x, levels)
    elif kind == "roll":
        arrays[kind] = _checked_roll(x)
        arrays.setdefault("mask", np.ones(x.shape[:2]))
    else:
        arrays[kind] = _checked_points(x)
    if "mask" in arrays:
        positions = x.shape[1] - (kind == "tokens")
        arrays["mask"] = _checked_mask(arrays["mask"], (n, positions))
    if "context" in arrays:
        arrays["context"] = _checked_context(arrays["context"], n)
    return arrays


def _check_images(x: np.ndarray, levels: int) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or _channels_first(x.shape):
        shape = list(x.shape)
        raise ValueError(f"image must be uint8 [N, H, W, C], got {x.dtype} {shape}{_advice(x)}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must lie in 2..256, got {levels}")
    if x.max() >= levels:
        allowed = f"levels={levels} (0..{levels - 1})"
        raise ValueError(f"an image value of {x.max()} does not fit {allowed}")


def _checked_tokens(x: np.ndarray, levels: int) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] < 2 or not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"tokens must be whole numbers [N, T+1], got {x.dtype} {list(x.shape)}")
    low, high = x.min(), x.max()
    if low < 0 or high >= levels:
        allowed = f"0..{levels - 1} (levels={levels})"
        raise ValueError(f"tokens must lie in {allowed}, got {low}..{high}")
    return x.astype(np.int32)


def _checked_roll(x: np.ndarray) -> np.ndarray:
    if x.ndim != 3 or not np.isin(x, (0, 1)).all():
        raise ValueError(f"roll must be 0 or 1 [N, T, keys], got {x.dtype} {list(x.shape)}")
    return x.astype(np.uint8)


def _checked_points(x: np.ndarray) -> np.ndarray:
    if x.ndim < 2 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"points must be floats [N, d, ...], got {x.dtype} {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError("points hold values that are not finite")
    return x.astype(np.float32)


def _checked_context(context: np.ndarray, n: int) -> np.ndarray:
    if context.ndim != 3 or len(context) != n or not np.issubdtype(context.dtype, np.floating):
        got = f"{context.dtype} {list(context.shape)}"
        raise ValueError(f"context must be floats [{n}, L, E], got {got}")
    if not np.isfinite(context).all():
        raise ValueError("context holds values that are not finite")
    return context.astype(np.float32)


def _checked_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"mask must be 0 or 1 {list(shape)}, got {got}")
    return mask.astype(np.float32)


def _checked_labels(label: np.ndarray, n: int, classes: int | None) -> tuple[np.ndarray, int]:
    """Returns the labels as int32 [n], and how many classes there are."""
    if label.shape != (n,) or not np.issubdtype(label.dtype, np.integer):
        got = f"{label.dtype} {list(label.shape)}"
        raise ValueError(f"label must be whole numbers [{n}], got {got}")
    low, high = label.min(), label.max()
    classes = classes or int(high) + 1
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {low}..{high}")
    return label.astype(np.int32), classes


def _checked_captions(
    tokens: np.ndarray,
    n: int,
    tokenizer: Tokenizer | None,
) -> tuple[np.ndarray, dict]:
    """Returns captions as int32 [n, L], and the fields of Info that describe them."""
    whole = np.issubdtype(tokens.dtype, np.integer)
    if tokens.ndim != 2 or len(tokens) != n or not tokens.shape[1] or not whole:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"tokens of captions must be whole numbers [{n}, L], got {got}")
    vocab = tokenizer.size if tokenizer else int(tokens.max()) + 1
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= vocab:
        raise ValueError(f"tokens of captions must lie in 0..{vocab - 1}, got {low}..{high}")
    return tokens.astype(np.int32), {
        "tokenizer": tokenizer.content if tokenizer else "",
        "caption_length": tokens.shape[1],
        "caption_vocab": vocab,
    }


def _channels_first(shape: tuple[int, ...]) -> bool:
    """Returns whether images look like PyTorch's [N, C, H, W]; `from_arrays` states the rule."""
    if len(shape) != 4:
        return False
    _, first, second, last = shape
    if first in (1, 3):
        return last not in (1, 3) or (second == last != first)
    return first == 4 < second == last


def _advice(x: np.ndarray) -> str:
    """Returns how to turn these images into uint8 [N, H, W, C], as the end of a message."""
    steps = []
    if _channels_first(x.shape):
        steps.append("channels come last: x.transpose(0, 2, 3, 1)")
    if x.ndim == 3:
        steps.append("add the axis of a single channel: x[..., None]")
    if np.issubdtype(x.dtype, np.floating):
        steps.append("convert floats in [0, 1]: (x * 255).round().astype(np.uint8)")
    return f"; {'; '.join(steps)}" if steps else ""


def _digest(arrays: dict, tokenizer: str = "") -> str:
    """Returns the sha256 of arrays and, with captions, of their tokenizer's content."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    digest.update(tokenizer.encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------- two sets side by side


def pair(a: Data, b: Data, *, aligned: bool = False, source: dict | None = None) -> Data:
    """Puts two sets side by side: a batch has `image` (or `points`) of a, and `other` of b.

    aligned: row i of a batch is example i of both sets. Otherwise each set has an order of its own,
        and an epoch of its own length; such pairs are unpaired data. Scores of them count as many
        examples of each set as the smaller one has, each at most once.

    Labels, captions and masks are left out. Raises ValueError for sets of different kinds or
    levels, for sets that are not in memory, for a pair of pairs, and for aligned sets of unequal
    numbers of examples.
    """
    kind = _checked_pair(a, b)
    sizes = (a.info.examples, b.info.examples)
    if aligned and sizes[0] != sizes[1]:
        raise ValueError(f"aligned sets need equally many examples, got {sizes[0]} and {sizes[1]}")
    arrays = {kind: a.resident[0][kind], "other": b.resident[0][kind]}

    def rows(seed, i, size):  # [size, 2]
        own = order(sizes[0], seed, i, size)
        # A seed of its own: else two sets of equal size would be aligned.
        return np.stack([own, own if aligned else order(sizes[1], seed + 2**32, i, size)], -1)

    def take(arrays, rows):
        first, second = rows[..., 0], rows[..., 1]
        return {kind: arrays[kind][first], "other": arrays["other"][second], "index": first}

    prints = f"{a.info.fingerprint} {b.info.fingerprint} {aligned}"
    info = Info(
        kind=kind,
        shape=a.info.shape,
        other=b.info.shape,
        aligned=aligned,
        levels=a.info.levels,
        examples=min(sizes),
        source=source,
        fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
    )
    return Data(info, lambda seed, i, size: take(arrays, rows(seed, i, size)), (arrays, rows, take))


def _checked_pair(a: Data, b: Data) -> str:
    """Returns the kind of two sets; raises ValueError where they cannot stand side by side."""
    names = [(one.info.source or {}).get("name", "arrays") for one in (a, b)]
    for one, name in zip((a, b), names, strict=True):
        if one.info.kind not in ("image", "points") or one.info.other is not None:
            found = "a pair" if one.info.other is not None else one.info.kind
            raise ValueError(f"pair needs two sets of images or of points, but {name} is {found}")
        if one.info.examples is None:
            raise ValueError(f"pair needs finite sets, but {name} is endless: pass examples=N")
        if one.resident is None:
            raise ValueError(
                f"pair needs sets in memory, but {name} is read while training: pass stream=False, "
                "or a smaller size"
            )
    if a.info.kind != b.info.kind:
        kinds = f"{names[0]} is {a.info.kind} and {names[1]} {b.info.kind}"
        raise ValueError(f"pair needs two sets of one kind, but {kinds}")
    if a.info.levels != b.info.levels:
        levels = f"{a.info.levels} ({names[0]}) and {b.info.levels} ({names[1]})"
        raise ValueError(f"pair needs two sets of the same levels, got {levels}")
    return a.info.kind


def _load_pair(split: str, *, first: Any = None, second: Any = None, aligned: Any = False) -> Data:
    """Loads the same split of two named sets as a pair."""
    for which, one in (("first", first), ("second", second)):
        named = isinstance(one, dict) and isinstance(one.get("name"), str) and "split" not in one
        if not named:
            needs = "a dictionary of a set's name and options, such as {'name': 'images:FOLDER'}"
            raise ValueError(f"pair needs {which}, {needs}; got {one!r}")
    if not isinstance(aligned, bool):
        raise ValueError(f"aligned must be True or False, got {aligned!r}")
    sets = [load(split=split, **one) for one in (first, second)]
    source = {"name": "pair", "split": split, "first": first, "second": second, "aligned": aligned}
    return pair(*sets, aligned=aligned, source=source)


# ----------------------------------------------------------------------------- read while training


def from_source(
    examples,
    *,
    levels: int = 256,
    classes: int | None = None,
    class_names: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
    source: dict | None = None,
    fingerprint: str | None = None,
) -> Data:
    """Makes a finite set of images that are read one by one, so it need not fit in memory.

    The order of examples is the same as in `from_arrays`. `fit` reads ahead in threads.

    examples: has `len(examples)` and `examples[i] -> {"image": uint8 [H, W, C], "label": int}`,
        as the data sources of grain and TFDS do. It is read in any order, from any thread. With
        captions an example also has "tokens" int [L], as in `from_arrays`.
    classes: number of classes; needed if there are labels.
    class_names: the name of each class.
    tokenizer: the tokenizer of words that made the captions; needed if there are any.
    fingerprint: identifies the set. By default it is a sha256 of the number of examples, of 64
        examples at even distances and, with captions, of their tokenizer.

    Raises ValueError for an example that does not fit this description: at once for the first
    example, for the others when they are read.
    """
    n = len(examples)
    if n == 0:
        raise ValueError("a data set needs at least one example")
    first = examples[0]
    if "image" not in first:
        raise ValueError(f"examples must hold 'image', got {', '.join(first) or 'nothing'}")
    names = [name for name in ("image", "label", "tokens") if name in first]
    if "label" in names and classes is None:
        raise ValueError("from_source needs to be told how many classes there are: pass classes=")
    if "tokens" in names and tokenizer is None:
        raise ValueError("from_source needs the tokenizer of the captions: pass tokenizer=")
    about = {
        "levels": levels,
        "classes": classes,
        "class_names": class_names,
        "tokenizer": tokenizer,
    }

    def read(rows) -> dict:
        arrays = _read_examples(examples, {name: np.shape(first[name]) for name in names}, rows)
        return from_arrays(arrays, **about, fingerprint="of a batch").resident[0]

    info = from_arrays(read([0]), **about).info
    if fingerprint is None:
        some = read(np.linspace(0, n - 1, min(n, 64)).astype(int))
        fingerprint = hashlib.sha256(f"{n} {_digest(some, info.tokenizer)}".encode()).hexdigest()

    def part(seed, i, size, rows):
        index = order(n, seed, i, size)[rows]
        return {**read(index), "index": index}

    info = replace(info, examples=n, source=source, fingerprint=fingerprint)
    return Data(info, lambda *which: part(*which, slice(None)), part=part)


def _read_examples(examples, shapes: dict[str, tuple[int, ...]], rows) -> dict:
    """Returns some examples as arrays; raises ValueError unless they have the fields `shapes`."""
    found = [examples[int(row)] for row in rows]
    for row, example in zip(rows, found, strict=True):
        for name, shape in shapes.items():
            if name not in example:
                raise ValueError(f"example {row} has no {name}, example 0 has one")
            if np.shape(example[name]) != shape:
                raise ValueError(f"{name} {row} is {np.shape(example[name])}, {name} 0 is {shape}")
    return {name: np.stack([example[name] for example in found]) for name in shapes}


def endless(draw: Callable, shape: tuple[int, ...], source: dict) -> Data:
    """Makes a set of points in which every batch is drawn afresh.

    draw: `draw(rng, size)` returns float [size, d], where rng is a numpy Generator.
    source: holds at least "split". Splits of different names draw different points.
    """
    stream = int(hashlib.sha256(source["split"].encode()).hexdigest()[:16], 16)

    def batch(seed, i, size):
        bits = np.random.Philox(key=[seed, stream], counter=[0, 0, i, 0])
        return {"points": draw(np.random.Generator(bits), size).astype(np.float32)}

    fingerprint = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    return Data(Info(kind="points", shape=shape, source=source, fingerprint=fingerprint), batch)


# -------------------------------------------------------------------------------------- named sets


def load(name: str, split: str = "train", *, folder: str | None = None, **options) -> Data:
    """Loads a named data set.

    name: digits, mnist, fashion_mnist, cifar10; emoji, emoji_google, emoji_twitter, emoji_pair;
        ring, grid, swiss_roll, ppca; python_source, tiny_shakespeare, tang_poems; jsb_chorales;
        images:FOLDER, pairs:FOLDER and text:FILE for your own data; pair for two of these sets.
    split: train or test, or slices as in TFDS: "train[:50000]", "train[90%:]", "train+test".
        Synthetic sets take any name, and each name draws other points. Text is divided into
        train and validation, as are emoji_google, emoji_twitter and emoji_pair. emoji has train,
        test and unseen; see `emoji.emoji`. jsb_chorales and tang_poems have train, validation
        and test; see `tang.tang_poems`. For images:FOLDER see
        `pictures.load_pictures`, for pairs:FOLDER `pairs.load_pairs`.
    folder: where the original files of a downloaded set lie. Without it the set is sought in
        AIGC_DATA/<name>, then among prepared copies, then on the network. Files are recognised
        by checksum, under any name. For your own data it replaces FOLDER or FILE.
    options: those of the set: std, examples and others for synthetic sets; length, stride and
        tokenizer for text; form for tang_poems; size, stream and labels for images:FOLDER and
        pairs:FOLDER; length and tokenizer for pairs:FOLDER; aligned for emoji_pair and pair; for
        pair also first and second, each a dictionary of a name and its options.

    Raises ValueError for an unknown name, split or option and for a wrong file, and
    FileNotFoundError if files are missing.
    """
    make = _function_of(name)
    accepted = inspect.signature(make).parameters
    _check_options(name, accepted, folder, options)
    if "folder" in accepted:
        options["folder"] = folder
    return make(split, **options)


def _function_of(name: str) -> Callable[..., Data]:
    """Returns the function that loads the set: `function(split, **options)`."""
    from . import emoji, emoji_pair, images, music, pairs, pictures, points, tang, text

    functions = {
        "digits": images.digits,
        "mnist": images.mnist,
        "fashion_mnist": images.fashion_mnist,
        "cifar10": images.cifar10,
        "emoji": emoji.emoji,
        "emoji_google": emoji_pair.emoji_google,
        "emoji_twitter": emoji_pair.emoji_twitter,
        "emoji_pair": emoji_pair.emoji_pair,
        "pair": _load_pair,
        "ring": points.ring,
        "grid": points.grid,
        "swiss_roll": points.swiss_roll,
        "ppca": points.ppca,
        "jsb_chorales": music.jsb_chorales,
        "tang_poems": tang.tang_poems,
        "python_source": functools.partial(text.load_text, "python_source"),
        "tiny_shakespeare": functools.partial(text.load_text, "tiny_shakespeare"),
    }
    if name.startswith("images:"):
        return functools.partial(pictures.load_pictures, name)
    if name.startswith("pairs:"):
        return functools.partial(pairs.load_pairs, name)
    if name.startswith("text:"):
        return functools.partial(text.load_text, name)
    if name not in functions:
        known = f"{', '.join(functions)}, images:FOLDER, pairs:FOLDER and text:FILE"
        raise ValueError(f"unknown data set {name!r}; there are {known}")
    return functions[name]


def _check_options(name: str, accepted, folder: str | None, options: dict) -> None:
    """Refuses options that the set does not have, and a folder for a set without files."""
    if folder is not None and "folder" not in accepted:
        raise ValueError(f"{name} needs no files, so it takes no folder")
    own = [option for option in accepted if option not in ("split", "folder")]
    flags = {
        "size": "images:FOLDER and pairs:FOLDER",
        "tokenizer": "text:FILE, pairs:FOLDER, python_source and tiny_shakespeare",
    }
    for option in options:
        if option not in own:
            takes = f"it takes {', '.join(own) or 'none'}"
            hint = f": --data.{option} is for {flags[option]}" if option in flags else ""
            raise ValueError(f"{name} has no option {option!r}; {takes}{hint}")
