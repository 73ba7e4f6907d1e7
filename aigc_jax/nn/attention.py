"""Multi-head attention (Vaswani et al. 2017).

Shapes: B rows, T queries, S keys, D channels in H heads of K, E channels of a context.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from .blocks import FusedDense
from .embeddings import rotate
from .sharding import check_divides, constrain


class Attention(nn.Module):
    """Attention of x to itself, to a cache, or to a context; every case is one call of one module.

    - Causal: pass `mask_BTS` = tril. Not causal: pass no mask, or one of your own.
    - With a cache: pass `past` and `slot`. The new keys and values are written there, and the
      result comes back, so that the caller keeps the cache.
    - Cross-attention: pass `context_BSE`, from which keys and values are made; needs fused=False.

    The attention weights [B, H, T, S] are sown as intermediates / attention.
    """

    heads: int
    fused: bool = True  # one kernel "qkv"; False: three kernels "q", "k", "v"
    bias: bool = True
    rotary: bool = False  # rotary positions
    dropout: float = 0.0  # of the attention weights
    kernel_init: Any = nn.initializers.lecun_normal()
    out_init: Any = nn.initializers.lecun_normal()  # of the last kernel
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B *T D"],
        mask_BTS: Bool[Array, "_ T S"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        *,
        context_BSE: Float[Array, "B S E"] | None = None,
        past: tuple[Array, Array] | None = None,
        slot: Any = 0,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Returns the output, shaped like x, and the keys and values [B, H, S, K] that it used.

        x_BTD: [B, T, D], or an image [B, height, width, D], whose pixels are the positions.
        mask_BTS: True where query t sees key s; None: every query sees every key.
        positions_BT: of rotary positions; None: 0 .. T-1.
        past: keys and values [B, H, S, K], into which the new ones are written from `slot` on.
        """
        shape = x_BTD.shape
        if x_BTD.ndim > 3:
            x_BTD = x_BTD.reshape(shape[0], -1, shape[-1])
        q, k, v = self._project(x_BTD, context_BSE)
        if self.rotary:
            if past is not None and positions_BT is None:
                raise ValueError("rotary attention with past keys needs positions_BT")
            positions = jnp.arange(q.shape[2])[None] if positions_BT is None else positions_BT
            q, k = rotate(q, positions), rotate(k, positions)
        if past is not None:
            update = jax.lax.dynamic_update_slice_in_dim
            k, v = (update(old, new, slot, 2) for old, new in zip(past, (k, v), strict=True))
        attend = self._masked if mask_BTS is not None else self._unmasked
        h = attend(q, k, v, mask_BTS).swapaxes(1, 2).reshape(shape)
        return self._dense(shape[-1], "out", self.out_init)(h), (k, v)

    def _dense(self, features: int, name: str, init: Any) -> nn.Dense:
        return nn.Dense(features, self.bias, kernel_init=init, dtype=self.dtype, name=name)

    def _project(self, x_BTD, context_BSE) -> tuple[Array, ...]:
        """Returns queries [B, H, T, K], keys and values [B, H, S, K]."""
        D, H = x_BTD.shape[-1], self.heads
        if D % H:
            raise ValueError(f"{D} channels do not divide into {H} heads")
        check_divides(H, "heads")
        if context_BSE is not None and (self.fused or self.rotary):
            raise ValueError("attention to a context needs fused=False and rotary=False")
        if self.fused:
            options = {"kernel_init": self.kernel_init, "dtype": self.dtype}
            qkv = FusedDense(3, D, self.bias, **options, name="qkv")(x_BTD)
            each = (qkv[:, :, i] for i in range(3))
        else:
            source = x_BTD if context_BSE is None else context_BSE
            inputs = {"q": x_BTD, "k": source, "v": source}
            each = (self._dense(D, name, self.kernel_init)(h) for name, h in inputs.items())
        heads = (h.reshape(*h.shape[:2], H, D // H).swapaxes(1, 2) for h in each)
        return tuple(constrain(h, "data", "model") for h in heads)

    def _drop(self, weights):
        return nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(weights)

    def _masked(self, q, k, v, mask_BTS):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(mask_BTS[:, None], scores.astype(jnp.float32), -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        self.sow("intermediates", "attention", weights)
        return jnp.einsum("bhts,bhsk->bhtk", self._drop(weights), v)

    def _unmasked(self, q, k, v, _):
        """Normalises after the product with v: its gradient then sums no [T, S]."""
        scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        h = jnp.einsum("bhts,bhsk->bhtk", self._drop(weights).astype(v.dtype), v)
        total = weights.sum(-1, keepdims=True)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", weights / total)
        return h / total.astype(v.dtype)
