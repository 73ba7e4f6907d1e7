"""Text: tokenizers, and sets of crops (to train on) or windows (to score every token once)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np

from . import Data, Info, order
from .prepare import cuts, prepared

LARGEST = 2**28  # characters of a tokenizer.json; the largest published ones have an eighth of it


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
    def characters(cls, text: str) -> Tokenizer:
        """One token for each character that occurs, in the order of their code points."""
        return cls(json.dumps({"characters": "".join(sorted(set(text)))}))

    @classmethod
    def bpe(cls, text: str, vocab: int) -> Tokenizer:
        """Byte-level BPE (GPT-2, section 2.2) of `vocab` tokens, at least 256, trained on the text."""
        import tokenizers

        if vocab < 256:
            raise ValueError(f"byte-level BPE needs a vocabulary of at least 256, the bytes themselves, got {vocab}")
        made = _byte_level(tokenizers.models.BPE())
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator([text], trainer)
        return cls(made.to_str())

    @classmethod
    def gpt2(cls, folder: str | Path) -> Tokenizer:
        """GPT-2's own, from a folder with its vocab.json and merges.txt, or tokenizer.json."""
        import tokenizers

        folder = Path(folder)
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
        file = Path(file)
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
        Path(file).write_bytes(self.content.encode())

    def encode(self, text: str) -> np.ndarray:
        """int32 [T]. Raises ValueError for a character that the vocabulary has not."""
        if self._characters is None:
            return np.array(self._ids(text), np.int32)
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
        if not self.size and len(points):
            raise ValueError(f"the vocabulary has no {text[0]!r}")
        tokens = np.minimum(np.searchsorted(self._characters, points), self.size - 1)
        if unknown := points[self._characters[tokens] != points].tolist():
            raise ValueError(f"the vocabulary has no {chr(unknown[0])!r}")
        return tokens.astype(np.int32)

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

    Raises ValueError for tokens that are no whole numbers in 0..vocab-1, a text shorter than length + 1, and a stride
    above length.
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
    vocab = tokenizer.size if tokenizer else vocab or int(tokens.max()) + 1
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"tokens must lie in 0..{vocab - 1}, got {tokens.min()}..{tokens.max()}")
    tokens = np.ascontiguousarray(tokens, np.int32)
    digest = hashlib.sha256(tokens.tobytes() + f"{length} {stride} {vocab}".encode())
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
        start = np.minimum(np.arange(windows) * stride, last)
        seen = np.diff(start, prepend=start[0] - length)
        arrays = {"text": tokens, "start": start.astype(np.int32), "seen": (length - seen).astype(np.int32)}
        rows, take = functools.partial(order, windows), functools.partial(_window, length)
    return Data(info, lambda seed, i, size: take(arrays, rows(seed, i, size)), (arrays, rows, take))


# ---------------------------------------------------------------------------------------------------------------- sets


def load_text(
    name: str, split: str, *, folder: str | None = None, length: int = 256, stride: int = 0, tokenizer: str = "char"
) -> Data:
    """python_source, tiny_shakespeare or text:PATH (UTF-8), as `from_tokens` cuts them.

    split: train, the first 90 % of the characters, validation, the rest; sliced as in TFDS.
    tokenizer: char; bpe:N, trained on train; or a tokenizer.json, or a folder with GPT-2's files.
    """
    text = _read(name, folder)
    border = len(text) * 9 // 10
    parts = {"train": text[:border], "validation": text[border:]}
    sizes = {part: len(content) for part, content in parts.items()}
    chosen = "".join(parts[part][start:stop] for part, start, stop in cuts(name, split, sizes))
    made = _tokenizer(tokenizer, text, parts["train"])
    try:
        tokens = made.encode(chosen)
        options = {"length": length, "stride": stride, "tokenizer": tokenizer}
        size = len(chosen.encode()) / max(1, len(tokens))
        return from_tokens(tokens, length=length, stride=stride, tokenizer=made, bytes_per_token=size,
                           source={"name": name, "split": split, **options})  # fmt: skip
    except ValueError as e:
        raise ValueError(f"{name} {split}: {e}") from e


@functools.lru_cache(maxsize=4)
def _tokenizer(which: str, text: str, train: str) -> Tokenizer:
    if which == "char":
        return Tokenizer.characters(text)
    if which.startswith("bpe:") and which[4:].isdecimal():
        return Tokenizer.bpe(train, int(which[4:]))
    if Path(which).is_dir():
        return Tokenizer.gpt2(which)
    if which.endswith(".json"):
        return Tokenizer.load(which)
    raise ValueError(f"tokenizer must be char, bpe:N, a tokenizer.json or a folder with GPT-2's files, got {which!r}")


def _read(name: str, folder: str | None) -> str:
    if name == "python_source":
        if folder is not None:
            raise ValueError("python_source needs no files, so it takes no folder")
        return _python_source()
    if name == "tiny_shakespeare":
        return _official_text(str(prepared(name, folder).data_path))
    path = Path(folder or name.removeprefix("text:"))
    if not path.is_file():
        raise FileNotFoundError(f"text: there is no file {path}")
    try:
        return path.read_bytes().decode("utf-8")  # with its line ends as they are
    except UnicodeDecodeError as e:
        raise ValueError(f"text: {path} is not UTF-8 (byte {e.start}): convert it, or name a text file") from e


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
