"""A small residual network that reads a picture (He et al. 2016), with GroupNorm and SiLU."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from .blocks import GroupNorm, recompute


class _Residual(nn.Module):
    """x + two convolutions, norms and activations first. [B, H, W, C] -> [B, H, W, C]."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = x
        for init in (nn.initializers.lecun_normal(), nn.initializers.zeros):
            h = nn.silu(GroupNorm(self.groups)(h))
            h = nn.Conv(x.shape[-1], (3, 3), kernel_init=init, dtype=self.dtype)(h)
        return x + h


class ResNet(nn.Module):
    """Images [B, H, W, C] -> features [B, H', W', widths[-1]], float32.

    Every width halves H and W by a convolution of stride 2; `blocks` residual blocks follow. Odd
    sizes are rounded up. The blocks are the identity at first.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1  # residual blocks per width
    groups: int = 8  # of GroupNorm
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        block = recompute(_Residual, self.remat)
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), 2, dtype=self.dtype, name=f"down{i}")(x)
            for j in range(self.blocks):
                x = block(self.groups, self.dtype, name=f"block{i}_{j}")(x)
        x = nn.silu(GroupNorm(self.groups, name="norm")(x))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
