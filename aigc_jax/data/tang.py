"""Tang poems in regular form: 36,430 poems of 4 or 8 lines of 5 or 7 characters, with titles.

The files are in `tang/`, with their origin and licences. They are part of the package, so this set
needs no network. `rhyme_holds` and `tones_hold` check the rules of regulated verse with readings
of the Tang.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import lzma
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import Data, from_arrays
from .prepare import cuts
from .tokenizer import Tokenizer

POEMS = Path(__file__).parent / "tang" / "poems.tsv.xz"
READINGS = POEMS.with_name("readings.tsv.xz")
FORMS = {"5x4": (5, 4), "7x4": (7, 4), "5x8": (5, 8), "7x8": (7, 8)}  # characters x lines
TITLE = 16  # characters of the longest title; the rest is cut off
PAD = "\n"  # token 0: fills titles and bodies
MARKS = "，。？！；"
# Finals of one rhyme of the 106, by medial i and main vowel: the rhymes of 支, 先, 删, 庚, 萧.
MERGED = {
    **dict.fromkeys(("iə", "iɛ", "i", "ɛ"), "i"),
    **dict.fromkeys(("iɛn", "ien", "en"), "en"),
    **dict.fromkeys(("ɛn", "an"), "an"),
    **dict.fromkeys(("iɛng", "iæng", "æng", "ɛng"), "æng"),
    **dict.fromkeys(("iɛu", "ieu", "eu"), "eu"),
}


class Poem(NamedTuple):
    """One poem. Its body has a mark after each line."""

    title: str
    author: str
    body: str
    form: str  # "5x4", "7x4", "5x8" or "7x8"


def tang_poems(split: str, *, form: str = "all") -> Data:
    """Loads Tang poems as tokens, one per character, with their titles.

    A batch has `tokens` int32 [B, 16 + N], `mask` float32 [B, 15 + N] and `index`. The first 16
    tokens are the title, the other N the body: 24, 32, 48 or 64 tokens with its marks. Both are
    padded with token 0. mask is 1 for the body and 0 for the title, which is given.

    form: "5x4" (four lines of five characters), "7x4", "5x8", "7x8", or "all", with N = 64.

    Splits: a hash puts a tenth of the poems into test and a tenth into validation, the others into
    train. Variants of one poem, which share half of their phrases, are in one split. The vocabulary
    is the characters of all poems of all splits, with those of the titles.
    """
    found, tokenizer = poems(split, form=form), _tokenizer()
    lines = FORMS[form] if form != "all" else FORMS["7x8"]
    rows = [
        place(poem.title[:TITLE], TITLE) + place(poem.body, body_length(lines)) for poem in found
    ]
    tokens = np.stack([tokenizer.encode(row) for row in rows])
    mask = np.zeros((len(rows), tokens.shape[1] - 1), np.float32)
    mask[:, TITLE - 1 :] = 1
    source = {"name": "tang_poems", "split": split, "form": form}
    data = from_arrays({"tokens": tokens, "mask": mask}, levels=tokenizer.size, source=source)
    texts = "".join(rows)
    info = replace(
        data.info,
        tokenizer=tokenizer.content,
        title_length=TITLE,
        bytes_per_token=len(texts.encode()) / len(texts),
        fingerprint=_hash(f"{data.info.fingerprint} {tokenizer.content}"),
    )
    return data._replace(info=info)


def body_length(form: tuple[int, int]) -> int:
    """Returns the number of tokens of a body: each line ends with a mark."""
    return (form[0] + 1) * form[1]


def place(text: str, length: int) -> str:
    """Returns the text filled up to `length` characters."""
    return text.ljust(length, PAD)


def poems(split: str, *, form: str = "all") -> list[Poem]:
    """Returns the poems of a split; the i-th has `index` i in its batches."""
    if form != "all" and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)} and all, got {form!r}")
    splits = {
        name: [poem for poem in found if form in ("all", poem.form)]
        for name, found in _splits().items()
    }
    slices = cuts("tang_poems", split, {name: len(found) for name, found in splits.items()})
    return [poem for name, start, stop in slices for poem in splits[name][start:stop]]


def form_of(body: str) -> str | None:
    """Returns the form of a well-formed poem; None for any other text.

    Well formed: 4 or 8 lines of 5 or 7 characters, each followed by a mark, and no mark or blank
    inside a line.
    """
    parts = re.split(f"([{MARKS}])", body)
    lines, marks = parts[:-1:2], parts[1::2]
    if parts[-1] or len(lines) != len(marks) or any(re.search(r"\s", line) for line in lines):
        return None
    shape = (len(lines[0]) if lines else 0, len(lines))
    same = all(len(line) == shape[0] for line in lines)
    return next((name for name, form in FORMS.items() if same and form == shape), None)


# --------------------------------------------------------------------- the rules of regulated verse


@functools.lru_cache(maxsize=1)
def _readings() -> dict[str, list[str]]:
    lines = lzma.decompress(READINGS.read_bytes()).decode().splitlines()[1:]
    return {char: found.split() for char, found in (line.split("\t") for line in lines)}


def is_level(reading: str) -> bool:
    """Returns whether a Tang reading has the level tone.

    The rising tone is marked by a caron, the departing tone by a grave accent, and the entering
    tone ends with p, t or k. These three are oblique.
    """
    marks = set(unicodedata.normalize("NFD", reading)) & {"\u030c", "\u0300"}
    return not marks and reading[-1] not in "ptk"


def tones(char: str) -> set[bool]:
    """Returns the tones that a character may have, True for level; empty for an unknown one."""
    return {is_level(reading) for reading in _readings().get(char, ())}


def rhymes(char: str) -> set[str]:
    """Returns the rhymes of a character's level readings.

    A rhyme is the main vowel and what follows it. Finals that the poets' 106 rhymes (Pingshui)
    count as one are merged: MERGED has them, with a medial i where the rhyme depends on it.
    """
    return {_rhyme(reading) for reading in _readings().get(char, ()) if is_level(reading)}


def _rhyme(reading: str) -> str:
    final = re.sub("^[^aeiouyæɑəɛ]*", "", reading)
    medial, rhyme = re.fullmatch("([iuy]*)([aeiouyæɑəɛ].*)", final).groups()
    closed = "i" if set(medial) & {"i", "y"} else ""
    return MERGED.get(closed + rhyme, rhyme)


def lines_of(body: str) -> list[str]:
    """Returns the lines of a poem without their marks."""
    return [line for line in re.split(f"[{MARKS}]", body) if line]


def rhyme_holds(body: str) -> bool | None:
    """Returns whether the even lines end in one level rhyme; None if fewer than two are known."""
    ends = [line[-1] for line in lines_of(body)[1::2]]
    known = [rhymes(char) for char in ends if tones(char)]
    return bool(set.intersection(*known)) if len(known) > 1 else None


def tones_hold(body: str) -> bool:
    """Returns whether a poem has the tone pattern of regulated verse.

    - In a line the tones of characters 2, 4 and 6 alternate.
    - In a couplet character 2 of the two lines has opposite tones; from one couplet to the next it
      has the same.
    - Even lines end level; odd ones, except the first, end oblique.

    A character of two tones, or of none that is known, fits everywhere.
    """
    lines = lines_of(body)

    def fits(char: str, level: bool) -> bool:
        return not (known := tones(char)) or level in known

    def pattern(second: bool) -> bool:
        for i, line in enumerate(lines):
            own = second ^ ((i + 1) // 2 % 2 == 1)  # lines 0, 3, 4, 7: as the first
            if not all(fits(line[j], own ^ (j // 2 % 2 == 1)) for j in range(1, len(line) - 1, 2)):
                return False
            if i and not fits(line[-1], i % 2 == 1):
                return False
        return True

    return pattern(True) or pattern(False)


# ------------------------------------------------------------------------------------------- files


@functools.lru_cache(maxsize=1)
def _splits() -> dict[str, list[Poem]]:
    splits = {"train": [], "validation": [], "test": []}
    found = sorted(_table(), key=lambda poem: _hash(poem.body))
    for poem, first in zip(found, first_variants([poem.body for poem in found]), strict=True):
        tenth = int(_hash(f"split {found[first].body}")[:8], 16) % 10
        splits[{0: "test", 1: "validation"}.get(tenth, "train")].append(poem)
    return splits


def phrases(body: str) -> list[str]:
    """Returns all runs of four characters within a line."""
    return [line[i : i + 4] for line in lines_of(body) for i in range(len(line) - 3)]


def first_variants(bodies: list[str]) -> list[int]:
    """Returns for each poem the number of the first poem that it is a variant of, or its own.

    Two poems are variants if at least half of one's phrases are in the other. So are variants of
    variants.
    """
    import scipy.sparse

    own = [set(phrases(body)) for body in bodies]
    having = collections.defaultdict(list)
    for i, each in enumerate(own):
        for phrase in each:
            having[phrase].append(i)
    pairs = (pair for poems in having.values() for pair in itertools.combinations(poems, 2))
    variants = [
        pair
        for pair, shared in collections.Counter(pairs).items()
        if 2 * shared >= min(len(own[i]) for i in pair)
    ]
    a, b = np.array(variants, np.int64).reshape(-1, 2).T
    links = scipy.sparse.coo_array((np.ones(len(a)), (a, b)), (len(own), len(own)))
    _, group = scipy.sparse.csgraph.connected_components(links, directed=False)
    _, first = np.unique(group, return_index=True)
    return first[group].tolist()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _table() -> tuple[Poem, ...]:
    lines = lzma.decompress(POEMS.read_bytes()).decode().splitlines()[1:]
    found = (line.split("\t") for line in lines)
    return tuple(Poem(title, author, body, form_of(body)) for title, author, body in found)


@functools.lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return Tokenizer.characters([PAD, *(poem.title + poem.body for poem in _table())])
