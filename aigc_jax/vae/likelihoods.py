"""Log densities of latents and log probabilities of pixels, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .config import Config


def gaussian_kl(mu: Float[Array, "... Z"], logvar: Float[Array, "... Z"]) -> Float[Array, "..."]:
    """Returns KL(N(mu, exp(logvar)) || N(0, I)) in nats, summed over latents (AEVB, appendix B)."""
    return 0.5 * jnp.sum(jnp.square(mu) + jnp.exp(logvar) - 1 - logvar, -1)


def log_normal(x: Float[Array, "..."], mu, logvar) -> Float[Array, "..."]:
    """Returns log N(x; mu, exp(logvar)) in nats, summed over the last axis."""
    return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + logvar + jnp.square(x - mu) * jnp.exp(-logvar), -1)


@jax.custom_jvp
def log_bernoulli(x, logits):
    """Returns x log p + (1 - x) log(1 - p) of each pixel in nats, with p = sigmoid(logits).

    Infinite logits are allowed. This form takes one exp and one log: two log-sigmoids, as in optax,
    take 3 times as long on the CPU. The derivative is written out, because JAX's derivatives of max
    and abs at logit 0 are not those of the sigmoid.
    """
    slope = x - (logits > 0).astype(logits.dtype)  # x may be whole numbers or bool
    return jnp.where(slope == 0, 0.0, slope * logits) - jnp.log1p(jnp.exp(-jnp.abs(logits)))


@log_bernoulli.defjvp
def _(primals, tangents):
    (x, logits), (dx, dlogits) = primals, tangents
    tangent = (x - jax.nn.sigmoid(logits)) * dlogits
    if dx.dtype != jax.dtypes.float0:  # whole numbers and bool have no tangent
        tangent = tangent + logits * dx
    return log_bernoulli(x, logits), tangent


def log_logistic(x: Float[Array, "..."], mean, log_scale, *, levels: int) -> Float[Array, "..."]:
    """Returns the log probability of grey levels under a discretised logistic, in nats.

    x: multiples of 1/(levels-1) in [0, 1]. The probability of x is the logistic's mass within half
        a level of x. Levels 0 and 1 include the tails, so the probabilities sum to 1.

    This is PixelCNN++ (Salimans et al. 2017), eq. 2, with one component.
    """
    half = 0.5 / (levels - 1)
    above, below = ((x + d - mean) * jnp.exp(-log_scale) for d in (half, -half))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) does not cancel or overflow.
    inside = jnp.log(-jnp.expm1(-2 * half * jnp.exp(-log_scale)))
    first, last = x < half, x > 1 - half
    return (
        jnp.where(last, 0.0, jax.nn.log_sigmoid(above))
        + jnp.where(first, 0.0, jax.nn.log_sigmoid(-below))
        + jnp.where(first | last, 0.0, inside)
    )


def _mean_and_log_scale(cfg: Config, decoded):
    """Returns mean and log scale per pixel, from what `decode` returns."""
    if cfg.likelihood == "gaussian" and cfg.sigma is not None:
        return decoded, jnp.log(jnp.full_like(decoded, cfg.sigma))
    mean, raw = jnp.split(decoded, 2, axis=-1)
    # A density is unbounded, so the gaussian's sigma stays above one grey level, 1 / (levels - 1).
    # A probability is bounded, so the logistic's scale is only kept within float32.
    floor = -jnp.log(cfg.levels - 1.0) if cfg.likelihood == "gaussian" else -12.0
    return mean, jnp.minimum(floor + jax.nn.softplus(raw - floor), 20.0)


def log_likelihood(
    cfg: Config,
    x: Shaped[Array | np.ndarray, "... H W C"],
    decoded: Float[Array, "... H W D"],
) -> Float[Array, "..."]:
    """Returns log p(x|z) in nats, summed over pixels. `decoded` is what `decode` returns.

    bernoulli: AEVB eq. 11. For grey levels x it is minus the cross-entropy, as in the literature on
        MNIST with real-valued targets. It then bounds no likelihood of the discrete images.
    gaussian: a density over pixels in [0, 1] (AEVB eq. 12). Our sigma, where it is learned, stays
        above one grey level.
    logistic: the probability of the grey levels.
    """
    x = jnp.asarray(x, jnp.result_type(x, decoded))  # may be whole numbers or bool
    if cfg.likelihood == "bernoulli":
        # One axis of pixels, because XLA's sum over [..., H, W, 1] is many times slower on the CPU.
        x, decoded = (a.reshape(*a.shape[:-3], -1) for a in (x, decoded))
        return jnp.sum(log_bernoulli(x, decoded), -1)
    mean, log_scale = (a.reshape(*a.shape[:-3], -1) for a in _mean_and_log_scale(cfg, decoded))
    x = x.reshape(*x.shape[:-3], -1)
    if cfg.likelihood == "gaussian":
        return log_normal(x, mean, 2 * log_scale)
    return jnp.sum(log_logistic(x, mean, log_scale, levels=cfg.levels), -1)


def bits_per_dim(cfg: Config, nll_nats: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns bits per pixel and channel.

    For a gaussian the probability of a grey level is taken as its density times the distance of
    levels, 1/(levels-1). This is no bound, but close to one if sigma is wider than a level.
    """
    bits = nll_nats / (cfg.shape[0] * cfg.shape[1] * cfg.shape[2] * jnp.log(2.0))
    return bits + jnp.log2(cfg.levels - 1.0) if cfg.likelihood == "gaussian" else bits


def mean_image(cfg: Config, decoded: Float[Array, "... D"]) -> Float[Array, "... C"]:
    """Returns the mean of p(x|z) in [0, 1], from what `decode` returns.

    For a logistic it is the mean before discretisation.
    """
    if cfg.likelihood == "bernoulli":
        return jax.nn.sigmoid(decoded)
    return jnp.clip(_mean_and_log_scale(cfg, decoded)[0], 0.0, 1.0)
