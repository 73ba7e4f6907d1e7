"""Tokenizers: single characters, whole words, and byte-level BPE by the `tokenizers` library.

Long texts are read, learnt from and encoded in pieces, so that only the tokens take memory.
"""

from __future__ import annotations

import array
import functools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

BLOCK = 1 << 16  # characters that are processed at once
# Characters of a tokenizer.json. The largest published ones have an eighth of that.
MAX_CONTENT = 2**28
# Characters of a word that byte-level BPE learns from as one: its time grows with their square.
MAX_WORD = 2000
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD}}}|\s{{{MAX_WORD}}}")
# A character after which GPT-2's pattern begins a new word, so that a cut there changes no token.
_WORD_END = re.compile(r"\S(?=[ \t\r\n\u3000])|[^\W_](?=[,.;:!?，。！？；：、])")


class Tokenizer:
    """Turns text into token numbers and back.

    Made by `Tokenizer.characters(text)`, `Tokenizer.words(texts)`, `Tokenizer.bpe(text, vocab)`,
    `Tokenizer.gpt2(folder)` or `Tokenizer.load(file)`. `size` is the number of tokens. `content`
    is the JSON that `save` writes: tokenizers with equal content are equal. `vocabulary` lists
    the words of a tokenizer of words and `numbers` gives the token of each, 1 or more. Both are
    None for the other kinds.
    """

    def __init__(self, content: str):
        """Makes a tokenizer from its `content`.

        Settings that would truncate, pad or randomly vary a text are switched off, also in
        `content`. Raises ValueError if `content` does not describe a tokenizer.
        """
        self.content = content
        self._characters = None
        self.vocabulary: tuple[str, ...] | None = None
        self.numbers: dict[str, int] | None = None
        try:
            if len(content) > MAX_CONTENT:
                raise ValueError(f"{len(content)} characters are more than {MAX_CONTENT}")
            config = json.loads(content)
            if not isinstance(config, dict):
                raise ValueError(f"it holds a {type(config).__name__}, not named values")
            if "characters" in config:
                self._characters = np.array(sorted(map(ord, config["characters"])))
                self.size = len(self._characters)
            elif "words" in config:
                self.vocabulary = _check_words(config["words"])
                self.numbers = {word: i for i, word in enumerate(self.vocabulary, 1)}
                self.size = 1 + len(self.vocabulary)
            else:
                import tokenizers

                self.content = _switch_off_settings(config, content)
                self._bpe = tokenizers.Tokenizer.from_str(self.content)
                self._lossless = _is_lossless(config)
                # Token numbers may have gaps: the largest one counts.
                self.size = 1 + max(self._bpe.get_vocab().values(), default=-1)
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"this is no tokenizer ({e})") from e
        if self.size > 2**31:
            raise ValueError(f"this is no tokenizer (token {self.size - 1} exceeds 32 bits)")

    @classmethod
    def characters(cls, text: str | Iterable[str]) -> Tokenizer:
        """Makes one token for each character of the text, in the order of their code points.

        text: a string, or its pieces in order.

        Raises ValueError for half of a surrogate pair, which is not a character.
        """
        seen = np.zeros(0x110000, bool)
        for piece in _split_blocks(text):
            seen[_code_points(_check_characters(piece))] = True
        found = "".join(map(chr, np.flatnonzero(seen).tolist()))
        return cls(json.dumps({"characters": found}))

    @classmethod
    def words(cls, texts: Iterable[str]) -> Tokenizer:
        """Makes one token for each word of the texts, in alphabetical order; see `split_words`.

        Token 0 is padding and stands for no word.
        """
        found = {word for text in texts for word in split_words(text)}
        return cls(json.dumps({"words": sorted(found)}))

    @classmethod
    def bpe(cls, text: str | Iterable[str], vocab: int) -> Tokenizer:
        """Trains byte-level BPE (GPT-2, section 2.2) with `vocab` tokens, 256 to 1,000,000.

        text: a string, or its pieces in order. A short text gives fewer tokens. Words of more
            than MAX_WORD characters, as in a genome, are learnt from in parts of that length.
        """
        import tokenizers

        if vocab < 256:
            needed = "a vocabulary of at least 256, the bytes themselves"
            raise ValueError(f"byte-level BPE needs {needed}, got {vocab}")
        # The library reserves memory for all tokens, and ends the process if there is too little.
        if vocab > 1_000_000:
            raise ValueError(
                f"byte-level BPE takes a vocabulary of at most 1,000,000, got {vocab}",
            )
        library = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        blocks = _split_long_words(_cut_at_words(_split_blocks(text)))
        library.train_from_iterator(map(_check_characters, blocks), trainer)
        return cls(library.to_str())

    @classmethod
    def gpt2(cls, folder: str | Path) -> Tokenizer:
        """Reads GPT-2's tokenizer from a folder.

        The folder holds vocab.json and merges.txt, or tokenizer.json.
        """
        import tokenizers

        folder = Path(os.path.expanduser(folder))
        if (folder / "tokenizer.json").is_file():
            return cls.load(folder / "tokenizer.json")
        files = [folder / "vocab.json", folder / "merges.txt"]
        if missing := [file.name for file in files if not file.is_file()]:
            names = " and no ".join(missing)
            raise FileNotFoundError(f"{folder} has no tokenizer.json, and no {names}")
        try:
            library = _byte_level(tokenizers.models.BPE.from_file(*map(str, files)))
            if library.token_to_id("<|endoftext|>") is not None:
                library.add_special_tokens(["<|endoftext|>"])  # one token, as in tokenizer.json
            return cls(library.to_str())
        except Exception as e:
            raise ValueError(f"{files[0]} and {files[1].name} are no tokenizer ({e})") from e

    @classmethod
    def load(cls, file: str | Path) -> Tokenizer:
        """Reads what `save` wrote, or any tokenizer.json of the `tokenizers` library."""
        file = Path(os.path.expanduser(file))
        if not file.is_file():
            raise FileNotFoundError(f"there is no tokenizer {file}")
        try:
            size = file.stat().st_size
            if size > 4 * MAX_CONTENT:
                raise ValueError(f"this is no tokenizer ({size} bytes are too many)")
            return cls(file.read_bytes().decode("utf-8"))  # read_text would change "\r\n" to "\n"
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    def save(self, file: str | Path) -> None:
        """Writes one JSON file."""
        file = Path(os.path.expanduser(file))
        new = file.with_name(f"{file.name}.new")
        new.write_bytes(self.content.encode())
        new.replace(file)

    def encode(self, text: str | Iterable[str]) -> np.ndarray:
        """Returns the token numbers of a text, int32 [T].

        text: a string, or its pieces in order.

        Raises ValueError for a character without a token, or a word that a tokenizer of words
        does not have.
        """
        if self.vocabulary is not None:
            return self._encode_words(text)
        if self._characters is None:
            return self._encode_bpe(text)
        tokens = array.array("i")
        beyond = int(self._characters.max(initial=-1)) + 1  # stands for all later code points
        table = np.full(beyond + 1, -1, np.int32)
        table[self._characters.astype(np.int64)] = np.arange(self.size)
        for piece in _split_blocks(text):
            found = table[np.minimum(_code_points(piece), beyond)]
            if found.min(initial=0) < 0:
                unknown = piece[int((found < 0).argmax())]
                raise ValueError(f"the vocabulary has no {unknown!r}")
            tokens.frombytes(found.tobytes())
        return np.frombuffer(tokens, np.int32)

    def _encode_words(self, text: str | Iterable[str]) -> np.ndarray:
        words = split_words("".join(_split_blocks(text)))
        if unknown := [word for word in dict.fromkeys(words) if word not in self.numbers]:
            raise ValueError(f"the vocabulary has no {', '.join(map(repr, unknown))}")
        return np.array([self.numbers[word] for word in words], np.int32)

    def _encode_bpe(self, text: str | Iterable[str]) -> np.ndarray:
        blocks = _split_blocks(text)
        if _can_encode_in_blocks(self.content):
            blocks = _cut_at_words(blocks)
        else:  # tokens may reach across any place
            blocks = ["".join(blocks)]
        tokens = array.array("i")
        for block in blocks:
            tokens.extend(self._ids(_check_characters(block)))
        return np.frombuffer(tokens, np.int32)

    def _ids(self, text: str) -> list[int]:
        """Returns the library's token numbers, and warns if they do not give the text back."""
        try:
            ids = self._bpe.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise ValueError(f"the tokenizer cannot encode this text ({e})") from e
        if not self._lossless:
            decoded = self._bpe.decode(ids, skip_special_tokens=False)
            if decoded != text:
                loss = _describe_loss(self._bpe, text, decoded, ids)
                print(f"warning: {loss}", file=sys.stderr, flush=True)
        return ids

    def decode(self, tokens) -> str:
        """Returns the text of token numbers. Bytes that are not UTF-8 become U+FFFD.

        Words are joined by spaces, without the space before a comma and the like. Padding is
        left out.

        Raises ValueError for numbers outside the vocabulary.
        """
        tokens = np.asarray(tokens, np.int64).reshape(-1)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.size:
            got = f"{tokens.min()}..{tokens.max()}"
            raise ValueError(f"tokens lie in 0..{self.size - 1}, got {got}")
        if self.vocabulary is not None:
            return _join_words([self.vocabulary[i - 1] for i in tokens if i])
        if self._characters is None:
            return self._bpe.decode(tokens.tolist(), skip_special_tokens=False)
        return "".join(map(chr, self._characters[tokens]))


# -------------------------------------------------------------------------------------------- words


def split_words(text: str) -> list[str]:
    """Returns the words of a text, in lower case.

    Words end at white space. A punctuation mark or symbol is a word of its own, except for a
    hyphen, an apostrophe or an underscore between two letters or digits.

    Raises ValueError for half of a surrogate pair, which is not a character.
    """
    text = unicodedata.normalize("NFC", _check_characters(text).lower())
    spaced = (f" {c} " if _is_mark(text, i) else c for i, c in enumerate(text))
    return "".join(spaced).split()


def _is_mark(text: str, i: int) -> bool:
    """Returns whether character i is punctuation or a symbol, and not inside a word."""
    if unicodedata.category(text[i])[0] not in "PS":
        return False
    inside = text[i - 1 : i].isalnum() and text[i + 1 : i + 2].isalnum()
    return not (inside and text[i] in "-'\u2019_")


def _join_words(words: list[str]) -> str:
    """Returns the words as a text that `split_words` splits into the same words."""
    return re.sub(r" (?=[,.;:!?)\]}])|(?<=[(\[{]) ", "", " ".join(words))


def _check_words(words) -> tuple[str, ...]:
    """Returns the words of a tokenizer.json.

    Raises ValueError unless they are distinct and each is one word of `split_words`: no text could
    give any other.
    """
    if not isinstance(words, list):
        raise ValueError("words must be a list")
    for word in words:
        if not isinstance(word, str) or split_words(word) != [word]:
            raise ValueError(f"{word!r} is not a word")
    if len(set(words)) < len(words):
        raise ValueError("a word is listed twice")
    return tuple(words)


# --------------------------------------------------------------------------- what is in a tokenizer


def _switch_off_settings(config: dict, content: str) -> str:
    """Returns a tokenizer.json without truncation, padding and BPE's dropout.

    It returns `content` itself, to the byte, if none of these is set.
    """
    model = config.get("model")
    set_on = [(config, name) for name in ("truncation", "padding") if config.get(name) is not None]
    if isinstance(model, dict) and model.get("dropout"):
        set_on.append((model, "dropout"))
    for parent, name in set_on:
        parent[name] = None
    return json.dumps(config) if set_on else content


def _is_lossless(config: dict) -> bool:
    """Returns whether every text comes back from its tokens; False if the file does not show it."""
    import tokenizers

    split, decoder = config.get("pre_tokenizer") or {}, config.get("decoder") or {}
    byte_level = split.get("type") == decoder.get("type") == "ByteLevel"
    if config["model"]["type"] != "BPE" or not byte_level:
        return False
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if not alphabet <= set(config["model"]["vocab"]):
        return False
    added = config.get("added_tokens") or ()
    strips_spaces = any(token.get(flag) for token in added for flag in ("lstrip", "rstrip"))
    adds_space = split.get("add_prefix_space")
    return not strips_spaces and not adds_space and config.get("normalizer") is None


def _describe_loss(library, text: str, decoded: str, ids: list[int]) -> str:
    """Returns how a text differs from the text that its tokens give back."""
    model = json.loads(library.to_str())["model"]
    name = model.get("unk_token")
    unknown = model.get("unk_id") if name is None else library.token_to_id(name)
    if unknown is not None and (count := ids.count(unknown)):
        name = library.id_to_token(unknown)
        these = f"{count} of {len(ids)} tokens are {name!r}"
        return f"the tokenizer does not know all of the text: {these}"
    differ = (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b)
    i = next(differ, min(len(text), len(decoded)))
    normalizer = f" ({type(library.normalizer).__name__})" if library.normalizer else ""
    before, after = text[i : i + 12], decoded[i : i + 12]
    change = f"at character {i} {before!r} comes back as {after!r}"
    return f"the tokenizer changes the text{normalizer}: {change}"


def _byte_level(model):
    """Returns the library's tokenizer around a BPE model, set up as GPT-2's."""
    import tokenizers

    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


@functools.lru_cache(maxsize=8)
def _can_encode_in_blocks(content: str) -> bool:
    """Returns whether a text that is cut at `_WORD_END` has the same tokens as the whole text.

    This holds if the tokenizer splits words by GPT-2's pattern, and none of its added tokens can
    reach across such a place.
    """
    config = json.loads(content)
    split = config.get("pre_tokenizer") or {}
    if split.get("type") != "ByteLevel" or not split.get("use_regex", True):
        return False
    if split.get("add_prefix_space") or config.get("normalizer") is not None:
        return False
    return not any(map(_may_cross_words, config.get("added_tokens") or ()))


def _may_cross_words(token: dict) -> bool:
    """Returns whether an added token may match text on both sides of a place of `_WORD_END`."""
    if token["lstrip"] or token["rstrip"] or token["single_word"]:
        return True
    return bool(re.search(r"\s", token["content"]) or _WORD_END.search(token["content"]))


# ----------------------------------------------------------------------------------- text in pieces


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _check_characters(text: str) -> str:
    """Returns the text; raises ValueError if UTF-8 cannot write it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = "half of a surrogate pair, which is not a character"
        raise ValueError(f"the text holds {text[e.start]!r}, {half}") from e
    return text


def _split_blocks(text: str | Iterable[str]) -> Iterator[str]:
    """Cuts a string into blocks of BLOCK characters; leaves pieces as they are."""
    if isinstance(text, str):
        return (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))
    return iter(text)


def _cut_at_words(pieces: Iterable[str]) -> Iterator[str]:
    """Yields the same text in blocks that end at a `_WORD_END`, so that no token changes."""
    pending: list[str] = []
    for piece in pieces:
        # The last word end within the last 4,096 characters.
        ends = (match.end() for match in _WORD_END.finditer(piece, max(0, len(piece) - 4096)))
        *_, end = 0, *ends
        if end:
            yield "".join([*pending, piece[:end]])
            pending, piece = [], piece[end:]
        pending.append(piece)
    if rest := "".join(pending):
        yield rest


def _split_long_words(blocks: Iterable[str]) -> Iterator[str]:
    """Yields the blocks, but cuts one with a word of MAX_WORD characters into parts that long."""
    for block in blocks:
        step = MAX_WORD if _LONG_WORD.search(block) else max(1, len(block))
        yield from (block[start : start + step] for start in range(0, len(block), step))
