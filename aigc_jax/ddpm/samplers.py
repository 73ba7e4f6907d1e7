"""From noise to samples, over any `eps_fn(x_t, t) -> eps_hat` with t the original steps [B]. One that learned variances
too gives (eps_hat, raw), see `learned_variance`. No sampler adds noise in its last step, and all of them loop in one
compiled scan.

Ancestral (Ho et al. 2020, "DDPM"), DDIM (Song, Meng & Ermon 2021), DPM-Solver++ (Lu et al. 2022), Heun (Karras et al.
2022); guidance (Ho & Salimans 2022), inpainting (Lugmayr et al. 2022), interpolation and progressive generation (DDPM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from .process import (
    Schedule,
    at,
    before,
    beta_tilde,
    check,
    convert,
    learned_variance,
    noise2,
    q_posterior,
    q_sample,
    respace,
)

Sample = Float[Array, "B ..."]
EpsFn = Callable[[Any, Any], Any]


def guide(eps_cond: Sample, eps_uncond: Sample, w) -> Sample:
    """(1 + w) eps_cond - w eps_uncond (Ho & Salimans 2022, eq. 6): w = 0 is conditional, -1 unconditional sampling.

    w: a number, or one for each example [B]. The "guidance scale" of other libraries is 1 + w.
    """
    w = jnp.asarray(w).reshape(-1, *[1] * (eps_cond.ndim - 1))
    return (1 + w) * eps_cond - w * eps_uncond


def said(eps_fn: EpsFn, x_t: Sample, t) -> tuple[Sample, Sample | None]:
    """eps_hat, and of learned variances raw, else None."""
    out = eps_fn(x_t, t)
    return out if isinstance(out, tuple) else (out, None)


def _noise(key, i, x):
    return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)


def _down(schedule: Schedule, x_T, body, start: int | None = None):
    """body(i [B], x, number) -> (x, x_0_hat) from the last level to the first: (x_0, (all x, all x_0_hat))."""
    check(schedule)
    steps = len(schedule.t) if start is None else start
    if not 0 <= steps <= len(schedule.t):
        raise ValueError(f"start counts levels, 0..{len(schedule.t)}, got {start}")

    def one(x, i):
        x, x_0_hat = body(jnp.full(len(x), i), x, i)
        return x, (x, x_0_hat)

    return jax.lax.scan(one, x_T, jnp.arange(steps - 1, -1, -1))


def _x_0_hat(schedule, eps_fn, x_t, i, clip):
    """x_0 as eps_hat sees it, clipped where wished, eps_hat, and raw."""
    eps_hat, raw = said(eps_fn, x_t, jnp.asarray(schedule.t)[i])
    x_0_hat = convert(schedule, eps_hat, x_t, i, given="eps", wanted="x_0")
    return (x_0_hat if clip is None else jnp.clip(x_0_hat, -clip, clip)), eps_hat, raw


def variance(schedule: Schedule, sigma2, x_t: Sample, i, raw: Sample | None = None) -> Array:
    """Variance of p(x_{t-1} | x_t): "beta", "beta_tilde" (DDPM, section 3.2), "learned", between them, which takes the
    raw that eps_fn gives beside eps_hat, or a callable (x_t, t) -> variance.
    """
    if callable(sigma2):
        return sigma2(x_t, jnp.asarray(schedule.t)[i])
    if sigma2 == "learned":
        if raw is None:
            raise ValueError("sigma2 'learned' takes an eps_fn that gives (eps_hat, raw): this one gives eps_hat only")
        return learned_variance(schedule, raw, i)
    if sigma2 not in ("beta", "beta_tilde"):
        raise ValueError(f"sigma2 must be beta, beta_tilde, learned or a function of x_t and t, not {sigma2!r}")
    return at(schedule.beta if sigma2 == "beta" else beta_tilde(schedule), i, x_t)


def _root(x: Array) -> Array:
    """Square root; 0, with slope 0, where x is 0 or rounded below it."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def sample_ddpm(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    key: Key[Array, ""],
    *,
    sigma2="beta",
    clip: float | None = None,
    start: int | None = None,
    path: bool = False,
):
    """Ancestral sampling (DDPM, algorithm 2) through every level of the schedule; give a respaced one for fewer.

    sigma2: see `variance`. clip: x_0_hat is held within +-clip, as the authors' code does with images (1.0).
    start: levels that x_T is above, for an x_t in the middle of the process; by default all.
    path: also all x_t and x_0_hat on the way, [S, B, ...], the noisiest first (progressive generation, DDPM eq. 15).
    """

    def body(i, x, number):
        x_0_hat, _, raw = _x_0_hat(schedule, eps_fn, x, i, clip)
        mean, _ = q_posterior(schedule, x_0_hat, x, i)
        sigma = _root(jnp.where(number > 0, variance(schedule, sigma2, x, i, raw), 0.0))
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
    eta: float = 0.0,
    sigma_hat: bool = False,
    spacing: str = "uniform",
    clip: float | None = None,
    path: bool = False,
):
    """DDIM (eq. 12) over `steps` levels: eta = 0 is deterministic, 1 ancestral sampling with sigma2 = "beta_tilde".

    sigma_hat: the paper's last row (section 5.1): noise of the larger sqrt(1 - alpha_bar_t / alpha_bar_s) is added to
        the mean of eta = 1. spacing: see `respace`; clip and path as in `sample_ddpm`.
    """
    if isinstance(eta, (int, float)) and (not 0 <= eta <= 1 or (sigma_hat and eta)):
        raise ValueError(f"eta must lie in 0..1, and be 0 with sigma_hat, got {eta}")
    few = respace(schedule, steps, spacing)
    earlier, noise2_earlier = before(few)
    sigma2 = (1.0 if sigma_hat else eta) ** 2 * beta_tilde(few)
    rest, added = noise2_earlier - sigma2, few.beta if sigma_hat else sigma2

    def body(i, x, number):
        x_0_hat, eps_hat, _ = _x_0_hat(few, eps_fn, x, i, clip)
        if clip is not None:
            eps_hat = convert(few, x_0_hat, x, i, given="x_0", wanted="eps")
        mean = at(earlier**0.5, i, x) * x_0_hat + _root(at(rest, i, x)) * eps_hat
        sigma = _root(jnp.where(number > 0, at(added, i, x), 0.0))
        return mean + sigma * _noise(key, number, x), x_0_hat

    x_0, way = _down(few, x_T, body)
    return (x_0, way) if path else x_0


def ddim_invert(
    schedule: Schedule, eps_fn: EpsFn, x_0: Sample, *, steps: int, spacing: str = "uniform", clip: float | None = None
) -> Sample:
    """The x_T from which `sample_ddim` with eta = 0 comes back to x_0, but for the size of its steps (DDIM eq. 14).

    Each step takes eps_hat at the level it leaves; the first, from alpha_bar = 1, at the first level it enters.
    """
    few = respace(schedule, steps, spacing)
    earlier, noise2_earlier = before(few)
    t = jnp.asarray(few.t)
    leaving = jnp.concatenate([t[:1], t[:-1]])

    def one(x, i):
        eps_hat, _ = said(eps_fn, x, jnp.full(len(x), leaving[i]))
        i = jnp.full(len(x), i)
        x_0_hat = (x - at(noise2_earlier**0.5, i, x) * eps_hat) / at(earlier**0.5, i, x)
        if clip is not None:
            x_0_hat = jnp.clip(x_0_hat, -clip, clip)
        return q_sample(few, x_0_hat, i, eps_hat), None

    return jax.lax.scan(one, x_0, jnp.arange(len(t)))[0]


def _lambdas(few: Schedule):
    """Half the log signal-to-noise ratio of each level."""
    numpy = jnp if isinstance(few.alpha_bar, jax.Array) else np
    return 0.5 * (numpy.log(few.alpha_bar) - numpy.log(noise2(few)))


def sample_dpm_solver(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    *,
    steps: int,
    spacing: str = "uniform",
    clip: float | None = None,
) -> Sample:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step, without noise.

    The first step is of first order, and the last too, which goes to x_0_hat itself.
    """
    few = respace(schedule, steps, spacing)
    lam = _lambdas(few)
    numpy = jnp if isinstance(few.alpha_bar, jax.Array) else np
    # Of the step from level i to level i - 1: h, and the ratio to the step before it.
    h = numpy.concatenate([numpy.ones(1), lam[:-1] - lam[1:]])
    ratio = numpy.concatenate([h[1:], numpy.ones(1)]) / h

    def one(carry, number):
        x, last = carry
        i = jnp.full(len(x), number)
        x_0_hat, _, _ = _x_0_hat(few, eps_fn, x, i, clip)
        both = x_0_hat + (x_0_hat - last) / (2 * at(ratio, i, x))
        d = jnp.where((number == len(few.t) - 1) | (number == 0), x_0_hat, both)
        to = jnp.maximum(i - 1, 0)
        signal, noise = at(few.alpha_bar**0.5, to, x), at(noise2(few) ** 0.5, to, x)
        moved = noise / at(noise2(few) ** 0.5, i, x) * x - signal * jnp.expm1(-at(h, i, x)) * d
        return (jnp.where(number == 0, x_0_hat, moved), x_0_hat), None

    (x_0, _), _ = jax.lax.scan(one, (x_T, jnp.zeros_like(x_T)), jnp.arange(len(few.t) - 1, -1, -1))
    return x_0


def sample_heun(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    *,
    steps: int,
    spacing: str = "uniform",
    clip: float | None = None,
) -> Sample:
    """Heun's method on the probability-flow ODE in sigma = sqrt(1/alpha_bar - 1) (Karras et al. 2022, algorithm 1):
    d(x / sqrt(alpha_bar)) / d sigma = eps_hat. 2 steps - 1 evaluations; the last step, to 0, is of first order.
    """
    few = respace(schedule, steps, spacing)
    sigma = (noise2(few) / few.alpha_bar) ** 0.5

    def slope(x, i):
        x_0_hat, eps_hat, _ = _x_0_hat(few, eps_fn, x, i, clip)
        return x_0_hat, eps_hat if clip is None else convert(few, x_0_hat, x, i, given="x_0", wanted="eps")

    def one(x, number):
        i = jnp.full(len(x), number)
        _, first = slope(x, i)
        scale, target = at(few.alpha_bar**-0.5, i, x), at(few.alpha_bar**0.5, i - 1, x)
        h = at(sigma, i - 1, x) - at(sigma, i, x)
        _, second = slope(target * (scale * x + h * first), i - 1)
        return target * (scale * x + h * (first + second) / 2), None

    x, _ = jax.lax.scan(one, x_T, jnp.arange(len(few.t) - 1, 0, -1))
    return slope(x, jnp.zeros(len(x), int))[0]


def inpaint(
    schedule: Schedule,
    eps_fn: EpsFn,
    x_T: Sample,
    key: Key[Array, ""],
    *,
    known: Sample,
    mask: Array,
    repeats: int = 1,
    sigma2="beta",
    clip: float | None = None,
) -> Sample:
    """Fills in where mask is 0, given `known` where it is 1 (RePaint, Lugmayr et al. 2022, algorithm 1).

    repeats: how often each step is taken, going back to its noise in between, so that what is filled in comes to agree
        with what is known; the paper takes 10 and jumps over 10 steps, ours over one.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")

    def body(i, x, number):
        def again(j, x):
            k_back, k_known, k_forth = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, number), j), 3)
            x_0_hat, _, raw = _x_0_hat(schedule, eps_fn, x, i, clip)
            mean, _ = q_posterior(schedule, x_0_hat, x, i)
            sigma = _root(jnp.where(number > 0, variance(schedule, sigma2, x, i, raw), 0.0))
            below = mean + sigma * jax.random.normal(k_back, x.shape)
            noisy = q_sample(schedule, known, jnp.maximum(i - 1, 0), jax.random.normal(k_known, x.shape))
            below = jnp.where(mask, jnp.where(number > 0, noisy, known), below)
            beta = at(schedule.beta, i, x)
            back = jnp.sqrt(1 - beta) * below + jnp.sqrt(beta) * jax.random.normal(k_forth, x.shape)
            return jnp.where(j < repeats - 1, back, below)

        x = jax.lax.fori_loop(0, repeats, again, x)
        return x, x

    return _down(schedule, x_T, body)[0]


def slerp(a: Sample, b: Sample, share) -> Sample:
    """Between two noises on the sphere they lie on (DDIM eq. 67); `share` 0 is a, 1 is b."""
    axes = tuple(range(1, a.ndim))
    cos = (a * b).sum(axes, keepdims=True) / jnp.sqrt((a**2).sum(axes, keepdims=True) * (b**2).sum(axes, keepdims=True))
    near = jnp.abs(cos) > 1 - 1e-6  # of one direction: in a line
    angle = jnp.arccos(jnp.where(near, 0.0, cos))
    sin = jnp.sin(angle)
    first = jnp.where(near, 1 - share, jnp.sin((1 - share) * angle) / sin)
    return first * a + jnp.where(near, share, jnp.sin(share * angle) / sin) * b


def interpolate(
    schedule: Schedule,
    eps_fn: EpsFn,
    a: Sample,
    b: Sample,
    key: Key[Array, ""],
    *,
    t: int,
    shares: Float[Array, "K"],
    sigma2="beta",
    clip: float | None = None,
) -> Float[Array, "K B ..."]:
    """Both images to step t with the same noise, between them in a line, and back (DDPM, section 4.4, figure 8).

    The paper prints x_0 where it means x_t. t counts steps taken: 0 is a blend of pixels.
    """
    if not 0 <= t <= len(schedule.t):
        raise ValueError(f"t counts steps taken, 0..{len(schedule.t)}, got {t}")
    k_eps, k_back = jax.random.split(key)
    if t:
        eps, last = jax.random.normal(k_eps, a.shape), jnp.full(len(a), t - 1)
        a, b = (q_sample(schedule, x, last, eps) for x in (a, b))
    between = jnp.concatenate([(1 - s) * a + s * b for s in shares])
    if t:
        between = sample_ddpm(schedule, eps_fn, between, k_back, sigma2=sigma2, clip=clip, start=t)
    return between.reshape(len(shares), *a.shape)
