"""Blocks that two families or more share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int


def pixel_shuffle(h: Float[Array, "... H W C4"]) -> Float[Array, "... H2 W2 C"]:
    """Four channels become 2 x 2 pixels: [..., H, W, 4 C] -> [..., 2 H, 2 W, C] (Shi et al. 2016).

    After a convolution it is a transposed one of stride 2, without its checkerboard and without the zeros that it
    multiplies by.
    """
    *rows, height, width, channels = h.shape
    h = h.reshape(*rows, height, width, 2, 2, channels // 4).swapaxes(-4, -3)
    return h.reshape(*rows, 2 * height, 2 * width, channels // 4)


def rotate(x_BHTK: Array, positions: Int[Array, "B T"]) -> Array:
    """Rotary positions (Su et al. 2021, eq. 34): pairs (i, i + K/2) turn by position / 10000^(2i/K); K is even.

    The paper pairs neighbours; halves, as in most codes since, are the same up to the order of the channels.
    """
    half = x_BHTK.shape[-1] // 2
    turns = 10_000.0 ** (-jnp.arange(half) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * turns[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(x_BHTK.dtype), jnp.sin(angle).astype(x_BHTK.dtype)
    a, b = jnp.split(x_BHTK, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _mean(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
    """Over the last axis. XLA's CPU code adds it up number by number, where a product with ones takes eight at once: a
    fifth of the time of a small transformer's update.
    """

    def product(x):
        return x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.mean(-1, keepdims=True))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), eps 1e-5, over the last axis."""

    kind: str  # layer | rms
    bias: bool = True  # of LayerNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":  # E[x^2] - E[x]^2 would lose digits where a channel is huge, as some of GPT-2's are
            h = h - _mean(h)
        h = h * jax.lax.rsqrt(_mean(h * h) + 1e-5)
        h = h * self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32).reshape(shape)
        if self.kind == "layer" and self.bias:
            h = h + self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32).reshape(shape)
        return h.astype(self.dtype)


class Block(nn.Module):
    """A transformer block with its norms first: x + attention(norm(x)), then x + mlp(norm(x)) (Radford et al. 2019).

    Shapes: B rows, T new positions, S positions looked at, D channels in H heads of K. Dropout is on where the caller
    passes an rng named dropout. The attention weights [B, H, T, S] are sown as intermediates / attention.

    Given a condition, it shifts and scales what the norms give and gates both branches, which begin as nothing
    ("adaLN-Zero", Peebles & Xie 2023).
    """

    heads: int
    hidden: int  # of the MLP; 0: attention only
    norm: str = "layer"  # layer | rms
    activation: str = "gelu"  # gelu (its tanh form, as GPT-2) | relu | swiglu
    bias: bool = True
    rotary: bool = False
    dropout: float = 0.0
    std: float = 0.02  # of the first kernels
    residual_std: float = 0.02  # of the kernels whose output is added to x
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask_BTS: Bool[Array, "_ T S"],
        positions_BT: Int[Array, "B T"],
        past: tuple[Array, Array] | None = None,
        at: Any = 0,
        condition_BD: Float[Array, "B D"] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """x_BTD after the block, and the keys and values [B, H, S, K] that it looked at.

        past: keys and values [B, H, S, K] of a cache, into which the new ones are written from slot `at` on; without
            them S = T. mask_BTS: who sees whom; True where row t looks at s.
        """
        D, H = x_BTD.shape[-1], self.heads

        def dense(features, std, name):
            init = nn.initializers.normal(std)
            return nn.Dense(features, self.bias, kernel_init=init, dtype=self.dtype, name=name)

        def drop(h):
            return nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)

        parts = None
        if condition_BD is not None:
            n = 6 if self.hidden else 3
            modulation = nn.Dense(n * D, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation")
            parts = jnp.split(modulation(jax.nn.silu(condition_BD))[:, None], n, -1)

        def shifted(h, i):
            return h if parts is None else h * (1 + parts[i + 1]) + parts[i]

        def gated(h, i):
            return h if parts is None else h * parts[i]

        h_BTD = shifted(Norm(self.norm, self.bias, self.dtype, name="norm_attention")(x_BTD), 0)
        qkv = dense(3 * D, self.std, "qkv")(h_BTD)
        q, k, v = (y.reshape(*y.shape[:2], H, D // H).swapaxes(1, 2) for y in jnp.split(qkv, 3, -1))
        if self.rotary:
            q, k = rotate(q, positions_BT), rotate(k, positions_BT)
        if past is not None:
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, at, 2) for old, new in zip(past, (k, v), strict=True))
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) * (D // H) ** -0.5
        scores = jnp.where(mask_BTS[:, None], scores.astype(jnp.float32), -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        self.sow("intermediates", "attention", weights)
        y_BTD = jnp.einsum("bhts,bhsk->bhtk", drop(weights), v).swapaxes(1, 2).reshape(*x_BTD.shape)
        x_BTD = x_BTD + gated(drop(dense(D, self.residual_std, "out")(y_BTD)), 2)
        if not self.hidden:
            return x_BTD, (k, v)

        h_BTD = shifted(Norm(self.norm, self.bias, self.dtype, name="norm_mlp")(x_BTD), 3)
        if self.activation == "swiglu":  # Shazeer 2020
            gate, up = jnp.split(dense(2 * self.hidden, self.std, "up")(h_BTD), 2, -1)
            h = jax.nn.silu(gate) * up
        else:
            h = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}[self.activation](dense(self.hidden, self.std, "up")(h_BTD))
        return x_BTD + gated(drop(dense(D, self.residual_std, "down")(h)), 5), (k, v)
