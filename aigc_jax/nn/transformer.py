"""The transformer block, norms first (Radford et al. 2019), and the decoder trunk made of it.

Shapes: B rows, T new positions, S positions looked at, D channels in H heads of K.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from .attention import Attention
from .blocks import Norm, checkpointed, recompute
from .embeddings import Modulation, adaln_zero, modulate
from .mlp import MLP
from .sharding import check_divides, constrain


def causal(B: int, T: int) -> tuple[Bool[Array, "_ T T"], Int[Array, "B T"]]:
    """Returns the mask by which t sees 0 .. t, and the positions 0 .. T-1 of all rows."""
    return jnp.tril(jnp.ones((1, T, T), bool)), jnp.broadcast_to(jnp.arange(T)[None], (B, T))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    A condition shifts and scales the norms' outputs and gates both branches, so that the block is
    the identity at first (adaLN-Zero, Peebles & Xie 2023).
    """

    heads: int
    hidden: int  # width of the MLP's middle; 0: attention only
    norm: str = "layer"  # layer | rms
    activation: str = "gelu"  # gelu (tanh form) | relu | swiglu
    bias: bool = True
    rotary: bool = False
    dropout: float = 0.0  # of attention weights and both branches
    std: float = 0.02  # of the initial kernels
    residual_std: float = 0.02  # of the kernels whose output is added to x
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask_BTS: Bool[Array, "_ T S"],
        positions_BT: Int[Array, "B T"],
        past: tuple[Array, Array] | None = None,
        slot: Any = 0,
        condition_BD: Float[Array, "B D"] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Returns x_BTD after the block, and the keys and values [B, H, S, K] that it looked at.

        past, slot: a cache and where to write in it, as in `Attention`; without it S = T.
        """
        x_BTD, for_attention, for_mlp = constrain(x_BTD, "data"), None, None
        if condition_BD is not None:
            parts = adaln_zero(condition_BD, 6 if self.hidden else 3, self.dtype)
            for_attention = Modulation(*parts[:3])
            for_mlp = Modulation(*parts[3:]) if self.hidden else None

        init, out_init = (nn.initializers.normal(std) for std in (self.std, self.residual_std))
        kernels = {"kernel_init": init, "out_init": out_init, "bias": self.bias}
        kernels["dtype"] = self.dtype
        attention = Attention(self.heads, rotary=self.rotary, dropout=self.dropout, **kernels)
        nn.share_scope(self, attention)  # its parameters are the block's own
        h_BTD = self._normed(x_BTD, "norm_attention", for_attention)
        h_BTD, kv = attention(h_BTD, mask_BTS, positions_BT, past=past, slot=slot)
        x_BTD = self._added(x_BTD, h_BTD, "Dropout_1", for_attention)
        if not self.hidden:
            return x_BTD, kv

        D = x_BTD.shape[-1]
        check_divides(self.hidden, "units of the MLP")
        mlp = MLP((self.hidden,), self.activation, D, names=("up", "down"), **kernels)
        nn.share_scope(self, mlp)
        h_BTD = mlp(self._normed(x_BTD, "norm_mlp", for_mlp))
        return self._added(x_BTD, h_BTD, "Dropout_2", for_mlp), kv

    def _normed(self, x_BTD, name: str, modulation: Modulation | None):
        h_BTD = Norm(self.norm, self.bias, self.dtype, name=name)(x_BTD)
        return h_BTD if modulation is None else modulate(h_BTD, modulation.shift, modulation.scale)

    def _added(self, x_BTD, h_BTD, name: str, modulation: Modulation | None):
        dropout = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"), name=name)
        h_BTD = dropout(h_BTD)
        return x_BTD + (h_BTD if modulation is None else h_BTD * modulation.gate)


def scan_blocks(
    module: nn.Module,
    block: Block,
    names: list[str],
    x_BTD: Float[Array, "B T D"],
    mask_BTS: Bool[Array, "_ T S"],
    positions_BT: Int[Array, "B T"],
    condition_BD: Float[Array, "B D"] | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Runs blocks of one form as one `lax.scan`: XLA compiles one block, however many there are.

    The parameters are those of the unrolled blocks, stacked here: a checkpoint serves both ways.
    Dropout draws other masks than in unrolled blocks, by the same law. Nothing is sown.

    module: the net that has the blocks' parameters under `names`, and a field `remat`.
    block: a Block without a parent.

    Returns x_BTD, and keys and values [layers, B, H, S, K].
    """
    params = [module.variables["params"][name] for name in names]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    key = module.make_rng("dropout") if module.has_rng("dropout") else None

    def layer(x_BTD, inputs):
        params, i = inputs
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, i)}
        given = (x_BTD, mask_BTS, positions_BT)
        return block.apply({"params": params}, *given, condition_BD=condition_BD, rngs=rngs)

    return jax.lax.scan(checkpointed(layer, module.remat), x_BTD, (stacked, jnp.arange(len(names))))


class Decoder(nn.Module):
    """The trunk of a transformer: positions, blocks and a last norm, over embeddings [B, T, D].

    With `causal`'s mask it is a decoder. With a mask of True everywhere it looks both ways.

    The initial kernels whose output is added to the stream are divided by sqrt(2 layers) (GPT-2,
    section 2.3).
    """

    layers: int
    heads: int
    width: int
    hidden: int  # width of the MLP's middle; 0: attention only
    context: int = 0  # number of learned positions; 0: none
    rotary: bool = False  # rotary positions
    norm: str = "layer"  # layer | rms
    activation: str = "gelu"  # gelu (tanh form) | relu | swiglu
    bias: bool = True
    dropout: float = 0.0  # of embeddings, attention weights and both branches
    std: float = 0.02  # of the initial kernels and positions
    dtype: Any = jnp.float32
    remat: bool | str = False
    scan: bool = False  # the blocks as one lax.scan (`scan_blocks`), where there is no cache

    def setup(self):
        if self.context:
            normal = nn.initializers.normal(self.std)
            self.wpe = nn.Embed(self.context, self.width, embedding_init=normal, dtype=self.dtype)
        block = recompute(Block, self.remat)
        self.blocks = [block(**self._form()) for _ in range(self.layers)]
        # Not `norm`, which is a field; saved parameters have that name.
        self.last_norm = Norm(self.norm, self.bias, self.dtype, name="norm")
        self.drop = nn.Dropout(self.dropout)

    def _form(self) -> dict:
        """Returns the fields of a block."""
        return {
            "heads": self.heads,
            "hidden": self.hidden,
            "norm": self.norm,
            "activation": self.activation,
            "bias": self.bias,
            "rotary": self.rotary,
            "dropout": self.dropout,
            "std": self.std,
            "residual_std": self.std / math.sqrt(2 * self.layers),
            "dtype": self.dtype,
        }

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask_BTS: Bool[Array, "_ T S"],
        positions_BT: Int[Array, "B T"],
        past: tuple[tuple[Array, Array], ...] | None = None,
        slot: Any = 0,
    ) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """Returns the last norm's output [B, T, D], and the keys and values of each block."""
        if self.context:
            x_BTD = x_BTD + self.wpe(positions_BT)
        x_BTD = x_BTD.astype(self.dtype)
        x_BTD = self.drop(x_BTD, deterministic=not self.has_rng("dropout"))
        if self.scan and past is None and not self.is_initializing():
            names = [f"blocks_{i}" for i in range(self.layers)]
            block = Block(**self._form(), parent=None)
            x_BTD, (keys, values) = scan_blocks(self, block, names, x_BTD, mask_BTS, positions_BT)
            keys_values = list(zip(keys, values, strict=True))
        else:
            keys_values = []
            for i, block in enumerate(self.blocks):
                old = None if past is None else past[i]
                x_BTD, kv = block(x_BTD, mask_BTS, positions_BT, old, slot)
                keys_values.append(kv)
        return self.last_norm(x_BTD), tuple(keys_values)
