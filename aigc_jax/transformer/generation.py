"""Continuing prompts: the cache of keys and values, `generate`, and `beam_search`.

Shapes: B prompts of T tokens, S slots of the cache or columns of a text, V = vocab, N new tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ..nn import causal
from .beams import Rules, search
from .model import Config, Params, call, check_length
from .sampling import Sampling, ban_repeats, occurred, penalise, sample_token

Integers = Array | np.ndarray | Sequence  # a prompt's are [B, T]


class Cache(NamedTuple):
    """Keys and values of the positions so far, in slots that are allocated once.

    All rows write to the same slot, so that a step changes one slice of memory. A row with
    a short prompt has unused slots between the prompt and the new tokens; `filled` masks
    them. The position of a token counts tokens, not slots.
    """

    kv: tuple[tuple[Array, Array], ...]  # of each layer: keys and values [B, H, S, K]
    filled: Bool[Array, "B S"]  # slots to look at
    lengths: Int[Array, "B"]  # tokens so far, which is the position of the next one
    slot: Int[Array, ""]  # where the next token is written


def prefill(
    cfg: Config,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths: Integers | None = None,
    *,
    slots: int | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads prompts; returns the logits after the last token of each, and a cache for `decode`.

    lengths: tokens per row, 1 to T, by default T. What comes after them is ignored.
    slots: of the cache, at least T, by default the context.

    Raises ValueError where T does not fit the context or the slots.
    """
    B, T = tokens_BT.shape
    check_length(cfg, T)
    slots = cfg.context if slots is None else slots
    if slots < T:
        raise ValueError(f"a cache of {slots} slots does not hold a prompt of {T} tokens")
    lengths = jnp.full(B, T, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    x_BTD = call(cfg, params, "embed", tokens_BT)
    h_BTD, kv = call(cfg, params, "run", x_BTD, *causal(B, T))
    last_BD = jnp.take_along_axis(h_BTD, lengths[:, None, None] - 1, axis=1)[:, 0]
    kv = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - T), (0, 0))), kv)
    filled = jnp.arange(slots)[None] < lengths[:, None]
    logits = call(cfg, params, "unembed", last_BD)
    return logits, Cache(kv, filled, lengths, jnp.array(T, jnp.int32))


def decode(
    cfg: Config,
    params: Params,
    token_B: Int[Array, "B"],
    cache: Cache,
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends one token per row; returns the logits after it, and the new cache.

    The caller must stop at the last slot and at the context. Beyond them results are wrong,
    and no error is raised.
    """
    new = jnp.ones((len(token_B), 1), bool)
    filled = jax.lax.dynamic_update_slice_in_dim(cache.filled, new, cache.slot, 1)
    x_BTD = call(cfg, params, "embed", token_B[:, None])
    mask, positions = filled[:, None], cache.lengths[:, None]
    h_BTD, kv = call(cfg, params, "run", x_BTD, mask, positions, cache.kv, cache.slot)
    logits = call(cfg, params, "unembed", h_BTD[:, 0])
    return logits, Cache(kv, filled, cache.lengths + 1, cache.slot + 1)


# ---------------------------------------------------------------------- checks of a request


def _check_integers(
    name: str,
    x: Integers,
    shape: tuple,
    low: int,
    high: int,
    message: str,
) -> Int[Array, "..."]:
    """Returns x as int32 of this shape (None: any size).

    Raises ValueError where x is no such array, with `message`, or where values lie outside
    low..high. Traced values are not checked.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
    try:  # under jit, a list may hold tracers
        x = x if isinstance(x, jax.Array) else jnp.asarray(x) if traced else np.asarray(x)
    except (ValueError, TypeError) as e:  # rows of unequal lengths
        raise ValueError(message) from e
    sizes = zip(shape, x.shape, strict=False)
    if x.ndim != len(shape) or any(size not in (None, got) for size, got in sizes):
        raise ValueError(message)
    if not x.size:
        raise ValueError("the prompt is empty: a model continues at least one token")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} of a prompt are whole numbers, got {x.dtype}")
    if not traced and getattr(x, "is_fully_addressable", True):
        values = np.asarray(x)  # an operation of JAX would be traced inside jit
        if not low <= values.min() <= values.max() <= high:
            got = f"{values.min()}..{values.max()}"
            raise ValueError(f"{name} of a prompt lie in {low}..{high}, got {got}")
    return jnp.asarray(x, jnp.int32)


def _check_count(name: str, value: Any, least: int) -> int:
    """Returns value as an int; ValueError unless it is static, whole, and at least `least`."""
    try:
        value = operator.index(value)
    except TypeError as e:
        raise ValueError(f"{name} must be a whole number, got {value!r:.40}") from e
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class _Request(NamedTuple):
    """Prompts that were checked, and how they are to be continued."""

    prompt: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    new: int  # largest number of new tokens
    ngram: int  # size of the runs that must not occur twice; 0: they may
    text: Int[Array, "B S"]  # columns of -1, the prompts aligned on the right, `new` columns of -1


def _check_request(cfg: Config, prompt, lengths, max_new_tokens, max_length, ngram) -> _Request:
    """Returns the request; raises ValueError where the model cannot serve it."""
    check_length(cfg, 1)
    message = "a prompt is tokens [B, T], as Tokenizer.encode(text)[None] gives them"
    prompt = _check_integers("tokens", prompt, (None, None), 0, cfg.vocab - 1, message)
    B, T = prompt.shape
    new = _new_tokens(cfg, T, max_new_tokens, max_length)
    lengths = np.full(B, T) if lengths is None else lengths
    message = f"lengths are one number for each of {B} prompts"
    lengths = _check_integers("lengths", lengths, (B,), 1, T, message)
    ngram = _check_count("no_repeat_ngram_size", ngram, 0)
    ngram = ngram if ngram < T + new else 0
    column = jnp.arange(T)[None] - T + lengths[:, None]
    padding = column < 0
    text = jnp.where(padding, -1, jnp.take_along_axis(prompt, jnp.maximum(column, 0), 1))
    text = jnp.pad(text, ((0, 0), (max(0, ngram - 1), new)), constant_values=-1)
    return _Request(prompt, lengths, new, ngram, text)


def _new_tokens(cfg: Config, T: int, max_new_tokens, max_length) -> int:
    """Returns the number of new tokens after prompts of T; ValueError where they do not fit."""
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError("say either max_new_tokens or max_length, which counts the prompt too")
    if max_length is None:
        new = _check_count("max_new_tokens", max_new_tokens, 1)
    elif (new := _check_count("max_length", max_length, 1) - T) < 1:
        raise ValueError(f"max_length {max_length} leaves no new token after a prompt of {T}")
    if T + new - 1 > cfg.context:  # the last new token takes no position: nothing follows it
        most = f", or ask for at most {cfg.context - T + 1}" if T <= cfg.context else ""
        words = f"exceed the context of {cfg.context}: cut the prompt{most}"
        raise ValueError(f"a prompt of {T} tokens and {new} new ones {words}")
    return new


def _stop_tokens(cfg: Config, stop: Any) -> Int[Array, "E"]:
    """Returns the tokens that end a text: `stop`, or where it is None those of the model."""
    stop = cfg.eos if stop is None else stop
    return jnp.asarray(() if stop is None else stop, jnp.int32).reshape(-1)


def _prefill_copies(
    cfg: Config,
    params: Params,
    request: _Request,
    copies: int,
) -> tuple[Float[Array, "Bn V"], Cache]:
    """Reads each prompt once; returns its logits and its cache once per continuation."""
    slots = request.prompt.shape[1] + request.new - 1
    logits, cache = prefill(cfg, params, request.prompt, request.lengths, slots=slots)
    copied = cache._replace(slot=jnp.zeros(len(logits)))
    logits, copied = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), (logits, copied))
    return logits, copied._replace(slot=cache.slot)


# ------------------------------------------------------------------------------- generation


def generate(
    cfg: Config,
    params: Params,
    prompt: Integers,
    key: Key[Array, ""],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    sampling: Sampling = Sampling(),
    lengths: Integers | None = None,
    n: int = 1,
    no_repeat_ngram_size: int = 0,
) -> Int[Array, "Bn N"]:
    """Samples n continuations of each prompt [B, T], those of one prompt in adjacent rows.

        continue_ = jax.jit(partial(transformer.generate, cfg, max_new_tokens=100))
        tokens = continue_(params, prompt, key, sampling=Sampling(0.8))

    Numbers in `sampling` are traced: another temperature does not compile again. The
    distribution of a token is that of `transformers`: repetition penalty, temperature,
    top_k, top_p, min_p.

    max_length: of prompt and continuation together, T included, instead of max_new_tokens.
    lengths: tokens per prompt, 1 to T, where they differ; pad on the right with any token.
    no_repeat_ngram_size: no run of this many tokens occurs twice in prompt and continuation; 0: any
        may. Where all tokens are forbidden, the token is 0.

    After a stop token come only stop tokens; the loop ends when every row has one. Stop
    tokens are `sampling.stop`, else `cfg.eos`. Where logits are NaN, as of damaged weights,
    the token is -1.

    Raises ValueError where prompt and continuation exceed the context by more than one token: the
    last token takes no position. Also for a prompt that is empty or not of whole numbers. Also for
    tokens outside the vocabulary and lengths above T, unless they are traced.
    """
    request = _check_request(cfg, prompt, lengths, max_new_tokens, max_length, no_repeat_ngram_size)
    n = _check_count("n", n, 1)
    stop = _stop_tokens(cfg, sampling.stop)
    logits, cache = _prefill_copies(cfg, params, request, n)
    return _sample_tokens(cfg, params, request, logits, cache, key, n, stop, sampling)


def _sample_tokens(cfg, params, request, logits, cache, key, n, stop, sampling):
    """The loop of `generate`: one token per row and step, until all rows have a stop token."""
    new = request.new
    text = jnp.repeat(request.text, n, axis=0)
    used = occurred(text, cfg.vocab)
    rows, begin = jnp.arange(len(text)), text.shape[1] - new

    def choose(i, logits, used, done, last, text):
        logits = penalise(logits, used, sampling.repetition)
        logits = ban_repeats(logits, text, begin + i, request.ngram)
        token = sample_token(logits, jax.random.fold_in(key, i), sampling)
        token = jnp.where(done, last, token)
        done = done | (token[:, None] == stop[None]).any(-1)
        return token, used.at[rows, token].set(True), done, text.at[:, begin + i].set(token)

    def unfinished(carry):
        i, _, _, _, done, _ = carry
        return (i < new) & ~done.all()

    def body(carry):
        i, token, cache, used, done, text = carry
        logits, cache = decode(cfg, params, token, cache)
        token, used, done, text = choose(i, logits, used, done, token, text)
        return i + 1, token, cache, used, done, text

    done, last = jnp.zeros(len(text), bool), jnp.zeros(len(text), jnp.int32)
    token, used, done, text = choose(0, logits, used, done, last, text)
    carry = (jnp.array(1), token, cache, used, done, text)
    i, last, *_, text = jax.lax.while_loop(unfinished, body, carry)
    return jnp.where(jnp.arange(new)[None] < i, text[:, begin:], last[:, None])


def beam_search(
    cfg: Config,
    params: Params,
    prompt: Integers,
    key: Key[Array, ""] | None = None,
    *,
    beams: int,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    lengths: Integers | None = None,
    stop: Any = None,
    length_penalty: Any = 1.0,
    early_stopping: bool | str = False,
    no_repeat_ngram_size: int = 0,
    sampling: Sampling = Sampling(),
) -> tuple[Int[Array, "B M N"], Float[Array, "B M"]]:
    """Returns the M = `beams` best continuations found of each prompt [B, T], and their scores.

    The best one is first. The score is log p / length**length_penalty in nats, over new
    tokens with their stop token. Tokens and scores are those of `transformers`. A text that
    ended is padded with its stop token.

    early_stopping: when a prompt is finished, once M texts have ended. True: at once. False: when
        the likeliest beam, if it ended now, would score no better than the worst of the M.
        "never": when it could not at any length.
    key: with a key, `sampling` draws the beams (beam sampling), without replacement, from the
        filtered log p of all beams together. Without one, only its repetition and stop matter.
    stop: tokens that end a text, else `sampling.stop`, else `cfg.eos`; their number is static.
    max_length, lengths, no_repeat_ngram_size: as in `generate`.

    Where fewer than M texts exist, the rest have score -inf and tokens -1. Where logits are
    NaN, scores are NaN and tokens -1.

    Raises ValueError where `generate` does, and where beams exceed the vocabulary.
    """
    request = _check_request(cfg, prompt, lengths, max_new_tokens, max_length, no_repeat_ngram_size)
    if not 1 <= _check_count("beams", beams, 1) <= cfg.vocab:
        raise ValueError(f"beams must lie in 1..{cfg.vocab}, got {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}')
    early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
    if isinstance(length_penalty, (int, float)) and not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    logits, cache = _prefill_copies(cfg, params, request, beams)

    def step(cache, rows, token):
        kept = cache._replace(kv=jax.tree.map(lambda x: x[rows], cache.kv))
        return decode(cfg, params, token, kept)

    stop = _stop_tokens(cfg, sampling.stop if stop is None else stop)
    text = jnp.repeat(request.text[:, None], beams, axis=1)
    rules = Rules(request.new, stop, length_penalty, early_stopping, request.ngram, sampling)
    return search(logits, cache, step, text, key, rules)
