"""Diffusion of tokens: Austin et al. 2021 ("D3PM"), and its limit of infinitely many steps.

A process destroys a text x_0 [B, L] of tokens 0 .. V-1 while a time t goes from 0 to 1. A token is
kept up to t with probability alpha(t), independently of the others. Otherwise it

- "absorbing": becomes the mask token V, and stays masked
- "uniform": is drawn anew from all V tokens

`logits_fn(x_t [B, L], t [B]) -> [B, L, V]` predicts x_0. Its softmax p_hat may come from a network
or from an exact computation. A step back from t to s < t is, for each token,

    p(x_s | x_t) = sum over x_0 of q(x_s | x_t, x_0) p_hat(x_0 | x_t).

It is the true reverse of q if p_hat is the true posterior. D3PM's eq. 4 is the same step, with
p_hat proportional to q(x_t | x_0) p_tilde(x_0): their network gives p_tilde, which need not know
that x_t is probably right. `log_evidence` is log q(x_t | x_0).

For "absorbing" the bound is a cross entropy at masked tokens, with a weight that depends on t: Shi
et al. 2024 ("MD4") and Sahoo et al. 2024 ("MDLM"). Its p_hat needs no t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from .bounds import low_discrepancy, step_at
from .schedules import at_least_float32

Tokens = Int[Array | np.ndarray, "B L"]
TokensLike = Shaped[Array | np.ndarray, "B L"]  # checked: whole numbers 0 .. V-1
Logits = Float[Array, "B L V"]
LogitsFn = Callable[[Any, Any], Any]
Process = str  # "absorbing" | "uniform"
MaskSchedule = str  # "linear" | "cosine"
Order = str  # "random" | "confidence" | "ancestral"
Nats = Float[Array, "B L"]
Step = Callable[[Any, Any], Any]  # (x [B, L], i) -> x


# ------------------------------------------------------------------------------- the process


def alpha(schedule: MaskSchedule, t):
    """Returns alpha(t), the probability that a token is kept up to t; from 1 down to 0.

    "linear": 1 - t. "cosine": 1 - cos(pi (1 - t) / 2) (the code of MD4).
    """
    return 1 - t if schedule == "linear" else 2 * jnp.sin(math.pi / 4 * (1 - t)) ** 2


def one_minus_alpha(schedule: MaskSchedule, t):
    """Returns 1 - alpha(t), accurate also where it is small."""
    return t if schedule == "linear" else jnp.sin(math.pi / 2 * t)


def alpha_drop(schedule: MaskSchedule, s, t):
    """Returns alpha(s) - alpha(t), accurate also where both are near 1."""
    early = one_minus_alpha(schedule, t) - one_minus_alpha(schedule, s)
    return jnp.where(t < 0.5, early, alpha(schedule, s) - alpha(schedule, t))


def minus_alpha_slope(schedule: MaskSchedule, t):
    """Returns -alpha'(t)."""
    one = jnp.ones_like(t)
    return one if schedule == "linear" else math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t))


def time_of(schedule: MaskSchedule, share):
    """Returns the t at which 1 - alpha(t) equals `share`."""
    return share if schedule == "linear" else 2 / math.pi * jnp.arcsin(share)


def corrupt(
    process: Process,
    tokens: Tokens,
    t: Float[Array, "B"],
    key: Key[Array, ""],
    *,
    vocab: int,
    schedule: MaskSchedule = "linear",
    mask: Any = None,
) -> Int[Array, "B L"]:
    """Returns x_t ~ q(x_t | x_0). mask [B, L]: tokens with 0 stay as they are."""
    k_change, k_new = jax.random.split(key)
    share = one_minus_alpha(schedule, t)[:, None]
    changed = jax.random.uniform(k_change, tokens.shape, share.dtype) < share
    if mask is not None:
        changed &= jnp.asarray(mask) > 0
    new = vocab
    if process == "uniform":
        new = jax.random.randint(k_new, tokens.shape, 0, vocab, jnp.int32)
    return jnp.where(changed, new, jnp.asarray(tokens, jnp.int32))


def log_evidence(
    x_t: Tokens, t: Float[Array, "B"], *, vocab: int, schedule: MaskSchedule = "linear"
) -> Logits:
    """Returns log q(x_t | x_0) of the uniform process for all V values of x_0."""
    at_x = jax.nn.one_hot(x_t, vocab, dtype=t.dtype)
    a_t, b_t = (f(schedule, t)[:, None, None] for f in (alpha, one_minus_alpha))
    return jnp.log(a_t * at_x + b_t / vocab)


def _per_token(x: Array) -> Array:
    """Returns [B, 1] of [B]."""
    return x[:, None]


def step_log_probs(
    logits: Logits,
    x_t: Tokens,
    s: Float[Array, "B"],
    t: Float[Array, "B"],
    *,
    schedule: MaskSchedule = "linear",
) -> Logits:
    """Returns log p(x_s | x_t) of the uniform process for all V values of x_s.

    By Bayes, q(x_s = y | x_t = x, x_0 = z) = q_ts(x | y) q_s(y | z) / q_t(x | z), with
        q_ts(x | y) = a_ts [x = y] + u_ts    from s to t
        q_s(y | z) = a_s [y = z] + u_s       from 0 to s
        q_t(x | z) = a_t [x = z] + u_t       from 0 to t
    Here a is the probability that a token is kept, and u = (1 - a) / V. The sum over z is
        p(y) = q_ts(x | y) (a_s p_hat(y) / q_t(x | y) + u_s C)
    with C = sum over z of p_hat(z) / q_t(x | z).
    """
    V = logits.shape[-1]
    log_p_hat = jax.nn.log_softmax(logits)
    at_x = jax.nn.one_hot(x_t, V, dtype=logits.dtype)  # [x_t = y]
    a_s, a_t = (alpha(schedule, time)[:, None, None] for time in (s, t))
    u_s = one_minus_alpha(schedule, s)[:, None, None] / V
    a_ts = a_t / a_s
    u_ts = alpha_drop(schedule, s, t)[:, None, None] / a_s / V  # 1 - a_ts, shared by V tokens
    log_q_t = log_evidence(x_t, t, vocab=V, schedule=schedule)  # of x_t given x_0 = y
    log_C = jax.nn.logsumexp(log_p_hat - log_q_t, -1, keepdims=True)
    straight = jnp.log(a_s) + log_p_hat - log_q_t
    return jnp.log(a_ts * at_x + u_ts) + jnp.logaddexp(straight, jnp.log(u_s) + log_C)


# --------------------------------------------------------------------------------- the bound


def cross_entropy(logits: Logits, tokens: Tokens) -> Nats:
    """Returns -log p_hat of each true token."""
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[..., None], -1)
    return -own[..., 0]


def step_kl(
    process: Process,
    logits: Logits,
    tokens: Tokens,
    x_t: Tokens,
    s: Float[Array, "B"],
    t: Float[Array, "B"],
    *,
    schedule: MaskSchedule = "linear",
) -> Nats:
    """Returns KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of each token, one term of D3PM eq. 1.

    At s = 0 it is -log p(x_0 | x_t), the term of the decoder.
    """
    if process == "absorbing":
        masked = x_t == logits.shape[-1]
        weight = _per_token(alpha_drop(schedule, s, t) / one_minus_alpha(schedule, t))
        return jnp.where(masked, weight * cross_entropy(logits, tokens), 0.0)
    V = logits.shape[-1]
    at_x, at_0 = (jax.nn.one_hot(x, V, dtype=logits.dtype) for x in (x_t, tokens))
    a_s, a_t = (alpha(schedule, time)[:, None, None] for time in (s, t))
    u_s = one_minus_alpha(schedule, s)[:, None, None] / V
    u_ts = alpha_drop(schedule, s, t)[:, None, None] / a_s / V
    q = (a_t / a_s * at_x + u_ts) * (a_s * at_0 + u_s)
    q = q / q.sum(-1, keepdims=True)
    log_p = step_log_probs(logits, x_t, s, t, schedule=schedule)
    return jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1.0)) - log_p), 0.0).sum(-1)


def kl_rate(
    process: Process,
    logits: Logits,
    tokens: Tokens,
    x_t: Tokens,
    t: Float[Array, "B"],
    *,
    schedule: MaskSchedule = "linear",
) -> Nats:
    """Returns the limit of T `step_kl` for T steps of equal length, of each token.

    The expectation of its integral over t from 0 to 1 is the bound in continuous time.

    "absorbing": -alpha' / (1 - alpha) times the cross entropy, at masked tokens (MD4 eq. 4).
    "uniform": a token changes to y at the rate (beta / V) w(y) backwards in time. Here beta is
    -alpha' / alpha, and w(y) = q(x_t = y | x_0) / q(x_t | x_0). The rate of p is the mean w_hat of
    w under p_hat. The KL of the two is beta / V times the sum of w_hat - w - w log(w_hat / w) over
    y != x_t.
    """
    slope, b_t = minus_alpha_slope(schedule, t), one_minus_alpha(schedule, t)
    if process == "absorbing":
        masked = x_t == logits.shape[-1]
        weight = _per_token(slope / b_t)
        return jnp.where(masked, weight * cross_entropy(logits, tokens), 0.0)
    V, log_p_hat = logits.shape[-1], jax.nn.log_softmax(logits)
    p_hat = jnp.exp(log_p_hat)
    at_x, at_0 = (jax.nn.one_hot(x, V, dtype=logits.dtype) for x in (x_t, tokens))
    a_t = jnp.maximum(alpha(schedule, t), 1e-12)  # at t = 1 the rate is 0, a factor of it infinite
    r_minus_1 = (V * a_t / b_t)[:, None, None]  # r - 1, where r = q(x | x) / q(x | y)
    inverse_r = (b_t / (b_t + V * a_t))[:, None, None]  # 1 / r
    inverse_r_minus_1 = -(V * a_t / (b_t + V * a_t))[:, None, None]  # 1 / r - 1
    log_p_x = (log_p_hat * at_x).sum(-1, keepdims=True)  # log p_hat(x_t)
    stayed = (at_0 * at_x).sum(-1, keepdims=True)  # [x_t = x_0]
    w = jnp.where(stayed == 1, inverse_r, 1.0) + r_minus_1 * at_0
    w_hat = -jnp.expm1(log_p_x) + r_minus_1 * p_hat + jnp.exp(log_p_x) * inverse_r
    # w_hat / w - 1, from differences that need their digits near t = 1
    p_minus_0 = jnp.where(at_0 == 1, jnp.expm1(log_p_hat), p_hat)
    excess = (
        r_minus_1 * p_minus_0
        + inverse_r_minus_1 * jnp.where(stayed == 1, jnp.expm1(log_p_x), jnp.exp(log_p_x))
    ) / w
    small = jnp.where(jnp.abs(excess) < 1e-2, excess, 0.0)
    series = small**2 * (1 / 2 - small / 3 + small**2 / 4 - small**3 / 5)
    bregman = jnp.where(jnp.abs(excess) < 1e-2, series, excess - jnp.log(w_hat) + jnp.log(w))
    return _per_token(slope / a_t / V) * jnp.where(at_x == 1, 0.0, w * bregman).sum(-1)


def vocabulary(logits_fn: LogitsFn, shape: tuple[int, int]) -> int:
    """Returns V, the number of tokens that logits_fn predicts."""
    x_t, t = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    logits = jax.eval_shape(logits_fn, x_t, t)
    if logits.ndim != 3 or logits.shape[:2] != tuple(shape):
        rows = f"[{shape[0]}, {shape[1]}, V]"
        raise ValueError(f"logits_fn must return {rows}, got {list(logits.shape)}")
    return logits.shape[-1]


def check_tokens(tokens, lowest: int, vocab: int, name: str) -> None:
    """Raises ValueError for tokens outside lowest .. vocab-1, if they are not traced."""
    if not jnp.issubdtype(jnp.asarray(tokens).dtype, jnp.integer):
        raise ValueError(f"{name} must be whole numbers, got {jnp.asarray(tokens).dtype}")
    if isinstance(tokens, jax.core.Tracer) or not np.size(tokens):
        return
    known = np.asarray(tokens)
    least, most = int(known.min()), int(known.max())
    if least < lowest or most >= vocab:
        raise ValueError(f"{name} must lie in {lowest}..{vocab - 1}, got {least}..{most}")


def token_vlb(
    process: Process,
    logits_fn: LogitsFn,
    tokens: TokensLike,
    key: Key[Array, ""],
    *,
    steps: int | None = None,
    mask: Any = None,
    schedule: MaskSchedule = "linear",
    terms: int = 1,
) -> Float[Array, "B"]:
    """Returns an unbiased estimate of an upper bound on -log p(x_0), nats.

    steps: T steps of equal length; None: their limit, continuous time. mask [B, L]: tokens with 0
    are given. They are never destroyed, and do not count. terms: times t per row, averaged. The
    times of all rows together are evenly spread, so a mean over rows is more precise than its rows.
    For "uniform" in continuous time, they are squares of such times. This has a sixth of the
    variance on a Markov chain of three states.
    """
    _check_process(process, schedule)
    if steps is not None and steps < 1 or terms < 1:
        raise ValueError(f"steps and terms must be at least 1, got {steps} and {terms}")
    V = vocabulary(logits_fn, tokens.shape)
    check_tokens(tokens, 0, V, "tokens")
    k_t, k_x = jax.random.split(key)
    times = low_discrepancy(k_t, terms * len(tokens)).reshape(terms, -1)

    def one(each):
        i, u = each
        # 1 - u lies in (0, 1]: nothing is masked at 0, where the weight is infinite
        t, weight = 1 - u, jnp.ones_like(u)
        if steps is not None:
            t = (step_at(u, steps) + 1) / jnp.float32(steps)
        elif process == "uniform":  # most cost is at small t, where few tokens have changed
            t, weight = (1 - u) ** 2, 2 * (1 - u)
        k = jax.random.fold_in(k_x, i)
        x_t = corrupt(process, tokens, t, k, vocab=V, schedule=schedule, mask=mask)
        logits = at_least_float32(logits_fn(x_t, t))
        if steps is None:
            rate = kl_rate(process, logits, tokens, x_t, t, schedule=schedule)
            nats = _per_token(weight) * rate
        else:
            s = step_at(u, steps) / jnp.float32(steps)
            nats = steps * step_kl(process, logits, tokens, x_t, s, t, schedule=schedule)
        return (nats if mask is None else jnp.where(jnp.asarray(mask) > 0, nats, 0.0)).sum(-1)

    return jax.lax.map(one, (jnp.arange(terms), times)).mean(0)


def masked_cross_entropy(
    logits_fn: LogitsFn,
    tokens: TokensLike,
    key: Key[Array, ""],
    *,
    mask: Any = None,
    schedule: MaskSchedule = "linear",
) -> Nats:
    """Returns -log p_hat of the tokens that are masked at a time t per row, and 0 elsewhere.

    It is `token_vlb` of "absorbing" without the weight -alpha' / (1 - alpha) (MaskGIT, Chang et al.
    2022). It is no bound, but its gradient has less variance. Let c_k be the expected cross entropy
    of one masked token where k of L tokens are masked. The bound is the sum of c_k over k = 1..L.
    The expected sum of a row [L] of this function is the sum of k c_k / (L + 1), for "linear".
    """
    _check_process("absorbing", schedule)
    V = vocabulary(logits_fn, tokens.shape)
    check_tokens(tokens, 0, V, "tokens")
    k_t, k_x = jax.random.split(key)
    t = 1 - low_discrepancy(k_t, len(tokens))
    x_t = corrupt("absorbing", tokens, t, k_x, vocab=V, schedule=schedule, mask=mask)
    nats = cross_entropy(at_least_float32(logits_fn(x_t, t)), tokens)
    return jnp.where(x_t == V, nats, 0.0)


def _check_process(process: str, schedule: str) -> None:
    if process not in ("absorbing", "uniform"):
        raise ValueError(f"process must be absorbing or uniform, got {process!r}")
    if schedule not in ("linear", "cosine"):
        raise ValueError(f"schedule must be linear or cosine, got {schedule!r}")


# --------------------------------------------------------------------------------- sampling


def draw_tokens(logits: Logits, key: Key[Array, ""], temperature: Any = 1.0) -> Int[Array, "B L"]:
    """Samples tokens from softmax(logits / temperature); at temperature 0 the most probable ones.

    mode "high": the usual float32 Gumbel noise ends near 16, so that it distorts the rates of
    tokens of probability 1e-6 (Zheng et al. 2024).
    """
    hot = jnp.maximum(temperature, 1e-30)
    drawn = jax.random.categorical(key, at_least_float32(logits) / hot, mode="high")
    return jnp.where(jnp.asarray(temperature) > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


def _descending_rank(score: Array) -> Array:
    """Returns the rank of each entry in its row; 0: the largest."""
    return jnp.argsort(jnp.argsort(-score, -1), -1)


def _revealed(masked: Bool[Array, "B L"], score: Array, count: Int[Array, "B"], block: int):
    """Returns the `count` masked positions of each row to reveal: leftmost block, highest score."""
    L = score.shape[-1]
    place = -_descending_rank(score) / L  # in (-1, 0], so that blocks come first
    place = place - jnp.arange(L)[None] // block
    return masked & (_descending_rank(jnp.where(masked, place, -jnp.inf)) < _per_token(count))


def sample_tokens(
    process: Process,
    logits_fn: LogitsFn,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    vocab: int,
    steps: int,
    temperature: Any = 1.0,
    known: Any = None,
    schedule: MaskSchedule = "linear",
    order: Order = "random",
    block: int = 0,
) -> Int[Array, "B L"]:
    """Samples B texts of L tokens.

    steps: 1..L for the orders "random" and "confidence", else at least 1.
    known: int32 [L] or [B, L], -1 where a token is free. The others stay fixed: a prompt, or both
        sides of a gap. For "uniform" the samples have the conditional law only if the model was
        trained with these tokens given (see `token_vlb`, mask). Else it takes them for noise.
    temperature: of the softmax. 0 takes the most probable x_0.
    order ("absorbing" only): which masked tokens a step reveals.
        "random": as many as the schedule says, at least one, at random places. With as many steps
            as tokens, one each: exact for an exact p_hat. With fewer, tokens of one step ignore
            each other.
        "confidence": as many, those whose drawn token is most probable (MaskGIT, Chang et al.
            2022, without their noise on the choice). This is not the model's law.
        "ancestral": each token on its own with the probability of D3PM's reverse step.
    block: length of blocks that are filled from left to right (Arriola et al. 2025); 0: the whole
        text at once. Without known tokens each block has equally many steps.
    """
    x, step = sampling_steps(
        process,
        logits_fn,
        key,
        shape=shape,
        vocab=vocab,
        steps=steps,
        temperature=temperature,
        known=known,
        schedule=schedule,
        order=order,
        block=block,
    )
    return jax.lax.scan(lambda x, i: (step(x, i), None), x, jnp.arange(steps))[0]


def sampling_steps(
    process: Process,
    logits_fn: LogitsFn,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    vocab: int,
    steps: int,
    temperature: Any = 1.0,
    known: Any = None,
    schedule: MaskSchedule = "linear",
    order: Order = "random",
    block: int = 0,
) -> tuple[Int[Array, "B L"], Step]:
    """Returns the text at t = 1, and step(x, i) of `sample_tokens` for i = 0 .. steps - 1."""
    _check_process(process, schedule)
    if not isinstance(temperature, jax.core.Tracer) and not np.min(temperature) >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    known = _known(known, shape, vocab)
    if process == "uniform":
        if order != "random" or block:
            raise ValueError("order and block belong to the process absorbing, not to uniform")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return _uniform_steps(logits_fn, key, known, vocab, steps, temperature, schedule)
    _check_reveal(order, block, steps, shape[1])
    x = jnp.where(known < 0, vocab, known)
    if order == "ancestral":
        return x, _ancestral_step(logits_fn, key, vocab, steps, temperature, schedule)
    return x, _reveal_step(logits_fn, key, x, vocab, steps, temperature, schedule, order, block)


def _known(known, shape: tuple[int, int], vocab: int) -> Int[Array, "B L"]:
    """Returns the known tokens [B, L], -1 where free."""
    if known is None:
        return jnp.full(shape, -1, jnp.int32)
    check_tokens(known, -1, vocab, "known tokens")
    if np.shape(known) not in (tuple(shape), tuple(shape[1:])):
        expected = f"{list(shape[1:])} or {list(shape)}"
        raise ValueError(f"known tokens must have shape {expected}, got {list(np.shape(known))}")
    return jnp.broadcast_to(jnp.asarray(known, jnp.int32), shape)


def _check_reveal(order: str, block: int, steps: int, L: int) -> None:
    if order not in ("random", "confidence", "ancestral"):
        raise ValueError(f"order must be random, confidence or ancestral, got {order!r}")
    if order == "ancestral":
        if block or steps < 1:
            found = f"block {block} and {steps} steps"
            raise ValueError(
                f"the ancestral order takes no block, and at least one step; got {found}"
            )
        return
    if not 1 <= steps <= L:
        rule = f"steps must lie in 1..{L}, the number of tokens: each step reveals at least one"
        raise ValueError(f"{rule}; got {steps}")
    if block and (L % block or steps % (L // block)):
        raise ValueError(
            f"block must divide the {L} tokens, and steps must be a multiple of the number of "
            f"blocks; got block {block} and {steps} steps"
        )


def _reveal_step(logits_fn, key, x, vocab: int, steps: int, temperature, schedule, order, block):
    """Returns the step that reveals a fixed number of tokens, in `order`. x: the first text."""
    k_order, k_draw = jax.random.split(key)
    L, free = x.shape[1], (x == vocab).sum(-1)
    block = block or L
    per_block = steps // (L // block)
    random = jax.random.uniform(k_order, x.shape)

    def left(i):  # masked tokens of each row [B] that remain after i steps
        done, within = i // per_block, i % per_block
        full = jnp.maximum(L // block - done - 1, 0)  # blocks that have not begun
        share = one_minus_alpha(schedule, (per_block - within) / per_block)
        now = jnp.where(done < L // block, share, 0.0)
        most = jnp.maximum(free - i, 0)  # each step reveals at least one
        return jnp.minimum(jnp.floor(free * (full + now) * block / L + 0.5), most).astype(jnp.int32)

    def step(x, i):
        masked = x == vocab
        share = masked.sum(-1) / jnp.maximum(free, 1)
        logits = logits_fn(x, time_of(schedule, share.astype(jnp.float32)))
        drawn = draw_tokens(logits, jax.random.fold_in(k_draw, i), temperature)
        score = -cross_entropy(at_least_float32(logits), drawn) if order == "confidence" else random
        count = masked.sum(-1) - left(i + 1)
        return jnp.where(_revealed(masked, score, count, block), drawn, x)

    return step


def _ancestral_step(logits_fn, key, vocab: int, steps: int, temperature, schedule):
    """Returns D3PM's reverse step of the absorbing process."""

    def step(x, i):
        k_reveal, k_draw = jax.random.split(jax.random.fold_in(key, i))
        t, s = (jnp.full(len(x), (steps - i - j) / steps, jnp.float32) for j in (0, 1))
        drawn = draw_tokens(logits_fn(x, t), k_draw, temperature)
        share = _per_token(1 - one_minus_alpha(schedule, s) / one_minus_alpha(schedule, t))
        reveal = (x == vocab) & (jax.random.uniform(k_reveal, x.shape) < share)
        return jnp.where(reveal, drawn, x)

    return step


def _uniform_steps(logits_fn, key, known, vocab: int, steps: int, temperature, schedule):
    """Returns noise and the reverse step of the uniform process; known tokens are put back."""
    k_start, k_way = jax.random.split(key)
    noise = jax.random.randint(k_start, known.shape, 0, vocab, jnp.int32)

    def step(x, i):
        t, s = (jnp.full(len(x), (steps - i - j) / steps, jnp.float32) for j in (0, 1))
        logits = at_least_float32(logits_fn(x, t)) / jnp.maximum(temperature, 1e-30)
        log_p = step_log_probs(logits, x, s, t, schedule=schedule)
        x = draw_tokens(log_p, jax.random.fold_in(k_way, i))
        return jnp.where(known < 0, x, known)

    return jnp.where(known < 0, noise, known), step
