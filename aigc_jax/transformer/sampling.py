"""From logits to a token: which tokens stay possible, and which of them is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

LARGEST, SMALLEST = (float(x) for x in (jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).tiny))


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled: a pytree of numbers, for which jit compiles once."""

    temperature: Any = 1.0  # logits are divided by it; 0: the most likely token
    top_k: Any = 0  # keep the k most likely tokens; 0: all (Fan et al. 2018)
    # Keep the fewest most likely tokens that have this probability together (Holtzman et al. 2020).
    top_p: Any = 1.0
    # Keep tokens at least this many times as likely as the most likely one (Nguyen et al. 2024).
    min_p: Any = 0.0
    # Divides positive logits of tokens that occurred, and multiplies negative ones; 1: none.
    repetition: Any = 1.0
    stop: Any = None  # tokens that end a sequence; None: those of the model's config; (): none

    def __post_init__(self):
        conditions = {
            "temperature": (lambda x: 0 <= x < float("inf"), "at least 0"),
            "top_k": (lambda x: x >= 0 and x == int(x), "a whole number, at least 0"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
            "repetition": (lambda x: 0 < x < float("inf"), "positive"),
        }
        for name, (holds, words) in conditions.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)):  # a tracer, under jit
                continue
            if not holds(value):
                raise ValueError(f"sampling.{name} must be {words}, got {value}")
            # One type per field, because jit compiles again for another one (0 is not 0.0
            # to it), and no number larger than 32 bits hold.
            largest = min(int(value), 2**31 - 1) if name == "top_k" else min(float(value), LARGEST)
            object.__setattr__(self, name, largest)


jax.tree_util.register_dataclass(Sampling, [f for f in Sampling.__dataclass_fields__], [])


def penalise(
    logits: Float[Array, "B V"],
    used: Bool[Array, "B V"],
    repetition: Any,
) -> Float[Array, "B V"]:
    """Returns logits with a penalty on `used` tokens (Keskar et al. 2019).

    Positive logits are divided by `repetition`, negative ones multiplied by it.
    """
    return jnp.where(used, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)


def occurred(tokens: Int[Array, "B S"], vocab: int) -> Bool[Array, "B V"]:
    """Returns which tokens of the vocabulary a text holds. Negative numbers stand for no token."""
    rows, known = jnp.arange(len(tokens))[:, None], jnp.where(tokens < 0, vocab, tokens)
    return jnp.zeros((len(tokens), vocab), bool).at[rows, known].set(True, mode="drop")


def ban_repeats(
    logits: Float[Array, "B V"],
    text: Int[Array, "B S"],
    column: Any,
    size: int,
) -> Float[Array, "B V"]:
    """Returns logits with -inf for each token that would complete a second equal n-gram of `size`.

    text: the text so far, which ends before `column`. -1 stands for no token: in at least size - 1
        columns on the left, and in all from `column` on.
    size: 0 bans no token. Where all tokens are banned, all logits are -inf.
    """
    if not 0 < size <= text.shape[1]:
        return logits
    width = text.shape[1] - size + 1  # n-grams of the text, one starting in each column
    # The last size - 1 tokens. (For size 1 one column, which is not read.)
    suffix = jax.lax.dynamic_slice_in_dim(text, column - (size - 1), max(1, size - 1), 1)

    def match(j, matches):
        token_j = jax.lax.dynamic_slice_in_dim(text, j, width, 1)
        return matches & (token_j == jax.lax.dynamic_slice_in_dim(suffix, j, 1, 1))

    matches = jax.lax.fori_loop(0, size - 1, match, jnp.ones((len(text), width), bool))
    banned = occurred(jnp.where(matches, text[:, size - 1 :], -1), logits.shape[1])
    return jnp.where(banned, -jnp.inf, logits)


def _largest_threshold(order: Array, holds) -> Array:
    """Returns the largest t [B] for which holds(order >= t[:, None]) [B].

    It must hold for all tokens together. Bisection over the 32 bits is exact, and 20 times
    as fast as sorting GPT-2's vocabulary.
    """

    def body(i, t):
        higher = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(order >= higher[:, None]), higher, t)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(order.shape[0], jnp.uint32))


def _ordered_bits(logits: Float[Array, "B V"]) -> Array:
    """Returns unsigned integers in the order of the logits; both zeros give the same one."""
    bits = jnp.where(logits == 0, 0.0, logits).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _heat(logits: Float[Array, "B V"], sampling: Sampling, greedy: Array) -> Float[Array, "B V"]:
    """Returns logits / temperature. If that would overflow, the largest is shifted to 0 first."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Above 1e30 the processor takes its inverse for 0, and 0 times -inf is NaN.
    temperature = jnp.where(greedy, 1.0, jnp.minimum(sampling.temperature, 1e30))
    largest = logits.max(-1, keepdims=True)
    overflows = jnp.isfinite(largest) & ~jnp.isfinite(largest / temperature)
    return jnp.where(overflows, logits - largest, logits) / temperature


def filter_logits(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    least: int = 1,
) -> Float[Array, "B V"]:
    """Returns logits / temperature, with -inf for tokens that cannot be sampled.

    top_k, top_p and min_p are applied in turn, each to what the last one left. A token as
    likely as the least likely one kept is kept too. The `least` most likely tokens are
    always kept. Exact, without sorting the vocabulary.
    """
    greedy = _greedy(sampling)
    logits = _heat(logits, sampling, greedy)
    order = _ordered_bits(logits)

    def keep(logits, kept):
        return jnp.where(kept, logits, -jnp.inf)

    def most_likely(k):
        def enough(kept):
            return kept.sum(-1) >= jnp.minimum(k, order.shape[-1])

        return order >= _largest_threshold(order, enough)[:, None]

    def top_k(logits):
        return keep(logits, most_likely(jnp.maximum(sampling.top_k, least)))

    def top_p(logits):
        p = jax.nn.softmax(logits)
        total = p.sum(-1)  # 1 up to rounding, which matters for top_p close to 1

        def enough(kept):  # at least one token, also for a top_p that 32 bits round to 0
            return (jnp.where(kept, p, 0.0).sum(-1) >= sampling.top_p * total) & kept.any(-1)

        return keep(logits, order >= _largest_threshold(order, enough)[:, None])

    def unchanged(logits):
        return logits

    left = jax.lax.cond(jnp.asarray(sampling.top_k) > 0, top_k, unchanged, logits)
    left = jax.lax.cond(jnp.asarray(sampling.top_p) < 1, top_p, unchanged, left)
    largest = left.max(-1, keepdims=True)
    left = keep(left, left >= largest + jnp.where(greedy, 0.0, jnp.log(sampling.min_p)))
    return left if least == 1 else jnp.where(most_likely(least), logits, left)


def _greedy(sampling: Sampling) -> Array:
    """Returns whether the temperature is 0, or so small that the processor takes it for 0."""
    return jnp.asarray(sampling.temperature) < SMALLEST


def sample_token(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    sampling: Sampling,
) -> Int[Array, "B"]:
    """Samples one token per row from softmax(filter_logits(logits, sampling)).

    At temperature 0 it is the first of the most likely tokens. A row with NaN gives -1; a
    row that is all -inf gives token 0.
    """

    def most_likely(logits):
        # The same as argmax, which takes four times as long on the CPU.
        largest = logits == logits.max(-1, keepdims=True)
        index = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        return jnp.where(largest, index, logits.shape[-1]).min(-1)

    def sampled(logits):
        return categorical(filter_logits(logits, sampling), key)

    token = jax.lax.cond(_greedy(sampling), most_likely, sampled, logits)
    return jnp.where(jnp.isnan(logits.max(-1)), -1, token)


draw = sample_token  # its old name


def categorical(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    block: int = 256,
) -> Int[Array, "B"]:
    """Samples from softmax(logits) by its distribution function: a block of tokens, then one of it.

    That takes two random numbers per row, where Gumbel noise takes one per token. It has
    two levels, because a float32 sum over all tokens would lose those of small probability.
    Tokens of probability 0 are never sampled.
    """
    B, V = logits.shape
    p = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(p, ((0, 0), (0, -V % block))).reshape(B, -1, block)
    u = jax.random.uniform(key, (2, B))

    def pick(p, u):
        """Returns the first index at which the running sum exceeds u times the total."""
        total = jnp.cumsum(p, -1)
        passed = (total > u[:, None] * total[:, -1:]) & (p > 0)
        # u < 1, but u * total may round up to the total. Then the most likely one is taken.
        return jnp.where(passed.any(-1), passed.argmax(-1), p.argmax(-1)).astype(jnp.int32)

    block_index = pick(blocks.sum(-1), u[0])
    first = block_index * block
    within = jnp.take_along_axis(blocks, block_index[:, None, None], 1)[:, 0]
    return first + pick(within, u[1])
