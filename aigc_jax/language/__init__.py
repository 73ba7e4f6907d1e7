"""Language models before the transformer, on the same batches, in the same units.

- n-grams with Kneser-Ney smoothing: `ngrams.py`. They are counted, not trained
- "nplm": the neural probabilistic language model (Bengio et al. 2003), a net of the last words
- "lstm": Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000
- "gru": Cho et al. 2014, but the reset gate acts after the matrix product, as in Flax and cuDNN

The last three are families. The recurrent ones begin each row of a batch with a state of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from ..core import (
    EMA,
    Family,
    Optim,
    Optimizer,
    State,
    check_at_least,
    check_fields,
    check_text,
    make_step,
    start,
    target_mask,
)
from .ngrams import KneserNey, kneser_ney, log_probs, probabilities, sample_ngrams

__all__ = [
    "Config",
    "KneserNey",
    "Net",
    "apply",
    "init",
    "kneser_ney",
    "log_probs",
    "make",
    "nll",
    "probabilities",
    "sample_ngrams",
]

Params = Any
Tokens = Int[Array | np.ndarray, "B T"]


@dataclass(frozen=True)
class Config:
    """A language model with a state or a window. The optimizer is Adam, the papers' is SGD."""

    kind: Literal["nplm", "lstm", "gru"] = "lstm"
    vocab: int = 65
    embedding: int = 128  # width of the token vectors
    width: int = 512  # of every layer
    layers: int = 1  # recurrent: one above the other; nplm: hidden layers (the paper has one)
    order: int = 5  # nplm: tokens of an n-gram, so that it sees order - 1
    dropout: float = 0.0  # between layers (Zaremba et al. 2014)
    # Of activations; parameters and the memory are float32. None: float32.
    dtype: Literal["float32", "bfloat16"] | None = None
    ema: float = 0.0
    micro: int = 1
    optim: Optimizer = Optim(lr=2e-3, clip=1.0)

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 1, "vocab", "embedding", "width", "layers", "micro")
        check_at_least(self, 2, "order")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        EMA(self.ema)

    def check(self, info) -> None:
        """Raises ValueError for data (a `data.Info`) that are no texts of this vocabulary."""
        check_text(self, info)


# --------------------------------------------------------------------------------- the networks


class Net(nn.Module):
    """Tokens [B, T] and a memory -> logits [B, T, V] of the next tokens, and the memory after them.

    The memory of "lstm" and "gru" is one state per layer. That of "nplm" is the last order - 1
    tokens [B, order - 1]; `vocab` stands for none. Without a memory a text begins.
    """

    cfg: Config

    @nn.compact
    def __call__(self, tokens: Tokens, memory: Any = None) -> tuple[Float[Array, "B T V"], Any]:
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype or "float32")
        wte = nn.Embed(cfg.vocab + (cfg.kind == "nplm"), cfg.embedding, dtype=dtype, name="wte")
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))
        if cfg.kind == "nplm":
            return self._window(tokens, memory, wte, drop)
        h, after = drop(wte(tokens)), []
        cell = nn.OptimizedLSTMCell if cfg.kind == "lstm" else nn.GRUCell
        for i in range(cfg.layers):
            layer = nn.RNN(cell(cfg.width, dtype=dtype, name=f"layer{i}"), return_carry=True)
            state, h = layer(h, initial_carry=None if memory is None else memory[i])
            after.append(state)
            h = drop(h)
        logits = nn.Dense(cfg.vocab, dtype=dtype, name="head")(h)
        return logits.astype(jnp.float32), tuple(after)

    def _window(self, tokens, memory, wte, drop):
        """Returns b + W x + U tanh(d + H x) (Bengio et al. 2003, eq. 1), x: the last vectors."""
        cfg, (B, T), n = self.cfg, tokens.shape, self.cfg.order - 1
        if memory is None:
            memory = jnp.full((B, n), cfg.vocab, jnp.int32)
        text = jnp.concatenate([memory, jnp.asarray(tokens, jnp.int32)], 1)
        seen = text[:, jnp.arange(1, T + 1)[:, None] + jnp.arange(n)[None]]  # [B, T, n]
        dtype = wte.dtype
        x = h = drop(wte(seen).reshape(B, T, n * cfg.embedding))
        for i in range(cfg.layers):
            h = drop(jnp.tanh(nn.Dense(cfg.width, dtype=dtype, name=f"layer{i}")(h)))
        straight = nn.Dense(cfg.vocab, use_bias=False, dtype=dtype, name="straight")(x)
        logits = nn.Dense(cfg.vocab, dtype=dtype, name="head")(h) + straight
        return logits.astype(jnp.float32), text[:, -n:]


def init(cfg: Config, key: Key[Array, ""]) -> Params:
    """Returns first parameters. An LSTM's forget gates begin with bias 1 (Gers et al. 2000)."""
    params = Net(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    for i in range(cfg.layers if cfg.kind == "lstm" else 0):
        params[f"layer{i}"]["hf"]["bias"] += 1
    return params


def apply(
    cfg: Config,
    params: Params,
    tokens: Tokens,
    memory: Any = None,
    *,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B T V"], Any]:
    """Returns the logits of the next tokens, and the memory. With a key, dropout is on."""
    rngs = None if key is None else {"dropout": key}
    return Net(cfg).apply({"params": params}, tokens, memory, rngs=rngs)


# ------------------------------------------------------------------------- losses and sampling


def nll(cfg: Config, params: Params, tokens: Tokens, key: Any = None) -> Float[Array, "B T-1"]:
    """Returns -log p of tokens[:, 1:] in nats, each given those before it."""
    logits, _ = apply(cfg, params, tokens[:, :-1], key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def loss(cfg: Config, params: Params, state: State, batch: dict, key):
    """Returns the mean nll in nats over the targets that count, and (extra, metrics)."""
    each, mask = nll(cfg, params, batch["tokens"], key if cfg.dropout else None), target_mask(batch)
    count = mask.sum()
    return (each * mask).sum() / jnp.maximum(count, 1.0), (state.extra, {"weight": count})


def evaluate(cfg: Config, state: State, batch: dict, key) -> dict[str, Array]:
    """Returns `nll_nats` [B], summed over each row, and `tokens` [B], the number of its targets."""
    mask = target_mask(batch)
    each = nll(cfg, EMA(cfg.ema).read(state), batch["tokens"])
    return {"nll_nats": (each * mask).sum(-1), "tokens": mask.sum(-1)}


def sample(
    cfg: Config,
    state: State,
    key,
    *,
    n: int,
    prompt: Any = None,
    max_new_tokens: int = 256,
    temperature: Any = 1.0,
) -> Int[Array, "n N"]:
    """Samples n continuations of max_new_tokens tokens, without their prompts.

    prompt: [T], continued n times, or [n, T]; by default token 0. temperature: of the softmax; 0
    takes the most probable token.
    """
    params = EMA(cfg.ema).read(state)
    prompt = jnp.zeros(1, jnp.int32) if prompt is None else jnp.asarray(prompt, jnp.int32)
    if prompt.shape[-1] < 1 or prompt.shape not in (prompt.shape[-1:], (n, prompt.shape[-1])):
        got = list(prompt.shape)
        raise ValueError(f"a prompt is tokens [T] or [n, T] with n = {n} and T >= 1, got {got}")
    prompt = jnp.broadcast_to(prompt, (n, prompt.shape[-1]))
    logits, memory = apply(cfg, params, prompt)

    def step(carry, k):
        logits, memory = carry
        drawn = jax.random.categorical(k, logits / jnp.maximum(temperature, 1e-30), mode="high")
        token = jnp.where(jnp.asarray(temperature) > 0, drawn, logits.argmax(-1)).astype(jnp.int32)
        logits, memory = apply(cfg, params, token[:, None], memory)
        return (logits[:, -1], memory), token

    keys = jax.random.split(key, max_new_tokens)
    return jax.lax.scan(step, (logits[:, -1], memory), keys)[1].T


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """Returns the model as a Family, for the batches of the transformer.

    Batches hold `tokens` [B, T+1], and optionally `mask` [B, T], 1 for targets that count, else 0.
    """
    ema = EMA(cfg.ema)

    def init_state(key):
        return start(init(cfg, key), cfg.optim, ema=ema)

    step = make_step(partial(loss, cfg), cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init_state, step, partial(evaluate, cfg), partial(sample, cfg))
