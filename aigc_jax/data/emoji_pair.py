"""Emoji in the styles of two vendors: Google's Noto Emoji, Twitter's Twemoji. 32x32 RGB on white.

The training sets of the two show different emoji, so that a translation from one style to the other
has to be learned without pairs. The validation sets show the same emoji in the same order. A few
emoji have equal pictures: Twitter draws two of validation alike, and three as in its train. The
files are in `noto/` and `twemoji/`, with their origin and licences. They are part of the package,
so these sets need no network.
"""

from __future__ import annotations

import functools
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from . import Data, emoji, from_arrays, pair
from .prepare import cuts

TWEMOJI = Path(__file__).parent / "twemoji"


def emoji_google(split: str) -> Data:
    """Loads Google's pictures: 646 train and 150 validation. A batch has `image` and `index`."""
    return _vendor("emoji_google", split)


def emoji_twitter(split: str) -> Data:
    """Loads Twitter's pictures: 645 train and 150 validation. A batch has `image` and `index`."""
    return _vendor("emoji_twitter", split)


def emoji_pair(split: str, *, aligned: Any = None) -> Data:
    """Loads both: a batch has `image` of Google, and `other` of Twitter.

    aligned: whether row i of both shows the same emoji. By default they do in validation, and not
        in train. Aligned training pairs are Twitter's 645 training pictures and Google's pictures
        of the same emoji, for comparison. Two of Google's are in its own train too.
    """
    if aligned not in (None, True, False):
        raise ValueError(f"aligned must be True, False or None, got {aligned!r}")
    validation = split.startswith("validation")
    if "+" in split or not split.startswith(("train", "validation")):
        raise ValueError(f"emoji_pair has train and validation, and slices; got {split!r}")
    if validation and aligned is False:
        raise ValueError("the validation set of emoji_pair is aligned: leave aligned out")
    aligned = validation if aligned is None else aligned
    images, twitter = _images(), emoji_twitter(split)
    source = {"name": "emoji_pair", "split": split}
    if not aligned or validation:
        return pair(emoji_google(split), twitter, aligned=aligned, source=source)
    slices = cuts("emoji_pair", split, {"train": len(images["google of twitter"])})
    rows = np.concatenate([images["google of twitter"][start:stop] for _, start, stop in slices])
    source["aligned"] = True
    return pair(from_arrays({"image": rows}), twitter, aligned=True, source=source)


def _vendor(name: str, split: str) -> Data:
    vendor = name.removeprefix("emoji_")
    images = _images()
    parts = {"train": images[vendor], "validation": images[f"{vendor}, both"]}
    slices = cuts(name, split, {part: len(x) for part, x in parts.items()})
    rows = np.concatenate([parts[part][start:stop] for part, start, stop in slices])
    return from_arrays({"image": rows}, source={"name": name, "split": split})


@functools.lru_cache(maxsize=1)
def _images() -> dict[str, np.ndarray]:
    """Returns the pictures, uint8 [N, 32, 32, 3], by vendor and set."""
    lines = lzma.decompress((TWEMOJI / "sets.tsv.xz").read_bytes()).decode().splitlines()[1:]
    emoji_of: dict[str, list[str]] = {"google": [], "twitter": [], "both": []}
    for line in lines:
        which, code_points = line.split("\t")
        emoji_of[which].append(code_points)
    raw = lzma.decompress((TWEMOJI / "images.bin.xz").read_bytes())
    twemoji = np.frombuffer(raw, np.uint8).reshape(-1, 32, 32, 3)
    border = len(emoji_of["twitter"])
    google = {which: emoji.pictures(code_points) for which, code_points in emoji_of.items()}
    return {
        "google": google["google"],
        "google, both": google["both"],
        "google of twitter": google["twitter"],
        "twitter": twemoji[:border],
        "twitter, both": twemoji[border:],
    }
