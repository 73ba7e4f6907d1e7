"""Time, labels and positions as vectors, and how a condition enters a block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from .sharding import constrain


def sinusoids(t: Float[Array, "B"], width: int) -> Float[Array, "B D"]:
    """Returns cos and sin of t at frequencies from 1 down to 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    angle = t[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)[None]
    return jnp.pad(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1), ((0, 0), (0, width % 2)))


def rotate(x_BHTK: Array, positions: Int[Array, "B T"]) -> Array:
    """Applies rotary positions (Su et al. 2021, eq. 34) to queries or keys of even width K.

    Channels i and i + K/2 turn together by the angle position / 10000^(2i/K). The paper pairs
    neighbouring channels; that is the same function up to the order of the channels.
    """
    half = x_BHTK.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(x_BHTK.dtype), jnp.sin(angle).astype(x_BHTK.dtype)
    a, b = jnp.split(x_BHTK, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Condition(nn.Module):
    """Time t [B], label [B] and context [B, L, E] as one vector [B, width].

    Label `classes` means no label. Of the context the mean over its L tokens enters.
    """

    width: int
    inner: int  # number of sinusoids
    classes: int  # 0: no labels
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t, label, context=None):
        h = nn.Dense(self.width, dtype=self.dtype)(sinusoids(t, self.inner))
        h = nn.Dense(self.width, dtype=self.dtype)(nn.silu(constrain(h, "data")))
        if context is not None:
            h = h + nn.Dense(self.width, dtype=self.dtype, name="context")(context.mean(1))
        if self.classes:
            h = h + nn.Embed(self.classes + 1, self.width, dtype=self.dtype, name="label")(label)
        return h


class Modulation(NamedTuple):
    """What a condition does to one branch of a block; each [B, 1, D]."""

    shift: Array
    scale: Array
    gate: Array


def modulate(h: Array, shift: Array, scale: Array) -> Array:
    """Returns h * (1 + scale) + shift, for a normalised h (DiT, section 3.2)."""
    return h * (1 + scale) + shift


def adaln_zero(condition_BD: Array, parts: int, dtype: Any = jnp.float32) -> list[Array]:
    """Returns `parts` shifts, scales or gates [B, 1, D], all 0 at first (adaLN-Zero, DiT).

    Call it inside `nn.compact`: it makes a Dense named "modulation".
    """
    features, zeros = parts * condition_BD.shape[-1], nn.initializers.zeros
    dense = nn.Dense(features, kernel_init=zeros, dtype=dtype, name="modulation")
    h_BD = jax.nn.silu(constrain(condition_BD, "data"))
    return jnp.split(constrain(dense(h_BD), "data")[:, None], parts, -1)
