"""The noising process q: schedules, what q says of x_t, and what a net's prediction says of x_0.

Steps are numbered 0 .. T-1, so `alpha_bar[t]` is the paper's with index t + 1; before step 0 it is 1. Arrays of a
schedule are float64 of numpy and become float32 where they are looked up. One that is itself traced, such as a learned
one, is float32 throughout, where 1 - alpha_bar would lose its digits at small t: `noise2` sums it up from betas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PREDICTIONS = ("eps", "x_0", "v", "mu")
SPACINGS = ("uniform", "paper", "quadratic")


class Schedule(NamedTuple):
    """Noise levels, the least first; of a respaced one `t` still holds the steps that the net was trained with."""

    beta: Any  # [S], variance that step i adds
    alpha_bar: Any  # [S], squared share of x_0 that is left after it
    t: Any  # [S], original steps


def check(schedule: Schedule) -> Schedule:
    """Refuses betas outside (0, 1), which leave no way back; of a traced schedule nothing can be said."""
    if not isinstance(schedule.beta, jax.core.Tracer):
        beta = np.asarray(schedule.beta, np.float64)
        if bad := np.flatnonzero(~((beta > 0) & (beta < 1))).tolist():
            raise ValueError(
                f"the betas of a schedule must lie between 0 and 1: at step {bad[0]} it is {beta[bad[0]]:.4g}"
            )
    return schedule


def _through(alpha_bar, variance, t) -> Schedule:
    """The schedule through these levels; variance: 1 - alpha_bar, to all its digits."""
    numpy = jnp if isinstance(alpha_bar, jax.Array) else np
    earlier, variance_earlier = numpy.append(1.0, alpha_bar[:-1]), numpy.append(0.0, variance[:-1])
    return check(Schedule((variance - variance_earlier) / earlier, alpha_bar, t))


def _from_beta(beta) -> Schedule:
    return Schedule(beta, np.cumprod(1 - beta), np.arange(len(beta)))


def linear_schedule(T: int) -> Schedule:
    """beta from 1e-4 to .02 over T = 1000 steps (DDPM, section 4); for another T both times 1000 / T.

    Raises ValueError where a beta reaches 1, for T <= 20.
    """
    if T <= 20:
        raise ValueError(f"linear_schedule needs T >= 21, where beta stays below 1, got {T}: use cosine_schedule")
    return _from_beta(np.linspace(1e-4, 0.02, T) * 1000 / T)


def cosine_schedule(T: int) -> Schedule:
    """alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + .008) / 1.008 pi/2), with beta at most .999.

    Nichol & Dhariwal 2021, eq. 17.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return _from_beta(np.minimum(1 - f[1:] / f[:-1], 0.999))


def discretise(gamma: Callable, T: int) -> Schedule:
    """T levels of a continuous schedule, both ends among them: alpha_bar = sigmoid(-gamma(u)), u in [0, 1].

    gamma is minus the log signal-to-noise ratio, increasing (Kingma et al. 2021, "VDM", eq. 3).
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    u = np.linspace(0.0, 1.0, T) if T > 1 else np.ones(1)
    g = gamma(jnp.asarray(u, jnp.float32))
    return _through(jax.nn.sigmoid(-g), jax.nn.sigmoid(g), np.arange(T))


def spaced(T: int, steps: int, spacing: str = "uniform") -> np.ndarray:
    """`steps` of the steps 0 .. T-1, increasing.

    uniform: round(linspace(0, T-1, steps)), both ends visited; of one step the last.
    paper: 0, k, 2k, ... with k = T / steps, which must divide T (DDIM's code).
    quadratic: round(linspace(0, sqrt(T-1), steps)^2), more of them at little noise (DDIM, section D.2, ends at .8 T).
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T}, got {steps}")
    if spacing == "paper":
        if T % steps:
            raise ValueError(f"spacing 'paper' needs steps that divide T = {T}, got {steps}: use uniform")
        return np.arange(0, T, T // steps)
    if steps == 1:
        return np.array([T - 1])
    if spacing == "uniform":
        return np.round(np.linspace(0, T - 1, steps)).astype(int)
    found = np.round(np.linspace(0, np.sqrt(T - 1), steps) ** 2).astype(int)
    # The first squares lie closer than whole numbers do: each is at least one above the last.
    return np.maximum.accumulate(found - np.arange(steps)) + np.arange(steps)


def respace(schedule: Schedule, steps: int, spacing: str = "uniform") -> Schedule:
    """The process that visits only `steps` of the steps, with the same marginals there (Nichol & Dhariwal, eq. 19)."""
    chosen = spaced(len(schedule.t), steps, spacing)
    return _through(schedule.alpha_bar[chosen], noise2(schedule)[chosen], schedule.t[chosen])


def at(values, t: Int[Array, "B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """values[t], of as many axes as x."""
    return jnp.asarray(values, jnp.float32)[t].reshape(-1, *[1] * (x.ndim - 1))


def noise2(schedule: Schedule):
    """1 - alpha_bar [S], the variance of the noise, to the digits that beta has."""
    numpy = jnp if isinstance(schedule.alpha_bar, jax.Array) else np
    return numpy.cumsum(schedule.beta * numpy.append(1.0, schedule.alpha_bar[:-1]))


def before(schedule: Schedule):
    """alpha_bar and noise2 one step earlier; 1 and 0 before step 0."""
    numpy = jnp if isinstance(schedule.alpha_bar, jax.Array) else np
    return numpy.append(1.0, schedule.alpha_bar[:-1]), numpy.append(0.0, noise2(schedule)[:-1])


def beta_tilde(schedule: Schedule):
    """Variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7); 0 at step 0."""
    _, noise2_earlier = before(schedule)
    return schedule.beta * noise2_earlier / noise2(schedule)


def learned_variance(schedule: Schedule, raw: Float[Array, "B ..."], t: Int[Array, "B"]) -> Float[Array, "B ..."]:
    """exp(v log beta + (1 - v) log beta_tilde), v = (raw + 1) / 2, of p(x_{t-1} | x_t) (Nichol & Dhariwal, eq. 15).

    At step 0, where beta_tilde is 0, it is that of step 1.
    """
    tilde, beta = jnp.asarray(beta_tilde(schedule), jnp.float32), jnp.asarray(schedule.beta, jnp.float32)
    tilde = tilde.at[0].set(tilde[1] if len(tilde) > 1 else beta[0])
    low, high = (at(jnp.log(x), t, raw) for x in (tilde, beta))
    v = (raw + 1) / 2
    return jnp.exp(v * high + (1 - v) * low)


def q_sample(
    schedule: Schedule, x_0: Float[Array, "B ..."], t: Int[Array, "B"], eps: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM eq. 4)."""
    return at(schedule.alpha_bar**0.5, t, x_0) * x_0 + at(noise2(schedule) ** 0.5, t, x_0) * eps


def _posterior(schedule: Schedule):
    """The factors of x_0 and x_t in the posterior's mean (DDPM eq. 7)."""
    earlier, noise2_earlier = before(schedule)
    return (
        earlier**0.5 * schedule.beta / noise2(schedule),
        (1 - schedule.beta) ** 0.5 * noise2_earlier / noise2(schedule),
    )


def q_posterior(
    schedule: Schedule, x_0: Float[Array, "B ..."], x_t: Float[Array, "B ..."], t: Int[Array, "B"]
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7); at step 0 they are x_0 and 0."""
    of_x_0, of_x_t = _posterior(schedule)
    return at(of_x_0, t, x_0) * x_0 + at(of_x_t, t, x_0) * x_t, at(beta_tilde(schedule), t, x_0)


def convert(
    schedule: Schedule,
    value: Float[Array, "B ..."],
    x_t: Float[Array, "B ..."],
    t: Int[Array, "B"],
    *,
    given: str,
    wanted: str,
) -> Float[Array, "B ..."]:
    """One prediction from another: `eps`, `x_0`, `v` = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho
    2022), or `mu`, the mean of x_{t-1} (DDPM eq. 7).

        x_0_hat = convert(schedule, net(x_t, t), x_t, t, given="v", wanted="x_0")

    From eps to the others divides by sqrt(alpha_bar), from x_0 or mu to eps by sqrt(1 - alpha_bar).
    """
    for name in (given, wanted):
        if name not in PREDICTIONS:
            raise ValueError(f"predictions are {', '.join(PREDICTIONS)}, not {name!r}")
    if given == wanted:
        return value
    signal, noise = (at(a**0.5, t, x_t) for a in (schedule.alpha_bar, noise2(schedule)))
    of_x_0, of_x_t = (at(a, t, x_t) for a in _posterior(schedule))
    if given == "eps":
        eps, x_0 = value, (x_t - noise * value) / signal
    elif given == "v":
        eps, x_0 = noise * x_t + signal * value, signal * x_t - noise * value
    else:
        x_0 = value if given == "x_0" else (value - of_x_t * x_t) / of_x_0
        eps = (x_t - signal * x_0) / noise
    return {"eps": eps, "x_0": x_0, "v": signal * eps - noise * x_0, "mu": of_x_0 * x_0 + of_x_t * x_t}[wanted]
