"""Beam search over any next-token function, by the rules of `transformers` (version 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .sampling import Sampling, ban_repeats, filter_logits, occurred, penalise


class Rules(NamedTuple):
    """How a search chooses. `stop`, `length_penalty` and numbers of `sampling` may be traced."""

    new: int  # largest number of new tokens
    stop: Int[Array, "E"]
    length_penalty: Any
    early_stopping: bool | str
    no_repeat_ngram_size: int
    sampling: Sampling


class Beams(NamedTuple):
    """M open prefixes and M texts that ended, for each of B prompts, best first. -1 is no token."""

    text: Int[Array, "B M S"]
    log_p: Float[Array, "B M"]  # of the open prefixes; -inf: no such prefix
    ended: Int[Array, "B M S"]
    score: Float[Array, "B M"]  # of the texts that ended; -inf: no such text
    open: Bool[Array, "B"]  # an open prefix may still become one of the best
    damaged: Bool[Array, "B"]  # a logit was NaN


def search(
    logits: Float[Array, "BM V"],
    cache: Any,
    step: Callable[[Any, Array, Array], tuple[Array, Any]],
    text: Int[Array, "B M S"],
    key: Key[Array, ""] | None,
    rules: Rules,
) -> tuple[Int[Array, "B M N"], Float[Array, "B M"]]:
    """Returns the texts that ended, best first, and their scores; stops when none can improve.

    logits: of each prompt's first new token, M times.
    step(cache, rows, token): keeps `rows` of the cache, appends a token to each, and returns the
        logits after it and the cache.
    text: the prompts, followed by `rules.new` columns of -1.
    key: with a key the beams are sampled; without one the likeliest continue.
    """
    B, M, S = text.shape
    begin = S - rules.new
    # One open prefix at first: M equal prefixes would give M equal texts.
    first = jnp.full((B, M), -jnp.inf).at[:, 0].set(0.0)
    score = jnp.full((B, M), -jnp.inf)
    beams = Beams(text, first, text, score, jnp.ones(B, bool), jnp.zeros(B, bool))

    def grow(i, beams, logits):
        column = begin + i
        step_key = None if key is None else jax.random.fold_in(key, i)
        return _grow(beams, logits, i, column, step_key, rules)

    def unfinished(carry):
        i, beams, _, _ = carry
        return (i < rules.new) & beams.open.any()

    def body(carry):
        i, beams, parent, cache = carry
        token = jax.lax.dynamic_index_in_dim(beams.text, begin + i - 1, 2, keepdims=False)
        rows = (parent + jnp.arange(B)[:, None] * M).reshape(-1)
        logits, cache = step(cache, rows, token.reshape(-1))
        beams, parent = grow(i, beams, logits)
        return i + 1, beams, parent, cache

    beams, parent = grow(0, beams, logits)
    carry = (jnp.array(1), beams, parent, cache)
    _, beams, _, _ = jax.lax.while_loop(unfinished, body, carry)
    tokens = jnp.where(beams.damaged[:, None, None], -1, beams.ended[:, :, begin:])
    return tokens, jnp.where(beams.damaged[:, None], jnp.nan, beams.score)


def _grow(beams: Beams, logits, i, column, key, rules: Rules) -> tuple[Beams, Int[Array, "B M"]]:
    """Appends token number i, in `column`; returns the beams, and the old beam of each open one."""
    B, M, _ = beams.text.shape
    log_p = _log_probabilities(beams, logits, column, key is not None, rules)
    damaged = beams.damaged | jnp.isnan(log_p).any((1, 2))
    total = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p + beams.log_p[:, :, None]).reshape(B, -1)
    # Enough candidates for M open ones, even if the likeliest of each beam are all stop tokens.
    count = min(max(2, 1 + len(rules.stop)) * M, total.shape[1])
    total, best = _sample(total, count, key) if key is not None else jax.lax.top_k(total, count)
    parent, token = best // logits.shape[1], (best % logits.shape[1]).astype(jnp.int32)
    ends = (token[:, :, None] == rules.stop[None, None]).any(-1) | (i == rules.new - 1)
    text = jnp.take_along_axis(beams.text, parent[:, :, None], 1).at[:, :, column].set(token)
    log_p, on = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), M)
    # Only the M best candidates may end; the others are there to continue. A text that
    # ended is padded with its last token.
    after = jnp.arange(text.shape[2])[None, None] > column
    padded = jnp.where(after, token[:, :, None], text)[:, :M]
    score = total[:, :M] / (i + 1.0) ** rules.length_penalty
    score = jnp.where(ends[:, :M] & beams.open[:, None], score, -jnp.inf)
    score, kept = jax.lax.top_k(jnp.concatenate([beams.score, score], 1), M)
    ended = jnp.concatenate([beams.ended, padded], 1)
    ended = jnp.take_along_axis(ended, kept[:, :, None], 1)
    text = jnp.take_along_axis(text, on[:, :, None], 1)
    may_improve = beams.open & _may_improve(log_p, score, i + 1.0, rules)
    grown = Beams(text, log_p, ended, score, may_improve, damaged)
    return grown, jnp.take_along_axis(parent, on, 1)


def _log_probabilities(
    beams: Beams,
    logits: Float[Array, "BM V"],
    column: Any,
    sampled: bool,
    rules: Rules,
) -> Float[Array, "B M V"]:
    """Returns log p of the next token after penalties and, if tokens are sampled, after filters.

    It is not normalised again, as in `transformers`.
    """
    B, M, S = beams.text.shape
    text = beams.text.reshape(-1, S)
    log_p = jax.nn.log_softmax(logits)
    log_p = penalise(log_p, occurred(text, logits.shape[1]), rules.sampling.repetition)
    log_p = ban_repeats(log_p, text, column, rules.no_repeat_ngram_size)
    if sampled:  # a beam needs one token that does not end it
        log_p = filter_logits(log_p, rules.sampling, least=max(2, 1 + len(rules.stop)))
    return log_p.reshape(B, M, -1)


def _sample(
    total: Float[Array, "B MV"],
    count: int,
    key: Key[Array, ""],
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Samples `count` indices from softmax(total) without replacement; returns the likeliest first.

    By the Gumbel top-k trick (Kool et al. 2019).
    """
    _, index = jax.lax.top_k(total + jax.random.gumbel(key, total.shape), count)
    total, order = jax.lax.top_k(jnp.take_along_axis(total, index, 1), count)
    return total, jnp.take_along_axis(index, order, 1)


def _may_improve(log_p, score, length, rules: Rules) -> Bool[Array, "B"]:
    """Returns whether the likeliest open beam may beat the worst of M texts; True until M ended.

    early_stopping False: as if the beam ended now, which is right for penalty 0. "never":
    as if it continued at no cost to the length that gives the best score. True: no, once M
    texts ended.
    """
    if rules.early_stopping == "never":
        length = jnp.where(jnp.asarray(rules.length_penalty) > 0, float(rules.new), length)
    worst = score.min(-1)
    better = log_p[:, 0] / length**rules.length_penalty > worst
    return better & ~jnp.isfinite(worst) if rules.early_stopping is True else better
