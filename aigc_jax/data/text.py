"""Text: tokenizers, and sets of crops (to train on) or windows (to score every token once)."""

from __future__ import annotations

import array
import codecs
import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from . import Data, Info, order
from .prepare import cuts, prepared

BLOCK = 1 << 16  # characters read, learnt from or encoded at once, so that only tokens take memory
# Places where GPT-2's pattern begins a new word whatever follows, so that a cut there changes no token.
_CUT = re.compile(r"\S(?=[ \t\r\n\u3000])|[^\W_](?=[,.;:!?，。！？；：、])")
LARGEST = 2**28  # characters of a tokenizer.json; the largest published ones have an eighth of it
LONGEST = 2000  # characters of a word that byte-level BPE learns from as one: its time grows with their square
_LONG = re.compile(rf"\S{{{LONGEST}}}|\s{{{LONGEST}}}")


class Tokenizer:
    """Text to token numbers and back: single characters, or byte-level BPE by the `tokenizers` library.

    `Tokenizer.characters(text)`, `Tokenizer.bpe(text, vocab)`, `Tokenizer.gpt2(folder)`, `Tokenizer.load(file)`.
    `content` is what `save` writes, JSON; two tokenizers of equal content are equal.
    """

    def __init__(self, content: str):
        """From `content`; raises ValueError where it describes no tokenizer.

        Settings that would cut, pad or vary a text are off, in `content` too.
        """
        self.content = content
        try:
            if len(content) > LARGEST:
                raise ValueError(f"{len(content)} characters are more than {LARGEST}")
            said = json.loads(content)
            if not isinstance(said, dict):
                raise ValueError(f"it holds no named values but a {type(said).__name__}")
            self._characters = np.array(sorted(map(ord, said["characters"]))) if "characters" in said else None
            if self._characters is None:
                import tokenizers

                self.content = _whole(said, content)
                self._bpe = tokenizers.Tokenizer.from_str(self.content)
                self._lossless = _is_lossless(said)
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"this is no tokenizer ({e})") from e
        # Numbers may have gaps: what counts is the largest.
        self.size = (
            len(self._characters) if self._characters is not None
            else 1 + max(self._bpe.get_vocab().values(), default=-1)
        )  # fmt: skip
        if self.size > 2**31:
            raise ValueError(f"this is no tokenizer (token {self.size - 1} exceeds 32 bits)")

    @classmethod
    def characters(cls, text: str | Iterable[str]) -> Tokenizer:
        """One token for each character that occurs, in the order of their code points.

        text: a string, or its pieces in order. Raises ValueError for half a surrogate pair, which is no character.
        """
        seen = np.zeros(0x110000, bool)
        for piece in _pieces(text):
            seen[_code_points(_sound(piece))] = True
        return cls(json.dumps({"characters": "".join(map(chr, np.flatnonzero(seen).tolist()))}))

    @classmethod
    def bpe(cls, text: str | Iterable[str], vocab: int) -> Tokenizer:
        """Byte-level BPE (GPT-2, section 2.2) of `vocab` tokens, 256 to 1,000,000, trained on the text.

        text: a string, or its pieces in order. A short text gives fewer tokens. Where words have more than LONGEST
        characters, as in a genome, the text is learnt from in parts of so many.
        """
        import tokenizers

        if vocab < 256:
            raise ValueError(f"byte-level BPE needs a vocabulary of at least 256, the bytes themselves, got {vocab}")
        if vocab > 1_000_000:  # the library reserves memory for all of them, and ends the process where it gets none
            raise ValueError(f"byte-level BPE takes a vocabulary of at most 1,000,000, got {vocab}")
        made = _byte_level(tokenizers.models.BPE())
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(map(_sound, _learnable(_at_words(_pieces(text)))), trainer)
        return cls(made.to_str())

    @classmethod
    def gpt2(cls, folder: str | Path) -> Tokenizer:
        """GPT-2's own, from a folder with its vocab.json and merges.txt, or tokenizer.json."""
        import tokenizers

        folder = Path(os.path.expanduser(folder))
        if (folder / "tokenizer.json").is_file():
            return cls.load(folder / "tokenizer.json")
        files = [folder / "vocab.json", folder / "merges.txt"]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder} has no tokenizer.json, and no {' and no '.join(missing)}")
        try:
            made = _byte_level(tokenizers.models.BPE.from_file(*map(str, files)))
            if made.token_to_id("<|endoftext|>") is not None:
                made.add_special_tokens(["<|endoftext|>"])  # one token, as tokenizer.json has it
            return cls(made.to_str())
        except Exception as e:
            raise ValueError(f"{files[0]} and {files[1].name} are no tokenizer ({e})") from e

    @classmethod
    def load(cls, file: str | Path) -> Tokenizer:
        """What `save` wrote, or any tokenizer.json of the `tokenizers` library."""
        file = Path(os.path.expanduser(file))
        if not file.is_file():
            raise FileNotFoundError(f"there is no tokenizer {file}")
        try:
            if file.stat().st_size > 4 * LARGEST:
                raise ValueError(f"this is no tokenizer ({file.stat().st_size} bytes are too many)")
            return cls(file.read_bytes().decode("utf-8"))  # read_text would turn "\r\n" into "\n"
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    def save(self, file: str | Path) -> None:
        """One JSON file."""
        Path(os.path.expanduser(file)).write_bytes(self.content.encode())

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """int32 [T] of a string, or of its pieces in order. Raises ValueError for a character of no token."""
        tokens = array.array("i")
        if self._characters is None:
            # Other tokenizers than GPT-2's kind may merge across any place: they get the text whole.
            for block in _at_words(_pieces(text)) if _cuts_at_words(self.content) else ["".join(_pieces(text))]:
                tokens.extend(self._ids(_sound(block)))
            return np.frombuffer(tokens, np.int32)
        last = int(self._characters.max(initial=-1)) + 1  # stands for every later code point
        table = np.full(last + 1, -1, np.int32)
        table[self._characters.astype(np.int64)] = np.arange(self.size)
        for piece in _pieces(text):
            found = table[np.minimum(_code_points(piece), last)]
            if found.min(initial=0) < 0:
                raise ValueError(f"the vocabulary has no {piece[int((found < 0).argmax())]!r}")
            tokens.frombytes(found.tobytes())
        return np.frombuffer(tokens, np.int32)

    def _ids(self, text: str) -> list[int]:
        """Token numbers by the library; one line where they do not give the text back."""
        try:
            ids = self._bpe.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise ValueError(f"the tokenizer cannot encode this text ({e})") from e
        if not self._lossless and (back := self._bpe.decode(ids, skip_special_tokens=False)) != text:
            print(f"warning: {_lost(self._bpe, text, back, ids)}", file=sys.stderr, flush=True)
        return ids

    def decode(self, tokens) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD. Raises ValueError for numbers beyond the vocabulary."""
        tokens = np.asarray(tokens, np.int64).reshape(-1)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.size:
            raise ValueError(f"tokens lie in 0..{self.size - 1}, got {tokens.min()}..{tokens.max()}")
        if self._characters is None:
            return self._bpe.decode(tokens.tolist(), skip_special_tokens=False)
        return "".join(map(chr, self._characters[tokens]))


def _whole(said: dict, content: str) -> str:
    """A tokenizer.json without truncation, padding and BPE's dropout; the same text where it has none of them."""
    model = said.get("model")
    off = [(said, name) for name in ("truncation", "padding") if said.get(name) is not None]
    if isinstance(model, dict) and model.get("dropout"):
        off.append((model, "dropout"))
    for place, name in off:
        place[name] = None
    return json.dumps(said) if off else content


def _is_lossless(said: dict) -> bool:
    """Whether any text comes back from its tokens, as from GPT-2's; False where this cannot be told from the file."""
    import tokenizers

    cut, back = said.get("pre_tokenizer") or {}, said.get("decoder") or {}
    if said["model"]["type"] != "BPE" or not cut.get("type") == back.get("type") == "ByteLevel":
        return False
    whole = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= set(said["model"]["vocab"])
    changed = any(token.get(flag) for token in said.get("added_tokens") or () for flag in ("lstrip", "rstrip"))
    return whole and not changed and not cut.get("add_prefix_space") and said.get("normalizer") is None


def _lost(made, text: str, back: str, ids: list[int]) -> str:
    """How a text differs from what its tokens give back."""
    model = json.loads(made.to_str())["model"]
    unknown = model.get("unk_token")
    number = model.get("unk_id") if unknown is None else made.token_to_id(unknown)
    if number is not None and (count := ids.count(number)):
        name = made.id_to_token(number)
        return f"the tokenizer does not know all of the text: {count} of {len(ids)} tokens are {name!r}"
    same = (a == b for a, b in zip(text, back, strict=False))
    at = next((i for i, equal in enumerate(same) if not equal), min(len(text), len(back)))
    kind = f" ({type(made.normalizer).__name__})" if made.normalizer else ""
    was, now = text[at : at + 12], back[at : at + 12]
    return f"the tokenizer changes the text{kind}: at character {at} {was!r} comes back as {now!r}"


def _byte_level(model):
    import tokenizers

    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _sound(text: str) -> str:
    """The text; ValueError where UTF-8 cannot write it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"the text holds {text[e.start]!r}, half of a surrogate pair and no character") from e
    return text


def _pieces(text: str | Iterable[str]) -> Iterator[str]:
    """A string in pieces of BLOCK characters; pieces as they are."""
    if isinstance(text, str):
        return (text[at : at + BLOCK] for at in range(0, len(text), BLOCK))
    return iter(text)


def _at_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text, cut anew: only where byte-level BPE begins a word in any case."""
    held: list[str] = []
    for piece in pieces:
        ends = (match.end() for match in _CUT.finditer(piece, max(0, len(piece) - 4096)))
        *_, end = 0, *ends
        if end:
            yield "".join([*held, piece[:end]])
            held, piece = [], piece[end:]
        held.append(piece)
    if rest := "".join(held):
        yield rest


def _learnable(blocks: Iterable[str]) -> Iterator[str]:
    """The blocks, those with words of more than LONGEST characters in parts of so many."""
    for block in blocks:
        step = LONGEST if _LONG.search(block) else max(1, len(block))
        yield from (block[at : at + step] for at in range(0, len(block), step))


@functools.lru_cache(maxsize=8)
def _cuts_at_words(content: str) -> bool:
    """Whether a tokenizer cuts text by GPT-2's pattern, and nothing in it reaches across a place of _CUT."""
    said = json.loads(content)
    words = said.get("pre_tokenizer") or {}
    plain = words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words.get("add_prefix_space")
    return plain and said.get("normalizer") is None and not any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"])
        or _CUT.search(token["content"]) for token in said.get("added_tokens") or ()
    )  # fmt: skip


def _crop(length: int, arrays: dict, rows) -> dict:
    return {"tokens": arrays["text"][rows[:, None] + np.arange(length + 1)[None]]}


def _window(length: int, arrays: dict, rows) -> dict:
    mask = np.arange(length)[None] >= arrays["seen"][rows][:, None]
    return {**_crop(length, arrays, arrays["start"][rows]), "mask": mask.astype(np.float32), "index": rows}


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
    """A text as tokens [N] -> batches `tokens` int32 [B, length + 1]: what is read, and shifted by one what follows.

    stride 0: crops from random places, without end. Else windows `stride` apart, with `mask` [B, length]: of every
    window only what no earlier one has predicted counts, so that each token but the first counts once, and, from the
    second window on, after at least length - stride others.

    Raises ValueError for tokens that are no whole numbers in 0..vocab-1, a text shorter than length + 1 or too long for
    int32, and a stride above length.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be whole numbers [N], got {tokens.dtype} {list(tokens.shape)}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not 0 <= stride <= length:
        raise ValueError(f"stride must lie in 0..length = {length}, got {stride}")
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} tokens, a length of {length} needs at least {length + 1}")
    if len(tokens) + length >= 2**31:
        raise ValueError(f"a text of {len(tokens):,} tokens is too long: its places are int32, take a part of it")
    vocab = tokenizer.size if tokenizer else vocab or int(tokens.max()) + 1
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"tokens must lie in 0..{vocab - 1}, got {tokens.min()}..{tokens.max()}")
    tokens = np.ascontiguousarray(tokens, np.int32)
    digest = hashlib.sha256(tokens)
    digest.update(f"{length} {stride} {vocab}".encode())
    if tokenizer:
        digest.update(tokenizer.content.encode())
    last = len(tokens) - 1 - length  # where the last window begins
    windows = -(-last // stride) + 1 if stride else None
    info = Info(
        kind="text", shape=(length + 1,), levels=vocab, examples=windows, source=source,
        fingerprint=digest.hexdigest(), tokenizer=tokenizer.content if tokenizer else "",
        bytes_per_token=bytes_per_token,
    )  # fmt: skip
    if not stride:

        def rows(seed, i, size):
            bits = np.random.Philox(key=[seed, 0], counter=[0, 0, i, 0]).random_raw(size)
            return (bits % np.uint64(last + 1)).astype(np.int32)

        arrays, take = {"text": tokens}, functools.partial(_crop, length)
    else:
        start = np.minimum(np.arange(windows, dtype=np.int32) * np.int32(stride), np.int32(last))
        seen = np.diff(start, prepend=start[0] - length)
        arrays = {"text": tokens, "start": start.astype(np.int32), "seen": (length - seen).astype(np.int32)}
        rows, take = functools.partial(order, windows), functools.partial(_window, length)
    return Data(info, lambda seed, i, size: take(arrays, rows(seed, i, size)), (arrays, rows, take))


# ---------------------------------------------------------------------------------------------------------------- sets


def load_text(
    name: str, split: str, *, folder: str | None = None, length: int = 256, stride: int = 0, tokenizer: str = "char"
) -> Data:
    """python_source, tiny_shakespeare or text:FILE (UTF-8), as `from_tokens` cuts them.

    split: train, the first 90 % of the characters, validation, the rest; sliced as in TFDS.
    tokenizer: char (or characters), of the whole text; bpe:N, trained on train; a tokenizer.json, or a folder with
        GPT-2's files.
    """
    parts = sizes(name, folder)
    border = {"train": 0, "validation": parts["train"]}
    chosen = cuts(name, split, parts, unit="characters")
    text = functools.partial(_read, name, folder)
    if re.fullmatch(r"(?i)bpe:\d+", tokenizer):
        tokenizer = tokenizer.lower()
    made = _tokenizer(tokenizer, text, parts["train"])
    size = 0

    def pieces():
        nonlocal size
        for part, start, stop in chosen:
            for piece in text(border[part] + start, border[part] + stop):
                size += len(piece.encode())
                yield piece

    try:
        tokens = made.encode(pieces())
        options = {"length": length, "stride": stride, "tokenizer": "char" if tokenizer == "characters" else tokenizer}
        return from_tokens(tokens, length=length, stride=stride, tokenizer=made,
                           bytes_per_token=size / max(1, len(tokens)),
                           source={"name": name, "split": split, **options})  # fmt: skip
    except ValueError as e:
        raise ValueError(f"{name} {split}: {e}") from e


def sizes(name: str, folder: str | None = None) -> dict[str, int]:
    """How many characters the two parts of a text have: {"train": ..., "validation": ...}."""
    characters = sum(map(len, _read(name, folder)))
    if not characters:
        raise ValueError(f"text: {_file(name, folder)} is empty")
    return {"train": characters * 9 // 10, "validation": characters - characters * 9 // 10}


_learnt: dict[tuple[str, str], Tokenizer] = {}  # by what trained them: minutes for a long text


def _tokenizer(which: str, text: Callable[..., Iterator[str]], train: int) -> Tokenizer:
    if which in ("char", "characters"):
        return Tokenizer.characters(text())
    if which.startswith("bpe:") and which[4:].isdecimal():
        digest = hashlib.sha256()
        for piece in text(0, train):
            digest.update(piece.encode())
        key = (which, digest.hexdigest())
        if key not in _learnt:
            _learnt[key] = Tokenizer.bpe(text(0, train), int(which[4:]))
        return _learnt[key]
    path = Path(os.path.expanduser(which))
    if path.is_dir():
        return Tokenizer.gpt2(path)
    if which.endswith(".json") or path.is_file():
        return Tokenizer.load(path)
    raise ValueError(
        f"tokenizer must be char (or characters), bpe:N, a tokenizer.json or a folder with GPT-2's files that exist, "
        f"got {which!r}"
    )


def _file(name: str, folder: str | None) -> Path:
    given = folder or name.removeprefix("text:")
    if not given:
        raise ValueError("text: name a file, as in text:FILE")
    return Path(os.path.expanduser(given))


def _read(name: str, folder: str | None, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The characters start..stop of a text, in pieces; its line ends as they are, without a byte order mark."""
    if name in ("python_source", "tiny_shakespeare"):
        if name == "python_source" and folder is not None:
            raise ValueError("python_source needs no files, so it takes no folder")
        text = _python_source() if name == "python_source" else _official_text(str(prepared(name, folder).data_path))
        stop = len(text) if stop is None else stop
        yield from (text[at : min(at + BLOCK, stop)] for at in range(start, stop, BLOCK))
        return
    path = _file(name, folder)
    if not path.is_file():
        raise FileNotFoundError(f"text: there is no file {path}")
    with open(path, "rb") as file:
        if _utf16(file.read(4096)):
            raise ValueError(_not_utf8(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for at in range(0, start, BLOCK):
                file.read(min(BLOCK, start - at))
            left = sys.maxsize if stop is None else stop - start
            while piece := file.read(min(BLOCK, left)):
                yield piece
                left -= len(piece)
    except UnicodeDecodeError as e:
        raise ValueError(_not_utf8(path)) from e


def _not_utf8(path: Path) -> str:
    """What is wrong with the file, which encoding it looks like, and the command that converts it."""
    content, at = path.read_bytes(), 0
    try:
        content.decode()
    except UnicodeDecodeError as e:
        at = e.start
    begin = content.rfind(b"\n", 0, at) + 1
    encoding = _encoding(content[begin : begin + BLOCK])
    said = f"text: {path} is not UTF-8 (byte {at})"
    if not encoding:
        return f"{said}, and looks like no text: name a text file"
    files = f"{shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-utf8.txt')}"
    if encoding == "UTF-8":
        return f"{said}: a few bytes are damaged. Drop them: iconv -c -f UTF-8 -t UTF-8 {files}"
    return f"{said}; it looks like {encoding}. Convert it: iconv -f {encoding} -t UTF-8 {files}"


def _utf16(sample: bytes) -> str:
    """UTF-16LE or UTF-16BE where nearly every other byte is 0, so that Western letters would be read as UTF-8."""
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) <= 0.4 * len(sample) or 10 * min(even, odd) > max(even, odd):
        return ""
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _encoding(sample: bytes) -> str:
    """A guess at an encoding, by iconv's name: UTF-8 where little is damaged, "" where it is no text."""
    import charset_normalizer

    if name := _utf16(sample):
        return name
    runs, letters = re.findall(rb"[\x80-\xff]+", sample), re.findall(rb"[A-Za-z]", sample)
    high = sum(map(len, runs))
    utf8 = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
    if 10 * (high - sum(map(len, re.findall(utf8, sample)))) < high:
        return "UTF-8"
    # Single accents among plain letters, which the library takes for anything.
    if b"\0" not in sample and 5 * sum(len(run) == 1 for run in runs) > 4 * len(runs) and len(letters) > 2 * high:
        return "CP1252"
    best = charset_normalizer.from_bytes(sample).best()
    name = codecs.lookup(best.encoding).name.upper().replace("_", "-") if best else ""
    for python, iconv in (("-LE", "LE"), ("-BE", "BE"), ("EUC-JIS-2004", "EUC-JP")):
        name = name.replace(python, iconv)
    return "" if b"\0" in sample and not name.startswith("UTF") else name


@functools.lru_cache(maxsize=1)
def _official_text(path: str) -> str:
    """The whole text out of TFDS's three splits, whose borders are not ours."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    return b"".join(builder.as_data_source(part)[0]["text"] for part in ("train", "validation", "test")).decode()


@functools.lru_cache(maxsize=1)
def _python_source() -> str:
    """The standard library's modules at its top level, those of pure ASCII, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.glob("*.py"), key=lambda f: f.name):
        with contextlib.suppress(UnicodeDecodeError):
            found.append(file.read_text(encoding="ascii"))
    if not found:
        raise FileNotFoundError(f"python_source: there are no modules in {root}")
    return "\n".join(found)
