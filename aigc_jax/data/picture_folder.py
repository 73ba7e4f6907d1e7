"""A folder of pictures: which files are examples, with which split and class.

From top to bottom: splits and classes, the walk through the folder, and messages. `pictures.py`
reads the files.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

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

# ------------------------------------------------------------------------------ splits and classes

Example = tuple[Path, int]  # a file and its label; 0 where there are no classes
LeftOut = dict[str, list[Path]]  # {reason: files and folders}


class Listing(NamedTuple):
    """What a folder of pictures holds."""

    kind: str  # images or pairs; messages begin with it
    root: Path
    splits: dict[str, list[Example]]  # in their fixed order
    classes: tuple[str, ...]  # names of the class folders; empty: no labels
    left_out: LeftOut


def list_folder(
    kind: str,
    root: Path,
    files: list[Path],
    left_out: LeftOut,
    labels: bool = True,
) -> Listing:
    """Sorts the files of a folder into splits and classes.

    files, left_out: what `walk` returns.
    labels: False makes one split, train, without classes.
    """
    if not labels:
        _check_not_empty(kind, root, files, left_out)
        splits = {"train": _shuffle([(file, 0) for file in files])}
        return Listing(kind, root, splits, (), left_out)
    by_top = defaultdict(list)  # {first part of the path below root: files}
    for file in files:
        by_top[file.parts[len(root.parts)]].append(file)
    folders = _split_folders(kind, root, by_top)
    if folders:
        left_out[NO_PICTURES] += [top for top in _folders(root) if top.name not in by_top]
        listed = {
            part: _list_split(kind, folders[part], by_top[folders[part].name], left_out)
            for part in ("train", "validation", "test")
            if part in folders
        }
    else:
        listed = {"train": _list_split(kind, root, files, left_out)}
    splits = {part: examples for part, (examples, _) in listed.items()}
    classes = {part: names for part, (_, names) in listed.items()}
    if len(set(classes.values())) > 1:
        each = []
        for part, names in classes.items():
            each.append(f"{part}: {', '.join(printable(Path(name)) for name in names) or 'none'}")
        which = f"the splits of {printable(root)} hold different classes: {'; '.join(each)}"
        raise ValueError(f"{kind}: {which}. Give each split the same class folders")
    return Listing(kind, root, splits, next(iter(classes.values())), left_out)


def root_of(name: str, folder: str | None) -> Path:
    """Returns the folder that images:FOLDER or pairs:FOLDER names, unless `folder` replaces it."""
    kind, _, path = name.partition(":")
    given = folder or path
    if not given:
        raise ValueError(f"{kind}: name a folder, as in {kind}:FOLDER")
    root = Path(os.path.expanduser(given))
    if root.is_dir():
        return root
    if root.exists():
        raise FileNotFoundError(f"{kind}: {printable(root)} is a file, not a folder")
    raise FileNotFoundError(f"{kind}: there is no folder {printable(root)}")


def _split_folders(kind: str, root: Path, by_top: dict[str, list[Path]]) -> dict[str, Path]:
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
            raise ValueError(f"{kind}: {both}: rename one")
        folders[part] = top
    others = sorted(set(by_top) - {top.name for top in folders.values()})
    if folders and others:
        first = next(iter(folders.values()))
        raise ValueError(
            f"{kind}: {printable(root / others[0])} lies beside {first}, which is read as a "
            "split: move it, or rename the other if that is a class",
        )
    return folders


def _list_split(
    kind: str,
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
        folder = printable(top / next(iter(classes)))
        beside = f"{printable(loose[0])} lies beside the class folder {folder}"
        raise ValueError(f"{kind}: {beside}: move one of them")
    _check_not_empty(kind, top, files, left_out)
    if len(classes) == 1:
        _check_single_class(kind, top, next(iter(classes)), files)
    if classes:
        examples = [(file, i) for i, found in enumerate(classes.values()) for file in found]
    else:
        examples = [(file, 0) for file in loose]
    return _shuffle(examples), tuple(classes)


def _check_single_class(kind: str, top: Path, name: str, files: list[Path]) -> None:
    """Refuses a single class folder that looks like a folder around splits or classes."""
    only = f"{printable(top)} holds nothing but"
    nested = [p.name for p in (*_folders(top / name), top / name) if p.name.lower() in SPLITS]
    if nested:
        above = top if name in nested else top / name
        raise ValueError(
            f"{kind}: {only} {name}/, and {', '.join(nested)} is read as a split only at the top: "
            f"name the folder above it, as {kind}:{above}",
        )
    lowest, inner = _common_folder(files)
    if lowest != top and len(inner) > 1:
        shown = f"{printable(Path(inner[0]))}, {printable(Path(inner[1]))}"
        shown += ", ..." * (len(inner) > 2)
        raise ValueError(
            f"{kind}: {only} {printable(lowest.relative_to(top))}/, whose folders {shown} would "
            f"be one class: for one class per folder, name {kind}:{printable(lowest)}",
        )


def _common_folder(files: list[Path]) -> tuple[Path, list[str]]:
    """Returns the lowest folder that holds all files, and its sub-folders that hold some.

    There are no sub-folders in the result if the folder holds files itself.
    """
    lowest = Path(os.path.commonpath([file.parent for file in files]))
    if any(file.parent == lowest for file in files):
        return lowest, []
    return lowest, list({file.parts[len(lowest.parts)]: None for file in files})


def _check_not_empty(kind: str, top: Path, files: list[Path], left_out: LeftOut) -> None:
    if not files:
        besides = f"; {_describe_left_out(top, left_out)}" if any(left_out.values()) else ""
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"{kind}: {printable(top)} holds no pictures ({suffixes}){besides}")


def _shuffle(examples: list[Example]) -> list[Example]:
    """Returns the examples in an order that depends only on how many there are."""
    bits = np.random.Philox(key=[0, 0]).random_raw(len(examples))
    return [examples[i] for i in np.argsort(bits, kind="stable")]


# ------------------------------------------------------------------------- walk through the folder


def walk(root: Path) -> tuple[list[Path], LeftOut]:
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
def print_once(line: str) -> None:
    """Prints a line on stderr, unless it is empty or was printed before."""
    if line:
        print(line, file=sys.stderr)


def printable(path: Path) -> str:
    """Returns a path for a message of one line: names may hold line ends or undecodable bytes."""
    return str(path) if str(path).isprintable() else repr(str(path))


def counts(root: Path, by_reason: dict[str, list]) -> str:
    """Returns "broken links (2: a, b), ...": each reason with its number and first names.

    by_reason: lists of paths below root, or of names.
    """
    each = []
    for reason, found in by_reason.items():
        first = [f.relative_to(root) if isinstance(f, Path) else Path(f) for f in found[:3]]
        names = [*map(printable, first), *["..."] * (len(found) > 3)]
        each += [f"{reason} ({len(found)}: {', '.join(names)})"] if found else []
    return ", ".join(each)


def _describe_left_out(root: Path, left_out: LeftOut) -> str:
    return f"left out {counts(root, left_out)}"


def summary(listing: Listing, notes: dict[str, list[Path]]) -> str:
    """Returns one line on what was left out or changed; empty if there is nothing to report."""
    _, root, _, classes, left_out = listing
    parts = [_describe_left_out(root, left_out)] if any(left_out.values()) else []
    skipped = [*left_out[READ_ELSEWHERE], *left_out[HIDDEN]]
    skipped = [path for path in skipped if os.path.isdir(path) and _is_class_level(root, path)]
    # A folder that looks like a class got no number: show which number each class has.
    if classes and (left_out[NO_PICTURES] or skipped):
        numbered = [f"{i} {printable(Path(name))}" for i, name in enumerate(classes[:10])]
        parts.append(f"the classes are {', '.join(numbered)}{', ...' * (len(classes) > 10)}")
    parts += [counts(root, {note: paths}) for note, paths in notes.items() if paths]
    return f"{listing.kind}: {printable(root)}: {'; '.join(parts)}" if parts else ""


def _is_class_level(root: Path, path: Path) -> bool:
    """Returns whether a folder lies where class folders do: at the top, or at that of a split."""
    above = path.parent
    return above == root or (above.parent == root and above.name.lower() in SPLITS)
