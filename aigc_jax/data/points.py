"""Synthetic sets in few dimensions, whose densities and modes are known.

They are endless by default: every batch holds new points. `examples=N` draws N points once, which
makes a finite set. A validation set has to be finite.
"""

from __future__ import annotations

import numpy as np

from . import Data, endless, from_arrays


def ring_modes(modes: int = 8, radius: float = 1.0) -> np.ndarray:
    """Returns the centres of `ring`, float64 [modes, 2].

    All of them are distinct. With np.linspace(0, 2 pi, modes) the first and the last would be the
    same point.
    """
    angle = 2 * np.pi * np.arange(modes) / modes
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def ring(
    split: str,
    *,
    modes: int = 8,
    radius: float = 1.0,
    std: float = 0.01,
    examples: int | None = None,
) -> Data:
    """Makes a mixture of equal Gaussians on a circle (Lin et al. 2018, PacGAN, section 4.1.1)."""
    draw = _mixture(ring_modes(modes, radius), std)
    return _points("ring", split, examples, draw, 2, modes=modes, radius=radius, std=std)


def grid_modes(side: int = 5, step: float = 2.0) -> np.ndarray:
    """Returns the centres of `grid`, float64 [side**2, 2], around the origin."""
    line = step * (np.arange(side) - (side - 1) / 2)
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)


def grid(
    split: str,
    *,
    side: int = 5,
    step: float = 2.0,
    std: float = 0.05,
    examples: int | None = None,
) -> Data:
    """Makes a mixture of equal Gaussians on a square grid (Lin et al. 2018, section 4.1.1)."""
    draw = _mixture(grid_modes(side, step), std)
    return _points("grid", split, examples, draw, 2, side=side, step=step, std=std)


def swiss_roll(
    split: str,
    *,
    noise: float = 0.25,
    scale: float = 7.5,
    examples: int | None = None,
) -> Data:
    """Makes the Swiss roll of Gulrajani et al. 2017, fig. 1, in two dimensions.

    It is scikit-learn's roll without its middle axis, divided by `scale`.
    """

    def draw(rng, n):
        t = 1.5 * np.pi * (1 + 2 * rng.random(n))
        roll = np.stack([t * np.cos(t), t * np.sin(t)], -1)
        return (roll + noise * rng.standard_normal((n, 2))) / scale

    return _points("swiss_roll", split, examples, draw, 2, noise=noise, scale=scale)


def ppca_parameters(dim: int = 30, latents: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loadings W float64 [dim, latents] and the mean b [dim] of `ppca`.

    The columns of W are orthogonal. Their lengths fall from 2 to 0.5.
    """
    rng = np.random.Generator(np.random.Philox(key=[dim, latents]))
    directions, _ = np.linalg.qr(rng.standard_normal((dim, latents)))
    return directions * np.linspace(2.0, 0.5, latents), 0.5 * rng.standard_normal(dim)


def ppca(
    split: str,
    *,
    dim: int = 30,
    latents: int = 10,
    std: float = 0.3,
    examples: int | None = None,
) -> Data:
    """Makes data of probabilistic PCA, x = W z + b + std * eps, so log p(x) is known exactly.

    Tipping & Bishop 1999, eq. 2.
    """
    if not 1 <= latents <= dim:
        raise ValueError(f"ppca: latents must lie in 1..dim={dim}, got {latents}")
    w, b = ppca_parameters(dim, latents)

    def draw(rng, n):
        return rng.standard_normal((n, latents)) @ w.T + b + std * rng.standard_normal((n, dim))

    return _points("ppca", split, examples, draw, dim, dim=dim, latents=latents, std=std)


def _mixture(centres: np.ndarray, std: float):
    """Returns draw(rng, n) of a mixture of Gaussians with equal weights, in two dimensions."""

    def draw(rng, n):
        chosen = centres[rng.integers(len(centres), size=n)]
        return chosen + std * rng.standard_normal((n, 2))

    return draw


def _points(name, split, examples, draw, dimensions, /, **options) -> Data:
    """Checks the options, and makes an endless or a finite set of the points that `draw` gives."""
    for option, value in options.items():
        low = 1 if option in ("modes", "side", "dim", "latents") else 0
        if not value >= low:
            raise ValueError(f"{name}: {option} must be at least {low}, got {value}")
    if not split.isidentifier():
        expected = "a split is a name such as train or test, not the slice"
        raise ValueError(f"{name} draws its points, so {expected} {split!r}")
    source = {"name": name, "split": split, **options}
    data = endless(draw, (dimensions,), source)
    if examples is None:
        return data
    if examples < 1:
        raise ValueError(f"{name}: examples must be at least 1, got {examples}")
    return from_arrays(data.batch(0, 0, examples), source={**source, "examples": examples})
