"""n-grams with interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999).

With h the last k - 1 tokens, h' the last k - 2, and D the discount of length k:

    P_k(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) P_{k-1}(w | h')

c(h) is the sum of c(h w) over w, and N(h) the number of w with c(h w) > 0. For the longest k, c
counts occurrences. For a shorter one, c(h w) is the number of different tokens that precede h w. So
a token that followed many contexts is likely to follow a new context. P_0 is uniform over the
vocabulary, so no token is impossible. A context that was never seen takes P_{k-1}.

    model = kneser_ney(train_tokens, order=5, vocab=65)
    nats = -log_probs(model, test_tokens)          # [N], each token given the four before it
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped


class Grams(NamedTuple):
    """The n-grams of one length k, and what is known of their contexts (length k - 1)."""

    keys: np.ndarray  # int64, sorted: row of the context among the (k-1)-grams, times V, plus token
    counts: np.ndarray  # c(h w) of each key
    totals: np.ndarray  # c(h) of each context
    kinds: np.ndarray  # N(h) of each context
    discount: float  # D


class KneserNey(NamedTuple):
    """A trained model. grams[k - 1] holds the n-grams of length k."""

    vocab: int
    grams: tuple[Grams, ...]


def kneser_ney(tokens: Shaped[np.ndarray, "..."], *, order: int, vocab: int) -> KneserNey:
    """Counts a text.

    order: length of the longest n-gram. Each discount is n_1 / (n_1 + 2 n_2), where n_r is the
    number of n-grams of that length with c = r (Chen & Goodman). Where n_1 or n_2 is 0 it would be
    0, which forbids new tokens, or 1, which forgets n-grams of c = 1. There it is 1/2 (ours).
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"tokens must be whole numbers [N], got {got}")
    if not 1 <= order <= len(tokens):
        raise ValueError(f"order must lie in 1..{len(tokens)}, the length of the text, got {order}")
    if tokens.min() < 0 or tokens.max() >= vocab:
        found = f"{tokens.min()}..{tokens.max()}"
        raise ValueError(f"tokens must lie in 0..{vocab - 1}, got {found}")
    tokens = tokens.astype(np.int64)
    rows, lengths = np.zeros(len(tokens) + 1, np.int64), []
    for k in range(1, order + 1):
        # rows[i]: row of the (k-1)-gram that ends before token i, for the tokens from k - 1 on
        keys, first, rows_k, counts = np.unique(
            rows[:-1] * vocab + tokens[k - 1 :],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        lengths.append((keys, counts, rows_k, first))
        rows = rows_k
    grams = []
    for k, (keys, counts, _, _) in enumerate(lengths, 1):
        if k < order:
            counts = _preceding(lengths[k - 1][2], lengths[k][3], len(keys))
        contexts = keys // vocab
        n = 1 if k == 1 else len(lengths[k - 2][0])
        totals = np.bincount(contexts, counts, n)
        kinds = np.bincount(contexts, counts > 0, n)
        grams.append(Grams(keys, counts, totals, kinds, _discount(counts)))
    return KneserNey(vocab, tuple(grams))


def _preceding(rows: np.ndarray, first: np.ndarray, n: int) -> np.ndarray:
    """Returns how many different tokens precede each of n k-grams.

    rows: of the k-grams, in the order of the text. first: where each (k+1)-gram begins first; the
    k-gram that ends it begins one token later.
    """
    return np.bincount(rows[first + 1], minlength=n)


def _discount(counts: np.ndarray) -> float:
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    return float(once / (once + 2 * twice)) if once and twice else 0.5


def _rows(grams: Grams, keys: np.ndarray) -> np.ndarray:
    """Returns the row of each key, -1 where there is none; keys below 0 have none."""
    row = np.minimum(np.searchsorted(grams.keys, keys), len(grams.keys) - 1)
    return np.where(grams.keys[row] == keys, row, -1)


def probabilities(model: KneserNey, contexts: Int[np.ndarray, "B C"]) -> np.ndarray:
    """Returns P(w | context) of all V tokens, float64 [B, V].

    Only the last order - 1 tokens of a context count. It may be shorter.
    """
    contexts, V = np.asarray(contexts), model.vocab
    words = np.arange(V)
    p = np.full((len(contexts), V), 1 / V)
    for k, grams in enumerate(model.grams[: contexts.shape[1] + 1], 1):
        row = _context_rows(model, contexts, k)
        p = _interpolated(grams, row[:, None], row[:, None] * V + words, p)
    return p


def _context_rows(model: KneserNey, contexts: np.ndarray, k: int) -> np.ndarray:
    """Returns the row of the last k - 1 tokens among the (k-1)-grams, -1 where they are new."""
    row = np.zeros(len(contexts), np.int64)
    for j in range(k - 1):
        key = np.where(row >= 0, row * model.vocab + contexts[:, contexts.shape[1] - k + 1 + j], -1)
        row = _rows(model.grams[j], key)
    return row


def _interpolated(grams: Grams, context, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Returns P_k of some tokens; lower: their P_{k-1}."""
    known = context >= 0
    at = np.where(known, context, 0)
    total, kinds = grams.totals[at], grams.kinds[at]
    row = _rows(grams, np.where(known, keys, -1))
    count = np.where(row >= 0, grams.counts[row], 0)
    known &= total > 0
    total = np.where(known, total, 1)
    p = (np.maximum(count - grams.discount, 0) + grams.discount * kinds * lower) / total
    return np.where(known, p, lower)


def log_probs(model: KneserNey, tokens: Int[np.ndarray, "N"]) -> np.ndarray:
    """Returns log P of each token given those before it in the text, nats, float64 [N].

    The first tokens have shorter contexts.
    """
    tokens, V = np.asarray(tokens).astype(np.int64), model.vocab
    if tokens.size and (tokens.min() < 0 or tokens.max() >= V):
        raise ValueError(f"tokens must lie in 0..{V - 1}, got {tokens.min()}..{tokens.max()}")
    p = np.full(len(tokens), 1 / V)
    rows = np.zeros(len(tokens), np.int64)  # of the (k-1)-gram that ends before each token
    for k, grams in enumerate(model.grams, 1):
        if k > len(tokens):
            break
        keys = np.where(rows >= 0, rows * V + tokens, -1)
        new = _interpolated(grams, rows, keys, p)
        p = np.where(np.arange(len(tokens)) >= k - 1, new, p)
        found = _rows(grams, keys)  # row of the k-gram that ends with each token
        rows = np.concatenate([[-1], found[:-1]])
    return np.log(p)


def sample_ngrams(
    model: KneserNey,
    rng: np.random.Generator,
    *,
    n: int,
    length: int,
    prompt: Any = (),
) -> Int[np.ndarray, "n L"]:
    """Samples n continuations of a prompt (tokens [T]), `length` tokens each, int32."""
    text = np.repeat(np.asarray(prompt, np.int64)[None], n, 0)
    size, window = text.shape[1], len(model.grams) - 1
    for _ in range(length):
        p = probabilities(model, text[:, max(0, text.shape[1] - window) :])
        new = (p.cumsum(-1) <= rng.random((n, 1)) * p.sum(-1, keepdims=True)).sum(-1, keepdims=True)
        text = np.concatenate([text, np.minimum(new, model.vocab - 1)], 1)
    return text[:, size:].astype(np.int32)
