"""From noise to samples, over any `eps_fn(x_t, t) -> eps_hat` with t the original steps [B]. One that learned variances
too gives (eps_hat, raw), see `learned_variance`. No sampler adds noise in its last step, and all of them loop in one
compiled scan.

prediction: what the function gives, "eps", "x_0" or "v". A net is best asked for its own: from eps to x_0_hat divides
by the root of alpha_bar, which is 5e-5 at the noisy end of a cosine schedule.
A sample has the dtype of x_T. The chain itself, and the x_t that the function sees, are at least float32.
spacing: which steps are visited, see `spaced`. `sample_ddpm`, `inpaint` and `interpolate` take a respaced schedule.

Ancestral (Ho et al. 2020, "DDPM"), DDIM (Song, Meng & Ermon 2021), DPM-Solver++ (Lu et al. 2022), Heun (Karras et al.
2022); guidance (Ho & Salimans 2022), inpainting (Lugmayr et al. 2022), interpolation and progressive generation (DDPM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from .process import (
    Sample,
    Schedule,
    angle,
    at,
    before,
    beta_tilde,
    check,
    denoised,
    kept,
    learned_variance,
    log_sigma,
    precise,
    q_posterior,
    q_sample,
    respace,
    roots,
)

EpsFn = Callable[[Any, Any], Any]


def guide(eps_cond: Sample, eps_uncond: Sample, w) -> Sample:
    """(1 + w) eps_cond - w eps_uncond (Ho & Salimans 2022, eq. 6): w = 0 is conditional, -1 unconditional sampling.

    The same of x_0 or v: each is a line in eps at a given x_t.
    w: a number, or one for each example [B]. The "guidance scale" of other libraries is 1 + w.
    """
    w = precise(w).reshape(-1, *[1] * (eps_cond.ndim - 1))
    return ((1 + w) * eps_cond - w * eps_uncond).astype(eps_cond.dtype)


def said(eps_fn: EpsFn, x_t: Sample, t) -> tuple[Sample, Sample | None]:
    """The prediction, and of learned variances raw, else None; in the precision of x_t, but at least float32."""
    out, dtype = eps_fn(x_t, t), jnp.result_type(x_t, jnp.float32)
    value, raw = out if isinstance(out, tuple) else (out, None)
    return jnp.asarray(value, dtype), None if raw is None else jnp.asarray(raw, dtype)


def _noise(key, i, x):
    return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)


def _down(schedule: Schedule, x_T, body, start: int | None = None):
    """body(i [B], x, number) -> (x, x_0_hat) from the last level to the first: (x_0, (all x, all x_0_hat))."""
    check(schedule)
    steps = len(schedule.t) if start is None else start
    if not 0 <= steps <= len(schedule.t):
        raise ValueError(f"start counts levels, 0..{len(schedule.t)}, got {start}")
    dtype = jnp.asarray(x_T).dtype

    def one(x, i):
        x, x_0_hat = body(jnp.full(len(x), i), x, i)
        return x, (x.astype(dtype), x_0_hat.astype(dtype))

    x, way = jax.lax.scan(one, precise(x_T), jnp.arange(steps - 1, -1, -1))
    return x.astype(dtype), way


def _denoise(schedule, eps_fn, x_t, i, prediction, clip):
    """x_0_hat, clipped where wished; eps_hat, which is what that x_0_hat leaves of x_t; and raw."""
    value, raw = said(eps_fn, x_t, jnp.asarray(schedule.t)[i])
    signal, noise = (at(a, i, x_t) for a in roots(schedule))
    x_0_hat, eps_hat = denoised(value, x_t, signal, noise, given=prediction)
    if clip is not None:
        x_0_hat, eps_hat = denoised(jnp.clip(x_0_hat, -clip, clip), x_t, signal, noise, given="x_0")
    return x_0_hat, eps_hat, raw


def variance(schedule: Schedule, sigma2, x_t: Sample, i, raw: Sample | None = None) -> Array:
    """Variance of p(x_{t-1} | x_t): "beta", "beta_tilde" (DDPM, section 3.2), "learned", between them, which takes the
    raw that eps_fn gives beside eps_hat, or a callable (x_t, t) -> variance.
    """
    if callable(sigma2):
        return jnp.asarray(sigma2(x_t, jnp.asarray(schedule.t)[i]), jnp.result_type(x_t, jnp.float32))
    if sigma2 == "learned":
        if raw is None:
            raise ValueError("sigma2 'learned' takes an eps_fn that gives (eps_hat, raw): this one gives eps_hat only")
        return learned_variance(schedule, raw, i)
    if sigma2 not in ("beta", "beta_tilde"):
        raise ValueError(f"sigma2 must be beta, beta_tilde, learned or a function of x_t and t, not {sigma2!r}")
    return at(schedule.beta if sigma2 == "beta" else beta_tilde(schedule), i, x_t)


def _ancestral(schedule, eps_fn, x, i, number, *, sigma2, clip, prediction):
    """Mean and deviation of p(x_{t-1} | x_t), without noise in the last step, and x_0_hat."""
    x_0_hat, _, raw = _denoise(schedule, eps_fn, x, i, prediction, clip)
    mean, _ = q_posterior(schedule, x_0_hat, x, i)
    return mean, _root(jnp.where(number > 0, variance(schedule, sigma2, x, i, raw), 0.0)), x_0_hat


def _root(x: Array) -> Array:
    """Square root; 0, with slope 0, where x is 0 or rounded below it."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


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
    """Ancestral sampling (DDPM, algorithm 2) through `steps` levels of the schedule, by default through every one.

    spacing: which levels, see `respace`.
    sigma2: see `variance`. clip: x_0_hat is held within +-clip, as the authors' code does with images (1.0).
    start: levels that x_T is above, for an x_t in the middle of the process; by default all.
    path: also all x_t and x_0_hat on the way, [S, B, ...], the noisiest first (progressive generation, DDPM eq. 15).
    """
    schedule = schedule if steps is None else respace(schedule, steps, spacing)

    def body(i, x, number):
        mean, sigma, x_0_hat = _ancestral(
            schedule, eps_fn, x, i, number, sigma2=sigma2, clip=clip, prediction=prediction
        )
        return mean + sigma * _noise(key, number, x), x_0_hat

    x_0, way = _down(schedule, x_T, body, start)
    return (x_0, way) if path else x_0


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
    """DDIM (eq. 12) over `steps` levels: eta = 0 is deterministic, 1 ancestral sampling with sigma2 = "beta_tilde".

    sigma_hat: the paper's last row (section 5.1): noise of the larger sqrt(1 - alpha_bar_t / alpha_bar_s) is added to
        the mean of eta = 1. spacing: see `respace`; clip and path as in `sample_ddpm`.
    """
    known = None if isinstance(eta, jax.core.Tracer) else np.asarray(eta)
    if known is not None and (not ((known >= 0) & (known <= 1)).all() or (sigma_hat and known.any())):
        raise ValueError(f"eta must lie in 0..1, and be 0 with sigma_hat, got {eta}")
    few = respace(schedule, steps, spacing)
    earlier, noise2_earlier = before(few)
    sigma2 = (1.0 if sigma_hat else eta) ** 2 * beta_tilde(few)
    rest, added = noise2_earlier - sigma2, few.beta if sigma_hat else sigma2

    def body(i, x, number):
        x_0_hat, eps_hat, _ = _denoise(few, eps_fn, x, i, prediction, clip)
        mean = at(earlier**0.5, i, x) * x_0_hat + _root(at(rest, i, x)) * eps_hat
        sigma = _root(jnp.where(number > 0, at(added, i, x), 0.0))
        return mean + sigma * _noise(key, number, x), x_0_hat

    x_0, way = _down(few, x_T, body)
    return (x_0, way) if path else x_0


def ddim_invert(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_0: Sample,
    *,
    steps: int,
    spacing: str = "uniform",
    clip: float | None = None,
    prediction: str = "eps",
) -> Sample:
    """The x_T from which `sample_ddim` with eta = 0 comes back to x_0, but for the size of its steps (DDIM eq. 14).

    Each step takes eps_hat at the level it leaves; the first, from alpha_bar = 1, at the first level it enters.
    """
    few = respace(schedule, steps, spacing)

    def one(x, number):
        leaving = jnp.full(len(x), jnp.maximum(number - 1, 0))
        x_0_hat, eps_hat, _ = _denoise(few, eps_fn, x, leaving, prediction, clip)
        return q_sample(few, jnp.where(number == 0, x, x_0_hat), jnp.full(len(x), number), eps_hat), None

    x_T, _ = jax.lax.scan(one, precise(x_0), jnp.arange(len(few.t)))
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
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step, without noise.

    First order are the first step, the one into level 0, which is often several times as long as the one before it, and
    the last, to x_0_hat itself. Visits levels evenly in log-SNR by default, as the paper does.
    """
    few = respace(schedule, steps, spacing)
    signal, noise = roots(few)
    sigmas = log_sigma(few)
    numpy = jnp if isinstance(sigmas, jax.Array) else np
    # Of the step from level i to level i - 1: h, and its ratio to the step before it.
    h = numpy.append(1.0, numpy.diff(sigmas))
    earlier = numpy.append(h[1:], 1.0)
    ratio = h / numpy.where(earlier > 0, earlier, 1.0)
    second = np.arange(len(h)) < len(h) - 1
    second[:2] = False

    def one(carry, number):
        x, last = carry
        i = jnp.full(len(x), number)
        to = jnp.maximum(i - 1, 0)
        x_0_hat, _, _ = _denoise(few, eps_fn, x, i, prediction, clip)
        d = x_0_hat + jnp.where(jnp.asarray(second)[number], at(ratio, i, x) / 2 * (x_0_hat - last), 0.0)
        moved = at(noise, to, x) / at(noise, i, x) * x - at(signal, to, x) * jnp.expm1(-at(h, i, x)) * d
        return (jnp.where(number == 0, x_0_hat, moved), x_0_hat), None

    x = precise(x_T)
    (x_0, _), _ = jax.lax.scan(one, (x, jnp.zeros_like(x)), jnp.arange(len(h) - 1, -1, -1))
    return x_0.astype(jnp.asarray(x_T).dtype)


def velocity(schedule: Schedule, eps_fn: EpsFn, x: Sample, i, prediction: str, clip: float | None = None) -> Sample:
    """dx_t / d phi = cos(phi) eps_hat - sin(phi) x_0_hat = v_hat, the probability flow in the `angle` phi.

    It is the flow of Karras et al. 2022, eq. 4, with sigma(phi) = tan(phi) and scale s(phi) = cos(phi).
    """
    x_0_hat, eps_hat, _ = _denoise(schedule, eps_fn, x, i, prediction, clip)
    signal, noise = (at(a, i, x) for a in roots(schedule))
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
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1), in the angle phi = arctan(sigma).

    2 steps - 1 evaluations; the last step, to sigma = 0, is of first order. See `velocity` for the flow. The paper
    prefers sigma itself (their eq. 4 with s = 1), and its own spacing, our "karras". In sigma, schedules that end at
    sigma = 20,000, as the cosine of T = 1000, need some hundred steps; in phi they end at pi / 2.
    """
    few = respace(schedule, steps, spacing)
    phi = angle(few)
    numpy = jnp if isinstance(phi, jax.Array) else np
    h = numpy.append(0.0, numpy.diff(phi))  # from level i - 1 to level i

    def one(x, number):
        i = jnp.full(len(x), number)
        step = -at(h, i, x)
        first = velocity(few, eps_fn, x, i, prediction, clip)
        second = velocity(few, eps_fn, x + step * first, i - 1, prediction, clip)
        return x + step * (first + second) / 2, None

    x, _ = jax.lax.scan(one, precise(x_T), jnp.arange(len(few.t) - 1, 0, -1))
    x_0_hat, _, _ = _denoise(few, eps_fn, x, jnp.zeros(len(x), int), prediction, clip)
    return x_0_hat.astype(jnp.asarray(x_T).dtype)


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
    """Fills in where mask is 0, given `known` where it is 1 (RePaint, Lugmayr et al. 2022, algorithm 1).

    steps, spacing: which levels are visited, by default every one; see `respace`.
    repeats: how often each step is taken, going back to its noise in between, so that what is filled in comes to agree
        with what is known; the paper takes 10 and jumps over 10 steps, ours over one.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    schedule = schedule if steps is None else respace(schedule, steps, spacing)
    known, mask = jnp.asarray(known, precise(x_T).dtype), jnp.asarray(mask) != 0

    def body(i, x, number):
        def normal(key):
            return jax.random.normal(key, x.shape, x.dtype)

        def again(j, x):
            k_back, k_known, k_forth = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, number), j), 3)
            mean, sigma, _ = _ancestral(schedule, eps_fn, x, i, number, sigma2=sigma2, clip=clip, prediction=prediction)
            below = mean + sigma * normal(k_back)
            noisy = q_sample(schedule, known, jnp.maximum(i - 1, 0), normal(k_known))
            below = jnp.where(mask, jnp.where(number > 0, noisy, known), below)
            back = at(kept(schedule) ** 0.5, i, x) * below + _root(at(schedule.beta, i, x)) * normal(k_forth)
            return jnp.where(j < repeats - 1, back, below)

        x = jax.lax.fori_loop(0, repeats, again, x)
        return x, x

    return _down(schedule, x_T, body)[0]


def slerp(a: Sample, b: Sample, share) -> Sample:
    """Between two noises on the sphere they lie on (DDIM eq. 67); `share` 0 is a, 1 is b.

    Between opposite noises every way is as short as any other: these are mixed in a line.
    """
    dtype, axes = jnp.result_type(a, b), tuple(range(1, a.ndim))
    a, b, share = precise(a), precise(b), jnp.asarray(share, precise(a).dtype)

    def length(x):
        return _root((x**2).sum(axes, keepdims=True))

    def unit(x):
        largest = jnp.abs(x).max(axes, keepdims=True)
        x = x / jnp.where(largest > 0, largest, 1.0)  # whose squares neither overflow nor vanish
        return x / jnp.where(largest > 0, length(x), 1.0)

    apart, together = length(unit(a) - unit(b)), length(unit(a) + unit(b))
    # In turns of pi, of the halved angle's tangent, which is exact where a cosine is flat.
    theta = jnp.where(together < 1e-5, 0.0, 2 / jnp.pi * jnp.arctan2(apart, together))
    first, second = (s * jnp.sinc(s * theta) / jnp.sinc(theta) for s in (1 - share, share))
    return (first * a + second * b).astype(dtype)


def interpolate(
    schedule: Schedule,
    eps_fn: EpsFn,
    a: Sample,
    b: Sample,
    key: Key[Array, ""],
    *,
    t: int,
    shares: Float[Array | np.ndarray, "K"],
    sigma2="beta",
    clip: float | None = None,
    prediction: str = "eps",
) -> Float[Array, "K B ..."]:
    """Both images to step t with the same noise, between them in a line, and back (DDPM, section 4.4, figure 8).

    The paper prints x_0 where it means x_t. t counts steps taken: 0 is a blend of pixels.
    """
    if not 0 <= t <= len(schedule.t):
        raise ValueError(f"t counts steps taken, 0..{len(schedule.t)}, got {t}")
    k_eps, k_back = jax.random.split(key)
    dtype, shape, a, b = jnp.result_type(a, b), a.shape, precise(a), precise(b)
    if t:
        eps, last = jax.random.normal(k_eps, shape, a.dtype), jnp.full(len(a), t - 1)
        a, b = (q_sample(schedule, x, last, eps) for x in (a, b))
    between = jnp.concatenate([(1 - s) * a + s * b for s in jnp.asarray(shares, a.dtype)])
    if t:
        between = sample_ddpm(
            schedule, eps_fn, between, k_back, sigma2=sigma2, clip=clip, start=t, prediction=prediction
        )
    return between.reshape(len(shares), *shape).astype(dtype)
