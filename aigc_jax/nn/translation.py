"""The nets of CycleGAN (Zhu et al. 2017, section 7.2): an image translator, a judge of patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from .blocks import instance_norm, pixel_shuffle, recompute


class ImageTranslator(nn.Module):
    """Images [B, H, W, C] -> images [B, H, W, out] in [-1, 1].

    A 7 x 7 convolution, then a convolution of stride 2 per further width, residual blocks, and the
    same way back. A convolution and a pixel shuffle stand for the authors' transposed convolution.
    Edges are padded by reflection, and by zeros where the stride is 2.
    """

    out: int  # channels
    widths: tuple[int, ...] = (64, 128, 256)  # channels at H, H/2, H/4
    blocks: int = 9
    kernel_init: Any = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, x):
        first, *deeper = self.widths
        h = nn.relu(instance_norm(self._conv("in", first, 7)(x)))
        for i, width in enumerate(deeper):
            h = nn.relu(instance_norm(self._conv(f"down{i}", width, 3, strides=2)(h)))
        for i in range(self.blocks):
            h = recompute(partial(ImageTranslator._res_block, i=i), self.remat)(self, h)
        for i, width in reversed(list(enumerate(self.widths[:-1]))):
            h = pixel_shuffle(self._conv(f"up{i}", 4 * width, 3)(h))
            h = nn.relu(instance_norm(h))
        return nn.tanh(self._conv("out", self.out, 7)(h).astype(jnp.float32))

    def _conv(self, name: str, width: int, size: int, strides: int = 1) -> nn.Conv:
        padding = "REFLECT" if strides == 1 else 1
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype, "name": name}
        return nn.Conv(width, (size, size), strides, padding=padding, **options)

    def _res_block(self, h, *, i: int):
        branch = nn.relu(instance_norm(self._conv(f"block{i}_0", h.shape[-1], 3)(h)))
        return h + instance_norm(self._conv(f"block{i}_1", h.shape[-1], 3)(branch))


class PatchDiscriminator(nn.Module):
    """Images [B, H, W, C] -> logits [B, h, w]: each judges one patch of the image (PatchGAN).

    4 x 4 convolutions: all but the last width have stride 2. The paper's widths, 64, 128, 256 and
    512, judge patches of 70 x 70 pixels. The first layer has no instance norm.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    kernel_init: Any = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x) -> Float[Array, "B h w"]:
        h = x
        for i, width in enumerate(self.widths):
            strides = 2 if i < len(self.widths) - 1 else 1
            h = self._conv(width, strides)(h)
            h = nn.leaky_relu(instance_norm(h) if i else h, 0.2)
        return self._conv(1, 1)(h)[..., 0].astype(jnp.float32)

    def _conv(self, width: int, strides: int) -> nn.Conv:
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        return nn.Conv(width, (4, 4), strides, padding=1, **options)
