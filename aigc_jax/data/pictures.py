"""Your own pictures: `images:FOLDER`.

From top to bottom: the data set, and how one file is read. `picture_folder.py` finds the files and
their classes, `pairs.py` their captions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import Data, from_arrays, from_source
from .picture_folder import (
    SPLITS,
    Example,
    Listing,
    list_folder,
    print_once,
    printable,
    root_of,
    summary,
    walk,
)
from .prepare import cuts
from .tokenizer import Tokenizer

# Larger sets are read while training instead of being held in memory.
RESIDENT_BYTES = 2**31


def load_pictures(
    name: str,
    split: str,
    *,
    folder: str | None = None,
    size: int | None = None,
    stream: bool | None = None,
    labels: bool = True,
) -> Data:
    """Loads images:FOLDER, your own pictures.

    FOLDER holds one sub-folder per class, labelled in the order of their names. Or it holds the
    pictures themselves, which then have no labels. Or it holds train/, validation/ (also val/ or
    valid/) and test/, or some of these, each laid out in one of the first two ways.

    Without train/ and the others there is one split, train, whose order mixes the classes. So
    slices such as "train[:90%]" and "train[90%:]" hold all classes. The order depends only on the
    names of the files.

    Pictures have one channel if all pictures of the folder are grey, else three. Transparent areas
    become white. Links to folders are followed. One line on stderr says what is left out, and why.

    size: scales the short side of every picture to this many pixels and crops the middle,
        size x size. Without it all pictures must have the same size.
    stream: reads pictures while training; by default if they would take more than 2 GiB. Every
        file is still read once at loading, for the fingerprint.
    labels: False takes every picture, in any sub-folder, as the split train without labels.

    Raises ValueError, with the file's name, for a file that cannot be read as a picture.
    """
    check_size("images", size)
    root = root_of(name, folder)
    listing = list_folder("images", root, *walk(root), labels)
    chosen = select(name, split, listing.splits)
    options = {"size": size, "stream": stream, "labels": None if labels else False}
    given = {option: value for option, value in options.items() if value is not None}
    return read_pictures(
        listing,
        chosen,
        {"name": name, "split": split, **given},
        size=size,
        stream=stream,
    )


def check_size(kind: str, size: int | None) -> None:
    """Raises ValueError for a size that no picture can have."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"{kind}: size must be a whole number of at least 1, got {size!r}")


def read_pictures(
    listing: Listing,
    chosen: list[Example],
    source: dict,
    *,
    size: int | None,
    stream: bool | None,
    tokens: np.ndarray | None = None,
    tokenizer: Tokenizer | None = None,
    notes: dict[str, list] | None = None,
) -> Data:
    """Makes a data set from the chosen pictures of a folder, and prints the line about it.

    tokens: the captions of the chosen pictures, int32 [N, L], which `tokenizer` made.
    notes: {what was changed: files or words}, for the line.
    """
    with warnings.catch_warnings():  # Pillow warns about files that it reads all the same
        warnings.simplefilter("ignore")
        pictures = PictureSource(listing, chosen, size, tokens)
        print_once(summary(listing, {**pictures.notes, **(notes or {})}))
        fingerprint = pictures.fingerprint
        if tokenizer:
            both = fingerprint.encode() + tokens.tobytes() + tokenizer.content.encode()
            fingerprint = hashlib.sha256(both).hexdigest()
        info = {
            "classes": len(listing.classes) or None,
            "class_names": listing.classes,
            "tokenizer": tokenizer,
            "source": source,
            "fingerprint": fingerprint,
        }
        if stream is None:
            stream = len(chosen) * np.prod(pictures.shape) > RESIDENT_BYTES
        if stream:
            return from_source(pictures, **info)
        arrays = pictures.read_all()
    return from_arrays(arrays, **info)


def picture_splits(name: str, *, folder: str | None = None) -> dict[str, int]:
    """Returns {split: number of pictures} of images:FOLDER, without opening a file."""
    root = root_of(name, folder)
    splits = list_folder("images", root, *walk(root)).splits
    return {part: len(examples) for part, examples in splits.items()}


def select(name: str, split: str, splits: dict[str, list[Example]]) -> list[Example]:
    """Returns the examples that `split` names; "val[:9]" may stand for "validation[:9]"."""

    def own_name(word: re.Match) -> str:
        meant = SPLITS.get(word.group().strip().lower())
        return meant if meant in splits else word.group()

    spec = re.sub(r"(?:(?<=\+)|^)\s*\w+", own_name, split)
    slices = cuts(name, spec, {part: len(examples) for part, examples in splits.items()})
    chosen = [example for part, start, stop in slices for example in splits[part][start:stop]]
    if not chosen:
        raise ValueError(f"{name}: the split {split!r} is empty")
    return chosen


# ----------------------------------------------------------------------------------------- reading


class PictureHeader(NamedTuple):
    """The header of a picture file."""

    size: tuple[int, int]  # width and height after turning the picture upright
    grey: bool
    orientation: int  # of EXIF, 1..8; 1: upright as stored
    animated: bool  # has further frames


def _read_header(file: Path) -> PictureHeader | str:
    """Returns the header, or why the file cannot be used."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith("I") or image.mode == "F":
                mode = f"more than 8 bits per channel (mode {image.mode})"
                return f"has {mode}: convert it to 8 bits"
            orientation = _orientation(image)
            sideways = orientation >= 5  # these four exchange width and height
            return PictureHeader(
                size=image.size[:: -1 if sideways else 1],
                grey=image.mode in ("1", "L", "LA"),
                orientation=orientation,
                # An MPO is a JPEG whose second frame is its preview.
                animated=image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
            )
    except Exception as e:  # Pillow raises many types for damaged files
        return _why_unreadable(file, e)


def _orientation(image) -> int:
    """Returns EXIF's orientation, 1..8; 1 (as stored) if it is missing or invalid."""
    # Pillow turns a TIFF by itself. In a PNG it would read all pixels to find EXIF after them.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # struct.error, SyntaxError, KeyError and others, depending on the version
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def _why_unreadable(file: Path, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    why = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        why = "its format is unknown"
    with contextlib.suppress(OSError):
        why = why if file.stat().st_size else "it is empty"
    return f"cannot be read as a picture ({' '.join(why.split())})"


def _copies(pool, files: list[Path]) -> list[Path]:
    """Returns the files that equal an earlier one, byte for byte."""
    by_size = defaultdict(list)
    for file in files:
        by_size[file.stat().st_size].append(file)
    candidates = [file for group in by_size.values() if len(group) > 1 for file in group]
    digests = pool.map(lambda file: hashlib.sha256(file.read_bytes()).digest(), candidates)
    seen, copies = set(), []
    for file, digest in zip(candidates, digests, strict=True):
        (copies.append(file) if digest in seen else seen.add(digest))
    return copies


class PictureSource:
    """The chosen pictures as a random-access source for `from_source`.

    Size and channels are those of the whole folder, so that every slice of it has the same.
    Raises ValueError with the names of files that are no pictures or differ in size.
    """

    def __init__(
        self,
        listing: Listing,
        chosen: list[Example],
        size: int | None,
        tokens: np.ndarray | None = None,
    ):
        self.kind, self.classes = listing.kind, listing.classes
        self.chosen, self.size, self.tokens = chosen, size, tokens
        every = [file for examples in listing.splits.values() for file, _ in examples]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            headers = dict(zip(every, pool.map(_read_header, every), strict=True))
            _refuse(self.kind, {file: why for file, why in headers.items() if isinstance(why, str)})
            digests = list(pool.map(self._digest, chosen))
            copies = _copies(pool, every)
        if size is None:
            _check_one_size(listing, {file: header.size for file, header in headers.items()})
        width, height = (size, size) if size else headers[every[0]].size
        self.shape = (height, width, 1 if all(h.grey for h in headers.values()) else 3)
        turned = {file: h.orientation for file, h in headers.items() if h.orientation > 1}
        self.orientations = turned
        animated = [file for file, h in headers.items() if h.animated]
        self.notes = {
            "pictures with several frames, of which the first is used": animated,
            "enlarged pictures": [f for f, h in headers.items() if size and min(h.size) < size],
            "copies of other files, which are kept": copies,
        }
        layout = repr((self.shape, listing.classes)).encode()
        self.fingerprint = hashlib.sha256(layout + b"".join(digests)).hexdigest()

    def _digest(self, example: Example) -> bytes:
        file, label = example
        return hashlib.sha256(label.to_bytes(4, "little") + file.read_bytes()).digest()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> dict:
        file, label = self.chosen[i]
        channels = self.shape[-1]
        try:
            pixels = _read_pixels(file, self.orientations.get(file, 1), channels, self.size)
        except Exception as e:  # Pillow raises many types for damaged files
            why = _why_unreadable(file, e)
            raise ValueError(f"{self.kind}: {printable(file)} is damaged: it {why}") from e
        example = {"image": pixels.reshape(*pixels.shape[:2], channels)}
        if self.classes:
            example["label"] = np.int32(label)
        if self.tokens is not None:
            example["tokens"] = self.tokens[i]
        return example

    def read_all(self) -> dict[str, np.ndarray]:
        """Returns all examples as arrays; raises ValueError that counts the damaged files."""

        def read_or_error(i: int) -> dict | ValueError:
            try:
                return self[i]
            except ValueError as e:
                return e

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            examples = list(pool.map(read_or_error, range(len(self))))
        if errors := [e for e in examples if isinstance(e, ValueError)]:
            more = f"; so are {len(errors) - 1} more" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0]}{more}")
        return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _read_pixels(file: Path, orientation: int, channels: int, size: int | None) -> np.ndarray:
    """Reads a picture as uint8 [H, W] or [H, W, 3].

    It is turned upright, put on white where it is transparent and, given `size`, scaled on its
    short side and cropped to the middle.
    """
    from PIL import Image, ImageOps

    # For EXIF's orientations 2..8.
    turns = (
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_270",
        "TRANSVERSE",
        "ROTATE_90",
    )
    with Image.open(file) as image:
        if orientation > 1:
            image = image.transpose(Image.Transpose[turns[orientation - 2]])
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


def _refuse(kind: str, unusable: dict[Path, str]) -> None:
    """Raises one ValueError for all files that cannot be used: {file: why}."""
    if unusable:
        file, why = next(iter(unusable.items()))
        more = [printable(file) for file in list(unusable)[1:4]]
        more += ["..."] * (len(unusable) > 4)
        also = f"; {len(unusable) - 1} more cannot be used: {', '.join(more)}" if more else ""
        raise ValueError(f"{kind}: {printable(file)} {why}{also}")


def _check_one_size(listing: Listing, sizes: dict[Path, tuple[int, int]]) -> None:
    """Raises ValueError that names two of the files if the pictures have several sizes."""
    first = next(iter(sizes))
    for file, size in sizes.items():
        if size != sizes[first]:
            (w, h), (w_0, h_0) = size, sizes[first]
            raise ValueError(
                f"{listing.kind}: {printable(file)} has {w} x {h} pixels, {printable(first)} has "
                f"{w_0} x {h_0}; {printable(listing.root)} holds {len(set(sizes.values()))} "
                "sizes. Pass size=32 (--data.size 32) to make all pictures 32 x 32",
            )
