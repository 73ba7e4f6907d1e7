"""Norms, activations, and the layers that change the resolution of an image."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from .sharding import constrain

ACTIVATIONS = {
    "relu": nn.relu,
    "leaky_relu": lambda h: nn.leaky_relu(h, 0.2),  # DCGAN's slope
    "tanh": nn.tanh,
    "gelu": nn.gelu,  # the tanh form, as in GPT-2
    "silu": nn.silu,
}


def activate(h: Array, activation: str, pieces: int = 5) -> Array:
    """Returns the activations of pre-activations [..., `inputs_per_unit` * C]: [..., C].

    "swiglu" is Shazeer 2020, silu(gate) * up. "maxout" is Goodfellow et al. 2013, the
    largest of `pieces` linear functions.
    """
    if activation == "swiglu":
        gate, up = jnp.split(h, 2, -1)
        return nn.silu(gate) * up
    if activation == "maxout":
        return h.reshape(*h.shape[:-1], pieces, -1).max(-2)
    return ACTIVATIONS[activation](h)


def inputs_per_unit(activation: str, pieces: int = 5) -> int:
    """Returns how many pre-activations make one activation."""
    return {"swiglu": 2, "maxout": pieces}.get(activation, 1)


def linear(layer: nn.Module, h: Array, norm: str, train: bool) -> Array:
    """Applies a Dense or Conv. If norm is "spectral", its kernel has largest singular value 1.

    Training makes one power iteration per call (SNGAN, algorithm 1). The kernel of a
    convolution counts as a matrix [h w c_in, c_out]. Call it inside `nn.compact`.
    """
    return nn.SpectralNorm(layer)(h, update_stats=train) if norm == "spectral" else layer(h)


def class_logits(h, y, kernel_init: Any, norm: str, train: bool, dtype: Any) -> Array:
    """Returns the logits [B] of a discriminator from its last features h [B, D].

    With one-hot labels y [B, classes], <y V, h> is added (projection, Miyato & Koyama 2018,
    eq. 3). Call it inside `nn.compact`.
    """
    options = {"kernel_init": kernel_init, "dtype": dtype}
    logits = linear(nn.Dense(1, **options), h, norm, train)[..., 0]
    if y is not None:
        embed = nn.Dense(h.shape[-1], use_bias=False, **options)
        logits += (h * linear(embed, y, norm, train)).sum(-1)
    return logits.astype(jnp.float32)


def _is_product(primitive, *_, **params) -> bool:
    """Whether this is a convolution, or a product without batch axes (so no attention score)."""
    if primitive.name == "dot_general":
        return not any(params["dimension_numbers"][1])
    return primitive.name == "conv_general_dilated"


def checkpointed(function, remat: bool | str | None):
    """Returns a function of arrays that is recomputed in the backward pass, as `remat` says.

    True: all of it. "dots": all but the results of products and convolutions, which are kept.
    """
    if not remat:
        return function
    return jax.checkpoint(function, policy=_is_product if remat == "dots" else None)


def recompute(target, remat: bool | str | None):
    """Returns a module's class, or a function of module and arrays, recomputed as `remat` says."""
    if not remat:
        return target
    return nn.remat(target, policy=_is_product if remat == "dots" else None)


class FusedDense(nn.Module):
    """Several linear maps of the same input as one product: [..., D] -> [..., parts, features].

    The parameters are those of a Dense with parts * features outputs. Over a mesh with an axis
    named model each map's outputs are split; in the kernel they do not lie side by side.
    """

    parts: int
    features: int
    bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... parts F"]:
        shape = (self.parts, self.features)
        kernel = self.param(
            "kernel", self.kernel_init, (x.shape[-1], self.parts * self.features), jnp.float32
        )
        kernel = kernel.astype(self.dtype).reshape(-1, *shape)
        kernel = constrain(kernel, None, None, "model")
        h = jnp.tensordot(x.astype(self.dtype), kernel, 1)
        if not self.bias:
            return h
        bias = self.param("bias", nn.initializers.zeros, (kernel[0].size,), jnp.float32)
        return h + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + shape)


def instance_norm(h: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns each channel of each image with mean 0 and variance 1 (Ulyanov et al. 2016).

    It has no parameters, as in the PyTorch code of CycleGAN. Computed in float32.
    """
    x = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    x = x - x.mean((1, 2), keepdims=True)
    return (x * jax.lax.rsqrt(jnp.square(x).mean((1, 2), keepdims=True) + 1e-5)).astype(h.dtype)


class NormAct(nn.Module):
    """A norm, then the activation. [B, ..., C] -> [B, ..., C] (maxout: fewer channels).

    norm: "batch"; "class_batch", whose scale and bias depend on one-hot labels y [B, classes]
        (Dumoulin et al. 2017); "layer", over all axes of an example; "instance", over the pixels of
        a channel; "none" and "spectral" leave h as it is.
    """

    norm: str = "none"
    activation: str = "relu"
    pieces: int = 5
    axis_name: str | None = None  # devices over which the statistics of a batch are averaged
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, train: bool, y: Float[Array, "B classes"] | None = None):
        if self.norm in ("batch", "class_batch"):
            own = self.norm == "batch"
            options = {"axis_name": self.axis_name if train else None, "dtype": self.dtype}
            options |= {} if own else {"use_scale": False, "use_bias": False}
            h = nn.BatchNorm(not train, momentum=0.9, **options)(h)
            h = h if own else self._of_class(h, y)
        elif self.norm == "layer":
            axes = tuple(range(1, h.ndim))
            options = {"reduction_axes": axes, "feature_axes": -1, "dtype": self.dtype}
            h = nn.LayerNorm(epsilon=1e-5, **options)(h)
        elif self.norm == "instance":
            h = instance_norm(h)
        return activate(h, self.activation, self.pieces)

    def _of_class(self, h, y):
        """Returns h (1 + scale) + bias. Both depend on class and channel, and are 0 at first."""
        options = {"use_bias": False, "kernel_init": nn.initializers.zeros, "dtype": self.dtype}
        scale, bias = jnp.split(nn.Dense(2 * h.shape[-1], name="classes", **options)(y), 2, -1)
        middle = (len(h), *(1,) * (h.ndim - 2), -1)
        return h * (1 + scale.reshape(middle)) + bias.reshape(middle)


def _mean(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
    """Returns the mean over the last axis.

    XLA's CPU code adds the numbers one by one. A product with ones adds eight at once,
    which saves a fifth of the time of a small transformer's update.
    """

    def product(x):
        return x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.mean(-1, keepdims=True))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, eps 1e-5.

    Computed in float32, at least; the output has `dtype`.
    """

    kind: str  # layer | rms
    bias: bool = True  # of LayerNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":
            # E[x^2] - E[x]^2 would lose digits where one channel is huge, as in GPT-2.
            h = h - _mean(h)
        h = h * jax.lax.rsqrt(_mean(h * h) + 1e-5)
        h = h * self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32).reshape(shape)
        if self.kind == "layer" and self.bias:
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
            h = h + bias.reshape(shape)
        return h.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018): mean 0 and variance 1 per group, then scale and bias.

    The function and parameters of Flax's GroupNorm. Here each channel is summed before the
    groups, which is faster on a CPU. Computed in float32; the output has the dtype of x.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        B, H, W, C = x.shape
        scale = self.param("scale", nn.initializers.ones, (C,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)

        def group_mean(x):  # [B, C]: each channel holds the mean of its group
            means = x.mean((1, 2)).reshape(B, self.groups, -1).mean(-1)
            return means.repeat(C // self.groups, -1)

        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mu = group_mean(h)
        slope = scale[None] * jax.lax.rsqrt(jnp.maximum(group_mean(h**2) - mu**2, 0) + 1e-6)
        h = h * slope[:, None, None] + (bias[None] - mu * slope)[:, None, None]
        return h.astype(x.dtype)


def pixel_shuffle(h: Float[Array, "... H W CC"], size: int = 2) -> Float[Array, "... H2 W2 C"]:
    """Turns size^2 channels into size x size pixels (Shi et al. 2016).

    [..., H, W, size^2 C] -> [..., size H, size W, C]. After a convolution, it makes a transposed
    convolution of stride `size`, without the checkerboard and the products with zeros.
    """
    *rows, height, width, channels = h.shape
    h = h.reshape(*rows, height, width, size, size, channels // size**2).swapaxes(-4, -3)
    return h.reshape(*rows, size * height, size * width, channels // size**2)


def pixel_unshuffle(h: Float[Array, "... H2 W2 C"], size: int = 2) -> Float[Array, "... H W CC"]:
    """Turns size x size pixels into size^2 channels: the inverse of `pixel_shuffle`."""
    *rows, height, width, channels = h.shape
    height, width = height // size, width // size
    h = h.reshape(*rows, height, size, width, size, channels).swapaxes(-4, -3)
    return h.reshape(*rows, height, width, size**2 * channels)


def upsample(h: Float[Array, "... H W C"]) -> Float[Array, "... H2 W2 C"]:
    """Repeats each pixel as 2 x 2 pixels."""
    return h.repeat(2, -3).repeat(2, -2)


def downsample(h: Float[Array, "... H W C"]) -> Float[Array, "... H2 W2 C"]:
    """Averages 2 x 2 pixels."""
    *rows, height, width, channels = h.shape
    return h.reshape(*rows, height // 2, 2, width // 2, 2, channels).mean((-4, -2))
