"""What StyleGAN2 (Karras et al. 2020) adds to the training of a GAN: mixing and path lengths."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..nn import StyleGenerator

PATH_EVERY = 4  # steps from one path penalty to the next
Styles = Float[Array, "B layers D"]


def mixed(net: StyleGenerator, w: Array, other: Array, share: float, key: Key[Array, ""]) -> Styles:
    """Returns one w per layer: from some layer on, `share` of the images take the other w.

    w, other [B, D]. The layer is drawn for each image (Karras et al. 2019, section 3.1).
    """
    k_mix, k_layer = jax.random.split(key)
    mix = jax.random.bernoulli(k_mix, share, (len(w),))
    layer = jax.random.randint(k_layer, (len(w),), 1, net.layers)
    first = jnp.where(mix, layer, net.layers)[:, None] > jnp.arange(net.layers)[None]
    return jnp.where(first[..., None], w[:, None], other[:, None])


def path_lengths(
    images: Callable[[Styles], Float[Array, "B H W C"]], ws: Styles, y: Float[Array, "B H W C"]
) -> Float[Array, "B"]:
    """Returns the length of J^T y / sqrt(H W) for each image (StyleGAN2, section 3.2).

    J is the derivative of an image by its w, and y is N(0, 1). The root makes the length nearly
    independent of the resolution. The squares are averaged over layers. So the mean square of
    the length is the squared Frobenius norm of J, over H W and the number of layers.
    """
    scale = (y.shape[1] * y.shape[2]) ** -0.5
    gradient = jax.grad(lambda ws: (images(ws) * y).sum() * scale)(ws)
    return jnp.sqrt(jnp.square(gradient).sum(-1).mean(-1))


def path_penalty(
    lengths: Float[Array, "B"], mean: Float[Array, ""], axis_name: str | None = None
) -> tuple[Array, Array]:
    """Returns the mean of (length - mean)^2, and the running mean of lengths, of decay 0.99."""
    now = jax.lax.stop_gradient(lengths.mean())
    if axis_name is not None:
        now = jax.lax.pmean(now, axis_name)
    mean = mean + 0.01 * (now - mean)
    return jnp.square(lengths - mean).mean(), mean
