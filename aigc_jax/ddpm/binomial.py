"""Diffusion of bits: the binomial process of Sohl-Dickstein et al. 2015 (table App.1).

A step keeps a bit with probability 1 - beta, and else draws it anew from B(rate). Bits are floats
0.0 and 1.0, [B, D]. `logits_fn(x_t, t) -> [B, D]` predicts the logits of x_0 = 1. Schedules are
those of `schedules`.

The bound is exact enough to reveal an error: it must not lie below a known entropy of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..core import (
    EMA,
    Family,
    Optim,
    Optimizer,
    State,
    check_at_least,
    check_fields,
    make_step,
    shard_rows,
    start,
)
from .bounds import mean_over_steps
from .nets import NetConfig, module
from .schedules import (
    Schedule,
    Steps,
    at_least_float32,
    cosine_schedule,
    extract,
    noise_variance,
    previous,
)

Bits = Float[Array | np.ndarray, "B D"]
LogitsFn = Callable[[Any, Any], Any]
Params = Any


@dataclass(frozen=True)
class DiscreteConfig:
    """Bits of length dim, given as points of 0 and 1. Defaults: for the paper's heartbeat."""

    dim: int = 20
    rate: float = 0.2  # share of ones in the noise
    T: int = 200  # the paper: 2000
    terms: int = 0  # number of steps t that `evaluate` draws; 0: all T
    net: NetConfig = NetConfig("mlp", (50, 50, 50), dropout=0.0)
    ema: float = 0.0
    micro: int = 1
    optim: Optimizer = Optim(lr=1e-3, clip=1.0)

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 0, "terms")
        check_at_least(self, 1, "dim", "T", "micro")
        if not 0 < self.rate < 1:
            raise ValueError(f"model.rate must lie between 0 and 1, got {self.rate}")
        if self.net.kind != "mlp":
            raise ValueError(f"model.net.kind must be mlp for bits, not {self.net.kind!r}")
        self.net.check((self.dim,))
        EMA(self.ema)

    def check(self, info) -> None:
        """Raises ValueError for data (a `data.Info`) that are not points of this length."""
        if info.kind != "points" or tuple(info.shape) != (self.dim,):
            given = f"{info.kind} of shape {tuple(info.shape)}"
            raise ValueError(f"this model takes points of {self.dim} bits, not {given}")


# --------------------------------------------------------------------------------- the process


def _check_sum(schedule: Schedule) -> None:
    """Raises ValueError for a path whose signal^2 and noise^2 are no probabilities."""
    if not schedule.preserves_variance:
        rule = "bits need a schedule that preserves variance: a bit is kept with probability"
        raise ValueError(f"{rule} alpha_bar, else drawn anew. Use cosine_schedule")


def q_marginal(schedule: Schedule, x_0: Bits, t: Steps, rate: float) -> Bits:
    """Returns P(x_t = 1 | x_0) = alpha_bar x_0 + (1 - alpha_bar) rate.

    x_0 may be a probability.
    """
    _check_sum(schedule)
    kept = extract(schedule.alpha_bar, t, x_0)
    return kept * x_0 + extract(noise_variance(schedule), t, x_0) * rate


def q_posterior(schedule: Schedule, x_0: Bits, x_t: Bits, t: Steps, rate: float) -> Bits:
    """Returns P(x_{t-1} = 1 | x_t, x_0), by Bayes' rule; at step 0 it is x_0 itself."""
    _check_sum(schedule)
    x_0 = at_least_float32(x_0)
    tables = (schedule.beta, *previous(schedule))
    beta, kept, drawn = (extract(table, t, x_0) for table in tables)
    # Each probability is a sum of positive parts: 1 minus another loses the digits of a small beta.
    one, zero = kept * x_0 + drawn * rate, kept * (1 - x_0) + drawn * (1 - rate)
    one = one * jnp.where(x_t > 0.5, 1 - beta * (1 - rate), beta * (1 - rate))
    zero = zero * jnp.where(x_t > 0.5, beta * rate, 1 - beta * rate)
    return one / (one + zero)


def p_reverse(schedule: Schedule, logits: Bits, x_t: Bits, t: Steps, rate: float) -> Bits:
    """Returns p(x_{t-1} = 1 | x_t): the mean of the posterior over the predicted x_0.

    (Austin et al. 2021, eq. 4.)
    """
    logits = jnp.asarray(logits, at_least_float32(x_t).dtype)
    of_one = q_posterior(schedule, jnp.full_like(x_t, 1.0), x_t, t, rate)
    of_zero = q_posterior(schedule, jnp.full_like(x_t, 0.0), x_t, t, rate)
    return jax.nn.sigmoid(logits) * of_one + jax.nn.sigmoid(-logits) * of_zero


# ------------------------------------------------------------------------ the bound, and sampling


def _kl(q, p) -> Float[Array, "B"]:
    """Returns KL(q || p) of bits, nats; finite, with a finite derivative in p, for q = 0 or 1."""
    p = jnp.clip(p, 1e-7, 1 - 1e-7)
    cross_entropy = -q * jnp.log(p) - (1 - q) * jnp.log1p(-p)
    xlogy = jax.scipy.special.xlogy
    return (xlogy(q, q) + xlogy(1 - q, 1 - q) + cross_entropy).sum(-1)


def vlb_term(
    schedule: Schedule,
    logits_fn: LogitsFn,
    x_0: Bits,
    t: Steps,
    key: Key[Array, ""],
    rate: float,
) -> Float[Array, "B"]:
    """Returns KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for one draw of x_t, nats.

    At step 0 it is -log p(x_0 | x_t).
    """
    x_0 = at_least_float32(x_0)
    x_t = jax.random.bernoulli(key, q_marginal(schedule, x_0, t, rate)).astype(x_0.dtype)
    p = p_reverse(schedule, logits_fn(x_t, t), x_t, t, rate)
    return _kl(q_posterior(schedule, x_0, x_t, t, rate), p)


def prior_kl(schedule: Schedule, x_0: Bits, rate: float) -> Float[Array, "B"]:
    """Returns KL(q(x_T | x_0) || B(rate)), nats."""
    last = np.full(len(x_0), len(schedule.t) - 1)
    q = q_marginal(schedule, x_0, last, rate)
    return _kl(q, jnp.full_like(q, rate))


def vlb(
    schedule: Schedule,
    logits_fn: LogitsFn,
    x_0: Bits,
    key: Key[Array, ""],
    *,
    rate: float,
) -> Float[Array, "B"]:
    """Returns an upper bound on -log p(x_0), nats: all T terms, one draw of x_t each.

    Minus this bound, in bits, is the K of the paper.
    """

    def add_term(total, i):
        t, k = jnp.full(len(x_0), i), jax.random.fold_in(key, i)
        return total + vlb_term(schedule, logits_fn, x_0, t, k, rate), None

    zero = jnp.zeros(len(x_0), at_least_float32(x_0).dtype)
    total, _ = jax.lax.scan(add_term, zero, jnp.arange(len(schedule.t)))
    return total + prior_kl(schedule, x_0, rate)


def sample(
    schedule: Schedule,
    logits_fn: LogitsFn,
    x_T: Bits,
    key: Key[Array, ""],
    *,
    rate: float,
) -> Bits:
    """Samples x_0 from x_T ~ B(rate): each step draws x_{t-1} ~ p(x_{t-1} | x_t)."""

    def step(x_t, i):
        t = jnp.full(len(x_t), i)
        p = p_reverse(schedule, logits_fn(x_t, t), x_t, t, rate)
        return jax.random.bernoulli(jax.random.fold_in(key, i), p).astype(x_t.dtype), None

    return jax.lax.scan(step, jnp.asarray(x_T), jnp.arange(len(schedule.t) - 1, -1, -1))[0]


# ------------------------------------------------------------------------------------- the family


def _bits(x):
    """Returns points of 0 and 1 as floats. Raises ValueError for other values, if not traced."""
    if not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)
        if not ((known == 0) | (known == 1)).all():
            found = f"values in {known.min():.5g}..{known.max():.5g}"
            raise ValueError(f"points must be bits, 0 or 1, got {found}")
    return at_least_float32(x)


def _net(cfg: DiscreteConfig):
    return module(cfg.net, (cfg.dim,), 0)


def logits_fn_of(
    cfg: DiscreteConfig,
    params: Params,
    key: Key[Array, ""] | None = None,
) -> LogitsFn:
    """Returns logits_fn(x_t, t) of the network. With a key, dropout is on."""
    rngs = None if key is None else {"dropout": key}

    def logits_fn(x_t, t):
        return _net(cfg).apply({"params": params}, 2 * x_t - 1, 1000.0 * t / cfg.T, rngs=rngs)

    return logits_fn


def training_loss(cfg: DiscreteConfig, params: Params, batch: dict, key: Key[Array, ""]):
    """Returns the bound in bits per dimension, from one t per example."""
    k_t, k_x, k_drop = jax.random.split(key, 3)
    x_0 = _bits(batch["points"])
    t = jax.random.randint(k_t, (len(x_0),), 0, cfg.T)
    logits_fn = logits_fn_of(cfg, params, k_drop if cfg.net.dropout else None)
    nll = cfg.T * vlb_term(cosine_schedule(cfg.T), logits_fn, x_0, t, k_x, cfg.rate)
    return nll.mean() / (cfg.dim * math.log(2))


def nll_nats(cfg: DiscreteConfig, params: Params, batch: dict, key: Key[Array, ""]):
    """Returns an upper bound on -log p per example [B], from cfg.terms of its T terms."""
    schedule, x_0 = cosine_schedule(cfg.T), _bits(batch["points"])
    logits_fn = logits_fn_of(cfg, params)
    if cfg.terms in (0, cfg.T):
        return vlb(schedule, logits_fn, x_0, key, rate=cfg.rate)
    k_t, k_x = jax.random.split(key)

    def term(t, i):
        return vlb_term(schedule, logits_fn, x_0, t, jax.random.fold_in(k_x, i), cfg.rate)

    mean = mean_over_steps(term, k_t, len(x_0), T=cfg.T, terms=cfg.terms)
    return cfg.T * mean + prior_kl(schedule, x_0, cfg.rate)


def make_discrete(cfg: DiscreteConfig, *, axis_name: str | None = None) -> Family:
    """Returns the binomial process as a Family, for batches `points` [B, d] of 0 and 1.

    Its schedule is the cosine one. evaluate: `nll_nats`, an upper bound on -log p.
    sample(state, key, *, n): bits [n, d].
    """
    ema = EMA(cfg.ema)

    def init(key):
        x_t, t = jnp.zeros((1, cfg.dim), jnp.float32), jnp.zeros((1,), jnp.float32)
        return start(_net(cfg).init(key, x_t, t)["params"], cfg.optim, ema=ema)

    def loss(params, state, batch, key):
        return training_loss(cfg, params, batch, key), (state.extra, {})

    def evaluate(state, batch, key):
        return {"nll_nats": nll_nats(cfg, ema.read(state), batch, key)}

    def sample_family(state: State, key, *, n: int):
        k_start, k_way = jax.random.split(key)
        x_T = jax.random.bernoulli(k_start, cfg.rate, (n, cfg.dim)).astype(jnp.float32)
        logits_fn = logits_fn_of(cfg, ema.read(state))
        return sample(cosine_schedule(cfg.T), logits_fn, shard_rows(x_T), k_way, rate=cfg.rate)

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample_family)
