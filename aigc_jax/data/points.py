"""Synthetic sets in few dimensions, whose densities and modes are known.

Endless by default: every batch draws new points. `examples=N` draws N points once and makes a finite set of them, as a
validation set has to be.
"""

from __future__ import annotations

import numpy as np

from . import Data, endless, from_arrays


def _points(name, split, examples, draw, dim, /, **options) -> Data:
    for option, value in options.items():
        low = 1 if isinstance(value, int) else 0
        if not value >= low:
            raise ValueError(f"{name}: {option} must be at least {low}, got {value}")
    if not split.isidentifier():
        raise ValueError(
            f"{name} draws its points, so a split is a name such as train or test, not the slice {split!r}"
        )
    source = {"name": name, "split": split, **options}
    data = endless(draw, (dim,), source)
    if examples is None:
        return data
    if examples < 1:
        raise ValueError(f"{name}: examples must be at least 1, got {examples}")
    return from_arrays(data.batch(0, 0, examples), source={**source, "examples": examples})


def ring_modes(modes: int = 8, radius: float = 1.0) -> np.ndarray:
    """Centres of `ring`, float64 [modes, 2]. All distinct: a linspace to 2 pi with its end counts one twice."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def grid_modes(side: int = 5, step: float = 2.0) -> np.ndarray:
    """Centres of `grid`, float64 [side**2, 2], around the origin."""
    at = step * (np.arange(side) - (side - 1) / 2)
    return np.stack(np.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 2)


def _mixture(centres, std):
    return lambda rng, n: centres[rng.integers(len(centres), size=n)] + std * rng.standard_normal((n, 2))


def ring(split: str, *, modes: int = 8, radius: float = 1.0, std: float = 0.01, examples: int | None = None) -> Data:
    """Equal Gaussians on a circle (Lin et al. 2018, PacGAN, section 4.1.1)."""
    draw = _mixture(ring_modes(modes, radius), std)
    return _points("ring", split, examples, draw, 2, modes=modes, radius=radius, std=std)


def grid(split: str, *, side: int = 5, step: float = 2.0, std: float = 0.05, examples: int | None = None) -> Data:
    """Equal Gaussians on a square grid (Lin et al. 2018, PacGAN, section 4.1.1)."""
    draw = _mixture(grid_modes(side, step), std)
    return _points("grid", split, examples, draw, 2, side=side, step=step, std=std)


def swiss_roll(split: str, *, noise: float = 0.25, scale: float = 7.5, examples: int | None = None) -> Data:
    """The roll of Gulrajani et al. 2017, fig. 1: scikit-learn's, without its middle axis, divided by `scale`."""

    def draw(rng, n):
        t = 1.5 * np.pi * (1 + 2 * rng.random(n))
        roll = np.stack([t * np.cos(t), t * np.sin(t)], -1)
        return (roll + noise * rng.standard_normal((n, 2))) / scale

    return _points("swiss_roll", split, examples, draw, 2, noise=noise, scale=scale)


def ppca_parameters(dim: int = 30, latents: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Loadings W float64 [dim, latents], orthogonal columns of falling length, and mean b [dim] of `ppca`."""
    rng = np.random.Generator(np.random.Philox(key=[dim, latents]))
    directions, _ = np.linalg.qr(rng.standard_normal((dim, latents)))
    return directions * np.linspace(2.0, 0.5, latents), 0.5 * rng.standard_normal(dim)


def ppca(split: str, *, dim: int = 30, latents: int = 10, std: float = 0.3, examples: int | None = None) -> Data:
    """Probabilistic PCA, x = W z + b + std * eps (Tipping & Bishop 1999, eq. 2): log p(x) is known exactly."""
    if not 1 <= latents <= dim:
        raise ValueError(f"ppca: latents must lie in 1..dim={dim}, got {latents}")
    w, b = ppca_parameters(dim, latents)

    def draw(rng, n):
        return rng.standard_normal((n, latents)) @ w.T + b + std * rng.standard_normal((n, dim))

    return _points("ppca", split, examples, draw, dim, dim=dim, latents=latents, std=std)
