"""Generators and discriminators of DCGAN (Radford et al. 2016) and SNGAN (Miyato et al. 2018)."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from .blocks import (
    NormAct,
    class_logits,
    downsample,
    linear,
    pixel_shuffle,
    recompute,
    upsample,
)
from .unet import PixelAttention


def attend(h, height: int | None, dtype: Any):
    """Applies self-attention to maps of this height (Zhang et al. 2019, "SAGAN"), and to no others.

    It is the identity at first. Call it inside `nn.compact`.
    """
    if h.shape[1] != height:
        return h
    return PixelAttention(1, 1, dtype, name="attention")(h)


class ConvGenerator(nn.Module):
    """G: noise [B, Z] and one-hot labels [B, classes] -> images [B, H, W, C] in [-1, 1], by tanh.

    Each width doubles H and W. DCGAN: a convolution and a pixel shuffle, which stand for
    the transposed convolution. Residual: pre-activation blocks that repeat pixels (SNGAN,
    appendix B.4).
    """

    shape: tuple[int, ...]  # H, W, C
    widths: tuple[int, ...]  # channels at H/2, H/4, ...; residual: at H, H/2, ...
    residual: bool = False
    activation: str = "relu"
    norm: str = "batch"  # none | batch | class_batch
    attention: int | None = None  # the height at which pixels attend to each other; None: nowhere
    kernel_init: Any = nn.initializers.lecun_normal()
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, z, y=None, train: bool = False):
        height, width, channels = self.shape
        halvings = len(self.widths)
        first = (height >> halvings, width >> halvings, self.widths[-1])
        h = z if y is None else jnp.concatenate([z, y.astype(z.dtype)], -1)
        dense = nn.Dense(prod(first), kernel_init=self.kernel_init, dtype=self.dtype)
        h = dense(h).reshape(-1, *first)
        layer, outs = ConvGenerator._layer, (*reversed(self.widths[:-1]), channels)
        if self.residual:
            layer, outs = ConvGenerator._res_block, tuple(reversed(self.widths))
        for i, out in enumerate(outs):
            h = recompute(partial(layer, i=i, out=out, train=train, y=y), self.remat)(self, h)
            h = attend(h, self.attention, self.dtype)
        if self.residual:
            h = self._conv(channels, 3)(self._act(2 * halvings, h, train, y))
        return nn.tanh(h.astype(jnp.float32))

    def _conv(self, channels: int, size: int) -> nn.Conv:
        return nn.Conv(channels, (size, size), kernel_init=self.kernel_init, dtype=self.dtype)

    def _act(self, i: int, h, train: bool, y):
        options = {"axis_name": self.axis_name, "dtype": self.dtype}
        return NormAct(self.norm, self.activation, **options, name=f"_Act_{i}")(h, train, y)

    def _layer(self, h, *, i: int, out: int, train: bool, y):
        return pixel_shuffle(self._conv(4 * out, 3)(self._act(i, h, train, y)))

    def _res_block(self, h, *, i: int, out: int, train: bool, y):
        branch = self._conv(out, 3)(upsample(self._act(2 * i, h, train, y)))
        branch = self._conv(out, 3)(self._act(2 * i + 1, branch, train, y))
        return branch + upsample(self._conv(out, 1)(h))


class ConvDiscriminator(nn.Module):
    """D: images [B, H, W, C], packed ones too, and one-hot labels [B, classes] -> logits [B].

    Each width halves H and W. DCGAN: 4 x 4 convolutions of stride 2 (the authors' code:
    5 x 5), no BatchNorm in the first layer. Residual: blocks that average pixels, and at
    the end a sum over pixels (SNGAN, appendix B.4).
    """

    widths: tuple[int, ...]  # channels at H/2, H/4, ...
    residual: bool = False
    projection: bool = False  # how labels enter: as in `class_logits`; False: as planes beside x
    activation: str = "leaky_relu"
    norm: str = "none"  # none | batch | spectral | layer | instance
    attention: int | None = None  # as in ConvGenerator
    kernel_init: Any = nn.initializers.lecun_normal()
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, x, y=None, train: bool = False):
        rows, *shape = x.shape
        y = jnp.zeros((rows, 0), x.dtype) if y is None else y.astype(x.dtype)
        beside = y[..., :0] if self.projection else y
        planes = jnp.broadcast_to(beside[:, None, None], (rows, *shape[:2], beside.shape[-1]))
        h = jnp.concatenate([x, planes], -1)
        layer = ConvDiscriminator._res_block if self.residual else ConvDiscriminator._layer
        for i, out in enumerate(self.widths):
            h = recompute(partial(layer, i=i, out=out, train=train), self.remat)(self, h)
            h = attend(h, self.attention, self.dtype)
        if self.residual:
            h = self._act(2 * len(self.widths) - 1, h, train).sum((-3, -2))
        else:
            h = h.reshape(rows, -1)
        labels = y if self.projection else None
        return class_logits(h, labels, self.kernel_init, self.norm, train, self.dtype)

    def _conv(self, channels: int, size: int, h, train: bool, strides: int = 1):
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        conv = nn.Conv(channels, (size, size), strides=strides, **options)
        return linear(conv, h, self.norm, train)

    def _act(self, i: int, h, train: bool, norm: str | None = None):
        norm = self.norm if norm is None else norm
        options = {"axis_name": self.axis_name, "dtype": self.dtype}
        return NormAct(norm, self.activation, **options, name=f"_Act_{i}")(h, train)

    def _layer(self, h, *, i: int, out: int, train: bool):
        h = self._conv(out, 4, h, train, strides=2)
        return self._act(i, h, train, norm=None if i else "none")

    def _res_block(self, h, *, i: int, out: int, train: bool):
        # The first block sees pixels, which need no activation.
        branch = self._conv(out, 3, self._act(2 * i - 1, h, train) if i else h, train)
        branch = self._conv(out, 3, self._act(2 * i, branch, train), train)
        return downsample(branch) + self._conv(out, 1, downsample(h), train)
