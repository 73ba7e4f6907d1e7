"""Diffusion of bits: the binomial process of Sohl-Dickstein et al. 2015 (table App.1), whose bound is exact enough to
catch an error in any other: where the data's entropy is known, nothing may lie below it.

A step keeps a bit with probability 1 - beta, and else draws it anew from B(rate). Bits are floats 0. and 1., [B, D]; a
`logits_fn(x_t, t) -> [B, D]` says how likely each bit of x_0 is 1. Schedules are those of `process`.
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

from ..core import EMA, Family, Optim, Optimizer, State, make_step, spread, start
from .bounds import step_at
from .nets import Net, module
from .process import Schedule, Steps, at, before, cosine_schedule, noise2, precise

Bits = Float[Array | np.ndarray, "B D"]
LogitsFn = Callable[[Any, Any], Any]


def _bits(x):
    """Points of 0 and 1 as floats. Raises ValueError for others, where they are not traced."""
    if not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)
        if not ((known == 0) | (known == 1)).all():
            raise ValueError(f"points must be bits, 0 or 1, got values in {known.min():.5g}..{known.max():.5g}")
    return precise(x)


def q_one(schedule: Schedule, x_0: Bits, t: Steps, rate: float) -> Bits:
    """P(x_t = 1 | x_0) = alpha_bar x_0 + (1 - alpha_bar) rate; x_0 may be a probability."""
    return at(schedule.alpha_bar, t, x_0) * x_0 + at(noise2(schedule), t, x_0) * rate


def posterior(schedule: Schedule, x_0: Bits, x_t: Bits, t: Steps, rate: float) -> Bits:
    """P(x_{t-1} = 1 | x_t, x_0), by Bayes' rule; at step 0 it is x_0 itself."""
    x_0 = precise(x_0)
    beta, earlier, noise_earlier = (at(a, t, x_0) for a in (schedule.beta, *before(schedule)))
    # Each probability is a sum of positive parts: 1 minus another would lose the digits of a small beta.
    one, zero = earlier * x_0 + noise_earlier * rate, earlier * (1 - x_0) + noise_earlier * (1 - rate)
    one = one * jnp.where(x_t > 0.5, 1 - beta * (1 - rate), beta * (1 - rate))
    zero = zero * jnp.where(x_t > 0.5, beta * rate, 1 - beta * rate)
    return one / (one + zero)


def reverse(schedule: Schedule, logits: Bits, x_t: Bits, t: Steps, rate: float) -> Bits:
    """p(x_{t-1} = 1 | x_t): the posterior, averaged over what the net thinks of x_0 (Austin et al. 2021, eq. 4)."""
    logits = jnp.asarray(logits, precise(x_t).dtype)
    ones, zeros = (posterior(schedule, jnp.full_like(x_t, bit), x_t, t, rate) for bit in (1.0, 0.0))
    return jax.nn.sigmoid(logits) * ones + jax.nn.sigmoid(-logits) * zeros


def _kl(q, p) -> Float[Array, "B"]:
    """KL of bits, nats; a q of 0 or 1 is no trouble, for the slope in p neither."""
    p = jnp.clip(p, 1e-7, 1 - 1e-7)
    cross = -q * jnp.log(p) - (1 - q) * jnp.log1p(-p)
    return (jax.scipy.special.xlogy(q, q) + jax.scipy.special.xlogy(1 - q, 1 - q) + cross).sum(-1)


def vlb_term(
    schedule: Schedule, logits_fn: LogitsFn, x_0: Bits, t: Steps, key: Key[Array, ""], rate: float
) -> Float[Array, "B"]:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for one drawn x_t; at step 0 it is -log p(x_0 | x_t)."""
    x_0 = precise(x_0)
    x_t = jax.random.bernoulli(key, q_one(schedule, x_0, t, rate)).astype(x_0.dtype)
    p = reverse(schedule, logits_fn(x_t, t), x_t, t, rate)
    return _kl(posterior(schedule, x_0, x_t, t, rate), p)


def prior_kl(schedule: Schedule, x_0: Bits, rate: float) -> Float[Array, "B"]:
    """KL(q(x_T | x_0) || B(rate)), nats."""
    last = q_one(schedule, x_0, np.full(len(x_0), len(schedule.t) - 1), rate)
    return _kl(last, jnp.full_like(last, rate))


def vlb(schedule: Schedule, logits_fn: LogitsFn, x_0: Bits, key: Key[Array, ""], *, rate: float) -> Float[Array, "B"]:
    """An upper bound on -log p(x_0), nats: all T terms, one draw of x_t each. Minus it, in bits, is the paper's K."""

    def one(total, i):
        t = jnp.full(len(x_0), i)
        return total + vlb_term(schedule, logits_fn, x_0, t, jax.random.fold_in(key, i), rate), None

    zero = jnp.zeros(len(x_0), precise(x_0).dtype)
    total, _ = jax.lax.scan(one, zero, jnp.arange(len(schedule.t)))
    return total + prior_kl(schedule, x_0, rate)


def sample(schedule: Schedule, logits_fn: LogitsFn, x_T: Bits, key: Key[Array, ""], *, rate: float) -> Bits:
    """Bits from x_T ~ B(rate), every step drawn from p(x_{t-1} | x_t)."""

    def one(x, i):
        t = jnp.full(len(x), i)
        p = reverse(schedule, logits_fn(x, t), x, t, rate)
        return jax.random.bernoulli(jax.random.fold_in(key, i), p).astype(x.dtype), None

    return jax.lax.scan(one, jnp.asarray(x_T), jnp.arange(len(schedule.t) - 1, -1, -1))[0]


@dataclass(frozen=True)
class DiscreteConfig:
    """Bits of length d, given as points of 0 and 1; the defaults are for the paper's heartbeat."""

    dim: int = 20
    rate: float = 0.2  # share of ones in the noise
    T: int = 200  # the paper: 2000
    terms: int = 0  # t that `evaluate` draws; 0: all T
    net: Net = Net("mlp", (50, 50, 50), dropout=0.0)
    ema: float = 0.0
    micro: int = 1
    optim: Optimizer = Optim(lr=1e-3, clip=1.0)

    def __post_init__(self):
        for field, low in {"dim": 1, "T": 1, "terms": 0, "micro": 1}.items():
            if getattr(self, field) < low:
                raise ValueError(f"model.{field} must be at least {low}, got {getattr(self, field)}")
        if not 0 < self.rate < 1:
            raise ValueError(f"model.rate must lie between 0 and 1, got {self.rate}")
        if self.net.kind != "mlp":
            raise ValueError(f"model.net.kind must be mlp for bits, not {self.net.kind!r}")
        self.net.check((self.dim,))
        EMA(self.ema)

    def check(self, info) -> None:
        """Refuses data (a `data.Info`) that are no points of this length, before anything compiles."""
        if info.kind != "points" or tuple(info.shape) != (self.dim,):
            raise ValueError(
                f"this model takes points of {self.dim} bits, not {info.kind} of shape {tuple(info.shape)}"
            )


def make_discrete(cfg: DiscreteConfig, *, axis_name: str | None = None) -> Family:
    """The binomial process as a Family, on batches `points` [B, d] of 0 and 1, over a cosine schedule.

    evaluate: `nll_nats`, an upper bound on -log p. sample(state, key, *, n): bits [n, d].
    """
    ema, schedule = EMA(cfg.ema), cosine_schedule(cfg.T)
    net = module(cfg.net, (cfg.dim,), 0)

    def logits_of(params, key=None):
        rngs = None if key is None else {"dropout": key}
        return lambda x, t: net.apply({"params": params}, 2 * x - 1, 1000.0 * t / cfg.T, rngs=rngs)

    def init(key):
        return start(
            net.init(key, *(jnp.zeros(shape, jnp.float32) for shape in ((1, cfg.dim), (1,))))["params"],
            cfg.optim,
            ema=ema,
        )

    def loss(params, state, batch, key):
        k_t, k_x, k_drop = jax.random.split(key, 3)
        x_0 = _bits(batch["points"])
        t = jax.random.randint(k_t, (len(x_0),), 0, cfg.T)
        logits_fn = logits_of(params, k_drop if cfg.net.dropout else None)
        each = cfg.T * vlb_term(schedule, logits_fn, x_0, t, k_x, cfg.rate)
        return each.mean() / (cfg.dim * math.log(2)), (state.extra, {})

    def evaluate(state, batch, key):
        x_0, logits_fn = _bits(batch["points"]), logits_of(ema.read(state))
        if cfg.terms in (0, cfg.T):
            return {"nll_nats": vlb(schedule, logits_fn, x_0, key, rate=cfg.rate)}
        k_t, k_x = jax.random.split(key)
        u = jax.random.uniform(k_t, (len(x_0),), jnp.float32)

        def term(i):
            t = step_at((u + i / cfg.terms) % 1, cfg.T)
            return vlb_term(schedule, logits_fn, x_0, t, jax.random.fold_in(k_x, i), cfg.rate)

        nll = cfg.T * jax.lax.map(term, jnp.arange(cfg.terms)).mean(0) + prior_kl(schedule, x_0, cfg.rate)
        return {"nll_nats": nll}

    def sample_family(state: State, key, *, n: int):
        k_start, k_way = jax.random.split(key)
        x_T = spread(jax.random.bernoulli(k_start, cfg.rate, (n, cfg.dim)).astype(jnp.float32))
        return sample(schedule, logits_of(ema.read(state)), x_T, k_way, rate=cfg.rate)

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample_family)
