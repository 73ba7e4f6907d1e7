"""Text sets: crops to train on, or windows that score every token once.

The tokenizers are in `tokenizer.py`.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from . import Data, Info, order
from .prepare import cuts, prepared
from .tokenizer import BLOCK, Tokenizer


def from_tokens(
    tokens: np.ndarray,
    *,
    length: int,
    stride: int = 0,
    vocab: int | None = None,
    tokenizer: Tokenizer | None = None,
    source: dict | None = None,
    bytes_per_token: float | None = None,
) -> Data:
    """Makes a text set from tokens [N]: batches with `tokens` int32 [B, length + 1].

    A model reads the first `length` of them and predicts the last `length`.

    stride: 0 gives an endless set of crops from random places. Otherwise the set consists of
        windows that begin `stride` tokens apart, with `mask` [B, length]. `mask` marks the tokens
        that no earlier window has scored. So every token but the first counts once. From the
        second window on it counts after at least length - stride tokens of context.
    vocab: number of tokens in the vocabulary, if no tokenizer is given; the largest token + 1
        by default.

    Raises ValueError for:
    - tokens that are not whole numbers in 0..vocab-1;
    - a text shorter than length + 1, or too long for int32 positions;
    - a stride outside 0..length.
    """
    tokens = np.asarray(tokens)
    vocab = _check_tokens(tokens, length, stride, vocab, tokenizer)
    tokens = np.ascontiguousarray(tokens, np.int32)
    digest = hashlib.sha256(tokens)
    digest.update(f"{length} {stride} {vocab}".encode())
    if tokenizer:
        digest.update(tokenizer.content.encode())
    last = len(tokens) - 1 - length  # where the last window begins
    windows = -(-last // stride) + 1 if stride else None
    info = Info(
        kind="text",
        shape=(length + 1,),
        levels=vocab,
        examples=windows,
        source=source,
        fingerprint=digest.hexdigest(),
        tokenizer=tokenizer.content if tokenizer else "",
        bytes_per_token=bytes_per_token,
    )
    if stride:
        start = np.arange(windows, dtype=np.int32) * np.int32(stride)
        start = np.minimum(start, np.int32(last))
        fresh = np.diff(start, prepend=start[0] - length)  # tokens that no earlier window scores
        seen = (length - fresh).astype(np.int32)
        arrays = {"text": tokens, "start": start.astype(np.int32), "seen": seen}
        rows, take = functools.partial(order, windows), functools.partial(_windows, length)
    else:
        arrays = {"text": tokens}
        rows, take = functools.partial(_places, last), functools.partial(_crops, length)
    return Data(info, lambda seed, i, size: take(arrays, rows(seed, i, size)), (arrays, rows, take))


def _check_tokens(
    tokens: np.ndarray,
    length: int,
    stride: int,
    vocab: int | None,
    tokenizer: Tokenizer | None,
) -> int:
    """Returns the size of the vocabulary; raises ValueError for what `from_tokens` refuses."""
    n = len(tokens) if tokens.ndim else 0
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"tokens must be whole numbers [N], got {got}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not 0 <= stride <= length:
        raise ValueError(f"stride must lie in 0..length = {length}, got {stride}")
    if n <= length:
        needed = f"a length of {length} needs at least {length + 1}"
        raise ValueError(f"the text has {n} tokens, {needed}")
    if n + length >= 2**31:
        limit = "positions are int32, use a part of it"
        raise ValueError(f"a text of {n:,} tokens is too long: {limit}")
    vocab = tokenizer.size if tokenizer else vocab or int(tokens.max()) + 1
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= vocab:
        raise ValueError(f"tokens must lie in 0..{vocab - 1}, got {low}..{high}")
    return vocab


def _places(last: int, seed: int, i: int, size: int) -> np.ndarray:
    """Returns where the crops of batch i begin: int32 [size], uniform in 0..last."""
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, i, 0]).random_raw(size)
    return (bits % np.uint64(last + 1)).astype(np.int32)


def _crops(length: int, arrays: dict, places) -> dict:
    return {"tokens": arrays["text"][places[:, None] + np.arange(length + 1)[None]]}


def _windows(length: int, arrays: dict, rows) -> dict:
    mask = np.arange(length)[None] >= arrays["seen"][rows][:, None]
    crops = _crops(length, arrays, arrays["start"][rows])
    return {**crops, "mask": mask.astype(np.float32), "index": rows}


# -------------------------------------------------------------------------------------- named sets


def load_text(
    name: str,
    split: str,
    *,
    folder: str | None = None,
    length: int = 256,
    stride: int = 0,
    tokenizer: str = "char",
) -> Data:
    """Loads python_source, tiny_shakespeare or text:FILE (UTF-8); see `from_tokens` for batches.

    split: train is the first 90 % of the characters, validation the rest; slices as in TFDS.
    tokenizer: char (or characters) for the characters of the whole text; bpe:N for byte-level
        BPE trained on train; a tokenizer.json; or a folder with GPT-2's files.
    """
    parts = sizes(name, folder)
    starts = {"train": 0, "validation": parts["train"]}
    slices = cuts(name, split, parts, unit="characters")
    read = functools.partial(_read, name, folder)
    if re.fullmatch(r"(?i)bpe:\d+", tokenizer):
        tokenizer = tokenizer.lower()
    made = _make_tokenizer(tokenizer, read, parts["train"])
    size = 0  # in bytes

    def pieces():
        nonlocal size
        for part, start, stop in slices:
            for piece in read(starts[part] + start, starts[part] + stop):
                size += len(piece.encode())
                yield piece

    recorded = "char" if tokenizer == "characters" else tokenizer
    options = {"length": length, "stride": stride, "tokenizer": recorded}
    try:
        tokens = made.encode(pieces())
        return from_tokens(
            tokens,
            length=length,
            stride=stride,
            tokenizer=made,
            bytes_per_token=size / max(1, len(tokens)),
            source={"name": name, "split": split, **options},
        )
    except ValueError as e:
        raise ValueError(f"{name} {split}: {e}") from e


def sizes(name: str, folder: str | None = None) -> dict[str, int]:
    """Returns the number of characters of both splits: {"train": ..., "validation": ...}."""
    characters = sum(map(len, _read(name, folder)))
    if not characters:
        raise ValueError(f"text: {_path(name, folder)} is empty")
    train = characters * 9 // 10
    return {"train": train, "validation": characters - train}


# Training takes minutes for a long text. Key: the specification, and a digest of the text.
_trained: dict[tuple[str, str], Tokenizer] = {}


def _make_tokenizer(spec: str, read: Callable[..., Iterator[str]], train: int) -> Tokenizer:
    """Returns the tokenizer that `spec` names; see `load_text`.

    read: `read(start, stop)` yields a part of the text, whose first `train` characters BPE is
        trained on.
    """
    if spec in ("char", "characters"):
        return Tokenizer.characters(read())
    if spec.startswith("bpe:") and spec[4:].isdecimal():
        digest = hashlib.sha256()
        for piece in read(0, train):
            digest.update(piece.encode())
        key = (spec, digest.hexdigest())
        if key not in _trained:
            _trained[key] = Tokenizer.bpe(read(0, train), int(spec[4:]))
        return _trained[key]
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return Tokenizer.gpt2(path)
    if spec.endswith(".json") or path.is_file():
        return Tokenizer.load(path)
    raise ValueError(
        "tokenizer must be char (or characters), bpe:N, a tokenizer.json or a folder with GPT-2's "
        f"files that exist, got {spec!r}",
    )


# ----------------------------------------------------------------------------------- reading a text


def _path(name: str, folder: str | None) -> Path:
    given = folder or name.removeprefix("text:")
    if not given:
        raise ValueError("text: name a file, as in text:FILE")
    return Path(os.path.expanduser(given))


def _read(name: str, folder: str | None, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the characters start..stop of a text, in pieces.

    Line ends stay as they are. A byte order mark is dropped.
    """
    if name in ("python_source", "tiny_shakespeare"):
        if name == "python_source" and folder is not None:
            raise ValueError("python_source needs no files, so it takes no folder")
        if name == "python_source":
            text = _python_source()
        else:
            text = _official_text(str(prepared(name, folder).data_path))
        stop = len(text) if stop is None else stop
        yield from (text[i : min(i + BLOCK, stop)] for i in range(start, stop, BLOCK))
        return
    path = _path(name, folder)
    if not path.is_file():
        raise FileNotFoundError(f"text: there is no file {path}")
    with open(path, "rb") as file:
        if guess_utf16(file.read(4096)):
            raise ValueError(describe_encoding(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for i in range(0, start, BLOCK):
                file.read(min(BLOCK, start - i))
            left = sys.maxsize if stop is None else stop - start
            while piece := file.read(min(BLOCK, left)):
                yield piece
                left -= len(piece)
    except UnicodeDecodeError as e:
        raise ValueError(describe_encoding(path)) from e


@functools.lru_cache(maxsize=1)
def _official_text(path: str) -> str:
    """Returns the whole text of Tiny Shakespeare. TFDS has three splits, which are not ours."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    parts = ("train", "validation", "test")
    return b"".join(builder.as_data_source(part)[0]["text"] for part in parts).decode()


@functools.lru_cache(maxsize=1)
def _python_source() -> str:
    """Returns the standard library's top-level modules that are pure ASCII, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.glob("*.py"), key=lambda f: f.name):
        with contextlib.suppress(UnicodeDecodeError):
            found.append(file.read_text(encoding="ascii"))
    if not found:
        raise FileNotFoundError(f"python_source: there are no modules in {root}")
    return "\n".join(found)


# ------------------------------------------------------------------------------- files not in UTF-8


def describe_encoding(path: Path, kind: str = "text") -> str:
    """Returns a message for a file that is not UTF-8, with the command that converts it."""
    content, wrong = path.read_bytes(), 0
    try:
        content.decode()
    except UnicodeDecodeError as e:
        wrong = e.start
    line = content.rfind(b"\n", 0, wrong) + 1
    encoding = _guess_encoding(content[line : line + BLOCK])
    problem = f"{kind}: {path} is not UTF-8 (byte {wrong})"
    if not encoding:
        return f"{problem}, and does not look like text: name a text file"
    files = f"{shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-utf8.txt')}"
    if encoding == "UTF-8":
        command = f"iconv -c -f UTF-8 -t UTF-8 {files}"
        return f"{problem}: a few bytes are damaged. Drop them: {command}"
    command = f"iconv -f {encoding} -t UTF-8 {files}"
    return f"{problem}; it looks like {encoding}. Convert it: {command}"


def guess_utf16(sample: bytes) -> str:
    """Returns UTF-16LE or UTF-16BE if nearly every other byte is 0, else "".

    Western letters in UTF-16 are valid UTF-8 too, with a NUL after each.
    """
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) <= 0.4 * len(sample) or 10 * min(even, odd) > max(even, odd):
        return ""
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _guess_encoding(sample: bytes) -> str:
    """Returns an encoding by iconv's name: UTF-8 if little is damaged, "" if it is not text."""
    import charset_normalizer

    if name := guess_utf16(sample):
        return name
    runs, letters = re.findall(rb"[\x80-\xff]+", sample), re.findall(rb"[A-Za-z]", sample)
    high = sum(map(len, runs))  # bytes that are not ASCII
    utf8 = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
    if 10 * (high - sum(map(len, re.findall(utf8, sample)))) < high:
        return "UTF-8"
    # Single accents among plain letters: charset_normalizer takes these for any encoding.
    single = sum(len(run) == 1 for run in runs)
    if b"\0" not in sample and 5 * single > 4 * len(runs) and len(letters) > 2 * high:
        return "CP1252"
    best = charset_normalizer.from_bytes(sample).best()
    name = codecs.lookup(best.encoding).name.upper().replace("_", "-") if best else ""
    for python, iconv in (("-LE", "LE"), ("-BE", "BE"), ("EUC-JIS-2004", "EUC-JP")):
        name = name.replace(python, iconv)
    return "" if b"\0" in sample and not name.startswith("UTF") else name
