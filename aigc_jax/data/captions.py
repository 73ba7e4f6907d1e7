"""Captions of pictures as rows of word numbers, padded with 0.

A data set with captions has `tokens` int32 [B, L] beside `image`. Its `info.tokenizer` turns words
into numbers, `info.caption_length` is L and `info.caption_vocab` the number of tokens:

    tokens = captions.encode(info.tokenizer, ["thumbs up, dark skin tone"], info.caption_length)
    texts = captions.decode(info.tokenizer, tokens)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from .tokenizer import Tokenizer, split_words


def encode(
    tokenizer: Tokenizer | str,
    texts: str | Sequence[str],
    length: int,
    *,
    skip_unknown: bool = False,
    cut: bool = False,
) -> np.ndarray:
    """Returns captions as tokens int32 [N, length], padded with 0. An empty text is all 0.

    tokenizer: a tokenizer of words, or its content.
    texts: a single text counts as a list of one.
    skip_unknown: leaves out words that the vocabulary does not have.
    cut: leaves out what follows the first `length` words.

    Raises ValueError that names the unknown words, and for a caption of more than `length` words.
    Punctuation marks count as words.
    """
    tokenizer = _words(tokenizer)
    texts = [texts] if isinstance(texts, str) else texts
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        unknown = unknown_words(tokenizer, text)
        if unknown and not skip_unknown:
            named = ", ".join(map(repr, unknown))
            raise ValueError(f"caption {text!r} has words that are not in the vocabulary: {named}")
        known = [tokenizer.numbers[word] for word in split_words(text) if word not in unknown]
        if len(known) > length and not cut:
            raise ValueError(f"caption {text!r} has {len(known)} words, the most is {length}")
        row[: len(known)] = known[:length]
    return tokens


def decode(tokenizer: Tokenizer | str, tokens) -> list[str]:
    """Returns the texts of tokens [N, L]. Padding is left out."""
    tokenizer = _words(tokenizer)
    return [tokenizer.decode(row) for row in np.asarray(tokens)]


def unknown_words(tokenizer: Tokenizer | str, text: str) -> list[str]:
    """Returns the words of a text that the vocabulary does not have, each once."""
    numbers = _words(tokenizer).numbers
    return [word for word in dict.fromkeys(split_words(text)) if word not in numbers]


@functools.lru_cache(maxsize=8)  # callers pass the content once per caption
def _read(content: str) -> Tokenizer:
    return Tokenizer(content)


def _words(tokenizer: Tokenizer | str) -> Tokenizer:
    tokenizer = _read(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if tokenizer.vocabulary is None:
        raise ValueError("captions need a tokenizer of words, as Tokenizer.words(texts) makes it")
    return tokenizer
