"""The nets of StyleGAN2 (Karras et al. 2020): mapping, modulated convolutions, discriminator.

All weights begin as N(0, 1) and are scaled where they are used (the equalised learning rate of
Karras et al. 2018), so that Adam moves them all at the same relative speed.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

NORMAL = nn.initializers.normal(1.0)


def leaky(h: Array) -> Array:
    """Returns a leaky ReLU of slope 0.2, times sqrt 2. It keeps the mean square of N(0, 1)."""
    return nn.leaky_relu(h, 0.2) * sqrt(2)


class EqualDense(nn.Module):
    """A dense layer, whose kernel is N(0, 1) / sqrt(inputs). [..., D] -> [..., out]."""

    out: int
    bias: float = 0.0  # its first value
    speed: float = 1.0  # how much faster than other layers it learns
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h):
        first = nn.initializers.normal(1 / self.speed)
        kernel = self.param("kernel", first, (h.shape[-1], self.out), jnp.float32)
        bias = nn.initializers.constant(self.bias / self.speed)
        bias = self.param("bias", bias, (self.out,), jnp.float32) * self.speed
        kernel = (kernel * (self.speed / sqrt(h.shape[-1]))).astype(self.dtype)
        out = h.astype(self.dtype) @ kernel
        return out + bias.astype(self.dtype).reshape((1,) * (out.ndim - 1) + (-1,))


class EqualConv(nn.Module):
    """A convolution, whose kernel is N(0, 1) / sqrt(inputs). [B, H, W, C] -> [B, H, W, out]."""

    out: int
    size: int = 3
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h):
        shape = (self.size, self.size, h.shape[-1], self.out)
        kernel = self.param("kernel", NORMAL, shape, jnp.float32) / sqrt(prod(shape[:3]))
        h = convolve(h.astype(self.dtype), kernel.astype(self.dtype))
        if not self.bias:
            return h
        bias = self.param("bias", nn.initializers.zeros, (self.out,), jnp.float32)
        return h + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def convolve(h: Array, kernel: Array) -> Array:
    """Returns the convolution of images with a kernel [h, w, in, out], edges padded by zeros."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def modulated(
    h: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C D"],
    style: Float[Array, "B C"],
    *,
    demodulate: bool = True,
) -> Float[Array, "B H W D"]:
    """Returns the convolution with kernels style * kernel, one per image (section 2.2).

    demodulate: each kernel is divided by the root of the sum of its squares. So independent inputs
    of variance 1 give outputs of variance 1. Both are done to the inputs and the outputs, which is
    the same and needs no kernel per image.
    """
    out = convolve(h * style[:, None, None], kernel)
    if not demodulate:
        return out
    squares = jnp.square(style) @ jnp.square(kernel).sum((0, 1))  # [B, D]
    return out * jax.lax.rsqrt(squares + 1e-8)[:, None, None]


def enlarge(h: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns images of twice the size, by bilinear interpolation (the filter 1, 3, 3, 1)."""
    B, H, W, C = h.shape
    return jax.image.resize(h, (B, 2 * H, 2 * W, C), "bilinear")


def shrink(h: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Returns images of half the size, by the filter (1, 3, 3, 1) / 8. H and W are even.

    At an edge the weights inside the image are divided by their sum. The authors pad zeros.
    """
    B, H, W, C = h.shape
    return jax.image.resize(h, (B, H // 2, W // 2, C), "bilinear")


class StyleLayer(nn.Module):
    """A modulated 3 x 3 convolution, noise, bias and a leaky ReLU.

    h [B, H, W, C], w [B, latents]; noise [B, height, width of the output].
    """

    out: int
    up: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, w, noise):
        h = enlarge(h) if self.up else h
        style = EqualDense(h.shape[-1], bias=1.0, name="style")(w)
        shape = (3, 3, h.shape[-1], self.out)
        kernel = self.param("kernel", NORMAL, shape, jnp.float32) / sqrt(prod(shape[:3]))
        h = modulated(h, kernel.astype(self.dtype), style.astype(self.dtype))
        strength = self.param("noise", nn.initializers.zeros, (), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.out,), jnp.float32)
        h = h + (strength * noise)[..., None].astype(self.dtype)
        return leaky(h + bias.astype(self.dtype).reshape(1, 1, 1, -1))


class ToImage(nn.Module):
    """A modulated 1 x 1 convolution to the channels of an image, without demodulation."""

    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, w):
        style = EqualDense(h.shape[-1], bias=1.0, name="style")(w)
        kernel = self.param("kernel", NORMAL, (1, 1, h.shape[-1], self.out), jnp.float32)
        kernel = (kernel / sqrt(h.shape[-1])).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.out,), jnp.float32)
        h = modulated(h, kernel, style.astype(self.dtype), demodulate=False)
        return h.astype(jnp.float32) + bias.reshape(1, 1, 1, -1)


class StyleGenerator(nn.Module):
    """G: z [B, latents + noise], one-hot labels [B, classes] -> images [B, H, W, C].

    Images are meant to lie in [-1, 1], but nothing holds them there, as in the paper.

    The first `latents` numbers of z go through the mapping; the others are the noise inputs, row by
    row of each layer (`noise_size`). Every resolution adds to the image of the one before it ("skip
    outputs"). `styles` and `images` are the two halves: one w per layer may come from another z.

    Where this differs from the paper: the mapping has `mapping_layers` layers, not 8. Labels are
    added to z, where the authors join the two. The mean w, for truncation, is the running mean of
    training.
    """

    shape: tuple[int, int, int]
    latents: int
    widths: tuple[int, ...]  # channels at H, H/2, ...
    mapping_layers: int = 2
    axis_name: str | None = None  # devices over which the mean w is averaged
    dtype: Any = jnp.float32

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The height and width of the map of each layer, from the smallest on."""
        height, width, _ = self.shape
        levels = [(height >> i, width >> i) for i in reversed(range(len(self.widths)))]
        return [levels[0], *(size for size in levels[1:] for _ in range(2))]

    @property
    def noise_size(self) -> int:
        """How many numbers of z are noise inputs."""
        return sum(map(prod, self.sizes))

    @property
    def layers(self) -> int:
        """How many w an image needs: one per layer, and one for the last image."""
        return len(self.sizes) + 1

    def setup(self):
        speed = 0.01  # of the mapping
        self.mapping = [EqualDense(self.latents, speed=speed) for _ in range(self.mapping_layers)]
        self.label = EqualDense(self.latents)
        first = (*self.sizes[0], self.widths[-1])
        self.constant = self.param("constant", NORMAL, first, jnp.float32)
        outs = [self.widths[-1], *(w for w in reversed(self.widths[:-1]) for _ in range(2))]
        self.convolutions = [
            StyleLayer(out, up=i % 2 == 1, dtype=self.dtype) for i, out in enumerate(outs)
        ]
        self.to_image = [ToImage(self.shape[-1], self.dtype) for _ in self.widths]
        self.mean = self.variable("batch_stats", "mean_style", jnp.zeros, (self.latents,))

    def __call__(self, z, y=None, train: bool = False, truncation: float = 1.0):
        w = self.styles(z, y, train)
        if truncation != 1.0:  # towards the mean (Karras et al. 2019, appendix B)
            w = self.mean.value[None] + truncation * (w - self.mean.value[None])
        ws = jnp.broadcast_to(w[:, None], (len(w), self.layers, self.latents))
        return self.images(ws, z[:, self.latents :])

    def styles(self, z, y=None, train: bool = False) -> Float[Array, "B latents"]:
        """Returns w. In training, its running mean is updated."""
        z = z[:, : self.latents]
        h = z * jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-8)
        if y is not None and y.shape[-1]:
            h = h + sqrt(y.shape[-1]) * self.label(y)  # one-hot: 1 of all inputs
        for layer in self.mapping:
            h = leaky(layer(h))
        if train and not self.is_initializing():
            mean = h.mean(0)
            if self.axis_name is not None:
                mean = jax.lax.pmean(mean, self.axis_name)
            self.mean.value += 0.005 * (mean - self.mean.value)
        return h

    def images(self, ws: Float[Array, "B layers latents"], noise: Float[Array, "B N"]):
        """Returns images of one w per layer, and the noise inputs."""
        rows = len(ws)
        h = jnp.broadcast_to(self.constant[None], (rows, *self.constant.shape))
        h, image, used = h.astype(self.dtype), None, 0
        for i, (layer, size) in enumerate(zip(self.convolutions, self.sizes, strict=True)):
            own = noise[:, used : used + prod(size)].reshape(rows, *size)
            used += prod(size)
            h = layer(h, ws[:, i], own)
            if i % 2 == 0:  # the last layer of a resolution
                new = self.to_image[i // 2](h, ws[:, i + 1])
                image = new if image is None else enlarge(image) + new
        return image


class StyleDiscriminator(nn.Module):
    """D: images [B, H, W, C], packed ones too -> logits [B]. Residual blocks that halve H and W.

    Labels enter by projection. The paper also shows D how much the images of a batch differ
    (minibatch standard deviation). Here each logit depends on its own image, as R1 assumes. The
    authors give labels a mapping of their own; here they have one layer. As in Miyato & Koyama
    2018, a logit without labels is added; the authors have the product alone.
    """

    widths: tuple[int, ...]  # channels at H, H/2, ...
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, y=None, train: bool = False):
        h = leaky(EqualConv(self.widths[0], 1, dtype=self.dtype, name="in")(x))
        for i, width in enumerate(self.widths[1:]):
            branch = leaky(EqualConv(h.shape[-1], dtype=self.dtype, name=f"first{i}")(h))
            branch = EqualConv(width, dtype=self.dtype, name=f"second{i}")(branch)
            skip = EqualConv(width, 1, bias=False, dtype=self.dtype, name=f"skip{i}")(shrink(h))
            h = (leaky(shrink(branch)) + skip) / sqrt(2)
        h = leaky(EqualConv(h.shape[-1], dtype=self.dtype, name="last")(h)).reshape(len(h), -1)
        h = leaky(EqualDense(self.widths[-1], dtype=self.dtype, name="dense")(h))
        logits = EqualDense(1, dtype=self.dtype, name="out")(h)[..., 0]
        if y is not None and y.shape[-1]:
            v = EqualDense(h.shape[-1], dtype=self.dtype, name="labels")(y)
            logits += (h * v).sum(-1) * sqrt(y.shape[-1] / h.shape[-1])  # one-hot: 1 of all inputs
        return logits.astype(jnp.float32)
