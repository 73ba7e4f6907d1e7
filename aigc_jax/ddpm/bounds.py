"""How likely a model finds x_0: the variational bound of T steps, its limit in continuous time, and the density of the
probability-flow ODE. Nats an example; over any eps_fn, as the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .process import Schedule, at, beta_tilde, check, convert, noise2, q_posterior, q_sample, respace
from .samplers import EpsFn, Sample, said, variance

PerExample = Float[Array, "B"]


def _sum(x: Array) -> PerExample:
    return x.reshape(len(x), -1).sum(-1)


def log_normal(x: Sample, mean, sigma2) -> PerExample:
    """log N(x; mean, sigma2), nats."""
    return _sum(-0.5 * (math.log(2 * math.pi) + jnp.log(sigma2) + (x - mean) ** 2 / sigma2))


def gaussian_kl(mean_q, variance_q, mean_p, variance_p) -> PerExample:
    """KL(q || p) of diagonal normals, nats."""
    ratio = variance_q / variance_p
    return _sum(0.5 * (ratio - 1 - jnp.log(ratio) + (mean_q - mean_p) ** 2 / variance_p))


def log_discretised(x: Sample, mean, sigma2, *, levels: int) -> PerExample:
    """log of a normal's mass on the grey level x in [-1, 1], whose neighbours lie 2 / (levels - 1) away (DDPM eq. 13).

    The first and the last level take the tails, so that the probabilities of all levels sum to 1. Exact in the tails,
    where the authors' code stops at 1e-12.
    """
    half, sigma = 1 / (levels - 1), jnp.sqrt(sigma2)
    above, below = (x + half - mean) / sigma, (x - half - mean) / sigma
    # Mirrored to the lower tail, where a difference of two distribution functions loses nothing.
    flip = above + below > 0
    above, below = jnp.where(flip, -below, above), jnp.where(flip, -above, below)
    lowest, highest = x < -1 + half, x > 1 - half
    first, last = jnp.where(flip, highest, lowest), jnp.where(flip, lowest, highest)
    log_above = jnp.where(last, 0.0, jax.scipy.special.log_ndtr(above))
    # The smaller over the larger; 0 where the lower tail belongs to the level. -1: any number with a finite slope.
    gap = jnp.where(first, -1.0, jax.scipy.special.log_ndtr(below) - log_above)
    return _sum(log_above + jnp.where(first, 0.0, jnp.log(-jnp.expm1(jnp.minimum(gap, -1e-7)))))


def decoder(schedule: Schedule, x_0: Sample, mean, sigma2, *, levels: int | None) -> PerExample:
    """-log p(x_0 | x_t) at step 0: of grey levels, or where levels is None a density."""
    return -(log_normal(x_0, mean, sigma2) if levels is None else log_discretised(x_0, mean, sigma2, levels=levels))


def first_variance(schedule: Schedule, sigma2, x_t: Sample, t, raw: Sample | None = None) -> Array:
    """As `variance`, but of "beta_tilde" at step 0, where it is 0, that of step 1 (Nichol & Dhariwal, section 3.1).

    Where the first two levels lie close together, as in a fine `discretise`, that is far too small: give a callable.
    """
    if sigma2 != "beta_tilde":
        return variance(schedule, sigma2, x_t, t, raw)
    values = beta_tilde(schedule)
    first = values[1] if len(values) > 1 else schedule.beta[0]
    return at(jnp.asarray(values, jnp.float32).at[0].set(first), t, x_t)


def vlb_term(
    schedule: Schedule, eps_fn: EpsFn, x_0: Sample, t, eps: Sample, *, levels: int | None = None, sigma2="beta"
) -> PerExample:
    """L_t of DDPM eq. 5 for one drawn x_t: KL(q(x_{t-1} | x_t, x_0) || p), or -log p(x_0 | x_t) at step 0."""
    x_t = q_sample(schedule, x_0, t, eps)
    eps_hat, raw = said(eps_fn, x_t, jnp.asarray(schedule.t)[t])
    x_0_hat = convert(schedule, eps_hat, x_t, t, given="eps", wanted="x_0")
    mean, var = q_posterior(schedule, x_0, x_t, t)
    mean_hat, _ = q_posterior(schedule, x_0_hat, x_t, t)
    var_hat = first_variance(schedule, sigma2, x_t, t, raw)
    at_0 = t == 0
    # At step 0 the posterior is a point: any variance there, so that no log of 0 meets the gradient.
    kl = gaussian_kl(mean, jnp.where(at_0.reshape(-1, *[1] * (x_0.ndim - 1)), var_hat, var), mean_hat, var_hat)
    return jnp.where(at_0, decoder(schedule, x_0, mean_hat, var_hat, levels=levels), kl)


def prior_kl(schedule: Schedule, x_0: Sample) -> PerExample:
    """L_T: KL(q(x_T | x_0) || N(0, I))."""
    last = jnp.asarray(noise2(schedule)[-1], jnp.float32)
    return gaussian_kl(schedule.alpha_bar[-1] ** 0.5 * x_0, last, 0.0, 1.0)


def vlb_terms(
    schedule: Schedule, eps_fn: EpsFn, x_0: Sample, key: Key[Array, ""], *, levels: int | None = None, sigma2="beta"
) -> Float[Array, "S1 B"]:
    """Every term of the bound: L_0 (the decoder), L_1, ..., and last L_T; one draw of x_t for each."""

    check(schedule)

    def one(_, i):
        eps = jax.random.normal(jax.random.fold_in(key, i), x_0.shape, x_0.dtype)
        t = jnp.full(len(x_0), i)
        return None, vlb_term(schedule, eps_fn, x_0, t, eps, levels=levels, sigma2=sigma2)

    _, terms = jax.lax.scan(one, None, jnp.arange(len(schedule.t)))
    return jnp.concatenate([terms, prior_kl(schedule, x_0)[None]])


def vlb(
    schedule: Schedule, eps_fn: EpsFn, x_0: Sample, key: Key[Array, ""], *, levels: int | None = None, sigma2="beta"
) -> PerExample:
    """An upper bound on -log p(x_0), nats (DDPM eq. 5), unbiased over the noise: all terms, one draw of x_t each.

    levels: x_0 holds so many grey levels, evenly over [-1, 1], and p is a probability; None: p is a density.
    sigma2: of p(x_{t-1} | x_t): "beta", "beta_tilde", "learned" of an eps_fn that gives (eps_hat, raw), or a callable
        (x_t, t) -> variance.
    At step 0, where beta_tilde is 0, it is that of step 1: of a fine `discretise` far too small, give a callable there.
    Nothing is clipped here: with a clipped x_0_hat it would be the bound of another model.
    """
    return vlb_terms(schedule, eps_fn, x_0, key, levels=levels, sigma2=sigma2).sum(0)


def low_discrepancy(key: Key[Array, ""], n: int) -> Float[Array, "n"]:
    """n numbers in [0, 1), each uniform, together evenly spread (VDM, appendix I.1)."""
    return (jax.random.uniform(key) + jnp.arange(n) / n) % 1


def continuous_vlb(
    gamma: Callable, eps_fn: EpsFn, x_0: Sample, key: Key[Array, ""], *, levels: int | None = None
) -> PerExample:
    """The bound in the limit of infinitely many steps (VDM eq. 11, 12 and 17), nats, unbiased from one u an example.

    gamma(u) [B] -> [B]: minus the log signal-to-noise ratio at u in [0, 1], increasing; alpha_bar = sigmoid(-gamma).
    eps_fn(x_u, u) takes that u. Depends on gamma through its ends only, whose decoder is N(x_u / alpha, sigma^2 /
    alpha^2) at u = 0, of grey levels normalised over them (VDM eq. 8). u is of low discrepancy over the batch.
    """
    k_u, k_eps, k_first = jax.random.split(key, 3)
    u = low_discrepancy(k_u, len(x_0))

    def wide(a):
        return jnp.asarray(a).reshape(-1, *[1] * (x_0.ndim - 1))

    def levels_at(u):
        g = gamma(u)
        return wide(jnp.sqrt(jax.nn.sigmoid(-g))), wide(jnp.sqrt(jax.nn.sigmoid(g)))

    signal, noise = levels_at(u)
    eps = jax.random.normal(k_eps, x_0.shape)
    rate = jax.jvp(gamma, (u,), (jnp.ones_like(u),))[1]
    diffusion = 0.5 * rate * _sum((eps - eps_fn(signal * x_0 + noise * eps, u)) ** 2)

    signal, noise = levels_at(jnp.ones(1))
    prior = gaussian_kl(signal * x_0, noise**2, 0.0, 1.0)
    signal, noise = levels_at(jnp.zeros(1))
    sigma2, x_u = (noise / signal) ** 2, x_0 + noise / signal * jax.random.normal(k_first, x_0.shape)
    if levels is None:
        return diffusion + prior - log_normal(x_0, x_u, sigma2)
    every = jnp.linspace(-1, 1, levels)
    scores = -0.5 * (x_u[..., None] - every.reshape(*[1] * x_0.ndim, -1)) ** 2 / sigma2[..., None]
    own = -0.5 * (x_u - x_0) ** 2 / sigma2
    return diffusion + prior - _sum(own - jax.nn.logsumexp(scores, -1))


def ode_log_likelihood(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Sample,
    key: Key[Array, ""],
    *,
    steps: int,
    trace: str = "hutchinson",
    spacing: str = "uniform",
) -> PerExample:
    """log p(x_0), nats, a density in the units of x_0, by the probability-flow ODE (Song et al. 2021, eq. 39).

    x_0 is taken to be at the schedule's first level, whose noise it should hold or be far above. In y = x_t /
    sqrt(alpha_bar) and sigma = sqrt(1 / alpha_bar - 1) the flow is dy / d sigma = eps_hat; Heun's method from level to
    level, `steps` levels, one step fewer. trace: of eps_hat's Jacobian: "hutchinson", from one vector of +-1 an
    example, unbiased; "exact", one pass a dimension.
    """
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"trace must be hutchinson or exact, not {trace!r}")
    if not 2 <= steps <= len(schedule.t):
        raise ValueError(f"steps counts levels, 2..{len(schedule.t)}, got {steps}")
    few = respace(schedule, steps, spacing)
    sigma, signal = (noise2(few) / few.alpha_bar) ** 0.5, few.alpha_bar**0.5
    probe = jax.random.rademacher(key, x_0.shape, x_0.dtype)
    D = math.prod(x_0.shape[1:])

    def slope(y, number):
        """eps_hat, and the trace of its Jacobian in y."""
        i = jnp.full(len(y), number)

        def eps_hat(y):
            return said(eps_fn, at(signal, i, y) * y, jnp.asarray(few.t)[i])[0]

        if trace == "hutchinson":
            value, along = jax.jvp(eps_hat, (y,), (probe,))
            return value, _sum(probe * along)

        def one(total, j):
            direction = (jnp.arange(D) == j).astype(y.dtype).reshape(1, *y.shape[1:])
            direction = jnp.broadcast_to(direction, y.shape)
            return total + _sum(direction * jax.jvp(eps_hat, (y,), (direction,))[1]), None

        return eps_hat(y), jax.lax.scan(one, jnp.zeros(len(y)), jnp.arange(D))[0]

    def step(carry, number):
        y, log_det, (first, trace_first) = carry
        h = jnp.asarray(sigma, jnp.float32)[number] - jnp.asarray(sigma, jnp.float32)[number - 1]
        second, trace_second = slope(y + h * first, number)
        y = y + h * (first + second) / 2
        log_det = log_det + h * (trace_first + trace_second) / 2
        return (y, log_det, slope(y, number)), None

    start = (x_0, jnp.zeros(len(x_0)), slope(x_0, 0))
    (y, log_det, _), _ = jax.lax.scan(step, start, jnp.arange(1, len(few.t)))
    # The last level's y is N(0, 1 / alpha_bar) to the model, x_T being N(0, I).
    return log_normal(y, 0.0, jnp.asarray(1 / few.alpha_bar[-1], jnp.float32)) + log_det
