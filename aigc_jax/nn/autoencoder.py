"""The encoder and decoder of an image autoencoder (Rombach et al. 2022, appendix E).

Both are the halves of a U-Net without its skip connections, so that all that the decoder knows
of an image passes through the latents.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from .blocks import GroupNorm, pixel_shuffle, pixel_unshuffle, recompute, upsample
from .unet import ResBlock


def _res_blocks(module: nn.Module, h, width: int, name: str):
    """Applies the residual blocks of one resolution."""
    block = recompute(ResBlock, module.remat)
    for i in range(module.blocks):
        h = block(width, module.groups, 0.0, module.dtype, name=f"{name}_{i}")(h)
    return h


class ImageEncoder(nn.Module):
    """Images [B, H, W, C] -> [B, H/f, W/f, out], float32, with f = patch * 2^(len(widths) - 1).

    Without widths it is one linear convolution over the patches. The authors pad below and to the
    right where they halve the resolution, and let the pixels attend to each other in the middle.
    This net pads both sides and has no attention.
    """

    out: int  # channels
    widths: tuple[int, ...] = (128, 256, 512)  # channels at H/patch, H/(2 patch), ...
    blocks: int = 2  # residual blocks per resolution
    groups: int = 32  # of GroupNorm
    patch: int = 1  # patches of this size are the pixels of the first convolution
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, x):
        h = pixel_unshuffle(x, self.patch)
        for level, width in enumerate(self.widths):
            options = {"strides": 2 if level else 1, "padding": 1, "dtype": self.dtype}
            h = nn.Conv(width, (3, 3), name=f"down{level}", **options)(h)
            h = _res_blocks(self, h, width, f"level{level}")
        if self.widths:
            h = nn.silu(GroupNorm(self.groups, name="norm")(h))
        h = nn.Conv(self.out, (3, 3), dtype=self.dtype, name="out")(h)
        return h.astype(jnp.promote_types(h.dtype, jnp.float32))


class ImageDecoder(nn.Module):
    """Latents [B, h, w, Z] -> [B, f h, f w, out], float32: `ImageEncoder` backwards."""

    out: int  # channels
    widths: tuple[int, ...] = (128, 256, 512)  # in the encoder's order
    blocks: int = 2  # residual blocks per resolution; the authors have one more
    groups: int = 32  # of GroupNorm
    patch: int = 1  # the last convolution makes patches of this size
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, z):
        h = z
        for level, width in reversed(list(enumerate(self.widths))):
            h = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"up{level}")(h)
            h = _res_blocks(self, h, width, f"level{level}")
            h = upsample(h) if level else h
        if self.widths:
            h = nn.silu(GroupNorm(self.groups, name="norm")(h))
        h = nn.Conv(self.out * self.patch**2, (3, 3), dtype=self.dtype, name="out")(h)
        return pixel_shuffle(h.astype(jnp.promote_types(h.dtype, jnp.float32)), self.patch)
