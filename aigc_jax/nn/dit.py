"""A transformer over patches of an image (Peebles & Xie 2023, "DiT")."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from .attention import Attention
from .blocks import Norm, recompute
from .embeddings import Condition, adaln_zero, modulate
from .transformer import Block, scan_blocks


class DiT(nn.Module):
    """x_t [B, H, W, C], time [B] in 0 .. 1000, label [B] -> [B, H, W, out], float32, 0 at first.

    The context [B, L, E] is optional, such as the features of a text's tokens. With it, an
    attention of patches to tokens follows each block. Chen et al. 2023 ("PixArt-alpha") have it
    inside the block.

    Time and label shift, scale and gate every block ("adaLN-Zero", section 3.2). Positions are
    learned; the paper's are sines and cosines.
    """

    out: int  # channels
    classes: int = 0  # 0: no labels
    width: int = 384
    layers: int = 12
    heads: int = 6
    patch: int = 2  # side of a patch in pixels
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool | str = False
    scan: bool = False  # the blocks as one lax.scan (`scan_blocks`), where there is no context

    @nn.compact
    def __call__(self, x_t, t, label=None, context=None):
        (B, H, W, _), p, D = x_t.shape, self.patch, self.width
        condition = Condition(D, 256, self.classes, self.dtype, name="condition")
        condition = condition(t, label, context)
        patches = nn.Conv(D, (p, p), p, dtype=self.dtype, name="patches")(x_t)
        h = patches.reshape(B, -1, D)
        T = h.shape[1]
        first = nn.initializers.normal(0.02)
        h = h + self.param("positions", first, (1, T, D), jnp.float32).astype(self.dtype)
        everyone = jnp.ones((1, T, T), bool)
        positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        block = recompute(Block, self.remat)
        options = {"dropout": self.dropout, "dtype": self.dtype}
        if self.scan and context is None and not self.is_initializing():
            alike = Block(self.heads, 4 * D, **options, parent=None)
            names = [f"block{i}" for i in range(self.layers)]
            h, _ = scan_blocks(self, alike, names, h, everyone, positions, condition)
        else:
            for i in range(self.layers):
                layer = block(self.heads, 4 * D, **options, name=f"block{i}")
                h, _ = layer(h, everyone, positions, condition_BD=condition)
                if context is not None:
                    h = h + self._look_at(context, h, f"block{i}_context")
        shift, scale = adaln_zero(condition, 2, self.dtype)
        h = modulate(Norm("layer", dtype=self.dtype, name="norm")(h), shift, scale)
        zeros = nn.initializers.zeros
        h = nn.Dense(p * p * self.out, kernel_init=zeros, dtype=self.dtype, name="out")(h)
        h = h.reshape(B, H // p, W // p, p, p, self.out).swapaxes(2, 3)
        return h.reshape(B, H, W, self.out).astype(jnp.float32)

    def _look_at(self, context, h, name: str):
        """Returns the attention of the patches h [B, T, D] to the context, 0 at first."""
        zeros = nn.initializers.zeros
        attention = Attention(self.heads, fused=False, out_init=zeros, dtype=self.dtype, name=name)
        h = Norm("layer", dtype=self.dtype, name=f"{name}_norm")(h)
        return attention(h, context_BSE=context)[0]
