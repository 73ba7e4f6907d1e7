"""Image sets: scikit-learn's digits, and downloaded sets through TFDS builders that need no TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import Data, from_arrays, from_source
from .prepare import cuts, prepared

# Larger sets of pictures are read while training instead of being held.
RESIDENT_BYTES = 2**31
PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm"
)  # fmt: skip
EMPTY, KNOWN = "without pictures in it", "linked to a folder that is read anyway"
# Folders that are read as splits, and what their slices may be called, whatever their capitals.
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
HIDDEN = "hidden or of the system"
# What file managers, archives, synchronisers and file systems leave: see _is_hidden.
SYSTEM = {
    "__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__", "_gsdata_",
    "network trash folder", "temporary items", "thumbnails", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip


def digits(split: str) -> Data:
    """Scikit-learn's 8x8 digits, 17 grey levels: the first 1,437 are train, the last 360 test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    image, label = bunch.images.astype(np.uint8)[..., None], bunch.target
    splits = {
        "train": {"image": image[:1437], "label": label[:1437]},
        "test": {"image": image[1437:], "label": label[1437:]},
    }
    return _cut("digits", split, {name: len(part["label"]) for name, part in splits.items()}, splits.get, levels=17)


def mnist(split: str, *, folder: str | None = None) -> Data:
    """MNIST, 28x28, 60,000 train and 10,000 test images, in the official order."""
    return _tfds("mnist", split, folder)


def fashion_mnist(split: str, *, folder: str | None = None) -> Data:
    """Fashion-MNIST, 28x28, 60,000 train and 10,000 test images; Debian's dataset-fashion-mnist is found by itself."""
    return _tfds("fashion_mnist", split, folder)


def cifar10(split: str, *, folder: str | None = None) -> Data:
    """CIFAR-10, 32x32 in colour, 50,000 train and 10,000 test images, in the official order."""
    return _tfds("cifar10", split, folder)


def pictures(
    name: str,
    split: str,
    *,
    folder: str | None = None,
    size: int | None = None,
    stream: bool | None = None,
    labels: bool = True,
) -> Data:
    """images:FOLDER, your own pictures; sub-folders are classes, in the order of their names.

    FOLDER holds the classes; or the pictures themselves, which then have no labels; or train/, validation/ (val/,
    valid/) and test/, as many as there are, each with the one or the other in it. Without these there is one split,
    train, in an order that depends on nothing but the files' names, so that its slices ("train[:90%]", "train[90%:]")
    hold all classes. Where all pictures are grey they have one channel, else three; what is transparent is put on
    white. Links to folders are followed. What is left out, and why, is said in one line on stderr.

    size: the short side of every picture is resized to so many pixels and the middle cut out, size x size; without it
        all pictures must have one size.
    stream: read pictures while training; by default where they would take more than 2 GiB. Each load reads every file
        once, to know the set again.
    labels: False takes every picture, wherever it lies, as one split, train, without labels.

    Raises ValueError, with the file's name, for what cannot be read as a picture.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"images: size must be a whole number of at least 1, got {size!r}")
    root, found, names, left = _found(name, folder, labels)
    own = re.sub(r"(?:(?<=\+)|^)\s*\w+", lambda word: _own_name(word.group(), found), split)
    chosen_cuts = cuts(name, own, {part: len(files) for part, files in found.items()})
    chosen = [found[part][i] for part, start, stop in chosen_cuts for i in range(start, stop)]
    if not chosen:
        raise ValueError(f"{name}: the split {split!r} is empty")
    every = [file for files in found.values() for file, _ in files]
    with warnings.catch_warnings():  # Pillow warns of what it reads all the same
        warnings.simplefilter("ignore")
        source = _Pictures(root, every, chosen, names, size)
        _say(_line(root, left, source.notes, names))
        given = {"size": size, "stream": stream, "labels": None if labels else False}
        info = {
            "classes": len(names) or None,
            "source": {"name": name, "split": split, **{key: v for key, v in given.items() if v is not None}},
            "fingerprint": source.fingerprint,
        }
        if stream if stream is not None else len(chosen) * np.prod(source.shape) > RESIDENT_BYTES:
            return from_source(source, **info)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            examples = list(pool.map(source.attempt, range(len(source))))
    if bad := [e for e in examples if isinstance(e, ValueError)]:
        raise ValueError(f"{bad[0]}{f'; so are {len(bad) - 1} more' if len(bad) > 1 else ''}")
    return from_arrays({key: np.stack([e[key] for e in examples]) for key in examples[0]}, **info)


def _own_name(word: str, splits: Iterable[str]) -> str:
    """The split that a word stands for (val: validation); the word itself where there is no such split."""
    meant = SPLITS.get(word.strip().lower())
    return meant if meant in splits else word


def picture_splits(name: str, *, folder: str | None = None) -> dict[str, int]:
    """{split: number of pictures} of images:FOLDER; opens no file."""
    return {part: len(files) for part, files in _found(name, folder)[1].items()}


def _found(name: str, folder: str | None, labels: bool = True):
    """The folder; {split: its (file, label), in their order for ever}; the names of the classes; {why: left out}.

    The label is 0 where there are no classes.
    """
    given = folder or name.removeprefix("images:")
    if not given:
        raise ValueError("images: name a folder, as in images:FOLDER")
    root = Path(os.path.expanduser(given))
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist: there is no folder of this name"
        raise FileNotFoundError(f"images: {_printable(root)} {what}")
    files, left = _walk(root)
    if not labels:
        return root, {"train": _mixed([(file, 0) for file in _some(root, files, left)])}, (), left
    of_top = defaultdict(list)
    for file in files:
        of_top[file.parts[len(root.parts)]].append(file)
    splits = {}
    for top in _folders(root):
        part = SPLITS.get(top.name.lower())
        if part and top.name in of_top:
            if part in splits:
                raise ValueError(f"images: {splits[part]} and {top} are both read as the split {part}: rename one")
            splits[part] = top
    beside = sorted(set(of_top) - {top.name for top in splits.values()})
    if splits and beside:
        raise ValueError(
            f"images: {_printable(root / beside[0])} lies beside {next(iter(splits.values()))}, which is read as a "
            "split: move it, or rename the other if that is a class"
        )
    found, classes = {}, {}
    if splits:
        left[EMPTY] += [top for top in _folders(root) if top.name not in of_top]
    for part in ("train", "validation", "test"):
        if part in splits:
            found[part], classes[part] = _listed(splits[part], of_top[splits[part].name], left)
    if not splits:
        found["train"], classes["train"] = _listed(root, files, left)
    if len(set(classes.values())) > 1:
        said = {part: ", ".join(_printable(Path(name)) for name in names) for part, names in classes.items()}
        told = "; ".join(f"{part}: {names or 'none'}" for part, names in said.items())
        raise ValueError(f"images: the splits of {_printable(root)} hold other classes: {told}")
    return root, found, next(iter(classes.values())), left


def _walk(root: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Every picture file below a folder in the order of names (bytes), and {why: what is left out}.

    Linked folders are read too, each folder once: links that lead back end.
    """
    found, left = [], defaultdict(list)
    known, folders, links = set(), [root], []
    while folders or links:
        at = folders.pop() if folders else links.pop(0)  # links last: a folder is read where it lies
        if (identity := (at.stat().st_dev, at.stat().st_ino)) in known:
            left[KNOWN].append(at)
            continue
        known.add(identity)
        for path in sorted(at.iterdir(), key=os.fsencode):
            if _is_hidden(path):
                left[HIDDEN].append(path)
            elif os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            elif not os.path.isfile(path):
                left["linked to nothing" if path.is_symlink() else "neither file nor folder"].append(path)
            elif path.suffix.lower() not in PICTURES:
                left["with another suffix than a picture's"].append(path)
            else:
                found.append(path)
    return sorted(found, key=lambda path: [os.fsencode(part) for part in path.parts]), left


def _is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden or of the system: Unix's, Windows', macOS's or a network drive's (@, #)."""
    name = path.name.lower()
    if name.startswith(".") or name in SYSTEM or re.fullmatch(r"found\.\d{3}", name):
        return True
    return name.startswith(("@", "#")) and os.path.isdir(path)


def _folders(root: Path) -> list[Path]:
    """The folders in a folder that may be classes or splits."""
    return sorted((p for p in root.iterdir() if os.path.isdir(p) and not _is_hidden(p)), key=os.fsencode)


def _listed(top: Path, files: list[Path], left: dict) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """The pictures of a split with their labels, in their order for ever, and the names of its classes."""
    inside, loose, depth = {p.name: [] for p in _folders(top)}, [], len(top.parts)
    for file in files:
        (inside[file.parts[depth]] if len(file.parts) > depth + 1 else loose).append(file)
    classes = {name: found for name, found in inside.items() if found}
    left[EMPTY] += [top / name for name, found in inside.items() if not found and top / name not in left[KNOWN]]
    if loose and classes:
        raise ValueError(
            f"images: {_printable(loose[0])} lies beside the class folder {_printable(top / next(iter(classes)))}: "
            "move one of them"
        )
    _some(top, files, left)
    if len(classes) == 1:
        [name] = classes
        nested = [p.name for p in (*_folders(top / name), top / name) if p.name.lower() in SPLITS]
        if nested:
            raise ValueError(
                f"images: {_printable(top)} holds nothing but {name}/, and {', '.join(nested)} is read as a split only "
                f"at the top: name the folder above it, as images:{top if name in nested else top / name}"
            )
        at, inner = _common(files)
        if at != top and len(inner) > 1:
            raise ValueError(
                f"images: {_printable(top)} holds nothing but {_printable(at.relative_to(top))}/, whose folders "
                f"{_printable(Path(inner[0]))}, {_printable(Path(inner[1]))}{', ...' * (len(inner) > 2)} would be one "
                f"class: for a class each, name images:{_printable(at)}"
            )
    labels = [(file, i) for i, found in enumerate(classes.values()) for file in found] or [(file, 0) for file in loose]
    return _mixed(labels), tuple(classes)


def _some(top: Path, files: list[Path], left: dict) -> list[Path]:
    """The files; ValueError where there are none."""
    if not files:
        besides = f"; {_left_out(top, left)}" if any(left.values()) else ""
        raise ValueError(f"images: {_printable(top)} holds no pictures ({', '.join(PICTURES)}){besides}")
    return files


def _mixed(examples: list) -> list:
    """The examples in their order for ever, which depends on nothing but how many there are."""
    bits = np.random.Philox(key=[0, 0]).random_raw(len(examples))
    return [examples[i] for i in np.argsort(bits, kind="stable")]


def _common(files: list[Path]) -> tuple[Path, list[str]]:
    """The lowest folder that holds all files, and its folders with some in them; none where it holds files itself."""
    at = Path(os.path.commonpath([file.parent for file in files]))
    inner = {file.parts[len(at.parts)]: None for file in files}
    return at, [] if any(file.parent == at for file in files) else list(inner)


def _printable(path: Path) -> str:
    """A path for a message of one line: names may hold line ends and bytes that are no text."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _left_out(root: Path, left: dict[str, list[Path]], word: str = "left out ") -> str:
    """How many files and folders, and why, with the names of some."""
    each = []
    for why, paths in left.items():
        names = [_printable(path.relative_to(root)) for path in paths[:3]] + ["..."] * (len(paths) > 3)
        each += [f"{len(paths)} {why} ({', '.join(names)})"] if paths else []
    return word + ", ".join(each)


def _line(root: Path, left: dict, notes: dict, classes: tuple[str, ...]) -> str:
    """What was left out, or taken otherwise than it is; empty: nothing."""
    said = [_left_out(root, left)] if any(left.values()) else []
    shift = [path for why in (KNOWN, HIDDEN) for path in left[why] if os.path.isdir(path) and _at_classes(root, path)]
    if classes and (left[EMPTY] or shift):
        numbered = [f"{i} {_printable(Path(name))}" for i, name in enumerate(classes[:10])]
        shown = ", ".join(numbered) + ", ..." * (len(classes) > 10)
        said.append(f"the classes are {shown}")
    said += [_left_out(root, {why: paths}, "") for why, paths in notes.items() if paths]
    return f"images: {_printable(root)}: {'; '.join(said)}" if said else ""


def _at_classes(root: Path, path: Path) -> bool:
    """Whether a folder lies where the classes do: at the top, or at the top of a split."""
    above = path.parent
    return above == root or (above.parent == root and above.name.lower() in SPLITS)


@functools.lru_cache(maxsize=1000)  # once: a run loads several slices of a folder
def _say(line: str) -> None:
    if line:
        print(line, file=sys.stderr)


class _Look(NamedTuple):
    """What the header of a picture file says."""

    size: tuple[int, int]  # width and height as one looks at it
    grey: bool
    turn: int  # EXIF's orientation, 1: as stored
    moves: bool  # it has more pictures than the first


def _look(file: Path) -> _Look | str:
    """What the header says, or why the file cannot be used."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith("I") or image.mode == "F":
                return f"has more than 8 bits a channel (mode {image.mode}): convert it"
            turn = _turn(image)
            moves = image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # an MPO is a JPEG with its preview
            return _Look(image.size[:: -1 if turn >= 5 else 1], image.mode in ("1", "L", "LA"), turn, moves)
    except Exception as e:  # readers of damaged files raise whatever they run into
        return _unreadable(file, e)


def _turn(image) -> int:
    """EXIF's orientation, 1..8; of odd EXIF 1, as stored."""
    # Pillow turns TIFF by itself, and would read a whole PNG in search of EXIF behind its pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # struct.error, SyntaxError, KeyError, ... by version
        return 1
    return int(turn) if turn in range(1, 9) else 1


def _unreadable(file: Path, e: Exception) -> str:
    from PIL import UnidentifiedImageError

    why = "it is of no known format" if isinstance(e, UnidentifiedImageError) else str(e) or type(e).__name__
    with contextlib.suppress(OSError):
        why = why if file.stat().st_size else "it is empty"
    return f"cannot be read as a picture ({' '.join(why.split())})"


def _copies(pool, files: list[Path]) -> list[Path]:
    """Files that are, byte for byte, one before them."""
    of_size = defaultdict(list)
    for file in files:
        of_size[file.stat().st_size].append(file)
    alike = [file for group in of_size.values() if len(group) > 1 for file in group]
    digests = pool.map(lambda file: hashlib.sha256(file.read_bytes()).digest(), alike)
    seen, found = set(), []
    for file, digest in zip(alike, digests, strict=True):
        (found.append(file) if digest in seen else seen.add(digest))
    return found


class _Pictures:
    """The chosen picture files as a random-access source; refuses what is no picture or has another size, by name.

    Size and channels are those of the whole folder, so that every slice of it has the same.
    """

    def __init__(self, root: Path, every: list[Path], chosen: list, classes: tuple[str, ...], size: int | None):
        self.chosen, self.classes, self.size = chosen, classes, size
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = dict(zip(every, pool.map(_look, every), strict=True))
            bad = {file: look for file, look in looks.items() if isinstance(look, str)}
            _refuse(bad)
            digests = list(pool.map(self._digest, chosen))
            copies = _copies(pool, every)
        if size is None:
            _one_size(root, {file: look.size for file, look in looks.items()})
        width, height = (size, size) if size else looks[every[0]].size
        self.turns = {file: look.turn for file, look in looks.items() if look.turn > 1}
        self.notes = {
            "of several frames, of which the first is used": [file for file, look in looks.items() if look.moves],
            "enlarged": [file for file, look in looks.items() if size and min(look.size) < size],
            "copied from another, kept": copies,
        }
        self.shape = (height, width, 1 if all(look.grey for look in looks.values()) else 3)
        self.fingerprint = hashlib.sha256(repr((self.shape, classes)).encode() + b"".join(digests)).hexdigest()

    def _digest(self, example: tuple[Path, int]) -> bytes:
        file, label = example
        return hashlib.sha256(label.to_bytes(4, "little") + file.read_bytes()).digest()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> dict:
        file, label = self.chosen[i]
        try:
            pixels = _pixels(file, self.turns.get(file, 1), self.shape[-1], self.size)
        except Exception as e:  # readers of damaged files raise whatever they run into
            raise ValueError(f"images: {_printable(file)} is damaged: it {_unreadable(file, e)}") from e
        example = {"image": pixels.reshape(*pixels.shape[:2], self.shape[-1])}
        return example | ({"label": np.int32(label)} if self.classes else {})

    def attempt(self, i: int) -> dict | ValueError:
        """Example i, or what is wrong with it."""
        try:
            return self[i]
        except ValueError as e:
            return e


def _pixels(file: Path, turn: int, channels: int, size: int | None) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3]: upright, on white, and with `size` resized to it on its short side and cut."""
    from PIL import Image, ImageOps

    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    with Image.open(file) as image:
        if turn > 1:
            image = image.transpose(Image.Transpose[turns[turn - 2]])
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


def _refuse(bad: dict[Path, str]) -> None:
    """One line for all files that cannot be used."""
    if bad:
        file, why = next(iter(bad.items()))
        more = [_printable(file) for file in list(bad)[1:4]] + ["..."] * (len(bad) > 4)
        also = f"; nor can {len(bad) - 1} more be used: {', '.join(more)}" if more else ""
        raise ValueError(f"images: {_printable(file)} {why}{also}")


def _one_size(root: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    """Refuses pictures of several sizes, two of them named."""
    first = next(iter(sizes))
    for file, size in sizes.items():
        if size != sizes[first]:
            (w, h), (w_0, h_0) = size, sizes[first]
            raise ValueError(
                f"images: {_printable(file)} has {w} x {h} pixels, {_printable(first)} has {w_0} x {h_0}, of "
                f"{len(set(sizes.values()))} sizes in {_printable(root)}: size=32 (--data.size 32) makes all of them "
                "32 x 32"
            )


def _cut(name: str, split: str, sizes: dict[str, int], read, *, levels: int) -> Data:
    """The examples that `split` names, out of whole splits."""
    pieces = [{key: a[start:stop] for key, a in read(s).items()} for s, start, stop in cuts(name, split, sizes)]
    arrays = {key: np.concatenate([p[key] for p in pieces]) for key in pieces[0]}
    if not len(arrays["image"]):
        raise ValueError(f"{name}: the split {split!r} is empty")
    return from_arrays(arrays, levels=levels, classes=10, source={"name": name, "split": split})


def _tfds(name: str, split: str, folder: str | None) -> Data:
    builder = prepared(name, folder)
    sizes = {s: info.num_examples for s, info in builder.info.splits.items()}
    return _cut(name, split, sizes, functools.partial(_read, str(builder.data_path)), levels=256)


@functools.lru_cache(maxsize=4)  # train and its validation slice come out of one reading
def _read(path: str, split: str) -> dict:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(path).as_data_source(split)
    examples = source.__getitems__(range(len(source)))
    return {
        "image": np.stack([e["image"] for e in examples]),
        "label": np.array([e["label"] for e in examples], np.int32),
    }
