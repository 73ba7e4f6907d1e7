"""What the diffusion scripts share: the exact denoiser of a mixture, and compiled sampling with the whole way shown."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from aigc_jax import ddpm, figures, train
from aigc_jax.core import EMA
from aigc_jax.ddpm.process import at
from aigc_jax.train.engine import compiler_options


def denoise(x_t, signal, noise, centres: np.ndarray, std: float):
    """E[eps | x_t] [B, d] where x_t = signal x_0 + noise eps [B, d] and x_0 is a mixture of equal normals.

    Each component k has the posterior of a normal, eps = noise (x_t - signal c_k) / v with v = signal^2 std^2 +
    noise^2, and a share of softmax(-|x_t - signal c_k|^2 / 2v). signal and noise: [B, 1].
    """
    v = signal**2 * std**2 + noise**2
    apart = x_t[:, None] - signal[:, None] * jnp.asarray(centres, jnp.float32)[None]
    share = jax.nn.softmax(-0.5 * (apart**2).sum(-1) / v, -1)
    return noise / v * (share[..., None] * apart).sum(1)


def exact_eps(schedule: ddpm.Schedule, centres: np.ndarray, std: float):
    """An eps_fn(x_t, t) that no training could better; t are steps of this schedule."""

    def eps_fn(x_t, t):
        signal, noise = (
            at(schedule.alpha_bar**0.5, t, x_t),
            at(ddpm.noise2(schedule) ** 0.5, t, x_t),
        )
        return denoise(x_t, signal, noise, centres, std)

    return eps_fn


def mixture_nll(x: np.ndarray, centres: np.ndarray, std: float) -> np.ndarray:
    """-log p(x) [N], nats, float64, of equal normals of width std around the centres [K, d]."""
    squared = ((x[:, None].astype(np.float64) - centres[None]) ** 2).sum(-1) / (2 * std**2)
    least = squared.min(-1, keepdims=True)
    d = x.shape[-1]
    inside = np.log(np.exp(least - squared).sum(-1)) - least[:, 0]
    return np.log(len(centres)) + d / 2 * np.log(2 * np.pi * std**2) - inside


def compiled(f, **options):
    """jax.jit as train compiles: on some CPUs convolutions need an option."""
    return jax.jit(f, compiler_options=compiler_options(jax.devices()[0]), **options)


def way(result: train.Result, key, *, n: int, label=None) -> tuple[np.ndarray, np.ndarray]:
    """Ancestral sampling of n pictures: every x_t and every x_0_hat, [T + 1, n, H, W, C] in [0, 1], noise first."""
    cfg = result.config

    def draw(state, key):
        params = EMA(cfg.ema).read(state)
        k_start, k_way = jax.random.split(key)
        schedule, given = (
            ddpm.schedule_of(cfg, params),
            None if label is None else jnp.asarray(label),
        )
        x_T = jax.random.normal(k_start, (n, *cfg.shape))
        eps_fn = ddpm.eps_fn_of(cfg, params, given)
        x_0, (x_t, x_0_hat) = ddpm.sample_ddpm(
            schedule, eps_fn, x_T, k_way, sigma2=cfg.variance, clip=1.0, path=True
        )
        return jnp.concatenate([x_T[None], x_t]), x_0_hat

    x_t, x_0_hat = compiled(draw)(result.state, key)
    return tuple(np.clip((np.asarray(x) + 1) / 2, 0, 1) for x in (x_t, x_0_hat))


def strip(ax, way: tuple[np.ndarray, np.ndarray], which: Iterable[int]) -> None:
    """What the net sees on the way: for each picture a row of x_t and below it one of x_0_hat."""
    x_t, x_0_hat = way
    T = len(x_0_hat)
    left = [round(share * T) for share in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)]
    pictures = [
        x
        for i in which
        for x in (
            *(x_t[T - t, i] for t in (*left, 0)),
            *(x_0_hat[T - t, i] for t in left),
            x_0_hat[-1, i],
        )
    ]
    figures.images(
        ax,
        np.stack(pictures),
        len(left) + 1,
        title=f"x_t, below it the x_0 seen in it; steps left: {', '.join(map(str, left))}, 0",
    )


def curve(ax, result: train.Result, watched: str) -> None:
    """The bound while training."""
    lines = [line for line in train.metrics(result.folder) if "valid" in line]
    values = np.array([(line["step"], line["valid"]["nll_bits_per_dim"]) for line in lines]).T
    figures.curves(
        ax,
        {watched: tuple(values)},
        xlabel="updates",
        ylabel="bound (bits per dim)",
        title=f"{watched}; {result.config.terms} of {result.config.T} terms drawn",
    )
