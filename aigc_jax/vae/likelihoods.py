"""Densities of latents and probabilities of pixels, in nats. `cfg` is a `vae.Config`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def gaussian_kl(mu: Float[Array, "... Z"], logvar: Float[Array, "... Z"]) -> Float[Array, "..."]:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, summed over latents (AEVB, appendix B)."""
    return 0.5 * jnp.sum(jnp.square(mu) + jnp.exp(logvar) - 1 - logvar, -1)


def log_normal(x: Float[Array, "..."], mu, logvar) -> Float[Array, "..."]:
    """log N(x; mu, exp(logvar)) in nats, summed over the last axis."""
    return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + logvar + jnp.square(x - mu) * jnp.exp(-logvar), -1)


@jax.custom_jvp
def log_bernoulli(x, logits):
    """x log p + (1 - x) log(1 - p) of each pixel in nats, p = sigmoid(logits), infinite logits included.

    The value takes one exp and one log: optax's two log-sigmoids take 3 times as long on the CPU. Its derivative is
    written out, because those of max and abs at logit 0 are not the sigmoid's.
    """
    slope = x - (logits > 0).astype(logits.dtype)  # x may be whole numbers or bool
    return jnp.where(slope == 0, 0.0, slope * logits) - jnp.log1p(jnp.exp(-jnp.abs(logits)))


@log_bernoulli.defjvp
def _(primals, tangents):
    (x, logits), (dx, dlogits) = primals, tangents
    moved = (x - jax.nn.sigmoid(logits)) * dlogits
    if dx.dtype != jax.dtypes.float0:  # whole numbers and bool do not move
        moved = moved + logits * dx
    return log_bernoulli(x, logits), moved


def log_logistic(x: Float[Array, "..."], mean, log_scale, *, levels: int) -> Float[Array, "..."]:
    """log probability of the grey level x (a multiple of 1/(levels-1) in [0, 1]) under a discretised logistic, in nats.

    The logistic's mass between x -+ half a level; levels 0 and 1 take the tails, so the levels' probabilities sum to 1
    (Salimans et al. 2017, "PixelCNN++", eq. 2, with one component).
    """
    half = 0.5 / (levels - 1)
    above, below = ((x + d - mean) * jnp.exp(-log_scale) for d in (half, -half))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): nothing cancels, nothing leaves float32.
    inside = jnp.log(-jnp.expm1(-2 * half * jnp.exp(-log_scale)))
    first, last = x < half, x > 1 - half
    return (
        jnp.where(last, 0.0, jax.nn.log_sigmoid(above))
        + jnp.where(first, 0.0, jax.nn.log_sigmoid(-below))
        + jnp.where(first | last, 0.0, inside)
    )


def _mean_and_log_scale(cfg, decoded):
    """Per pixel, from what `decode` returns: a fixed sigma, or the second half of the channels."""
    if cfg.likelihood == "gaussian" and cfg.sigma is not None:
        return decoded, jnp.log(jnp.full_like(decoded, cfg.sigma))
    mean, raw = jnp.split(decoded, 2, axis=-1)
    # A density is unbounded, so its sigma ends smoothly at one grey level; a probability's scale where float32 does.
    floor = -jnp.log(cfg.levels - 1.0) if cfg.likelihood == "gaussian" else -12.0
    return mean, jnp.minimum(floor + jax.nn.softplus(raw - floor), 20.0)


def log_likelihood(
    cfg, x: Shaped[Array | np.ndarray, "... H W C"], decoded: Float[Array, "... H W D"]
) -> Float[Array, "..."]:
    """log p(x|z) in nats, summed over pixels; `decoded` is what `decode` returns.

    bernoulli: AEVB eq. 11. With grey levels x it is the negative cross-entropy, a bound on no discrete likelihood; the
        same formula that the literature calls MNIST with real-valued targets.
    gaussian: a density in [0, 1] pixel units (AEVB eq. 12, whose sigma ours keeps above one grey level).
    logistic: the probability of the grey levels.
    """
    x = jnp.asarray(x, jnp.result_type(x, decoded))  # may be whole numbers or bool
    if cfg.likelihood == "bernoulli":
        # One axis of pixels: XLA's CPU code for a sum over [..., H, W, 1] is many times slower.
        x, decoded = (a.reshape(*a.shape[:-3], -1) for a in (x, decoded))
        return jnp.sum(log_bernoulli(x, decoded), -1)
    mean, log_scale = (a.reshape(*a.shape[:-3], -1) for a in _mean_and_log_scale(cfg, decoded))
    x = x.reshape(*x.shape[:-3], -1)
    if cfg.likelihood == "gaussian":
        return log_normal(x, mean, 2 * log_scale)
    return jnp.sum(log_logistic(x, mean, log_scale, levels=cfg.levels), -1)


def bits_per_dim(cfg, nll_nats: Float[Array, "..."]) -> Float[Array, "..."]:
    """Bits a pixel and channel. A gaussian's density counts at the levels' distance in [0, 1], 1/(levels-1).

    That is no bound on a discrete likelihood, but near one where sigma is wider than a level.
    """
    bits = nll_nats / (cfg.shape[0] * cfg.shape[1] * cfg.shape[2] * jnp.log(2.0))
    return bits + jnp.log2(cfg.levels - 1.0) if cfg.likelihood == "gaussian" else bits


def mean_image(cfg, decoded: Float[Array, "... D"]) -> Float[Array, "... C"]:
    """The mean of p(x|z) in [0, 1] from what `decode` returns (of a logistic: before its tails are cut)."""
    if cfg.likelihood == "bernoulli":
        return jax.nn.sigmoid(decoded)
    return jnp.clip(_mean_and_log_scale(cfg, decoded)[0], 0.0, 1.0)
