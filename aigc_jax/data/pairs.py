"""Your own pictures with captions: `pairs:FOLDER`.

`picture_folder.py` finds the files and their classes, `pictures.py` reads the pictures.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import numpy as np

from . import Data, captions
from .picture_folder import (
    OTHER_SUFFIX,
    LeftOut,
    Listing,
    list_folder,
    printable,
    root_of,
    walk,
)
from .pictures import check_size, read_pictures, select
from .text import describe_encoding, guess_utf16
from .tokenizer import Tokenizer, split_words

TABLE = "captions.tsv"
# The first cell of a header line of captions.tsv, in lower case.
HEADERS = {"file", "files", "filename", "file_name", "file name", "image", "picture", "path"}
# Reasons why files are left out, as a message lists them.
NO_CAPTION = "pictures without a caption"
EMPTY = "pictures with an empty caption"
NO_PICTURE = "captions without a picture"


def load_pairs(
    name: str,
    split: str,
    *,
    folder: str | None = None,
    size: int | None = None,
    stream: bool | None = None,
    labels: bool = True,
    length: int = 32,
    tokenizer: str | None = None,
) -> Data:
    """Loads pairs:FOLDER, your own pictures with captions.

    FOLDER is laid out as for images:FOLDER; splits, classes, `size`, `stream` and `labels` mean the
    same (`pictures.load_pictures`). The captions are in UTF-8, in one of two forms:
    - beside each picture a .txt file of the same name (cat.png and cat.txt), whose lines are
      joined; or
    - one FOLDER/captions.tsv, with a line per picture: the file below FOLDER, a tab, the caption.
      A header line is optional. Quotation marks have no special meaning.

    A batch has `tokens` int32 [B, length], the caption in words padded with 0. One line on stderr
    counts and names pictures without captions, captions without pictures, empty captions, and
    captions that are cut. The first two and pictures with empty captions are left out.

    length: the most words of a caption, punctuation included; the rest is cut off.
    tokenizer: a tokenizer.json with the words, such as that of a run. By default the words are
        those of all captions of train, also where `split` is a slice of it. Other words are left
        out of the tokens, and counted.

    Raises ValueError for two captions of one picture, for captions in both forms, and for files
    that cannot be read.
    """
    check_size("pairs", size)
    if type(length) is not int or length < 1:
        raise ValueError(f"pairs: length must be a whole number of at least 1, got {length!r}")
    root = root_of(name, folder)
    files, left_out = walk(root)
    texts = read_captions(root, files, left_out)
    listing = list_folder("pairs", root, list(texts), left_out, labels)
    words = _words(tokenizer, listing, texts)
    chosen = select(name, split, listing.splits)
    tokens, notes = _encode(words, {file: texts[file] for file, _ in chosen}, length)
    options = {"size": size, "stream": stream, "labels": None if labels else False}
    options |= {"length": length, "tokenizer": tokenizer}
    given = {option: value for option, value in options.items() if value is not None}
    return read_pictures(
        listing,
        chosen,
        {"name": name, "split": split, **given},
        size=size,
        stream=stream,
        tokens=tokens,
        tokenizer=words,
        notes=notes,
    )


def _words(file: str | None, listing: Listing, texts: dict[Path, str]) -> Tokenizer:
    """Returns the tokenizer of a file, or that of the captions of train."""
    if file is not None:
        found = Tokenizer.load(file)
        if found.vocabulary is None:
            raise ValueError(f"pairs: {file} is no tokenizer of words, which captions need")
        return found
    splits = listing.splits
    training = splits["train"] if "train" in splits else sum(splits.values(), [])
    return Tokenizer.words(texts[file] for file, _ in training)


def _encode(
    words: Tokenizer,
    texts: dict[Path, str],
    length: int,
) -> tuple[np.ndarray, dict[str, list]]:
    """Returns the captions as tokens [N, length], and notes on what of them is left out."""
    unknown: dict[str, None] = {}
    long = []
    for file, text in texts.items():
        found = split_words(text)
        missing = [word for word in found if word not in words.numbers]
        unknown |= dict.fromkeys(missing)
        if len(found) - len(missing) > length:
            long.append(file)
    tokens = captions.encode(words, list(texts.values()), length, skip_unknown=True, cut=True)
    notes = {
        f"captions of more than {length} words, which are cut": long,
        "words that the vocabulary does not have, which are left out": list(unknown),
    }
    return tokens, notes


# ---------------------------------------------------------------------------- reading the captions


def read_captions(root: Path, files: list[Path], left_out: LeftOut) -> dict[Path, str]:
    """Returns {picture: caption}, in the order of `files`.

    files, left_out: what `walk(root)` returns. Caption files are taken out of `left_out`, and what
    has no partner is added to it.

    Raises ValueError if there is no caption at all, and for what `load_pairs` refuses.
    """
    beside = _text_files(left_out)
    table = root / TABLE
    in_table = table in left_out[OTHER_SUFFIX]
    if in_table and (both := [file for file in files if file.with_suffix("") in beside]):
        text = beside[both[0].with_suffix("")]
        raise ValueError(
            f"pairs: {printable(root)} has captions in {TABLE} and in .txt files, such as "
            f"{printable(text.relative_to(root))}: keep one of the two forms",
        )
    if in_table:
        left_out[OTHER_SUFFIX].remove(table)
        found, alone = _from_table(root, table, files)
    else:
        found, alone = _from_text_files(files, beside)
        others = set(left_out[OTHER_SUFFIX]) - set(beside.values())
        left_out[OTHER_SUFFIX] = sorted(others, key=os.fsencode)
    texts = {file: text for file, text in found.items() if split_words(text)}
    if files and not texts:
        forms = f"a .txt file beside each picture, or {TABLE} in {printable(root)}"
        raise ValueError(f"pairs: none of the {len(files)} pictures has a caption: write {forms}")
    left_out[NO_CAPTION] += [file for file in files if file not in found]
    left_out[EMPTY] += [file for file in found if file not in texts]
    left_out[NO_PICTURE] += alone
    return texts


def _text_files(left_out: LeftOut) -> dict[Path, Path]:
    """Returns {path without suffix: .txt file}."""
    found: dict[Path, Path] = {}
    for path in left_out[OTHER_SUFFIX]:
        if path.suffix.lower() != ".txt":
            continue
        if other := found.get(path.with_suffix("")):
            raise ValueError(f"pairs: {printable(other)} and {path.name} name one picture")
        found[path.with_suffix("")] = path
    return found


def _from_text_files(
    files: list[Path],
    beside: dict[Path, Path],
) -> tuple[dict[Path, str], list[Path]]:
    """Returns {picture: caption}, and the .txt files without a picture."""
    found, pictures = {}, {}
    for file in files:
        stem = file.with_suffix("")
        if stem not in beside:
            continue
        if other := pictures.get(stem):
            both = f"{printable(other)} and {file.name} share {beside[stem].name}"
            raise ValueError(f"pairs: {both}: rename one, and give it a caption of its own")
        pictures[stem] = file
        found[file] = " ".join(_read_text(beside[stem]).split())
    return found, [path for stem, path in beside.items() if stem not in pictures]


def _from_table(
    root: Path,
    table: Path,
    files: list[Path],
) -> tuple[dict[Path, str], list[str]]:
    """Returns {picture: caption} of captions.tsv, and the names in it that are no pictures."""
    by_name = {_same_name(file.relative_to(root).as_posix()): file for file in files}
    named: dict[str, tuple[int, str]] = {}  # {name: line, caption}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _read_text(table)), 1):
        cells = line.split("\t")
        if not line.strip() or _is_header(number, cells):
            continue
        at = f"pairs: {printable(table)} line {number}"
        if len(cells) < 2:
            raise ValueError(f"{at} has no tab: write the file, a tab, the caption")
        name = _same_name(cells[0])
        if name in named:
            first = named[name][0]
            raise ValueError(f"{at} names {name!r} again, after line {first}: keep one caption")
        named[name] = number, " ".join(" ".join(cells[1:]).split())
    texts = {by_name[name]: text for name, (_, text) in named.items() if name in by_name}
    return (
        {file: texts[file] for file in files if file in texts},
        [name for name in named if name not in by_name],
    )


def _is_header(number: int, cells: list[str]) -> bool:
    """Returns whether a line of captions.tsv is its header; refuses a header of other columns."""
    if number > 1 or cells[0].strip().lower() not in HEADERS:
        return False
    if len(cells) != 2:
        columns = ", ".join(cell.strip() for cell in cells)
        raise ValueError(f"pairs: {TABLE} has the columns {columns}: keep file and caption")
    return True


def _same_name(name: str) -> str:
    """Returns a file name as captions.tsv and the file system may both write it."""
    return os.path.normpath(unicodedata.normalize("NFC", name.strip().replace("\\", "/")))


def _read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file without its byte order mark."""
    content = path.read_bytes()
    try:
        if guess_utf16(content[:4096]):
            raise ValueError(describe_encoding(path, "pairs"))
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(describe_encoding(path, "pairs")) from e
