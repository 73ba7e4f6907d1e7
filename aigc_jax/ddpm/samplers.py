"""Samplers: from noise x_T to samples x_0.

- `sample_ddpm`: ancestral sampling (Ho et al. 2020, "DDPM", algorithm 2)
- `sample_ddim`, `ddim_invert`: DDIM (Song, Meng & Ermon 2021)
- `sample_dpm_solver`: DPM-Solver++(2M) (Lu et al. 2022)
- `sample_heun`: Heun's method (Karras et al. 2022)
- `guide`: classifier-free guidance (Ho & Salimans 2022)
- `inpaint`: RePaint (Lugmayr et al. 2022)
- `slerp`, `interpolate`: between noises, between images

They hold for every path of a `Schedule`. On a straight one, `sample_ddim` with eta = 0 is Euler's
method of flow matching, x_{t-1} = x_t + (u_{t-1} - u_t) velocity, and `sample_heun` Heun's.

Common arguments:

schedule: the levels; `i` below is an index into them. Samplers that take `steps` and `spacing`
    visit only so many of them: see `schedules.spaced`. `interpolate` takes a respaced schedule.
eps_fn: eps_fn(x_t, t) -> eps_hat, any function, with t [B] the steps of training (`schedule.t`).
    It may return (eps_hat, raw) where `raw` chooses the variance: see `learned_variance`.
prediction: what eps_fn really returns, "eps", "x_0", "v" or "velocity". Pass a network's own
    prediction: the way from eps to x_0_hat divides by the signal, 5e-5 at the end of a cosine
    schedule. At the end of a straight one it is 0, and "eps" is refused.
clip: x_0_hat is limited to [-clip, clip], as the code of DDPM does for images (1.0).

A sample has the dtype of x_T. The chain, and the x_t that eps_fn sees, are at least float32. The
last step adds no noise. Each sampler is one compiled scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from ..core import floats
from .process import (
    Given,
    check_eps,
    learned_variance,
    q_posterior,
    q_sample,
    to_x_0_and_eps,
)
from .schedules import (
    Sample,
    Schedule,
    array_namespace,
    at_least_float32,
    beta_tilde,
    check,
    extract,
    flow_time,
    from_flow_units,
    log_sigma,
    previous,
    respace,
    signal_and_noise,
    step_signal_squared,
    to_flow_units,
)

EpsFn = Callable[[Any, Any], Any]


def call_eps_fn(eps_fn: EpsFn, x_t: Sample, t) -> tuple[Sample, Sample | None]:
    """Returns (prediction, raw) of eps_fn in the precision of x_t, at least float32.

    raw is None where eps_fn returns a prediction only.
    """
    out, dtype = eps_fn(x_t, t), jnp.result_type(x_t, jnp.float32)
    value, raw = out if isinstance(out, tuple) else (out, None)
    return jnp.asarray(value, dtype), None if raw is None else jnp.asarray(raw, dtype)


def guide(eps_cond: Sample, eps_uncond: Sample, w) -> Sample:
    """Returns (1 + w) eps_cond - w eps_uncond (Ho & Salimans 2022, eq. 6).

    w: a number, or one per example [B]. 0 is conditional, -1 unconditional sampling. The "guidance
    scale" of other libraries is 1 + w.

    Predictions of x_0, v or velocity may be guided too: at a given x_t each is linear in eps.
    """
    w = at_least_float32(w).reshape(-1, *[1] * (eps_cond.ndim - 1))
    return ((1 + w) * eps_cond - w * eps_uncond).astype(eps_cond.dtype)


# ------------------------------------------------------------------------- one step, and all steps


def _normal(key, step, x):
    """Samples the N(0, I) noise of one step, shaped like x."""
    return jax.random.normal(jax.random.fold_in(key, step), x.shape, x.dtype)


def _safe_sqrt(x: Array) -> Array:
    """Returns sqrt(x); 0, with derivative 0, where x is 0 or was rounded below it."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _denoise(schedule, eps_fn, x_t, i, prediction, clip):
    """Returns (x_0_hat, eps_hat, raw) at level i.

    After clipping x_0_hat, eps_hat is recomputed such that both still give x_t.
    """
    check_eps(schedule, prediction)
    value, raw = call_eps_fn(eps_fn, x_t, jnp.asarray(schedule.t)[i])
    signal, noise = signal_and_noise(schedule, i, x_t)
    preserving = schedule.preserves_variance
    x_0_hat, eps_hat = to_x_0_and_eps(
        value, x_t, signal, noise, prediction=prediction, preserves_variance=preserving
    )
    if clip is not None:
        x_0_hat = jnp.clip(x_0_hat, -clip, clip)
        x_0_hat, eps_hat = to_x_0_and_eps(x_0_hat, x_t, signal, noise, prediction="x_0")
    return x_0_hat, eps_hat, raw


def variance(schedule: Schedule, sigma2, x_t: Sample, i, raw: Sample | None = None) -> Array:
    """Returns the variance of p(x_{t-1} | x_t) at level i, broadcastable to x_t.

    sigma2: "beta" or "beta_tilde" (DDPM, section 3.2); "learned", between them, which needs `raw`;
    or a function (x_t, t) -> variance.
    """
    if callable(sigma2):
        value = sigma2(x_t, jnp.asarray(schedule.t)[i])
        return jnp.asarray(value, jnp.result_type(x_t, jnp.float32))
    if sigma2 == "learned":
        if raw is None:
            rule = "sigma2 'learned' needs an eps_fn that gives (eps_hat, raw)"
            raise ValueError(f"{rule}: this one gives eps_hat only")
        return learned_variance(schedule, raw, i)
    if sigma2 not in ("beta", "beta_tilde"):
        choices = "beta, beta_tilde, learned or a function of x_t and t"
        raise ValueError(f"sigma2 must be {choices}, not {sigma2!r}")
    return extract(schedule.beta if sigma2 == "beta" else beta_tilde(schedule), i, x_t)


def _p_mean_std(schedule, eps_fn, x_t, i, step, *, sigma2, clip, prediction):
    """Returns mean and standard deviation of p(x_{t-1} | x_t), and x_0_hat.

    The standard deviation is 0 in the last step (step = 0).
    """
    x_0_hat, _, raw = _denoise(schedule, eps_fn, x_t, i, prediction, clip)
    mean, _ = q_posterior(schedule, x_0_hat, x_t, i)
    std = _safe_sqrt(jnp.where(step > 0, variance(schedule, sigma2, x_t, i, raw), 0.0))
    return mean, std, x_0_hat


def _scan_down(schedule: Schedule, x_T, body, start: int | None = None):
    """Runs body(x_t, i [B], step) -> (x_{t-1}, x_0_hat) from the last level to the first.

    Returns x_0 and (every x_{t-1}, every x_0_hat). With `start`, only the first `start` levels.
    """
    check(schedule)
    steps = len(schedule.t) if start is None else start
    if not 0 <= steps <= len(schedule.t):
        raise ValueError(f"start counts levels, 0..{len(schedule.t)}, got {start}")
    dtype = jnp.asarray(x_T).dtype

    def one(x, step):
        x, x_0_hat = body(x, jnp.full(len(x), step), step)
        return x, (x.astype(dtype), x_0_hat.astype(dtype))

    x_0, trajectory = jax.lax.scan(one, at_least_float32(x_T), jnp.arange(steps - 1, -1, -1))
    return x_0.astype(dtype), trajectory


# ------------------------------------------------------------------------------ ancestral sampling


def sample_ddpm(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    key: Key[Array, ""],
    *,
    steps: int | None = None,
    spacing: str = "uniform",
    sigma2="beta",
    clip: float | None = None,
    start: int | None = None,
    path: bool = False,
    prediction: str = "eps",
):
    """Samples x_0 by ancestral sampling (DDPM, algorithm 2).

    From the last level to the first, x_{t-1} = mean + std z with z ~ N(0, I). mean and std are
    those of p(x_{t-1} | x_t); in the last step std is 0.

    steps, spacing: which levels are visited, by default all.
    sigma2: the variance of p(x_{t-1} | x_t): see `variance`.
    start: number of levels below x_T, for an x_t in the middle of the process; by default all.
    path: if true, returns (x_0, (x_t, x_0_hat)) with all x_t and x_0_hat [S, B, ...], the noisiest
        first (progressive generation, DDPM eq. 15).
    """
    schedule = schedule if steps is None else respace(schedule, steps, spacing)
    options = {"sigma2": sigma2, "clip": clip, "prediction": prediction}

    def body(x_t, i, step):
        mean, std, x_0_hat = _p_mean_std(schedule, eps_fn, x_t, i, step, **options)
        z = _normal(key, step, x_t)
        return mean + std * z, x_0_hat

    x_0, trajectory = _scan_down(schedule, x_T, body, start)
    return (x_0, trajectory) if path else x_0


# --------------------------------------------------------------------------- deterministic samplers


def sample_ddim(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    key: Key[Array, ""],
    *,
    steps: int,
    eta: Any = 0.0,
    sigma_hat: bool = False,
    spacing: str = "uniform",
    clip: float | None = None,
    path: bool = False,
    prediction: str = "eps",
):
    """Samples x_0 by DDIM (Song, Meng & Ermon 2021, eq. 12) in `steps` steps.

    eta: 0 is deterministic, 1 is ancestral sampling with sigma2 = "beta_tilde".
    sigma_hat: the last row of the paper's table 1 (section 5.1). The mean is that of eta = 1, the
        noise has the larger variance beta, 1 - alpha_bar_t / alpha_bar_s of the levels visited.
    path: as in `sample_ddpm`.
    """
    known_eta = None if isinstance(eta, jax.core.Tracer) else np.asarray(eta)
    if known_eta is not None:
        outside = not ((known_eta >= 0) & (known_eta <= 1)).all()
        if outside or (sigma_hat and known_eta.any()):
            raise ValueError(f"eta must lie in 0..1, and be 0 with sigma_hat, got {eta}")
    respaced = respace(schedule, steps, spacing)
    alpha_bar_prev, variance_prev = previous(respaced)
    sigma2 = (1.0 if sigma_hat else eta) ** 2 * beta_tilde(respaced)
    along_eps, added = variance_prev - sigma2, respaced.beta if sigma_hat else sigma2

    def body(x_t, i, step):
        x_0_hat, eps_hat, _ = _denoise(respaced, eps_fn, x_t, i, prediction, clip)
        mean = extract(alpha_bar_prev**0.5, i, x_t) * x_0_hat
        mean = mean + _safe_sqrt(extract(along_eps, i, x_t)) * eps_hat
        std = _safe_sqrt(jnp.where(step > 0, extract(added, i, x_t), 0.0))
        return mean + std * _normal(key, step, x_t), x_0_hat

    x_0, trajectory = _scan_down(respaced, x_T, body)
    return (x_0, trajectory) if path else x_0


def ddim_invert(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Given,
    *,
    steps: int,
    spacing: str = "uniform",
    clip: float | None = None,
    prediction: str = "eps",
) -> Sample:
    """Returns the x_T from which `sample_ddim` with eta = 0 returns to x_0 (DDIM eq. 14).

    It does so up to the error of a finite number of steps. Each step takes eps_hat at the level
    that it leaves. The first one, from x_0 itself, takes it at the first level.
    """
    x_0, respaced = floats("x_0", x_0), respace(schedule, steps, spacing)

    def one(x, step):
        i = jnp.full(len(x), jnp.maximum(step - 1, 0))
        x_0_hat, eps_hat, _ = _denoise(respaced, eps_fn, x, i, prediction, clip)
        x_0_hat = jnp.where(step == 0, x, x_0_hat)
        return q_sample(respaced, x_0_hat, jnp.full(len(x), step), eps_hat), None

    x_T, _ = jax.lax.scan(one, at_least_float32(x_0), jnp.arange(len(respaced.t)))
    return x_T.astype(jnp.asarray(x_0).dtype)


def sample_dpm_solver(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    *,
    steps: int,
    spacing: str = "log_snr",
    clip: float | None = None,
    prediction: str = "eps",
) -> Sample:
    """Samples x_0 by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, deterministic.

    One evaluation per step. Three steps are of first order. The first one has none before it. The
    last one ends at x_0_hat itself. The step into level 0 is often several times as long as the
    step before it. On a path that begins without signal the second step is of first order too:
    lambda is infinite there. The default spacing is the paper's.
    """
    respaced = respace(schedule, steps, spacing)
    signal, noise = respaced.signal, respaced.noise
    minus_lambda = log_sigma(respaced)  # lambda = log(signal / noise)
    xp = array_namespace(minus_lambda)
    # For the step from level i to level i - 1: its length h, and h over that of the step before.
    h = xp.append(1.0, xp.diff(minus_lambda))
    h_before = xp.append(h[1:], 1.0)
    ratio = h / xp.where(h_before > 0, h_before, 1.0)
    if not respaced.preserves_variance:
        ratio = xp.where(xp.append(signal[1:], 1.0) > 0, ratio, 0.0)
    second_order = np.arange(len(h)) < len(h) - 1
    second_order[:2] = False

    def one(carry, step):
        x_t, x_0_hat_before = carry
        i = jnp.full(len(x_t), step)
        to = jnp.maximum(i - 1, 0)
        x_0_hat, _, _ = _denoise(respaced, eps_fn, x_t, i, prediction, clip)
        is_second = jnp.asarray(second_order)[step]
        change = extract(ratio, i, x_t) / 2 * (x_0_hat - x_0_hat_before)
        d = x_0_hat + jnp.where(is_second, change, 0.0)
        x_prev = extract(noise, to, x_t) / extract(noise, i, x_t) * x_t
        x_prev = x_prev - extract(signal, to, x_t) * jnp.expm1(-extract(h, i, x_t)) * d
        return (jnp.where(step == 0, x_0_hat, x_prev), x_0_hat), None

    x = at_least_float32(x_T)
    (x_0, _), _ = jax.lax.scan(one, (x, jnp.zeros_like(x)), jnp.arange(len(h) - 1, -1, -1))
    return x_0.astype(jnp.asarray(x_T).dtype)


def velocity(
    schedule: Schedule,
    eps_fn: EpsFn,
    x: Sample,
    i,
    prediction: str,
    clip: float | None = None,
) -> Sample:
    """Returns the flow at level i, by `flow_time`; x is in the units of `to_flow_units`.

    If variance is preserved, x is x_t, and the flow is dx_t / d phi = cos(phi) eps_hat - sin(phi)
    x_0_hat = v_hat. This is the probability flow of Karras et al. 2022, eq. 4, with sigma(phi) =
    tan(phi) and scale s(phi) = cos(phi).

    On other paths x is x_t / (signal + noise), and the flow is dx / du = eps_hat - x_0_hat (Lipman
    et al. 2022; eq. 4 with sigma(u) = u / (1 - u) and scale s(u) = 1 - u).
    """
    x_t = from_flow_units(schedule, x, i)
    x_0_hat, eps_hat, _ = _denoise(schedule, eps_fn, x_t, i, prediction, clip)
    if not schedule.preserves_variance:
        return eps_hat - x_0_hat
    signal, noise = signal_and_noise(schedule, i, x_t)
    return signal * eps_hat - noise * x_0_hat


def sample_heun(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    *,
    steps: int,
    spacing: str = "log_snr",
    clip: float | None = None,
    prediction: str = "eps",
) -> Sample:
    """Samples x_0 by Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1).

    2 steps - 1 evaluations. The last step, to sigma = 0, is of first order. The flow is `velocity`,
    in the angle phi = arctan(sigma). The paper recommends sigma itself (eq. 4 with s = 1) and the
    spacing "karras". A cosine schedule of T = 1000 ends at sigma = 20,000: there sigma needs some
    hundred steps, while phi ends at pi / 2. On a straight path the time is u.
    """
    respaced = respace(schedule, steps, spacing)
    time = flow_time(respaced)
    xp = array_namespace(time)
    h = xp.append(0.0, xp.diff(time))  # from level i - 1 to level i

    def one(x, step):
        i = jnp.full(len(x), step)
        d_time = -extract(h, i, x)
        first = velocity(respaced, eps_fn, x, i, prediction, clip)
        second = velocity(respaced, eps_fn, x + d_time * first, i - 1, prediction, clip)
        return x + d_time * (first + second) / 2, None

    x = at_least_float32(x_T)
    x = to_flow_units(respaced, x, np.full(len(x), len(respaced.t) - 1))
    x, _ = jax.lax.scan(one, x, jnp.arange(len(respaced.t) - 1, 0, -1))
    first = jnp.zeros(len(x), int)
    x = from_flow_units(respaced, x, first)
    x_0_hat, _, _ = _denoise(respaced, eps_fn, x, first, prediction, clip)
    return x_0_hat.astype(jnp.asarray(x_T).dtype)


# ----------------------------------------------------------------------- inpainting, interpolation


def inpaint(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    key: Key[Array, ""],
    *,
    known: Shaped[Array | np.ndarray, "B ..."],
    mask: Array | np.ndarray,
    repeats: int = 1,
    steps: int | None = None,
    spacing: str = "uniform",
    sigma2="beta",
    clip: float | None = None,
    prediction: str = "eps",
) -> Sample:
    """Samples x_0 where mask is 0, given `known` where it is 1 (RePaint, algorithm 1).

    repeats: how often each step is taken. Between repeats, noise is added again, so that the new
        part comes to fit the known one. The paper takes 10 and jumps over 10 steps, we over one.
    steps, spacing: which levels are visited, by default all.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    schedule = schedule if steps is None else respace(schedule, steps, spacing)
    known = jnp.asarray(known, at_least_float32(x_T).dtype)
    mask = jnp.asarray(mask) != 0
    options = {"sigma2": sigma2, "clip": clip, "prediction": prediction}

    def body(x_t, i, step):
        def normal(key):
            return jax.random.normal(key, x_t.shape, x_t.dtype)

        def repeat(r, x_t):
            k = jax.random.fold_in(jax.random.fold_in(key, step), r)
            k_back, k_known, k_forth = jax.random.split(k, 3)
            mean, std, _ = _p_mean_std(schedule, eps_fn, x_t, i, step, **options)
            unknown = mean + std * normal(k_back)
            noisy = q_sample(schedule, known, jnp.maximum(i - 1, 0), normal(k_known))
            x_prev = jnp.where(mask, jnp.where(step > 0, noisy, known), unknown)
            again = extract(step_signal_squared(schedule) ** 0.5, i, x_t) * x_prev
            again = again + _safe_sqrt(extract(schedule.beta, i, x_t)) * normal(k_forth)
            return jnp.where(r < repeats - 1, again, x_prev)

        x_prev = jax.lax.fori_loop(0, repeats, repeat, x_t)
        return x_prev, x_prev

    return _scan_down(schedule, x_T, body)[0]


def slerp(a: Sample, b: Sample, share) -> Sample:
    """Interpolates between two noises along their sphere (DDIM eq. 67): `share` 0 is a, 1 is b.

    share: a number, or an array that broadcasts against a, such as [B, 1, 1, 1].
    Opposite noises have no shortest path on the sphere; they are mixed in a line.
    """
    dtype, axes = jnp.result_type(a, b), tuple(range(1, a.ndim))
    a, b = at_least_float32(a), at_least_float32(b)
    share = jnp.asarray(share, a.dtype)

    def length(x):
        return _safe_sqrt((x**2).sum(axes, keepdims=True))

    def unit(x):
        largest = jnp.abs(x).max(axes, keepdims=True)
        x = x / jnp.where(largest > 0, largest, 1.0)  # so that squares neither overflow nor vanish
        return x / jnp.where(largest > 0, length(x), 1.0)

    difference, total = length(unit(a) - unit(b)), length(unit(a) + unit(b))
    # The angle over pi, from the tangent of its half: a cosine is flat near 0.
    theta = jnp.where(total < 1e-5, 0.0, 2 / jnp.pi * jnp.arctan2(difference, total))
    of_a, of_b = (s * jnp.sinc(s * theta) / jnp.sinc(theta) for s in (1 - share, share))
    return (of_a * a + of_b * b).astype(dtype)


def interpolate(
    schedule: Schedule,
    eps_fn: EpsFn,
    a: Given,
    b: Given,
    key: Key[Array, ""],
    *,
    t: int,
    shares: Float[Array | np.ndarray, "K"],
    sigma2="beta",
    clip: float | None = None,
    prediction: str = "eps",
) -> Float[Array, "K B ..."]:
    """Interpolates between images through their noisy versions (DDPM, section 4.4 and figure 8).

    Both images get t steps of the same noise, are mixed in a line, and are denoised. t = 0 mixes
    the pixels. The paper prints x_0 where it means x_t. eps_fn is called with K B samples, those of
    the first share first.
    """
    if not 0 <= t <= len(schedule.t):
        raise ValueError(f"t counts steps taken, 0..{len(schedule.t)}, got {t}")
    k_eps, k_back = jax.random.split(key)
    a, b = floats("a", a), floats("b", b)
    dtype, shape = jnp.result_type(a, b), a.shape
    a, b = at_least_float32(a), at_least_float32(b)
    if t:
        eps, last = jax.random.normal(k_eps, shape, a.dtype), jnp.full(len(a), t - 1)
        a, b = (q_sample(schedule, x, last, eps) for x in (a, b))
    mixed = jnp.concatenate([(1 - s) * a + s * b for s in jnp.asarray(shares, a.dtype)])
    if t:
        options = {"sigma2": sigma2, "clip": clip, "prediction": prediction}
        mixed = sample_ddpm(schedule, eps_fn, mixed, k_back, start=t, **options)
    return mixed.reshape(len(shares), *shape).astype(dtype)
