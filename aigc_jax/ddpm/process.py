"""The noising process q: schedules, what q says of x_t, and what a net's prediction says of x_0.

Steps are numbered 0 .. T-1, so `alpha_bar[t]` is the paper's with index t + 1; before step 0 it is 1. Tables of a
schedule are float64 of numpy. Where they are looked up they take the precision of x, but at least float32. A schedule
that is itself traced, such as a learned one, keeps its own dtype. There 1 - alpha_bar would lose its digits at small t:
`noise2` sums it up from betas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

PREDICTIONS = ("eps", "x_0", "v", "mu")

Sample = Float[Array | np.ndarray, "B ..."]  # images [B, H, W, C] in [-1, 1], or points [B, d]
Given = Shaped[Array | np.ndarray, "B ..."]  # a Sample, whose type `core.floats` checks
Steps = Int[Array | np.ndarray, "B"]


class Schedule(NamedTuple):
    """Noise levels, the least first; of a respaced one `t` still holds the steps that the net was trained with."""

    beta: Any  # [S], variance that step i adds
    alpha_bar: Any  # [S], squared share of x_0 that is left after it
    t: Any  # [S], original steps


def check(schedule: Schedule) -> Schedule:
    """Refuses betas outside (0, 1), which leave no way back; of a traced schedule nothing can be said.

    A beta that rounding alone made 1, with some of x_0 left (alpha_bar above 0), has a way back.
    """
    numpy, beta, alpha_bar = _tables(schedule)
    if numpy is np and (bad := np.flatnonzero(~((beta > 0) & (beta <= 1) & (alpha_bar > 0)))).size:
        i = int(bad[0])
        raise ValueError(f"the betas of a schedule must lie between 0 and 1: at step {i} it is {beta[i]:.4g}")
    return schedule


def _tables(schedule: Schedule):
    """(numpy, beta, alpha_bar): in float64 of numpy, or of a traced schedule jax.numpy and its own arrays."""
    beta, alpha_bar, _ = schedule
    if isinstance(beta, jax.core.Tracer) or isinstance(alpha_bar, jax.core.Tracer):
        return jnp, jnp.asarray(beta), jnp.asarray(alpha_bar)
    return np, np.asarray(beta, np.float64), np.asarray(alpha_bar, np.float64)


def _through(alpha_bar, variance, t) -> Schedule:
    """The schedule through these levels; variance: 1 - alpha_bar, to all its digits."""
    numpy = jnp if isinstance(alpha_bar, jax.Array) else np
    earlier, variance_earlier = numpy.append(1.0, alpha_bar[:-1]), numpy.append(0.0, variance[:-1])
    # The difference of whichever is small: of the other float32 has lost it.
    step = numpy.where(variance < 0.5, variance - variance_earlier, earlier - alpha_bar)
    return Schedule(_quotient(step, earlier, 0.0), alpha_bar, t)


def _quotient(a, b, otherwise: float):
    """a / b, or where b is 0, as alpha_bar or the noise are where float32 cannot hold them, this number."""
    numpy = jnp if isinstance(b, jax.Array) else np
    return numpy.where(b > 0, a / numpy.where(b > 0, b, 1.0), otherwise)


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
    g = gamma(jnp.asarray(u))
    return check(_through(jax.nn.sigmoid(-g), jax.nn.sigmoid(g), np.arange(T)))


def _uniform(T: int, steps: int, _):
    return np.round(np.linspace(0, T - 1, steps)).astype(int)


def _paper(T: int, steps: int, _):
    if T % steps:
        raise ValueError(f"spacing 'paper' needs steps that divide T = {T}, got {steps}: use uniform")
    return np.arange(0, T, T // steps)


def _quadratic(T: int, steps: int, _):
    return np.round(np.linspace(0, np.sqrt(T - 1), steps) ** 2).astype(int)


def _log_snr(T: int, steps: int, log_sigma):
    return _evenly(log_sigma, steps)


def _karras(T: int, steps: int, log_sigma):
    numpy = jnp if isinstance(log_sigma, jax.Array) else np
    return _evenly(numpy.exp(log_sigma / 7), steps)


_SPACINGS = {"uniform": _uniform, "paper": _paper, "quadratic": _quadratic, "log_snr": _log_snr, "karras": _karras}
SPACINGS = tuple(_SPACINGS)


def _evenly(place, steps: int):
    """`steps` >= 2 of the levels at these increasing places [T], nearest to evenly spaced ones, both ends among them.

    A gap between neighbours that is wider than a step counts as one step, so that no level falls into it in vain: the
    last two levels of a cosine schedule of T = 1000 have sigma 641 and 20,000.
    """
    numpy = jnp if isinstance(place, jax.Array) else np
    T, gap = len(place), numpy.diff(place)
    rising = numpy.sort(gap)
    k = np.arange(steps - 1)  # were the k widest gaps one step each, so long would the others be
    longest = numpy.cumsum(rising)[T - 2 - k] / (steps - 1 - k)
    step = longest[numpy.argmax(rising[::-1][: steps - 1] <= longest)]
    counted = numpy.append(0.0, numpy.cumsum(numpy.minimum(gap / step, 1.0)))
    goal = np.arange(1, steps - 1)
    above = numpy.clip(numpy.searchsorted(counted, goal), 1, T - 1)
    nearest = above - (goal - counted[above - 1] < counted[above] - goal)
    return numpy.concatenate([numpy.zeros(1, int), nearest, numpy.full(1, T - 1)])


def spaced(T: int, steps: int, spacing: str = "uniform", log_sigma=None):
    """`steps` of the steps 0 .. T-1, increasing. All but `paper` visit both ends, and of one step the last.

    uniform: round(linspace(0, T-1, steps)).
    paper: 0, k, 2k, ... with k = T / steps, which must divide T (DDIM's code).
    quadratic: round(linspace(0, sqrt(T-1), steps)^2), more of them at little noise (DDIM, section D.2, ends at .8 T).
    log_snr: evenly in log sigma, sigma^2 = 1 / alpha_bar - 1, which is minus half the log signal-to-noise ratio (Lu et
        al. 2022). karras: evenly in sigma^(1/7) (Karras et al. 2022, eq. 5). Both take the nearest steps that there
        are, and log_sigma [T], which may be traced: so are then the steps. See `respace`.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T}, got {steps}")
    if spacing in ("log_snr", "karras") and log_sigma is None:
        raise ValueError(f"spacing {spacing!r} depends on the noise levels: give log_sigma, or use respace")
    if steps == 1 and spacing != "paper":
        return np.array([T - 1])
    found, i = _SPACINGS[spacing](T, steps, log_sigma), np.arange(steps)
    # Places may lie closer than steps do: each is at least one above the last, and leaves room for the next.
    up = jax.lax.cummax(found - i) if isinstance(found, jax.Array) else np.maximum.accumulate(found - i)
    return (jnp if isinstance(up, jax.Array) else np).minimum(up, T - steps) + i


def respace(schedule: Schedule, steps: int, spacing: str = "uniform") -> Schedule:
    """The process that visits only `steps` of the steps, with the same marginals there (Nichol & Dhariwal, eq. 19).

    spacing: see `spaced`. Of a traced schedule `log_snr` and `karras` choose by its values, so that t is traced too.
    """
    numpy, _, alpha_bar = _tables(check(schedule))
    chosen = spaced(len(alpha_bar), steps, spacing, log_sigma(schedule))
    t = numpy.asarray(schedule.t)[chosen]
    return _through(alpha_bar[chosen], noise2(schedule)[chosen], t)


def precise(x) -> Array:
    """x as an array of JAX in its own precision, but at least float32: what all arithmetic here is done in."""
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))


def at(values, t: Steps, x: Sample) -> Array:
    """values[t], of as many axes as x, in the precision of x but at least float32."""
    return jnp.asarray(values, jnp.result_type(x, jnp.float32))[t].reshape(-1, *[1] * (x.ndim - 1))


def noise2(schedule: Schedule):
    """1 - alpha_bar [S], the variance of the noise, to the digits that beta has."""
    numpy, beta, alpha_bar = _tables(schedule)
    return numpy.cumsum(beta * numpy.append(1.0, alpha_bar[:-1]))


def before(schedule: Schedule):
    """alpha_bar and noise2 one step earlier; 1 and 0 before step 0."""
    numpy, _, alpha_bar = _tables(schedule)
    return numpy.append(1.0, alpha_bar[:-1]), numpy.append(0.0, noise2(schedule)[:-1])


def roots(schedule: Schedule):
    """(signal, noise), each [S]: the factors of x_0 and eps in x_t, the roots of alpha_bar and noise2."""
    return _tables(schedule)[2] ** 0.5, noise2(schedule) ** 0.5


def log_sigma(schedule: Schedule):
    """log(noise / signal) [S], minus half the log signal-to-noise ratio; finite where one of them is 0."""
    numpy, _, alpha_bar = _tables(schedule)
    least = np.finfo(alpha_bar.dtype).tiny
    variance = numpy.maximum(noise2(schedule), least)
    return 0.5 * (numpy.log(variance) - numpy.log(numpy.maximum(alpha_bar, least)))


def angle(schedule: Schedule):
    """phi [S] in 0 .. pi / 2, with signal = cos phi and noise = sin phi (Salimans & Ho 2022, appendix D)."""
    signal, noise = roots(schedule)
    return _tables(schedule)[0].arctan2(noise, signal)


def kept(schedule: Schedule):
    """1 - beta [S], to the digits that alpha_bar has: in float32 a beta near 1 has lost them."""
    return _quotient(_tables(schedule)[2], before(schedule)[0], 1.0)


def beta_tilde(schedule: Schedule):
    """Variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7); 0 at step 0."""
    return _quotient(_tables(schedule)[1] * before(schedule)[1], noise2(schedule), 0.0)


def beta_tilde_1(schedule: Schedule):
    """beta_tilde, but at step 0, where it is 0, that of step 1 (Nichol & Dhariwal, section 3.1); of one step beta."""
    numpy, beta, _ = _tables(schedule)
    tilde = beta_tilde(schedule)
    return numpy.append(tilde[1:2] if len(tilde) > 1 else beta[:1], tilde[1:])


def learned_variance(schedule: Schedule, raw: Sample, t: Steps) -> Sample:
    """exp(v log beta + (1 - v) log beta_tilde), v = (raw + 1) / 2, of p(x_{t-1} | x_t) (Nichol & Dhariwal, eq. 15).

    At step 0, where beta_tilde is 0, it is that of step 1.
    """
    numpy, beta, _ = _tables(schedule)
    low, high = (at(numpy.log(x), t, raw) for x in (beta_tilde_1(schedule), beta))
    v = (raw + 1) / 2
    return jnp.exp(v * high + (1 - v) * low)


def q_sample(schedule: Schedule, x_0: Sample, t: Steps, eps: Sample) -> Sample:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM eq. 4)."""
    signal, noise = (at(a, t, x_0) for a in roots(schedule))
    return signal * x_0 + noise * eps


def _posterior(schedule: Schedule):
    """The factors of x_0 and x_t in the posterior's mean (DDPM eq. 7); 1 and 0 at step 0 and without noise."""
    earlier, noise2_earlier = before(schedule)
    of_x_0 = earlier**0.5 * _quotient(_tables(schedule)[1], noise2(schedule), 1.0)
    of_x_t = kept(schedule) ** 0.5 * _quotient(noise2_earlier, noise2(schedule), 0.0)
    return of_x_0, of_x_t


def q_posterior(schedule: Schedule, x_0: Sample, x_t: Sample, t: Steps) -> tuple[Sample, Sample]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7); at step 0 they are x_0 and 0."""
    of_x_0, of_x_t = (at(a, t, x_0) for a in _posterior(schedule))
    return of_x_0 * x_0 + of_x_t * x_t, at(beta_tilde(schedule), t, x_0)


def _over(a, b):
    """a / b, for b >= 0; where b is 0, or rounded to it, a very large number instead of no number."""
    return a / jnp.maximum(b, jnp.finfo(b.dtype).tiny ** 0.5)


def denoised(value: Sample, x_t: Sample, signal: Array, noise: Array, *, given: str) -> tuple[Sample, Sample]:
    """x_0_hat and eps_hat, where x_t = signal x_0 + noise eps, as a prediction `eps`, `x_0` or `v` says.

    From eps to x_0_hat divides by signal, from x_0 to eps_hat by noise; v divides by nothing.
    """
    if given == "eps":
        return _over(x_t - noise * value, signal), value
    if given == "x_0":
        return value, _over(x_t - signal * value, noise)
    if given == "v":
        return signal * x_t - noise * value, noise * x_t + signal * value
    rule = " ('mu' belongs to the steps that it was trained with: convert it to x_0 first)" if given == "mu" else ""
    raise ValueError(f"prediction must be eps, x_0 or v, not {given!r}{rule}")


def convert(schedule: Schedule, value: Sample, x_t: Sample, t: Steps, *, given: str, wanted: str) -> Sample:
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
    signal, noise = (at(a, t, x_t) for a in roots(schedule))
    of_x_0, of_x_t = (at(a, t, x_t) for a in _posterior(schedule))
    if given == "mu":
        value, given = _over(value - of_x_t * x_t, of_x_0), "x_0"
    x_0, eps = denoised(value, x_t, signal, noise, given=given)
    return {"eps": eps, "x_0": x_0, "v": signal * eps - noise * x_0, "mu": of_x_0 * x_0 + of_x_t * x_t}[wanted]
