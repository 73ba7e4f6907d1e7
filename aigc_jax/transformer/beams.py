"""Beam search over any next-token function, by the rules of Hugging Face's `transformers` (its version 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .sampling import Sampling, ban_repeats, filter_logits, occurred, penalise


class Rules(NamedTuple):
    """How a search chooses. The numbers of `sampling`, the stop tokens and the length penalty may be traced."""

    new: int  # most new tokens
    stop: Int[Array, "E"]
    length_penalty: Any
    early_stopping: bool | str
    no_repeat_ngram_size: int
    sampling: Sampling


class Beams(NamedTuple):
    """M prefixes that go on and M texts that ended, of each of B prompts, both best first. -1 is no token."""

    text: Int[Array, "B M S"]
    log_p: Float[Array, "B M"]  # -inf: there is no such prefix
    ended: Int[Array, "B M S"]
    score: Float[Array, "B M"]  # -inf: there is no such text
    open: Bool[Array, "B"]  # a text that goes on may still be among the best
    damaged: Bool[Array, "B"]  # a logit was NaN


def search(
    logits: Float[Array, "BM V"],
    cache: Any,
    step: Callable[[Any, Array, Array], tuple[Array, Any]],
    text: Int[Array, "B M S"],
    key: Key[Array, ""] | None,
    rules: Rules,
) -> tuple[Int[Array, "B M N"], Float[Array, "B M"]]:
    """The texts that ended, best first, and their scores; the loop ends where none can become better.

    logits: of each prompt's first new token, M times. step(cache, rows, token): takes the rows of the cache that go on,
    and gives the logits after one more token each. text: the prompts, with `rules.new` columns of -1 behind them.
    Without a key the likeliest go on; with one they are drawn.
    """
    B, M, S = text.shape
    begin = S - rules.new
    first = jnp.full((B, M), -jnp.inf).at[:, 0].set(0.0)  # M equal prefixes would give M equal texts
    beams = Beams(text, first, text, jnp.full((B, M), -jnp.inf), jnp.ones(B, bool), jnp.zeros(B, bool))

    def grow(i, beams, logits):
        return _grow(beams, logits, i, begin + i, None if key is None else jax.random.fold_in(key, i), rules)

    def more(carry):
        i, beams, _, _ = carry
        return (i < rules.new) & beams.open.any()

    def one(carry):
        i, beams, parent, cache = carry
        token = jax.lax.dynamic_index_in_dim(beams.text, begin + i - 1, 2, keepdims=False)
        logits, cache = step(cache, (parent + jnp.arange(B)[:, None] * M).reshape(-1), token.reshape(-1))
        beams, parent = grow(i, beams, logits)
        return i + 1, beams, parent, cache

    beams, parent = grow(0, beams, logits)
    _, beams, _, _ = jax.lax.while_loop(more, one, (jnp.array(1), beams, parent, cache))
    tokens = jnp.where(beams.damaged[:, None, None], -1, beams.ended[:, :, begin:])
    return tokens, jnp.where(beams.damaged[:, None], jnp.nan, beams.score)


def _grow(beams: Beams, logits, i, at, key, rules: Rules) -> tuple[Beams, Int[Array, "B M"]]:
    """The beams with token number i, in column `at`, and which of the old ones each of those that go on was."""
    B, M, _ = beams.text.shape
    log_p = _log_probabilities(beams, logits, at, key is not None, rules)
    damaged = beams.damaged | jnp.isnan(log_p).any((1, 2))
    total = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p + beams.log_p[:, :, None]).reshape(B, -1)
    # As many as there must be for M to go on where each beam's likeliest are all stop tokens.
    count = min(max(2, 1 + len(rules.stop)) * M, total.shape[1])
    total, best = _drawn(total, count, key) if key is not None else jax.lax.top_k(total, count)
    parent, token = best // logits.shape[1], (best % logits.shape[1]).astype(jnp.int32)
    ends = (token[:, :, None] == rules.stop[None, None]).any(-1) | (i == rules.new - 1)
    text = jnp.take_along_axis(beams.text, parent[:, :, None], 1).at[:, :, at].set(token)
    log_p, on = jax.lax.top_k(jnp.where(ends, -jnp.inf, total), M)
    # Only the M best count as ended: what is less likely is there to go on. Behind the end the last token stands.
    filled = jnp.where(jnp.arange(text.shape[2])[None, None] > at, token[:, :, None], text)[:, :M]
    score = total[:, :M] / (i + 1.0) ** rules.length_penalty
    score = jnp.where(ends[:, :M] & beams.open[:, None], score, -jnp.inf)
    score, kept = jax.lax.top_k(jnp.concatenate([beams.score, score], 1), M)
    ended = jnp.take_along_axis(jnp.concatenate([beams.ended, filled], 1), kept[:, :, None], 1)
    text = jnp.take_along_axis(text, on[:, :, None], 1)
    grown = Beams(text, log_p, ended, score, beams.open & _may_improve(log_p, score, i + 1.0, rules), damaged)
    return grown, jnp.take_along_axis(parent, on, 1)


def _log_probabilities(beams: Beams, logits, at, drawn: bool, rules: Rules) -> Float[Array, "B M V"]:
    """Of the next token, after penalties and, where tokens are drawn, filters; not normalised again, as there."""
    B, M, S = beams.text.shape
    text = beams.text.reshape(-1, S)
    log_p = penalise(jax.nn.log_softmax(logits), occurred(text, logits.shape[1]), rules.sampling.repetition)
    log_p = ban_repeats(log_p, text, at, rules.no_repeat_ngram_size)
    if drawn:  # a beam needs one token that does not end it
        log_p = filter_logits(log_p, rules.sampling, least=max(2, 1 + len(rules.stop)))
    return log_p.reshape(B, M, -1)


def _drawn(total: Float[Array, "B MV"], count: int, key) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`count` different indices drawn from softmax(total), one after another (Kool et al. 2019), likeliest first."""
    _, at = jax.lax.top_k(total + jax.random.gumbel(key, total.shape), count)
    total, order = jax.lax.top_k(jnp.take_along_axis(total, at, 1), count)
    return total, jnp.take_along_axis(at, order, 1)


def _may_improve(log_p, score, length, rules: Rules) -> Bool[Array, "B"]:
    """Whether the likeliest beam that goes on may score above the worst that ended; True until M have ended.

    early_stopping False: as if it ended now, which is right where the penalty is 0. "never": as if it went on at no
    cost to the length that suits its score best. True: no, once M have ended.
    """
    if rules.early_stopping == "never":
        length = jnp.where(jnp.asarray(rules.length_penalty) > 0, float(rules.new), length)
    worst = score.min(-1)
    better = log_p[:, 0] / length**rules.length_penalty > worst
    return better & ~jnp.isfinite(worst) if rules.early_stopping is True else better
