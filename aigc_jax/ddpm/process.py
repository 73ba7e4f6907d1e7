"""The noising process q: the distribution of x_t, its posterior, conversions between predictions.

    x_t = signal_t x_0 + noise_t eps,   eps ~ N(0, I)

For any schedule, the step from t-1 to t is

    x_t = r x_{t-1} + sqrt(beta_t) eps,   r = signal_t / signal_{t-1},
    beta_t = noise_t^2 - r^2 noise_{t-1}^2

and Bayes' rule gives q(x_{t-1} | x_t, x_0) (Kingma et al. 2021, appendix A):

    mean      (signal_{t-1} beta_t x_0 + r noise_{t-1}^2 x_t) / noise_t^2
    variance  beta_t noise_{t-1}^2 / noise_t^2
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .schedules import (
    Sample,
    Schedule,
    Steps,
    arrays,
    beta_tilde,
    beta_tilde_clipped,
    extract,
    noise_variance,
    previous,
    ratio,
    signal_and_noise,
    step_signal_squared,
)

PREDICTIONS = ("eps", "x_0", "v", "mu", "velocity")

Given = Shaped[Array | np.ndarray, "B ..."]  # a Sample whose dtype `core.floats` checks


# --------------------------------------------------------------------- q(x_t | x_0), its posterior


def q_sample(schedule: Schedule, x_0: Sample, t: Steps, eps: Sample) -> Sample:
    """Returns x_t = signal x_0 + noise eps (DDPM eq. 4)."""
    signal, noise = signal_and_noise(schedule, t, x_0)
    return signal * x_0 + noise * eps


def posterior_factors(schedule: Schedule):
    """Returns the factors of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7), [S].

    The general form is at the top of this file. At step 0 and without noise they are 1 and 0.
    """
    alpha_bar_prev, variance_prev = previous(schedule)
    signal_prev = alpha_bar_prev**0.5
    of_x_0 = signal_prev * ratio(arrays(schedule)[1], noise_variance(schedule), if_zero=1.0)
    step_signal = step_signal_squared(schedule) ** 0.5
    of_x_t = step_signal * ratio(variance_prev, noise_variance(schedule), if_zero=0.0)
    return of_x_0, of_x_t


def q_posterior(
    schedule: Schedule,
    x_0: Sample,
    x_t: Sample,
    t: Steps,
) -> tuple[Sample, Sample]:
    """Returns mean and variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).

    At step 0 they are x_0 and 0.
    """
    of_x_0, of_x_t = (extract(factor, t, x_0) for factor in posterior_factors(schedule))
    return of_x_0 * x_0 + of_x_t * x_t, extract(beta_tilde(schedule), t, x_0)


def learned_variance(schedule: Schedule, raw: Sample, t: Steps) -> Sample:
    """Returns the variance of p(x_{t-1} | x_t) that a network chose between beta_tilde and beta.

    exp(v log beta + (1 - v) log beta_tilde), v = (raw + 1) / 2, where raw is the network's output
    (Nichol & Dhariwal 2021, eq. 15). At step 0, where beta_tilde is 0, it is that of step 1.
    """
    xp, beta, _ = arrays(schedule)
    low = extract(xp.log(beta_tilde_clipped(schedule)), t, raw)
    high = extract(xp.log(beta), t, raw)
    v = (raw + 1) / 2
    return jnp.exp(v * high + (1 - v) * low)


# -------------------------------------------------------------------------------------- predictions


def _divide(a, b):
    """Returns a / b for b >= 0, and a very large number instead of NaN where b is 0."""
    return a / jnp.maximum(b, jnp.finfo(b.dtype).tiny ** 0.5)


def check_eps(schedule: Schedule, prediction: str) -> None:
    """Raises ValueError where x_0_hat is wanted of the prediction eps at a level without signal.

    Only paths with a `variance` of their own may have such a level. Traced ones are not checked.
    """
    if prediction != "eps" or schedule.preserves_variance:
        return
    xp, _, alpha_bar = arrays(schedule)
    if xp is np and not alpha_bar[-1]:
        rule = "prediction 'eps' says nothing about x_0 at the last level, which has no signal"
        raise ValueError(f"{rule}: give velocity, x_0 or v, see `convert`")


def to_x_0_and_eps(
    value: Sample,
    x_t: Sample,
    signal: Array,
    noise: Array,
    *,
    prediction: str,
    preserves_variance: bool = True,
) -> tuple[Sample, Sample]:
    """Returns x_0_hat and eps_hat, given a prediction `eps`, `x_0`, `v` or `velocity` for x_t.

    They satisfy x_t = signal x_0_hat + noise eps_hat. From eps to x_0_hat divides by signal, from
    x_0 to eps_hat by noise. velocity divides by signal + noise, v by signal^2 + noise^2.

    preserves_variance: whether signal^2 + noise^2 = 1, so that v divides by nothing.
    """
    if prediction == "eps":
        return _divide(x_t - noise * value, signal), value
    if prediction == "x_0":
        return value, _divide(x_t - signal * value, noise)
    if prediction == "v":
        x_0_hat, eps_hat = signal * x_t - noise * value, noise * x_t + signal * value
        if preserves_variance:
            return x_0_hat, eps_hat
        power = signal**2 + noise**2
        return x_0_hat / power, eps_hat / power
    if prediction == "velocity":
        total = signal + noise
        return (x_t - noise * value) / total, (x_t + signal * value) / total
    hint = ""
    if prediction == "mu":
        hint = " ('mu' belongs to the steps of training: convert it to x_0 first)"
    raise ValueError(f"prediction must be eps, x_0, v or velocity, not {prediction!r}{hint}")


def convert(
    schedule: Schedule,
    value: Sample,
    x_t: Sample,
    t: Steps,
    *,
    given: str,
    wanted: str,
) -> Sample:
    """Returns the prediction `wanted` that the prediction `given` implies. Both are one of:

    eps, x_0: the noise and the data in x_t.
    v: signal eps - noise x_0 (Salimans & Ho 2022).
    velocity: eps - x_0, along a straight path the derivative by u (Lipman et al. 2022).
    mu: the mean of x_{t-1} (DDPM eq. 7).

        x_0_hat = convert(schedule, net(x_t, t), x_t, t, given="v", wanted="x_0")

    From eps to the others divides by signal, from x_0 or mu to eps by noise. At a level without
    signal, a given eps leads to x_0_hat of no meaning.
    """
    for name in (given, wanted):
        if name not in PREDICTIONS:
            raise ValueError(f"predictions are {', '.join(PREDICTIONS)}, not {name!r}")
    if given == wanted:
        return value
    signal, noise = signal_and_noise(schedule, t, x_t)
    of_x_0, of_x_t = (extract(factor, t, x_t) for factor in posterior_factors(schedule))
    if given == "mu":
        value, given = _divide(value - of_x_t * x_t, of_x_0), "x_0"
    preserving = schedule.preserves_variance
    x_0, eps = to_x_0_and_eps(
        value, x_t, signal, noise, prediction=given, preserves_variance=preserving
    )
    if wanted == "velocity":
        return eps - x_0
    return {
        "eps": eps,
        "x_0": x_0,
        "v": signal * eps - noise * x_0,
        "mu": of_x_0 * x_0 + of_x_t * x_t,
    }[wanted]
