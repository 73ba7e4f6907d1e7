"""Likelihoods of x_0 under a diffusion model, in nats per example, for any eps_fn (see `samplers`).

- `vlb`: the variational bound of T steps (Ho et al. 2020, "DDPM", eq. 5)
- `continuous_vlb`: its limit in continuous time (Kingma et al. 2021, "VDM")
- `ode_log_likelihood`: the density of the probability-flow ODE (Song et al. 2021)

Common arguments:

prediction: what eps_fn returns, "eps", "x_0", "v" or "velocity", as in the samplers.
levels: number of grey levels of x_0, evenly over [-1, 1]; the bound is then that of a probability.
    None: the bound is that of a density.
sigma2: the variance of p(x_{t-1} | x_t): see `samplers.variance`.
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
    check_eps,
    posterior_factors,
    q_posterior,
    q_sample,
    to_x_0_and_eps,
)
from .samplers import EpsFn, call_eps_fn, variance, velocity
from .schedules import (
    Sample,
    Schedule,
    Steps,
    array_namespace,
    at_least_float32,
    beta_tilde_clipped,
    check,
    extract,
    flow_time,
    from_flow_units,
    noise_variance,
    respace,
    signal_and_noise,
    to_flow_units,
)

PerExample = Float[Array, "B"]


# ----------------------------------------------------------------------------- densities of normals


def _sum_per_example(x: Array) -> PerExample:
    return x.reshape(len(x), -1).sum(-1)


def log_normal(x: Sample, mean, sigma2) -> PerExample:
    """Returns log N(x; mean, sigma2), nats."""
    log_density = -0.5 * (math.log(2 * math.pi) + jnp.log(sigma2) + (x - mean) ** 2 / sigma2)
    return _sum_per_example(log_density)


def gaussian_kl(mean_q, variance_q, mean_p, variance_p) -> PerExample:
    """Returns KL(q || p) of diagonal normals, nats."""
    log_ratio = jnp.log(variance_q / variance_p)
    # expm1, because near ratio = 1 the difference ratio - 1 - log ratio is all rounding error, and
    # a bound sums thousands of such terms.
    excess = jnp.expm1(log_ratio) - log_ratio
    return _sum_per_example(0.5 * (excess + (mean_q - mean_p) ** 2 / variance_p))


def log_discretised(x: Sample, mean, sigma2, *, levels: int) -> PerExample:
    """Returns the log of a normal's probability of the grey level x in [-1, 1] (DDPM eq. 13), nats.

    Levels lie 2 / (levels - 1) apart; each has the mass within half of that. The first and the last
    level have the tails, so that all probabilities sum to 1. Exact in the tails, where the code of
    DDPM stops at 1e-12.
    """
    x, half, sigma = at_least_float32(x), 1 / (levels - 1), jnp.sqrt(sigma2)
    above, below = (x + half - mean) / sigma, (x - half - mean) / sigma
    # Mirrored to the lower tail, where a difference of distribution functions loses no digits.
    flip = above + below > 0
    above, below = jnp.where(flip, -below, above), jnp.where(flip, -above, below)
    lowest, highest = x < -1 + half, x > 1 - half
    first, last = jnp.where(flip, highest, lowest), jnp.where(flip, lowest, highest)
    log_above = jnp.where(last, 0.0, jax.scipy.special.log_ndtr(above))
    # log of the smaller over the larger. The first level has the whole tail: its value
    # is not used, and -1 keeps its gradient finite.
    gap = jnp.where(first, -1.0, jax.scipy.special.log_ndtr(below) - log_above)
    log_rest = jnp.log(-jnp.expm1(jnp.minimum(gap, -1e-7)))
    return _sum_per_example(log_above + jnp.where(first, 0.0, log_rest))


# ----------------------------------------------------------------------------- the bound of T steps


def decoder_nll(x_0: Given, mean, sigma2, *, levels: int | None) -> PerExample:
    """Returns -log p(x_0 | x_t) at step 0, of grey levels, or a density where levels is None."""
    if levels is None:
        return -log_normal(x_0, mean, sigma2)
    return -log_discretised(x_0, mean, sigma2, levels=levels)


def positive_variance(
    schedule: Schedule,
    sigma2,
    x_t: Sample,
    t,
    raw: Sample | None = None,
) -> Array:
    """Like `variance`, except that "beta_tilde" at step 0, where it is 0, is that of step 1.

    (Nichol & Dhariwal 2021, section 3.1.) The value is far too small where the first two levels lie
    close together, as in a fine `discretise`: pass a function as sigma2 there.
    """
    if sigma2 != "beta_tilde":
        return variance(schedule, sigma2, x_t, t, raw)
    return extract(beta_tilde_clipped(schedule), t, x_t)


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
    """Returns one term of DDPM eq. 5, for the x_t that eps gives.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_t) at step 0.
    """
    x_0 = at_least_float32(floats("x_0", x_0))
    x_t = q_sample(schedule, x_0, t, jnp.asarray(eps, x_0.dtype))
    check_eps(schedule, prediction)
    value, raw = call_eps_fn(eps_fn, x_t, jnp.asarray(schedule.t)[t])
    signal, noise = signal_and_noise(schedule, t, x_t)
    preserving = schedule.preserves_variance
    x_0_hat, _ = to_x_0_and_eps(
        value, x_t, signal, noise, prediction=prediction, preserves_variance=preserving
    )
    _, var_q = q_posterior(schedule, x_0, x_t, t)
    var_p = positive_variance(schedule, sigma2, x_t, t, raw)
    is_0 = t == 0
    # At step 0 the posterior is a point. Any positive variance will do there: no log of 0 may enter
    # the gradient.
    var_q = jnp.where(is_0.reshape(-1, *[1] * (x_0.ndim - 1)), var_p, var_q)
    # Both means have the same part in x_t. It is left out, because the difference is small and
    # needs its digits: the variances may be smaller still.
    mean_difference = extract(posterior_factors(schedule)[0], t, x_t) * (x_0 - x_0_hat)
    decoder = decoder_nll(x_0, x_0_hat, var_p, levels=levels)
    return jnp.where(is_0, decoder, gaussian_kl(mean_difference, var_q, 0.0, var_p))


def prior_kl(schedule: Schedule, x_0: Given) -> PerExample:
    """Returns L_T = KL(q(x_T | x_0) || N(0, I)), nats."""
    x_0 = at_least_float32(floats("x_0", x_0))
    last = np.full(len(x_0), len(schedule.t) - 1)
    mean = extract(schedule.signal, last, x_0) * x_0
    return gaussian_kl(mean, extract(noise_variance(schedule), last, x_0), 0.0, 1.0)


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
    """Returns all terms of the bound, one draw of x_t each: L_0 (the decoder), L_1, ..., L_T."""
    check(schedule)
    x_0 = at_least_float32(floats("x_0", x_0))
    options = {"levels": levels, "sigma2": sigma2, "prediction": prediction}

    def term(_, i):
        eps = jax.random.normal(jax.random.fold_in(key, i), x_0.shape, x_0.dtype)
        return None, vlb_term(schedule, eps_fn, x_0, jnp.full(len(x_0), i), eps, **options)

    _, terms = jax.lax.scan(term, None, jnp.arange(len(schedule.t)))
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
    """Returns an upper bound on -log p(x_0), nats (DDPM eq. 5): the sum of `vlb_terms`.

    Unbiased over the noise. For "beta_tilde" at step 0 see `positive_variance`. x_0_hat is never
    clipped, because the bound would be that of another model.
    """
    options = {"levels": levels, "sigma2": sigma2, "prediction": prediction}
    return vlb_terms(schedule, eps_fn, x_0, key, **options).sum(0)


def low_discrepancy(key: Key[Array, ""], n: int) -> Float[Array, "n"]:
    """Samples n numbers in [0, 1), each uniform, together evenly spread (VDM, appendix I.1)."""
    return (jax.random.uniform(key, (), jnp.float32) + jnp.arange(n, dtype=jnp.float32) / n) % 1


def step_at(u: Float[Array, "B"], T: int) -> Steps:
    """Returns the step floor(u T) in 0 .. T-1 of u in [0, 1].

    Never T, although rounding may make u T that large.
    """
    return jnp.minimum((u * T).astype(int), T - 1)


def mean_over_steps(term: Callable, key: Key[Array, ""], n: int, *, T: int, terms: int):
    """Returns an unbiased estimate of the mean of term(t, i) [n] over all T steps.

    Averages i = 0 .. terms-1 with t [n] evenly spread over the steps, from one random offset per
    example.
    """
    offset = jax.random.uniform(key, (n,), jnp.float32)

    def one(i):
        return term(step_at((offset + i / terms) % 1, T), i)

    return jax.lax.map(one, jnp.arange(terms)).mean(0)


# --------------------------------------------------------------- the bound in continuous time (VDM)


def continuous_vlb(
    gamma: Callable,
    eps_fn: EpsFn,
    x_0: Given,
    key: Key[Array, ""],
    *,
    levels: int | None = None,
    prediction: str = "eps",
) -> PerExample:
    """Returns the bound in the limit of infinitely many steps (VDM eq. 11, 12 and 17), nats.

    Unbiased, from one u per example, of low discrepancy over the batch. Its expectation depends on
    gamma only through gamma(0) and gamma(1).

    gamma: gamma(u) [B] -> [B], minus the log signal-to-noise ratio at u in [0, 1], increasing:
        signal^2 = sigmoid(-gamma), noise^2 = sigmoid(gamma).
    eps_fn: eps_fn(x_u, u), with that u in place of a step.

    The decoder at u = 0 is N(x_u / signal, noise^2 / signal^2), normalised over the grey levels if
    there are any (VDM eq. 8).
    """
    x_0 = at_least_float32(floats("x_0", x_0))
    k_u, k_eps, k_decoder = jax.random.split(key, 3)
    u = low_discrepancy(k_u, len(x_0)).astype(x_0.dtype)

    def broadcast(a):
        return jnp.asarray(a, x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))

    def signal_and_noise(u):
        g = gamma(u)
        return broadcast(jnp.sqrt(jax.nn.sigmoid(-g))), broadcast(jnp.sqrt(jax.nn.sigmoid(g)))

    signal, noise = signal_and_noise(u)
    eps = jax.random.normal(k_eps, x_0.shape, x_0.dtype)
    gamma_slope = jax.jvp(gamma, (u,), (jnp.ones_like(u),))[1].astype(x_0.dtype)
    x_u = signal * x_0 + noise * eps
    value, _ = call_eps_fn(eps_fn, x_u, u)
    _, eps_hat = to_x_0_and_eps(value, x_u, signal, noise, prediction=prediction)
    diffusion = 0.5 * gamma_slope * _sum_per_example((eps - eps_hat) ** 2)

    signal, noise = signal_and_noise(jnp.ones(1))
    prior = gaussian_kl(signal * x_0, noise**2, 0.0, 1.0)

    signal, noise = signal_and_noise(jnp.zeros(1))
    sigma2 = (noise / signal) ** 2
    mean = x_0 + noise / signal * jax.random.normal(k_decoder, x_0.shape, x_0.dtype)
    if levels is None:
        return diffusion + prior - log_normal(x_0, mean, sigma2)
    grey = jnp.linspace(-1, 1, levels, dtype=x_0.dtype)
    distance = mean[..., None] - grey.reshape(*[1] * x_0.ndim, -1)
    logits = -0.5 * distance**2 / sigma2[..., None]
    own_logit = -0.5 * (mean - x_0) ** 2 / sigma2
    return diffusion + prior - _sum_per_example(own_logit - jax.nn.logsumexp(logits, -1))


# --------------------------------------------------------------------------- the density of the ODE


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
    """Returns log p(x_0) by the probability-flow ODE (Song et al. 2021, eq. 39), nats.

    A density in the units of x_0. x_0 counts as a sample of the schedule's first level: it should
    contain that noise, or vary far more than it.

    The flow is `velocity`: v_hat by phi, or on other paths eps_hat - x_0_hat by u, in the units of
    `to_flow_units`. It is bounded at both ends. (The flow of x_t / signal is not: that grows to
    20,000 over a cosine schedule.) Heun's method goes through `steps` levels, which takes steps - 1
    steps.

    trace: of the Jacobian of the flow. "hutchinson" is unbiased, from one vector of +-1 per
        example. "exact" takes one product with the Jacobian per dimension.
    """
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"trace must be hutchinson or exact, not {trace!r}")
    if not 2 <= steps <= len(schedule.t):
        raise ValueError(f"steps counts levels, 2..{len(schedule.t)}, got {steps}")
    respaced = respace(schedule, steps, spacing)
    time, variance_0 = flow_time(respaced), noise_variance(respaced)[:1]
    x_0 = at_least_float32(floats("x_0", x_0))
    h = jnp.asarray(array_namespace(time).diff(time), x_0.dtype)
    probe, D = jax.random.rademacher(key, x_0.shape, x_0.dtype), math.prod(x_0.shape[1:])

    def flow(x, level):
        """Returns the velocity and the trace of its Jacobian."""
        i = jnp.full(len(x), level)
        v_hat, jvp = jax.linearize(lambda x: velocity(respaced, eps_fn, x, i, prediction), x)
        if trace == "hutchinson":
            return v_hat, _sum_per_example(probe * jvp(probe))
        return v_hat, _exact_trace(jvp, x)

    def heun_step(carry, level):
        x, log_det, (v_1, trace_1) = carry
        v_2, trace_2 = flow(x + h[level - 1] * v_1, level)
        x = x + h[level - 1] * (v_1 + v_2) / 2
        log_det = log_det + h[level - 1] * (trace_1 + trace_2) / 2
        return (x, log_det, flow(x, level)), None

    first, last = np.zeros(len(x_0), int), np.full(len(x_0), len(respaced.t) - 1)
    x = extract(respaced.signal, first, x_0) * x_0
    x = to_flow_units(respaced, x, first)
    # The change of units from x_0 to x at the first level: D log(signal), or else D log(1 - u).
    power, lost = (D / 2, variance_0) if respaced.preserves_variance else (D, time[:1])
    log_det = power * jnp.log1p(-extract(lost, first, x_0).reshape(-1))
    start = (x, log_det, flow(x, 0))
    (x, log_det, _), _ = jax.lax.scan(heun_step, start, jnp.arange(1, len(respaced.t)))
    if not respaced.preserves_variance:  # back to the units of x_T
        log_det = log_det + D * jnp.log(from_flow_units(respaced, jnp.ones_like(log_det), last))
    return log_normal(from_flow_units(respaced, x, last), 0.0, 1.0) + log_det


def _exact_trace(jvp: Callable, x: Sample) -> PerExample:
    """Returns the trace of the Jacobian of each example: one product per dimension."""
    D = math.prod(x.shape[1:])

    def add_diagonal(total, j):
        unit = (jnp.arange(D) == j).astype(x.dtype).reshape(1, *x.shape[1:])
        unit = jnp.broadcast_to(unit, x.shape)
        return total + _sum_per_example(unit * jvp(unit)), None

    return jax.lax.scan(add_diagonal, jnp.zeros(len(x), x.dtype), jnp.arange(D))[0]
