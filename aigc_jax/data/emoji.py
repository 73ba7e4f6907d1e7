"""Emoji with captions: 3,786 pictures of Google's Noto Emoji, 32x32 RGB on white.

The files are in `noto/`, with their origin and licences. They are part of the package, so this set
needs no network.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import lzma
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import Data, captions, from_arrays
from .prepare import cuts
from .tokenizer import Tokenizer

NOTO = Path(__file__).parent / "noto"
LENGTH = 16  # words of the longest caption, punctuation included
UNSEEN = 400  # emoji that are kept out of train in all their tones; at most
# tone 1..5, in the order of Unicode's modifiers 1F3FB..1F3FF. 0: no tone.
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TWO_TONES = 6  # tone of a picture that shows two people or hands of different tones
# Names of Unicode that another emoji has too, or that say another colour than the picture.
RENAMED = {"person_in_tuxedo": "person in tuxedo", "heart": "red heart"}


class Emoji(NamedTuple):
    """One picture: an emoji in one skin tone, or without."""

    code_points: str  # in hexadecimal, joined by -
    base: str  # code points of the same emoji without a skin tone
    category: str
    tone: int  # 0: none; 1..5: light to dark, as in TONES; 6: two different tones
    caption: str
    row: int  # of the files in noto/


def emoji(split: str) -> Data:
    """Loads emoji of 32x32 RGB with captions: 2,748 train, 308 test and 730 unseen pictures.

    A batch has `image`, `label` (the category; `info.class_names` names it), `tokens` int32
    [B, 16] (the caption in words, padded with 0) and `index`. `captions.decode(info.tokenizer,
    tokens)` returns the captions, such as "waving hand, dark skin tone". `examples(split)` returns
    them with all other facts, and `tones(split)` the skin tones.

    Splits and their order depend only on the pictures and on a hash of the code points:
    - unseen: 400 of the 1,911 emoji in all their tones. Emoji with an equal picture, such as the
      flags of France and of St Martin, are drawn together.
    - test: a fifth of the other pictures with a skin tone. Pictures that have a copy are left out,
      such as the snowboarder, who looks the same in all tones. Train has each of these emoji in
      other tones and without a tone.
    - train: all others.

    No picture of a split is in another split too.

    The vocabulary is the 1,520 words of train. Test has no other words. 334 pictures of unseen
    have some, which are left out of their tokens; 95 have no known word, so their tokens are all 0.
    """
    table, vocabulary, categories = examples(split), _tokenizer(), class_names()
    texts = [one.caption for one in table]
    arrays = {
        "image": _images()[[one.row for one in table]],
        "label": np.array([categories.index(one.category) for one in table]),
        "tokens": captions.encode(vocabulary, texts, LENGTH, skip_unknown=True),
    }
    return from_arrays(
        arrays,
        classes=len(categories),
        class_names=categories,
        tokenizer=vocabulary,
        source={"name": "emoji", "split": split},
    )


def examples(split: str) -> list[Emoji]:
    """Returns what each example of a split shows; the i-th has `index` i in its batches."""
    splits = _splits()
    sizes = {part: len(found) for part, found in splits.items()}
    slices = cuts("emoji", split, sizes)
    return [one for part, start, stop in slices for one in splits[part][start:stop]]


def tones(split: str) -> np.ndarray:
    """Returns the skin tone of each example of a split, int32 [N], in the order of `index`.

    0 is none, 1..5 are light to dark, and 6 is two different tones in one picture.
    """
    return np.array([one.tone for one in examples(split)], np.int32)


def pictures(code_points: list[str]) -> np.ndarray:
    """Returns the pictures of emoji with these code points, uint8 [N, 32, 32, 3]."""
    row = {one.code_points: one.row for one in _table()}
    return _images()[[row[each] for each in code_points]]


@functools.lru_cache(maxsize=1)
def class_names() -> tuple[str, ...]:
    """Returns the names of the ten categories, in the order of their labels."""
    return tuple(sorted({one.category for one in _table()}))


@functools.lru_cache(maxsize=1)
def _splits() -> dict[str, list[Emoji]]:
    """Returns {split: pictures}; `emoji` states the rule."""
    table = sorted(_table(), key=lambda one: _hash("order", one.code_points))
    group = _groups()
    names = sorted(set(group.values()), key=lambda name: _hash("unseen emoji", name))
    sizes = collections.Counter(group.values())
    counts = itertools.accumulate(sizes[name] for name in names)  # emoji in the first groups
    chosen = {name for name, count in zip(names, counts, strict=True) if count <= UNSEEN}
    unseen = {base for base, name in group.items() if name in chosen}
    copies = collections.Counter(map(_picture, table))
    known = [one for one in table if one.base not in unseen]
    toned = [one for one in known if one.tone and copies[_picture(one)] == 1]
    toned.sort(key=lambda one: _hash("test tone", one.code_points))
    test = set(toned[: len(toned) // 5])
    return {
        "train": [one for one in known if one not in test],
        "test": [one for one in table if one in test],
        "unseen": [one for one in table if one.base in unseen],
    }


def _groups() -> dict[str, str]:
    """Returns {base: smallest base of its group}. Emoji with an equal picture share a group."""
    group = {one.base: one.base for one in _table()}
    first: dict[bytes, str] = {}  # {picture: base that was first to have it}
    for one in _table():
        pair = {group[one.base], group[first.setdefault(_picture(one), one.base)]}
        if len(pair) == 2:  # an equal picture joins two groups
            group = {base: min(pair) if name in pair else name for base, name in group.items()}
    return group


def _picture(one: Emoji) -> bytes:
    return _images()[one.row].tobytes()


def _hash(purpose: str, code_points: str) -> str:
    return hashlib.sha256(f"{purpose} {code_points}".encode()).hexdigest()


# ------------------------------------------------------------------------------------------- files


@functools.lru_cache(maxsize=1)
def _images() -> np.ndarray:
    raw = lzma.decompress((NOTO / "images.bin.xz").read_bytes())
    return np.frombuffer(raw, np.uint8).reshape(-1, 32, 32, 3)


@functools.lru_cache(maxsize=1)
def _table() -> tuple[Emoji, ...]:
    """Returns all pictures in the order of the files. An emoji's tones follow it."""
    lines = lzma.decompress((NOTO / "emoji.tsv.xz").read_bytes()).decode().splitlines()
    found = []
    for row, line in enumerate(lines[1:]):
        code_points, category, _, short_name, name, variation = line.split("\t")
        if not variation:
            base = code_points
        modifiers = [int(tone, 16) - 0x1F3FA for tone in variation.split("-") if tone]
        tones = list(dict.fromkeys(modifiers))
        tone = TWO_TONES if len(tones) == 2 else sum(tones)
        words = [f"{TONES[i - 1]} skin tone" for i in tones]
        caption = ", ".join([readable(short_name, name), *[" and ".join(words)] * bool(words)])
        found.append(Emoji(code_points, base, category, tone, caption, row))
    return tuple(found)


def readable(short_name: str, name: str) -> str:
    """Returns a name of Unicode in plain lower-case words.

    "man: red hair" becomes "man with red hair", "thumbs up sign" becomes "thumbs up" and "são tomé
    & príncipe flag" becomes "sao tome and principe flag". Colons become commas.
    """
    name = RENAMED.get(short_name, name).lower()
    plain = unicodedata.normalize("NFKD", name)
    name = "".join(c for c in plain if not unicodedata.combining(c)).replace("\u2019", "'")
    name = re.sub(r"(hands?|thumbs up|thumbs down) sign$", r"\1", name)
    name = re.sub(r"^white (?=.* pointing )", "", name)  # white: only an outline
    name = re.sub(r": (.* hair|beard)$", r" with \1", name)
    name = re.sub(r"^(\w+): bald$", r"bald \1", name)
    name = name.replace("*", "asterisk").replace("keycap: ", "keycap ").replace(":", ",")
    name = re.sub(r"[.()]| -(?= )", "", name.replace("&", "and"))
    return name


@functools.lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return Tokenizer.words(one.caption for one in _splits()["train"])
