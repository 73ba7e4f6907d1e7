"""The U-Net of DDPM (Ho et al. 2020, appendix B)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from .attention import Attention
from .blocks import GroupNorm, recompute, upsample
from .embeddings import Condition
from .sharding import check_divides, constrain


def zero_conv(features: int, name: str | None = None, dtype: Any = jnp.float32) -> nn.Conv:
    """Returns a 3 x 3 convolution that gives 0 at first, for the end of a branch."""
    return nn.Conv(features, (3, 3), kernel_init=nn.initializers.zeros, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut, with the condition, where there is one, between them."""

    width: int
    groups: int  # of GroupNorm
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        check_divides(self.width, "channels of a residual block")
        x = constrain(x, "data")
        h = nn.silu(GroupNorm(self.groups)(x))
        h = nn.Conv(self.width, (3, 3), dtype=self.dtype)(h)
        if condition is not None:
            condition = nn.silu(constrain(condition, "data"))
            h = h + nn.Dense(self.width, dtype=self.dtype)(condition)[:, None, None]
        h = nn.silu(GroupNorm(self.groups)(h))
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = zero_conv(self.width, dtype=self.dtype)(h)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=self.dtype, name="shortcut")(x)
        return h + x


class PixelAttention(nn.Module):
    """x + attention(norm(x)), in which every pixel looks at every pixel. [B, H, W, C]."""

    heads: int
    groups: int  # of GroupNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = GroupNorm(self.groups)(x)
        zeros = nn.initializers.zeros
        attention = Attention(self.heads, fused=False, out_init=zeros, dtype=self.dtype)
        nn.share_scope(self, attention)  # its parameters are this module's own
        return x + attention(h)[0]


class ContextAttention(nn.Module):
    """x + attention(norm(x), context), in which every pixel looks at every token of a context.

    x [B, H, W, C], context [B, L, E] -> [B, H, W, C] (Rombach et al. 2022, section 3.3).
    """

    heads: int
    groups: int  # of GroupNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        zeros = nn.initializers.zeros
        attention = Attention(self.heads, fused=False, out_init=zeros, dtype=self.dtype)
        nn.share_scope(self, attention)
        return x + attention(GroupNorm(self.groups)(x), context_BSE=context)[0]


class UNet(nn.Module):
    """x_t [B, H, W, C], time [B] in 0 .. 1000, label [B] -> [B, H, W, out], float32, 0 at first.

    It may have a context [B, L, E], such as the features of a text's tokens. The context's mean is
    added to the time; GLIDE (Nichol et al. 2021) adds the last token's vector. Each attention of
    pixels to pixels is followed by one of pixels to tokens.

    Where it halves the resolution it pads both sides; the authors pad below and to the right.
    """

    out: int  # channels
    classes: int = 0  # 0: no labels
    widths: tuple[int, ...] = (128, 256, 256, 256)  # channels at H, H/2, H/4, ...
    blocks: int = 2  # residual blocks per resolution, one more on the way up
    attention: tuple[int, ...] = (16,)  # heights at which it attends, besides the middle
    heads: int = 1
    groups: int = 32  # of GroupNorm
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: bool | str = False

    @nn.compact
    def __call__(self, x_t, t, label=None, context=None):
        first, dtype = self.widths[0], self.dtype
        condition = Condition(4 * first, first, self.classes, dtype, name="condition")
        condition = condition(t, label, context)
        h = nn.Conv(first, (3, 3), dtype=dtype, name="in")(x_t)
        skips = [h]
        for level, width in enumerate(self.widths):
            if level:
                down = nn.Conv(h.shape[-1], (3, 3), 2, padding=1, dtype=dtype, name=f"down{level}")
                h = down(h)
                skips.append(h)
            for i in range(self.blocks):
                h = self._block(h, condition, context, width, f"down{level}_{i}")
                skips.append(h)
        h = self._res_block(self.widths[-1], "middle_0")(h, condition)
        h = self._attend(h, context, "middle")
        h = self._res_block(self.widths[-1], "middle_1")(h, condition)
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self._block(h, condition, context, width, f"up{level}_{i}")
            if level:
                h = nn.Conv(width, (3, 3), dtype=dtype, name=f"up{level}")(upsample(h))
        h = nn.silu(GroupNorm(self.groups, name="norm")(h))
        return zero_conv(self.out, "out", dtype)(h).astype(jnp.float32)

    def _block(self, h, condition, context, width: int, name: str):
        h = self._res_block(width, name)(h, condition)
        return self._attend(h, context, name) if h.shape[1] in self.attention else h

    def _res_block(self, width: int, name: str) -> nn.Module:
        block = recompute(ResBlock, self.remat)
        return block(width, self.groups, self.dropout, self.dtype, name=name)

    def _attend(self, h, context, name: str):
        """Pixels look at pixels, then at the tokens of the context."""
        options = (self.heads, self.groups, self.dtype)
        pixels = recompute(PixelAttention, self.remat)
        h = pixels(*options, name=f"{name}_attention")(h)
        if context is None:
            return h
        tokens = recompute(ContextAttention, self.remat)
        return tokens(*options, name=f"{name}_context")(h, context)
