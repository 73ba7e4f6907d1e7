"""The nets of a VAE: q(z_1|x), p(x|z_1), and with two layers q(z_2|z_1), p(z_1|z_2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, Shaped

from ..core import floats, one_hot
from ..nn import pixel_shuffle
from .config import Config

Params = dict[str, Any]  # {"encoder": ..., "decoder": ...}; two layers: also "upper_encoder" ...
ImageLike = Shaped[Array | np.ndarray, "B H W C"]  # floats in [0, 1], or bool; see `check_images`
Latent = Float[Array, "B Z"]
Label = Any  # whole numbers 0..classes-1 [B], or one for all; checked by `core.labels`

_ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "softplus": nn.softplus}


def _dtype(cfg: Config):
    return jnp.bfloat16 if cfg.bfloat16 else None  # None: that of the parameters (float64 in tests)


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_images(cfg: Config, x):
    """Returns images as floats of at least 32 bits. Binary images may be bool.

    Raises ValueError for another shape and for whole-number pixels. It does so for values outside
    [0, 1] too, if they are not traced and the likelihood is not gaussian, whose density exists
    everywhere.
    """
    if x.shape[-3:] != tuple(cfg.shape):
        raise ValueError(f"images must be [..., {', '.join(map(str, cfg.shape))}], got {x.shape}")
    interval = None if cfg.likelihood == "gaussian" else (0, 1)
    x = _at_least_float32(x) if x.dtype == bool else x
    return _at_least_float32(floats("image", x, within=interval))


class Gaussian(nn.Module):
    """A diagonal Gaussian: h [..., D] -> mu, logvar, each [..., dim] (AEVB, appendix C.2)."""

    cfg: Config
    dim: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, h):
        act, dtype = _ACTIVATIONS[self.cfg.activation], _dtype(self.cfg)
        for width in self.hidden:
            h = act(nn.Dense(width, dtype=dtype)(h))
        h = _at_least_float32(nn.Dense(2 * self.dim, dtype=dtype)(h))
        mu, logvar = jnp.split(h, 2, axis=-1)
        return mu, jnp.clip(logvar, -30.0, 20.0)  # not in the paper: keeps exp within float32


class Encoder(nn.Module):
    """q(z_1|x): images [..., H, W, C], one-hot labels [..., classes] -> mu, logvar [..., Z]."""

    cfg: Config

    @nn.compact
    def __call__(self, x, y):
        cfg = self.cfg
        for width in cfg.channels:
            conv = nn.Conv(width, (3, 3), strides=2, dtype=_dtype(cfg))
            x = _ACTIVATIONS[cfg.activation](conv(x))
        h = jnp.concatenate([x.reshape(*x.shape[:-3], -1), y.astype(x.dtype)], -1)
        return Gaussian(cfg, cfg.latent_dim, cfg.hidden)(h)


class Decoder(nn.Module):
    """p(x|z_1): z_1 [..., Z], one-hot labels [..., classes] -> [..., H, W, D] (AEVB, appendix C).

    D = C: logits for bernoulli, means for a gaussian with fixed sigma. D = 2C: means and
    unconstrained log scales.
    """

    cfg: Config

    @nn.compact
    def __call__(self, z, y):
        cfg, (height, width, depth) = self.cfg, self.cfg.shape
        act, dtype = _ACTIVATIONS[cfg.activation], _dtype(cfg)
        if cfg.likelihood == "logistic" or (cfg.likelihood == "gaussian" and cfg.sigma is None):
            depth *= 2
        h = jnp.concatenate([z, y.astype(z.dtype)], -1)
        for features in reversed(cfg.hidden):
            h = act(nn.Dense(features, dtype=dtype)(h))
        halvings = len(cfg.channels)
        height, width = height >> halvings, width >> halvings
        first = cfg.channels[-1] if cfg.channels else depth
        h = nn.Dense(height * width * first, dtype=dtype)(h)
        h = h.reshape(*h.shape[:-1], height, width, first)
        for features in (*reversed(cfg.channels[:-1]), depth) if cfg.channels else ():
            h = pixel_shuffle(nn.Conv(4 * features, (3, 3), dtype=dtype)(act(h)))
        return _at_least_float32(h)


def _upper_modules(cfg: Config) -> tuple[Gaussian, Gaussian]:
    """Returns the modules of q(z_2|z_1) and p(z_1|z_2)."""
    upper_encoder = Gaussian(cfg, cfg.upper_dim, cfg.upper_hidden)
    return upper_encoder, Gaussian(cfg, cfg.latent_dim, cfg.upper_hidden[::-1])


def init(cfg: Config, key: Key[Array, ""]) -> Params:
    """Returns the initial parameters."""
    k_encoder, k_decoder, *k_upper = jax.random.split(key, 4 if cfg.upper_dim else 2)
    y, z = (jnp.zeros((1, size), jnp.float32) for size in (cfg.classes, cfg.latent_dim))
    params = {
        "encoder": Encoder(cfg).init(k_encoder, jnp.zeros((1, *cfg.shape), jnp.float32), y),
        "decoder": Decoder(cfg).init(k_decoder, z, y),
    }
    if cfg.upper_dim:
        upper_encoder, upper_decoder = _upper_modules(cfg)
        params["upper_encoder"] = upper_encoder.init(k_upper[0], z)
        z_2 = jnp.zeros((1, cfg.upper_dim), jnp.float32)
        params["upper_decoder"] = upper_decoder.init(k_upper[1], z_2)
    return params


def encode(
    cfg: Config,
    params: Params,
    x: ImageLike,
    label: Label = None,
) -> tuple[Latent, Latent]:
    """Returns mu and logvar of q(z_1|x) for images in [0, 1].

    Raises ValueError for whole-number pixels, and for values outside [0, 1] that are not traced.
    """
    x = check_images(cfg, x)
    y = one_hot(label, cfg.classes, x.shape[:-3])
    return Encoder(cfg).apply(params["encoder"], x, y)


def decode(
    cfg: Config,
    params: Params,
    z: Float[Array, "... Z"],
    label: Label = None,
) -> Float[Array, "... H W D"]:
    """Returns what `log_likelihood` and `mean_image` take, for z_1 with any leading axes.

    This is logits, means, or means and unconstrained log scales of p(x|z_1). A label array has the
    last of the leading axes: for z [k, B, Z] it has shape [B].
    """
    y = one_hot(label, cfg.classes, z.shape[:-1])
    if not cfg.channels or z.ndim < 3:
        return Decoder(cfg).apply(params["decoder"], z, y)
    # Flax merges the leading axes for a convolution. With the images outermost, a mesh that shards
    # the images need not move them between devices.
    z, y = jnp.moveaxis(z, -2, 0), jnp.moveaxis(y, -2, 0)
    return jnp.moveaxis(Decoder(cfg).apply(params["decoder"], z, y), 0, -4)


def encode_upper(cfg: Config, params: Params, z_1: Float[Array, "... Z"]):
    """Returns mu and logvar of q(z_2|z_1)."""
    return _upper_modules(cfg)[0].apply(params["upper_encoder"], z_1)


def decode_upper(cfg: Config, params: Params, z_2: Float[Array, "... Z"]):
    """Returns mu and logvar of p(z_1|z_2)."""
    return _upper_modules(cfg)[1].apply(params["upper_decoder"], z_2)
