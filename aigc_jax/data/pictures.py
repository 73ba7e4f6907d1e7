"""Your own pictures: `images:FOLDER`.

From top to bottom: the data set, its splits and classes, the walk through the folder, messages,
and how one file is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import Data, from_arrays, from_source
from .prepare import cuts

# Larger sets are read while training instead of being held in memory.
RESIDENT_BYTES = 2**31
SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .bmp .gif .webp .tif .tiff .pbm .pgm .ppm .pnm".split(),
)
# Names of folders and of slices in lower case -> the split that they stand for.
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
# Left behind by file managers, archives, synchronisers and file systems; see _is_hidden.
SYSTEM_NAMES = {
    "__macosx",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "__pycache__",
    "_gsdata_",
    "network trash folder",
    "temporary items",
    "thumbnails",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
# Reasons why files and folders are left out, as a message lists them.
HIDDEN = "hidden or system files"
NO_PICTURES = "folders without pictures"
READ_ELSEWHERE = "links to folders that are read anyway"
BROKEN = "broken links"
SPECIAL = "special files"
OTHER_SUFFIX = "files without a picture suffix"


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
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"images: size must be a whole number of at least 1, got {size!r}")
    listing = _list_folder(name, folder, labels)
    chosen = _select(name, split, listing.splits)
    options = {"size": size, "stream": stream, "labels": None if labels else False}
    given = {option: value for option, value in options.items() if value is not None}
    with warnings.catch_warnings():  # Pillow warns about files that it reads all the same
        warnings.simplefilter("ignore")
        source = _PictureSource(listing, chosen, size)
        _print_once(_summary(listing, source.notes))
        info = {
            "classes": len(listing.classes) or None,
            "source": {"name": name, "split": split, **given},
            "fingerprint": source.fingerprint,
        }
        if stream is None:
            stream = len(chosen) * np.prod(source.shape) > RESIDENT_BYTES
        if stream:
            return from_source(source, **info)
        arrays = source.read_all()
    return from_arrays(arrays, **info)


def picture_splits(name: str, *, folder: str | None = None) -> dict[str, int]:
    """Returns {split: number of pictures} of images:FOLDER, without opening a file."""
    splits = _list_folder(name, folder).splits
    return {part: len(examples) for part, examples in splits.items()}


# ------------------------------------------------------------------------------ splits and classes

Example = tuple[Path, int]  # a file and its label; 0 where there are no classes
LeftOut = dict[str, list[Path]]  # {reason: files and folders}


class _Listing(NamedTuple):
    """What a folder of pictures holds."""

    root: Path
    splits: dict[str, list[Example]]  # in their fixed order
    classes: tuple[str, ...]  # names of the class folders; empty: no labels
    left_out: LeftOut


def _select(name: str, split: str, splits: dict[str, list[Example]]) -> list[Example]:
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


def _list_folder(name: str, folder: str | None, labels: bool = True) -> _Listing:
    """Finds the splits, classes and files of a folder."""
    root = _root(name, folder)
    files, left_out = _walk(root)
    if not labels:
        _check_not_empty(root, files, left_out)
        return _Listing(root, {"train": _shuffle([(file, 0) for file in files])}, (), left_out)
    by_top = defaultdict(list)  # {first part of the path below root: files}
    for file in files:
        by_top[file.parts[len(root.parts)]].append(file)
    folders = _split_folders(root, by_top)
    if folders:
        left_out[NO_PICTURES] += [top for top in _folders(root) if top.name not in by_top]
        listed = {
            part: _list_split(folders[part], by_top[folders[part].name], left_out)
            for part in ("train", "validation", "test")
            if part in folders
        }
    else:
        listed = {"train": _list_split(root, files, left_out)}
    splits = {part: examples for part, (examples, _) in listed.items()}
    classes = {part: names for part, (_, names) in listed.items()}
    if len(set(classes.values())) > 1:
        each = []
        for part, names in classes.items():
            each.append(f"{part}: {', '.join(_printable(Path(name)) for name in names) or 'none'}")
        which = f"the splits of {_printable(root)} hold different classes: {'; '.join(each)}"
        raise ValueError(f"images: {which}. Give each split the same class folders")
    return _Listing(root, splits, next(iter(classes.values())), left_out)


def _root(name: str, folder: str | None) -> Path:
    given = folder or name.removeprefix("images:")
    if not given:
        raise ValueError("images: name a folder, as in images:FOLDER")
    root = Path(os.path.expanduser(given))
    if root.is_dir():
        return root
    if root.exists():
        raise FileNotFoundError(f"images: {_printable(root)} is a file, not a folder")
    raise FileNotFoundError(f"images: there is no folder {_printable(root)}")


def _split_folders(root: Path, by_top: dict[str, list[Path]]) -> dict[str, Path]:
    """Returns {split: folder} for folders with a split's name; empty if there are none.

    Raises ValueError if two folders stand for one split, or if a split lies beside something
    else that holds pictures.
    """
    folders: dict[str, Path] = {}
    for top in _folders(root):
        part = SPLITS.get(top.name.lower())
        if not part or top.name not in by_top:
            continue
        if part in folders:
            both = f"{folders[part]} and {top} are both read as the split {part}"
            raise ValueError(f"images: {both}: rename one")
        folders[part] = top
    others = sorted(set(by_top) - {top.name for top in folders.values()})
    if folders and others:
        first = next(iter(folders.values()))
        raise ValueError(
            f"images: {_printable(root / others[0])} lies beside {first}, which is read as a "
            "split: move it, or rename the other if that is a class",
        )
    return folders


def _list_split(
    top: Path,
    files: list[Path],
    left_out: LeftOut,
) -> tuple[list[Example], tuple[str, ...]]:
    """Returns the examples of a split in their fixed order, and the names of its classes."""
    inside: dict[str, list[Path]] = {folder.name: [] for folder in _folders(top)}
    loose, depth = [], len(top.parts)
    for file in files:
        (inside[file.parts[depth]] if len(file.parts) > depth + 1 else loose).append(file)
    classes = {name: found for name, found in inside.items() if found}
    empty = [top / name for name, found in inside.items() if not found]
    left_out[NO_PICTURES] += [path for path in empty if path not in left_out[READ_ELSEWHERE]]
    if loose and classes:
        folder = _printable(top / next(iter(classes)))
        beside = f"{_printable(loose[0])} lies beside the class folder {folder}"
        raise ValueError(f"images: {beside}: move one of them")
    _check_not_empty(top, files, left_out)
    if len(classes) == 1:
        _check_single_class(top, next(iter(classes)), files)
    if classes:
        examples = [(file, i) for i, found in enumerate(classes.values()) for file in found]
    else:
        examples = [(file, 0) for file in loose]
    return _shuffle(examples), tuple(classes)


def _check_single_class(top: Path, name: str, files: list[Path]) -> None:
    """Refuses a single class folder that looks like a folder around splits or classes."""
    only = f"{_printable(top)} holds nothing but"
    nested = [p.name for p in (*_folders(top / name), top / name) if p.name.lower() in SPLITS]
    if nested:
        above = top if name in nested else top / name
        raise ValueError(
            f"images: {only} {name}/, and {', '.join(nested)} is read as a split only at the top: "
            f"name the folder above it, as images:{above}",
        )
    lowest, inner = _common_folder(files)
    if lowest != top and len(inner) > 1:
        shown = f"{_printable(Path(inner[0]))}, {_printable(Path(inner[1]))}"
        shown += ", ..." * (len(inner) > 2)
        raise ValueError(
            f"images: {only} {_printable(lowest.relative_to(top))}/, whose folders {shown} would "
            f"be one class: for one class per folder, name images:{_printable(lowest)}",
        )


def _common_folder(files: list[Path]) -> tuple[Path, list[str]]:
    """Returns the lowest folder that holds all files, and its sub-folders that hold some.

    There are no sub-folders in the result if the folder holds files itself.
    """
    lowest = Path(os.path.commonpath([file.parent for file in files]))
    if any(file.parent == lowest for file in files):
        return lowest, []
    return lowest, list({file.parts[len(lowest.parts)]: None for file in files})


def _check_not_empty(top: Path, files: list[Path], left_out: LeftOut) -> None:
    if not files:
        besides = f"; {_describe_left_out(top, left_out)}" if any(left_out.values()) else ""
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"images: {_printable(top)} holds no pictures ({suffixes}){besides}")


def _shuffle(examples: list[Example]) -> list[Example]:
    """Returns the examples in an order that depends only on how many there are."""
    bits = np.random.Philox(key=[0, 0]).random_raw(len(examples))
    return [examples[i] for i in np.argsort(bits, kind="stable")]


# ------------------------------------------------------------------------- walk through the folder


def _walk(root: Path) -> tuple[list[Path], LeftOut]:
    """Returns every picture file below a folder, and what is left out.

    The files are sorted by the bytes of their paths. Linked folders are read too. Each folder is
    read once, so links that lead back do no harm.
    """
    found: list[Path] = []
    left_out: LeftOut = defaultdict(list)
    known, folders, links = set(), [root], []
    while folders or links:
        # Links come last, so that a folder is read at its own place if it lies below root.
        folder = folders.pop() if folders else links.pop(0)
        status = folder.stat()
        if (identity := (status.st_dev, status.st_ino)) in known:
            left_out[READ_ELSEWHERE].append(folder)
            continue
        known.add(identity)
        for path in sorted(folder.iterdir(), key=os.fsencode):
            if _is_hidden(path):
                left_out[HIDDEN].append(path)
            elif os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            elif not os.path.isfile(path):
                left_out[BROKEN if path.is_symlink() else SPECIAL].append(path)
            elif path.suffix.lower() not in SUFFIXES:
                left_out[OTHER_SUFFIX].append(path)
            else:
                found.append(path)
    return sorted(found, key=lambda path: [os.fsencode(part) for part in path.parts]), left_out


def _is_hidden(path: Path) -> bool:
    """Returns whether Unix, Windows, macOS or a network drive (@, #) hides a file or folder."""
    name = path.name.lower()
    if name.startswith(".") or name in SYSTEM_NAMES or re.fullmatch(r"found\.\d{3}", name):
        return True
    return name.startswith(("@", "#")) and os.path.isdir(path)


def _folders(parent: Path) -> list[Path]:
    """Returns the sub-folders that may be classes or splits."""
    found = (path for path in parent.iterdir() if os.path.isdir(path) and not _is_hidden(path))
    return sorted(found, key=os.fsencode)


# ---------------------------------------------------------------------------------------- messages


@functools.lru_cache(maxsize=1000)  # a run loads several slices of one folder
def _print_once(line: str) -> None:
    if line:
        print(line, file=sys.stderr)


def _printable(path: Path) -> str:
    """Returns a path for a message of one line: names may hold line ends or undecodable bytes."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _counts(root: Path, by_reason: dict[str, list[Path]]) -> str:
    """Returns "broken links (2: a, b), ...": each reason with its number and first names."""
    each = []
    for reason, paths in by_reason.items():
        names = [_printable(path.relative_to(root)) for path in paths[:3]]
        names += ["..."] * (len(paths) > 3)
        each += [f"{reason} ({len(paths)}: {', '.join(names)})"] if paths else []
    return ", ".join(each)


def _describe_left_out(root: Path, left_out: LeftOut) -> str:
    return f"left out {_counts(root, left_out)}"


def _summary(listing: _Listing, notes: dict[str, list[Path]]) -> str:
    """Returns one line on what was left out or changed; empty if there is nothing to report."""
    root, _, classes, left_out = listing
    parts = [_describe_left_out(root, left_out)] if any(left_out.values()) else []
    skipped = [*left_out[READ_ELSEWHERE], *left_out[HIDDEN]]
    skipped = [path for path in skipped if os.path.isdir(path) and _is_class_level(root, path)]
    # A folder that looks like a class got no number: show which number each class has.
    if classes and (left_out[NO_PICTURES] or skipped):
        numbered = [f"{i} {_printable(Path(name))}" for i, name in enumerate(classes[:10])]
        parts.append(f"the classes are {', '.join(numbered)}{', ...' * (len(classes) > 10)}")
    parts += [_counts(root, {note: paths}) for note, paths in notes.items() if paths]
    return f"images: {_printable(root)}: {'; '.join(parts)}" if parts else ""


def _is_class_level(root: Path, path: Path) -> bool:
    """Returns whether a folder lies where class folders do: at the top, or at that of a split."""
    above = path.parent
    return above == root or (above.parent == root and above.name.lower() in SPLITS)


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


class _PictureSource:
    """The chosen pictures as a random-access source for `from_source`.

    Size and channels are those of the whole folder, so that every slice of it has the same.
    Raises ValueError with the names of files that are no pictures or differ in size.
    """

    def __init__(self, listing: _Listing, chosen: list[Example], size: int | None):
        self.chosen, self.classes, self.size = chosen, listing.classes, size
        every = [file for examples in listing.splits.values() for file, _ in examples]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            headers = dict(zip(every, pool.map(_read_header, every), strict=True))
            _refuse({file: why for file, why in headers.items() if isinstance(why, str)})
            digests = list(pool.map(self._digest, chosen))
            copies = _copies(pool, every)
        if size is None:
            _check_one_size(listing.root, {file: header.size for file, header in headers.items()})
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
            raise ValueError(f"images: {_printable(file)} is damaged: it {why}") from e
        example = {"image": pixels.reshape(*pixels.shape[:2], channels)}
        return example | ({"label": np.int32(label)} if self.classes else {})

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


def _refuse(unusable: dict[Path, str]) -> None:
    """Raises one ValueError for all files that cannot be used: {file: why}."""
    if unusable:
        file, why = next(iter(unusable.items()))
        more = [_printable(file) for file in list(unusable)[1:4]]
        more += ["..."] * (len(unusable) > 4)
        also = f"; {len(unusable) - 1} more cannot be used: {', '.join(more)}" if more else ""
        raise ValueError(f"images: {_printable(file)} {why}{also}")


def _check_one_size(root: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    """Raises ValueError that names two of the files if the pictures have several sizes."""
    first = next(iter(sizes))
    for file, size in sizes.items():
        if size != sizes[first]:
            (w, h), (w_0, h_0) = size, sizes[first]
            raise ValueError(
                f"images: {_printable(file)} has {w} x {h} pixels, {_printable(first)} has "
                f"{w_0} x {h_0}; {_printable(root)} holds {len(set(sizes.values()))} sizes. Pass "
                "size=32 (--data.size 32) to make all pictures 32 x 32",
            )
