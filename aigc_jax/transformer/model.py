"""The model: its Config, the Flax module, and logits, attention weights and losses of tokens.

Shapes stand in the names: B rows, T positions, D = width, V = vocab, H heads of K channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from ..core import EMA, Optim, Optimizer, check_at_least, check_fields, check_text
from ..nn import Decoder, causal

Params = Any


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer. The defaults are the smallest GPT-2 (124 million parameters)."""

    vocab: int = 50257  # 0: no tokens, for models of frames or numbers by `backbone`
    context: int = 1024  # largest number of positions
    layers: int = 12
    heads: int = 12
    width: int = 768
    # Of the MLP. 0: 4 width; for swiglu 8/3 width rounded up to 8, which is as many parameters.
    hidden: int = 0
    mlp: bool = True  # False: attention only (Elhage et al. 2021)
    positions: Literal["learned", "rotary"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"  # gelu: the tanh form
    bias: bool = True  # in linear layers and LayerNorm
    tied: bool = True  # the embedding is also the kernel of the last layer
    dropout: float = 0.0  # of embeddings, attention weights and both branches
    std: float = 0.02  # of initial kernels; those added to the stream: divided by sqrt(2 layers)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] = False
    # Blocks as one lax.scan: compiles in the time of one. The same parameters as unrolled.
    scan: bool | None = None
    eos: tuple[int, ...] | None = None  # tokens that end a text if `Sampling.stop` is None
    bos: int | None = None  # the token before a text; only written by save_gpt2
    micro: int = 1  # micro-batches per update
    ema: float = 0.0  # decay of the averaged parameters; 0: none
    optim: Optimizer = Optim(lr=6e-4, b2=0.95, weight_decay=0.1, clip=1.0, warmup=100)

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 0, "vocab", "hidden")
        check_at_least(self, 1, "context", "layers", "heads", "width", "micro")
        if self.layers > 1000:
            raise ValueError(f"model.layers must be at most 1000, got {self.layers}")
        if self.width % self.heads:
            raise ValueError(
                f"model.width {self.width} does not divide into {self.heads} heads",
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            head = self.width // self.heads
            raise ValueError(f"rotary positions need heads of even width, got {head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        if not self.std > 0:
            raise ValueError(f"model.std must be positive, got {self.std}")
        for token in (*(self.eos or ()), *(() if self.bos is None else (self.bos,))):
            if token < 0:
                raise ValueError(f"model.eos and model.bos must not be negative, got {token}")
        EMA(self.ema)

    @property
    def inner(self) -> int:
        """Width of the middle of the MLP; 0 without an MLP."""
        if not self.mlp:
            return 0
        swiglu = -(-8 * self.width // 24) * 8
        return self.hidden or (swiglu if self.activation == "swiglu" else 4 * self.width)

    def check(self, info) -> None:
        """Raises ValueError where a data set does not fit the model."""
        check_text(self, info)
        if info.shape[0] - 1 > self.context:
            raise ValueError(
                f"model.context is {self.context}, the data's length is {info.shape[0] - 1}: "
                "set model.context to at least that, or shorten the data",
            )


class Transformer(nn.Module):
    """Token embeddings, a decoder trunk, logits. Dropout is on if an rng named dropout is given."""

    cfg: Config

    def setup(self):
        cfg = self.cfg
        dtype, normal = jnp.dtype(cfg.dtype), nn.initializers.normal(cfg.std)
        if cfg.vocab:
            self.wte = nn.Embed(cfg.vocab, cfg.width, embedding_init=normal, dtype=dtype)
        self.trunk = Decoder(
            layers=cfg.layers,
            heads=cfg.heads,
            width=cfg.width,
            hidden=cfg.inner,
            context=cfg.context if cfg.positions == "learned" else 0,
            rotary=cfg.positions == "rotary",
            norm=cfg.norm,
            activation=cfg.activation,
            bias=cfg.bias,
            dropout=cfg.dropout,
            std=cfg.std,
            dtype=dtype,
            remat=cfg.remat,
            scan=bool(cfg.scan),
        )
        nn.share_scope(self, self.trunk)  # its parameters are this module's own
        if cfg.vocab and not cfg.tied:
            self.head = nn.Dense(cfg.vocab, use_bias=False, kernel_init=normal, dtype=dtype)

    def embed(self, tokens_BT):
        """Returns embeddings [B, T, D], without positions."""
        return self.wte(tokens_BT)

    def run(self, x_BTD, mask_BTS, positions_BT, past=None, slot=0):
        """Returns the last norm's output [B, T, D], and the keys and values of each block."""
        return self.trunk(x_BTD, mask_BTS, positions_BT, past, slot)

    def unembed(self, h_BTD):
        """Returns logits [..., V], float32."""
        logits = self.wte.attend(h_BTD) if self.cfg.tied else self.head(h_BTD)
        return logits.astype(jnp.float32)

    def __call__(self, x):
        """Tokens [B, T] -> logits; with vocab=0 embeddings [B, T, D] -> [B, T, D]."""
        h_BTD, _ = self.run(self.embed(x) if self.cfg.vocab else x, *causal(*x.shape[:2]))
        return self.unembed(h_BTD) if self.cfg.vocab else h_BTD


def call(cfg: Config, params: Params, method: str, *args, rngs=None):
    """Calls a method of the Transformer."""
    return Transformer(cfg).apply({"params": params}, *args, method=method, rngs=rngs)


def check_length(cfg: Config, T: int, *, tokens: bool = True) -> None:
    """Raises ValueError where the model cannot read a sequence of T positions."""
    if tokens and not cfg.vocab:
        raise ValueError("model.vocab is 0: a model without tokens takes embeddings, by `backbone`")
    if not 1 <= T <= cfg.context:
        raise ValueError(
            f"sequences must have 1 to {cfg.context} positions (model.context), got {T}",
        )


def _check_tokens(cfg: Config, tokens) -> None:
    """Raises ValueError for tokens outside the vocabulary, where their values are known."""
    known = not isinstance(tokens, jax.core.Tracer)
    if not cfg.vocab or not known or not getattr(tokens, "is_fully_addressable", True):
        return
    values = np.asarray(tokens)  # an operation of JAX would be traced inside jit
    if values.size and not 0 <= values.min() <= values.max() < cfg.vocab:
        raise ValueError(
            f"tokens lie in 0..{cfg.vocab - 1} (model.vocab), got {values.min()}..{values.max()}",
        )


def init(cfg: Config, key: Key[Array, ""]) -> Params:
    """Returns first parameters: kernels N(0, std^2), as GPT-2 (section 2.3).

    The kernels whose output is added to the stream are divided by sqrt(2 layers).
    """
    x = jnp.zeros((1, 1), jnp.int32) if cfg.vocab else jnp.zeros((1, 1, cfg.width))
    return Transformer(cfg).init(key, x)["params"]


def apply(
    cfg: Config, params: Params, tokens_BT: Int[Array, "B T"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T V"]:
    """Returns the logits of the next token at every position. With a key, dropout is on.

    Raises ValueError where T > context. It also does for tokens outside the vocabulary, unless they
    are traced.
    """
    check_length(cfg, tokens_BT.shape[1])
    _check_tokens(cfg, tokens_BT)
    rngs = None if key is None else {"dropout": key}
    return call(cfg, params, "__call__", tokens_BT, rngs=rngs)


def backbone(
    cfg: Config, params: Params, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T D"]:
    """Runs the blocks and the last norm on embeddings of your own, for regression or frames.

    Positions are added; attention is causal. With a key, dropout is on. `Config(vocab=0)` makes no
    token embedding. Raises ValueError where T > context.
    """
    check_length(cfg, x_BTD.shape[1], tokens=False)
    rngs = None if key is None else {"dropout": key}
    return call(cfg, params, "run", x_BTD, *causal(*x_BTD.shape[:2]), rngs=rngs)[0]


def attention(
    cfg: Config,
    params: Params,
    tokens_BT: Int[Array, "B T"],
) -> Float[Array, "L B H T T"]:
    """Returns the attention weights of all layers and heads; row t sums to 1 over 0 .. t."""
    check_length(cfg, tokens_BT.shape[1])
    model = Transformer(replace(cfg, scan=None))  # a scan sows nothing
    _, sown = model.apply({"params": params}, tokens_BT, mutable="intermediates")
    blocks = [sown["intermediates"][f"blocks_{i}"] for i in range(cfg.layers)]
    return jnp.stack([block["attention"][0] for block in blocks])


def nll(
    cfg: Config, params: Params, tokens: Int[Array, "B T1"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T"]:
    """Returns -log p(token t+1 | tokens 0 .. t) in nats, from T+1 tokens per row.

    With a key, dropout is on. Raises ValueError for tokens outside the vocabulary; where they are
    traced, their positions give NaN instead.
    """
    _check_tokens(cfg, tokens)
    wrong = (tokens < 0) | (tokens >= cfg.vocab)
    tokens = jnp.where(wrong, 0, tokens)  # a NaN here would reach all positions
    logits = apply(cfg, params, tokens[:, :-1], key)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.where(wrong[:, :-1] | wrong[:, 1:], jnp.nan, each)
