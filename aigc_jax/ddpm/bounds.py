"""How likely a model finds x_0: the variational bound of T steps, its limit in continuous time, and the density of the
probability-flow ODE. Nats an example; over any eps_fn, as the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..core import floats
from .process import (
    Given,
    Sample,
    Schedule,
    Steps,
    _posterior,
    angle,
    at,
    beta_tilde_1,
    check,
    denoised,
    noise2,
    precise,
    q_posterior,
    q_sample,
    respace,
    roots,
)
from .samplers import EpsFn, said, variance, velocity

PerExample = Float[Array, "B"]


def _sum(x: Array) -> PerExample:
    return x.reshape(len(x), -1).sum(-1)


def log_normal(x: Sample, mean, sigma2) -> PerExample:
    """log N(x; mean, sigma2), nats."""
    return _sum(-0.5 * (math.log(2 * math.pi) + jnp.log(sigma2) + (x - mean) ** 2 / sigma2))


def gaussian_kl(mean_q, variance_q, mean_p, variance_p) -> PerExample:
    """KL(q || p) of diagonal normals, nats."""
    log_ratio = jnp.log(variance_q / variance_p)
    # expm1: of ratios near 1, of which a bound has thousands, ratio - 1 - log ratio would be rounding errors.
    return _sum(0.5 * (jnp.expm1(log_ratio) - log_ratio + (mean_q - mean_p) ** 2 / variance_p))


def log_discretised(x: Sample, mean, sigma2, *, levels: int) -> PerExample:
    """log of a normal's mass on the grey level x in [-1, 1], whose neighbours lie 2 / (levels - 1) away (DDPM eq. 13).

    The first and the last level take the tails, so that the probabilities of all levels sum to 1. Exact in the tails,
    where the authors' code stops at 1e-12.
    """
    x, half, sigma = precise(x), 1 / (levels - 1), jnp.sqrt(sigma2)
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


def decoder(schedule: Schedule, x_0: Given, mean, sigma2, *, levels: int | None) -> PerExample:
    """-log p(x_0 | x_t) at step 0: of grey levels, or where levels is None a density."""
    return -(log_normal(x_0, mean, sigma2) if levels is None else log_discretised(x_0, mean, sigma2, levels=levels))


def first_variance(schedule: Schedule, sigma2, x_t: Sample, t, raw: Sample | None = None) -> Array:
    """As `variance`, but of "beta_tilde" at step 0, where it is 0, that of step 1 (Nichol & Dhariwal, section 3.1).

    Where the first two levels lie close together, as in a fine `discretise`, that is far too small: give a callable.
    """
    if sigma2 != "beta_tilde":
        return variance(schedule, sigma2, x_t, t, raw)
    return at(beta_tilde_1(schedule), t, x_t)


def vlb_term(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Given,
    t: Steps,
    eps: Sample,
    *,
    levels: int | None = None,
    sigma2="beta",
    prediction: str = "eps",
) -> PerExample:
    """L_t of DDPM eq. 5 for one drawn x_t: KL(q(x_{t-1} | x_t, x_0) || p), or -log p(x_0 | x_t) at step 0."""
    x_0 = precise(floats("x_0", x_0))
    x_t = q_sample(schedule, x_0, t, jnp.asarray(eps, x_0.dtype))
    value, raw = said(eps_fn, x_t, jnp.asarray(schedule.t)[t])
    x_0_hat, _ = denoised(value, x_t, *(at(a, t, x_t) for a in roots(schedule)), given=prediction)
    _, var = q_posterior(schedule, x_0, x_t, t)
    var_hat = first_variance(schedule, sigma2, x_t, t, raw)
    at_0 = t == 0
    # At step 0 the posterior is a point: any variance there, so that no log of 0 meets the gradient.
    var = jnp.where(at_0.reshape(-1, *[1] * (x_0.ndim - 1)), var_hat, var)
    # Of both means x_t's part is the same: their difference is small, and the variances may be far smaller.
    apart = at(_posterior(schedule)[0], t, x_t) * (x_0 - x_0_hat)
    return jnp.where(
        at_0, decoder(schedule, x_0, x_0_hat, var_hat, levels=levels), gaussian_kl(apart, var, 0.0, var_hat)
    )


def prior_kl(schedule: Schedule, x_0: Given) -> PerExample:
    """L_T: KL(q(x_T | x_0) || N(0, I))."""
    x_0, last = precise(floats("x_0", x_0)), np.full(len(x_0), len(schedule.t) - 1)
    mean = at(roots(schedule)[0], last, x_0) * x_0
    return gaussian_kl(mean, at(noise2(schedule), last, x_0), 0.0, 1.0)


def vlb_terms(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Given,
    key: Key[Array, ""],
    *,
    levels: int | None = None,
    sigma2="beta",
    prediction: str = "eps",
) -> Float[Array, "S1 B"]:
    """Every term of the bound: L_0 (the decoder), L_1, ..., and last L_T; one draw of x_t for each."""

    check(schedule)
    x_0 = precise(floats("x_0", x_0))

    def one(_, i):
        eps = jax.random.normal(jax.random.fold_in(key, i), x_0.shape, x_0.dtype)
        t = jnp.full(len(x_0), i)
        term = vlb_term(schedule, eps_fn, x_0, t, eps, levels=levels, sigma2=sigma2, prediction=prediction)
        return None, term

    _, terms = jax.lax.scan(one, None, jnp.arange(len(schedule.t)))
    return jnp.concatenate([terms, prior_kl(schedule, x_0)[None]])


def vlb(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Given,
    key: Key[Array, ""],
    *,
    levels: int | None = None,
    sigma2="beta",
    prediction: str = "eps",
) -> PerExample:
    """An upper bound on -log p(x_0), nats (DDPM eq. 5), unbiased over the noise: all terms, one draw of x_t each.

    levels: x_0 holds so many grey levels, evenly over [-1, 1], and p is a probability; None: p is a density.
    sigma2: of p(x_{t-1} | x_t): "beta", "beta_tilde", "learned" of an eps_fn that gives (eps_hat, raw), or a callable
        (x_t, t) -> variance.
    prediction: what eps_fn gives, as in the samplers.
    At step 0, where beta_tilde is 0, it is that of step 1: of a fine `discretise` far too small, give a callable there.
    Nothing is clipped here: with a clipped x_0_hat it would be the bound of another model.
    """
    given = {"levels": levels, "sigma2": sigma2, "prediction": prediction}
    return vlb_terms(schedule, eps_fn, x_0, key, **given).sum(0)


def low_discrepancy(key: Key[Array, ""], n: int) -> Float[Array, "n"]:
    """n numbers in [0, 1), each uniform, together evenly spread (VDM, appendix I.1)."""
    return (jax.random.uniform(key, (), jnp.float32) + jnp.arange(n, dtype=jnp.float32) / n) % 1


def step_at(u: Float[Array, "B"], T: int) -> Steps:
    """The step 0 .. T-1 in whose T-th part of [0, 1) u lies; never T, to which u T may be rounded."""
    return jnp.minimum((u * T).astype(int), T - 1)


def continuous_vlb(
    gamma: Callable,
    eps_fn: EpsFn,
    x_0: Given,
    key: Key[Array, ""],
    *,
    levels: int | None = None,
    prediction: str = "eps",
) -> PerExample:
    """The bound in the limit of infinitely many steps (VDM eq. 11, 12 and 17), nats, unbiased from one u an example.

    gamma(u) [B] -> [B]: minus the log signal-to-noise ratio at u in [0, 1], increasing; alpha_bar = sigmoid(-gamma).
    eps_fn(x_u, u) takes that u. Depends on gamma through its ends only, whose decoder is N(x_u / alpha, sigma^2 /
    alpha^2) at u = 0, of grey levels normalised over them (VDM eq. 8). u is of low discrepancy over the batch.
    prediction: what eps_fn gives, as in the samplers.
    """
    x_0 = precise(floats("x_0", x_0))
    k_u, k_eps, k_first = jax.random.split(key, 3)
    u = low_discrepancy(k_u, len(x_0)).astype(x_0.dtype)

    def wide(a):
        return jnp.asarray(a, x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))

    def levels_at(u):
        g = gamma(u)
        return wide(jnp.sqrt(jax.nn.sigmoid(-g))), wide(jnp.sqrt(jax.nn.sigmoid(g)))

    signal, noise = levels_at(u)
    eps = jax.random.normal(k_eps, x_0.shape, x_0.dtype)
    rate = jax.jvp(gamma, (u,), (jnp.ones_like(u),))[1].astype(x_0.dtype)
    x_u = signal * x_0 + noise * eps
    _, eps_hat = denoised(said(eps_fn, x_u, u)[0], x_u, signal, noise, given=prediction)
    diffusion = 0.5 * rate * _sum((eps - eps_hat) ** 2)

    signal, noise = levels_at(jnp.ones(1))
    prior = gaussian_kl(signal * x_0, noise**2, 0.0, 1.0)
    signal, noise = levels_at(jnp.zeros(1))
    sigma2, x_u = (noise / signal) ** 2, x_0 + noise / signal * jax.random.normal(k_first, x_0.shape, x_0.dtype)
    if levels is None:
        return diffusion + prior - log_normal(x_0, x_u, sigma2)
    every = jnp.linspace(-1, 1, levels, dtype=x_0.dtype)
    scores = -0.5 * (x_u[..., None] - every.reshape(*[1] * x_0.ndim, -1)) ** 2 / sigma2[..., None]
    own = -0.5 * (x_u - x_0) ** 2 / sigma2
    return diffusion + prior - _sum(own - jax.nn.logsumexp(scores, -1))


def ode_log_likelihood(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Given,
    key: Key[Array, ""],
    *,
    steps: int,
    trace: str = "hutchinson",
    spacing: str = "log_snr",
    prediction: str = "eps",
) -> PerExample:
    """log p(x_0), nats, a density in the units of x_0, by the probability-flow ODE (Song et al. 2021, eq. 39).

    x_0 is taken to be at the schedule's first level, whose noise it should hold or be far above. The flow is that of
    `velocity`, dx_t / d phi = v_hat, bounded at both ends, where x_t / sqrt(alpha_bar) grows to 20,000 over a cosine
    schedule. Heun's method from level to level, `steps` levels, one step fewer. trace: of v_hat's Jacobian:
    "hutchinson", from one vector of +-1 an example, unbiased; "exact", one product with it a dimension.
    """
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"trace must be hutchinson or exact, not {trace!r}")
    if not 2 <= steps <= len(schedule.t):
        raise ValueError(f"steps counts levels, 2..{len(schedule.t)}, got {steps}")
    few = respace(schedule, steps, spacing)
    phi, noise2_0, x_0 = angle(few), noise2(few)[:1], precise(floats("x_0", x_0))
    h = jnp.asarray((jnp if isinstance(phi, jax.Array) else np).diff(phi), x_0.dtype)
    probe, D = jax.random.rademacher(key, x_0.shape, x_0.dtype), math.prod(x_0.shape[1:])

    def slope(x, number):
        """v_hat, and the trace of its Jacobian."""
        i = jnp.full(len(x), number)
        v_hat, product = jax.linearize(lambda x: velocity(few, eps_fn, x, i, prediction), x)
        if trace == "hutchinson":
            return v_hat, _sum(probe * product(probe))

        def part(total, j):
            direction = jnp.broadcast_to((jnp.arange(D) == j).astype(x.dtype).reshape(1, *x.shape[1:]), x.shape)
            return total + _sum(direction * product(direction)), None

        return v_hat, jax.lax.scan(part, jnp.zeros(len(x), x.dtype), jnp.arange(D))[0]

    def one(carry, number):
        x, log_det, (first, trace_first) = carry
        second, trace_second = slope(x + h[number - 1] * first, number)
        x = x + h[number - 1] * (first + second) / 2
        log_det = log_det + h[number - 1] * (trace_first + trace_second) / 2
        return (x, log_det, slope(x, number)), None

    first = np.zeros(len(x_0), int)
    x = at(roots(few)[0], first, x_0) * x_0
    # The change of units from x_t at the first level to x_0, D log(signal).
    log_det = D / 2 * jnp.log1p(-at(noise2_0, first, x_0).reshape(-1))
    (x, log_det, _), _ = jax.lax.scan(one, (x, log_det, slope(x, 0)), jnp.arange(1, len(few.t)))
    return log_normal(x, 0.0, 1.0) + log_det
