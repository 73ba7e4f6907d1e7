"""Decoder-only transformers: GPT-2 (Radford et al. 2019) and what has changed in them since.

Shapes stand in the names: B rows, T positions, D = width, V = vocab, S slots of the cache, H heads of K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from ..core import EMA, Family, Optim, Optimizer, State, make_step, start
from ..nn import Block, Norm
from .gpt2 import load_gpt2, save_gpt2
from .sampling import Sampling, draw, filter_logits, penalise

__all__ = [
    "Cache", "Config", "Sampling", "Transformer", "apply", "attention", "backbone", "beam_search", "decode", "draw",
    "filter_logits", "generate", "init", "load_gpt2", "make", "penalise", "prefill", "save_gpt2",
]  # fmt: skip

Params = Any


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer; the defaults are GPT-2's smallest, of 124 million parameters."""

    vocab: int = 50257  # 0: no tokens, for models of frames or numbers through `backbone`
    context: int = 1024  # most positions
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int = 0  # of the MLP; 0: 4 width, for swiglu 8/3 of it, rounded up to 8 (as many parameters)
    mlp: bool = True  # False: attention only (Elhage et al. 2021)
    positions: str = "learned"  # learned | rotary
    norm: str = "layer"  # layer | rms
    activation: str = "gelu"  # gelu (tanh form) | relu | swiglu
    bias: bool = True  # in linear layers and LayerNorm
    tied: bool = True  # the embedding is the last layer's kernel too
    dropout: float = 0.0  # of embeddings, attention weights and both branches
    std: float = 0.02  # of all first kernels; those added to the stream: divided by sqrt(2 layers)
    dtype: str = "float32"  # of activations: float32 | bfloat16; parameters are float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    micro: int = 1
    ema: float = 0.0
    optim: Optimizer = Optim(lr=6e-4, b2=0.95, weight_decay=0.1, clip=1.0, warmup=100)

    def __post_init__(self):
        for field in ("context", "layers", "heads", "width", "micro"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, got {getattr(self, field)}")
        if self.layers > 1000:
            raise ValueError(f"model.layers must be at most 1000, got {self.layers}")
        for field in ("vocab", "hidden"):
            if getattr(self, field) < 0:
                raise ValueError(f"model.{field} must not be negative, got {getattr(self, field)}")
        for field, known in {
            "positions": ("learned", "rotary"),
            "norm": ("layer", "rms"),
            "activation": ("gelu", "relu", "swiglu"),
            "dtype": ("float32", "bfloat16"),
        }.items():
            if getattr(self, field) not in known:
                raise ValueError(f"model.{field} must be one of {', '.join(known)}, not {getattr(self, field)!r}")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} does not divide into {self.heads} heads")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need heads of even width, got {self.width // self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        if not self.std > 0:
            raise ValueError(f"model.std must be positive, got {self.std}")
        EMA(self.ema)

    @property
    def inner(self) -> int:
        """Width of the MLP's middle."""
        if not self.mlp:
            return 0
        third = -(-8 * self.width // 24) * 8
        return self.hidden or (third if self.activation == "swiglu" else 4 * self.width)

    def check(self, info) -> None:
        """Raises ValueError where a data set does not fit."""
        if info.kind != "text":
            raise ValueError(f"a transformer trains on text, not on {info.kind}")
        if info.levels > self.vocab:
            raise ValueError(f"model.vocab is {self.vocab}, the tokenizer has {info.levels} tokens (data.info.levels)")
        if info.shape[0] - 1 > self.context:
            raise ValueError(f"model.context is {self.context}, the data's length is {info.shape[0] - 1}")


# ----------------------------------------------------------------------------------------------------------- the model


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a last norm, logits. A deterministic map unless given a dropout rng."""

    cfg: Config

    def setup(self):
        cfg = self.cfg
        dtype, normal = jnp.dtype(cfg.dtype), nn.initializers.normal(cfg.std)
        if cfg.vocab:
            self.wte = nn.Embed(cfg.vocab, cfg.width, embedding_init=normal, dtype=dtype)
        if cfg.positions == "learned":
            self.wpe = nn.Embed(cfg.context, cfg.width, embedding_init=normal, dtype=dtype)
        block = nn.remat(Block) if cfg.remat else Block
        self.blocks = [
            block(
                cfg.heads, cfg.inner, cfg.norm, cfg.activation, cfg.bias, cfg.positions == "rotary", cfg.dropout,
                cfg.std, cfg.std / math.sqrt(2 * cfg.layers), dtype,
            ) for _ in range(cfg.layers)
        ]  # fmt: skip
        self.norm = Norm(cfg.norm, cfg.bias, dtype)
        if cfg.vocab and not cfg.tied:
            self.head = nn.Dense(cfg.vocab, use_bias=False, kernel_init=normal, dtype=dtype)
        self.drop = nn.Dropout(cfg.dropout)

    def embed(self, tokens_BT):
        """[B, T] -> [B, T, D], without positions."""
        return self.wte(tokens_BT)

    def run(self, x_BTD, mask_BTS, positions_BT, past=None, at=0):
        """Embeddings -> the last norm's output [B, T, D], and each block's keys and values."""
        if self.cfg.positions == "learned":
            x_BTD = x_BTD + self.wpe(positions_BT)
        x_BTD = self.drop(x_BTD.astype(self.cfg.dtype), deterministic=not self.has_rng("dropout"))
        seen = []
        for i, block in enumerate(self.blocks):
            x_BTD, kv = block(x_BTD, mask_BTS, positions_BT, None if past is None else past[i], at)
            seen.append(kv)
        return self.norm(x_BTD), tuple(seen)

    def unembed(self, h_BTD):
        """[..., D] -> logits [..., V], float32."""
        logits = self.wte.attend(h_BTD) if self.cfg.tied else self.head(h_BTD)
        return logits.astype(jnp.float32)

    def __call__(self, x):
        """Tokens [B, T] -> logits; without a vocabulary embeddings [B, T, D] -> [B, T, D]."""
        h_BTD, _ = self.run(self.embed(x) if self.cfg.vocab else x, *_causal(*x.shape[:2]))
        return self.unembed(h_BTD) if self.cfg.vocab else h_BTD


def _causal(B: int, T: int) -> tuple[Bool[Array, "_ T T"], Int[Array, "B T"]]:
    """Everyone sees itself and what came before; positions 0 .. T-1 in all rows."""
    return jnp.tril(jnp.ones((1, T, T), bool)), jnp.broadcast_to(jnp.arange(T)[None], (B, T))


def _call(cfg, params, method, *args, rngs=None):
    return Transformer(cfg).apply({"params": params}, *args, method=method, rngs=rngs)


def _check_length(cfg: Config, T: int, *, tokens: bool = True) -> None:
    if tokens and not cfg.vocab:
        raise ValueError("model.vocab is 0: a model without tokens takes embeddings, by `backbone`")
    if not 1 <= T <= cfg.context:
        raise ValueError(f"sequences must have 1 to {cfg.context} positions (model.context), got {T}")


def init(cfg: Config, key: Key[Array, ""]) -> Params:
    """First parameters: N(0, std^2), the kernels that write to the stream / sqrt(2 layers) (GPT-2, section 2.3)."""
    x = jnp.zeros((1, 1), jnp.int32) if cfg.vocab else jnp.zeros((1, 1, cfg.width))
    return Transformer(cfg).init(key, x)["params"]


def apply(
    cfg: Config, params: Params, tokens_BT: Int[Array, "B T"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T V"]:
    """Logits of the next token at every position. With a key, dropout is on. Raises ValueError where T > context."""
    _check_length(cfg, tokens_BT.shape[1])
    return _call(cfg, params, "__call__", tokens_BT, rngs=None if key is None else {"dropout": key})


def backbone(
    cfg: Config, params: Params, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T D"]:
    """Causal blocks and the last norm over embeddings of your own, for regression or frames; positions are added.

    With a key, dropout is on. `Config(vocab=0)` has no token embedding to go unused. Raises ValueError where T >
    context.
    """
    _check_length(cfg, x_BTD.shape[1], tokens=False)
    rngs = None if key is None else {"dropout": key}
    return _call(cfg, params, "run", x_BTD, *_causal(*x_BTD.shape[:2]), rngs=rngs)[0]


def attention(cfg: Config, params: Params, tokens_BT: Int[Array, "B T"]) -> Float[Array, "L B H T T"]:
    """The attention weights of every layer and head; row t sums to 1 over the positions 0 .. t."""
    _check_length(cfg, tokens_BT.shape[1])
    _, sown = Transformer(cfg).apply({"params": params}, tokens_BT, mutable="intermediates")
    return jnp.stack([sown["intermediates"][f"blocks_{i}"]["attention"][0] for i in range(cfg.layers)])


def nll(
    cfg: Config, params: Params, tokens: Int[Array, "B T1"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T"]:
    """-log p(token t+1 | tokens 0 .. t), nats, from T+1 tokens a row. With a key, dropout is on."""
    logits = apply(cfg, params, tokens[:, :-1], key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


# ------------------------------------------------------------------------------------------------------------ decoding


class Cache(NamedTuple):
    """Keys and values of the positions so far, in slots that are laid out beforehand.

    All rows write to the same slot, so that a step is one slice of memory: a row with a short prompt has holes between
    it and what is generated, which nobody looks at. Its positions have none.
    """

    kv: tuple[tuple[Array, Array], ...]  # of each layer: keys and values [B, H, S, K]
    filled: Bool[Array, "B S"]  # slots to look at
    lengths: Int[Array, "B"]  # tokens so far: the position of the next
    at: Int[Array, ""]  # the slot of the next


def prefill(
    cfg: Config,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    *,
    slots: int | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads prompts: the logits after each one's last token, and the cache to go on from with `decode`.

    lengths: tokens of each row, 1 to T; what comes after them is ignored. By default T in all. slots: of the cache, at
        least T; by default the context. Raises ValueError where T does not fit.
    """
    B, T = tokens_BT.shape
    _check_length(cfg, T)
    slots = cfg.context if slots is None else slots
    if slots < T:
        raise ValueError(f"a cache of {slots} slots does not hold a prompt of {T} tokens")
    lengths = jnp.full(B, T, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    h_BTD, kv = _call(cfg, params, "run", _call(cfg, params, "embed", tokens_BT), *_causal(B, T))
    last_BD = jnp.take_along_axis(h_BTD, lengths[:, None, None] - 1, axis=1)[:, 0]
    kv = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - T), (0, 0))), kv)
    filled = jnp.arange(slots)[None] < lengths[:, None]
    return _call(cfg, params, "unembed", last_BD), Cache(kv, filled, lengths, jnp.array(T, jnp.int32))


def decode(cfg: Config, params: Params, token_B: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
    """One more token a row: the logits after it, and the cache with it.

    The caller keeps count: past the last slot, or past the context, positions are wrong without an error.
    """
    filled = jax.lax.dynamic_update_slice_in_dim(cache.filled, jnp.ones((len(token_B), 1), bool), cache.at, 1)
    x_BTD = _call(cfg, params, "embed", token_B[:, None])
    h_BTD, kv = _call(cfg, params, "run", x_BTD, filled[:, None], cache.lengths[:, None], cache.kv, cache.at)
    return _call(cfg, params, "unembed", h_BTD[:, 0]), Cache(kv, filled, cache.lengths + 1, cache.at + 1)


def _check_prompt(cfg: Config, prompt, lengths, new: int) -> None:
    if not hasattr(prompt, "shape") or len(prompt.shape) != 2:
        raise ValueError("a prompt is tokens [B, T], as Tokenizer.encode(text)[None] gives them")
    _check_length(cfg, 1)
    if new < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {new}")
    if 0 in prompt.shape:
        raise ValueError("the prompt is empty: a model continues at least one token")
    if prompt.shape[1] + new > cfg.context:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and {new} new ones exceed the context of {cfg.context}: "
            f"cut the prompt, or ask for at most {max(0, cfg.context - prompt.shape[1])}"
        )
    # What is traced has no values to look at; of what is compiled, the caller keeps count.
    for name, x, low, high in (("tokens", prompt, 0, cfg.vocab - 1), ("lengths", lengths, 1, prompt.shape[1])):
        if x is not None and not isinstance(x, jax.core.Tracer) and not low <= np.min(x) <= np.max(x) <= high:
            raise ValueError(f"{name} of a prompt lie in {low}..{high}, got {np.min(x)}..{np.max(x)}")


def generate(
    cfg: Config,
    params: Params,
    prompt: Int[Array, "B T"],
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    lengths: Int[Array, "B"] | None = None,
    n: int = 1,
) -> Int[Array, "Bn N"]:
    """Continuations of each prompt, n in a row for each, from a cache that is laid out once.

        jax.jit(partial(transformer.generate, cfg, max_new_tokens=100))(params, prompt, key, sampling=Sampling(.8))

    The numbers in `sampling` are traced: another temperature does not compile again. lengths: of prompts that are
    unequal, 1 to T; they are filled up on the right with any token. After a stop token come only stop tokens, and the
    loop ends where all rows have one. Where logits are NaN, which means damaged weights, the token is -1.

    Raises ValueError where prompt and continuation exceed the context, and, outside of jit, for tokens beyond the
    vocabulary and lengths beyond T.
    """
    _check_prompt(cfg, prompt, lengths, max_new_tokens)
    B, T = prompt.shape
    stop = jnp.asarray(sampling.stop, jnp.int32).reshape(-1)
    logits, cache = prefill(cfg, params, prompt, lengths, slots=T + max_new_tokens)
    inside = jnp.arange(T)[None] < cache.lengths[:, None]
    used = jnp.zeros((B, cfg.vocab), bool).at[jnp.arange(B)[:, None], prompt].max(inside)
    # One prefill a prompt, then a copy of its cache for each continuation.
    several = cache._replace(at=jnp.zeros(B))
    logits, used, several = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (logits, used, several))
    cache = several._replace(at=cache.at)

    def choose(i, logits, used, done, last):
        token = draw(penalise(logits, used, sampling.repetition), jax.random.fold_in(key, i), sampling)
        token = jnp.where(done, last, token)
        used = used.at[jnp.arange(B * n), token].set(True)
        return token, used, done | (token[:, None] == stop[None]).any(-1)

    def more(carry):
        i, _, _, _, done, _ = carry
        return (i < max_new_tokens) & ~done.all()

    def one(carry):
        i, token, cache, used, done, out = carry
        logits, cache = decode(cfg, params, token, cache)
        token, used, done = choose(i, logits, used, done, token)
        return i + 1, token, cache, used, done, out.at[:, i].set(token)

    nobody = jnp.zeros(B * n, bool)
    token, used, done = choose(0, logits, used, nobody, jnp.zeros(B * n, jnp.int32))
    out = jnp.zeros((B * n, max_new_tokens), jnp.int32).at[:, 0].set(token)
    i, last, *_, out = jax.lax.while_loop(more, one, (jnp.array(1), token, cache, used, done, out))
    return jnp.where(jnp.arange(max_new_tokens)[None] < i, out, last[:, None])


def beam_search(
    cfg: Config,
    params: Params,
    prompt: Int[Array, "B T"],
    *,
    beams: int,
    max_new_tokens: int,
    lengths: Int[Array, "B"] | None = None,
    stop: tuple[int, ...] = (),
) -> tuple[Int[Array, "B M N"], Float[Array, "B M"]]:
    """The continuations of largest log p found by keeping the `beams` best prefixes, best first, and their log p.

    A prefix that ends in a stop token is kept with its log p as it is, filled up with that token; there is no length
    penalty. Raises ValueError where beams exceed the vocabulary, or prompt and continuation the context.
    """
    _check_prompt(cfg, prompt, lengths, max_new_tokens)
    if not 1 <= beams <= cfg.vocab:
        raise ValueError(f"beams must lie in 1..{cfg.vocab}, got {beams}")
    B, T = prompt.shape
    stops = jnp.asarray(stop, jnp.int32)
    logits, cache = prefill(cfg, params, prompt, lengths, slots=T + max_new_tokens)
    log_p, token = jax.lax.top_k(jax.nn.log_softmax(logits), beams)  # [B, M]
    at, cache = cache.at, cache._replace(at=jnp.zeros(B))
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), cache)._replace(at=at)
    out = jnp.zeros((B, beams, max_new_tokens), jnp.int32).at[:, :, 0].set(token)
    first_row = jnp.arange(B)[:, None] * beams

    def one(i, carry):
        token, log_p, done, cache, out = carry
        logits, cache = decode(cfg, params, token.reshape(-1), cache)
        step = jax.nn.log_softmax(logits).reshape(B, beams, -1)
        # A finished prefix has one continuation, its last token once more, at no cost.
        again = jnp.where(jax.nn.one_hot(token, cfg.vocab, dtype=bool), 0.0, -jnp.inf)
        total = log_p[:, :, None] + jnp.where(done[:, :, None], again, step)
        log_p, best = jax.lax.top_k(total.reshape(B, -1), beams)
        parent, token = best // cfg.vocab, (best % cfg.vocab).astype(jnp.int32)
        rows = (first_row + parent).reshape(-1)
        kv, filled, lengths = jax.tree.map(lambda x: x[rows], (cache.kv, cache.filled, cache.lengths))
        out = jnp.take_along_axis(out, parent[:, :, None], 1).at[:, :, i].set(token)
        return token, log_p, ended(token), Cache(kv, filled, lengths, cache.at), out

    def ended(token):
        return (token[:, :, None] == stops[None, None]).any(-1)

    token, log_p, _, _, out = jax.lax.fori_loop(1, max_new_tokens, one, (token, log_p, ended(token), cache, out))
    return out, log_p


# ---------------------------------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """The transformer as a Family, on batches `tokens` [B, T+1] with an optional `mask` [B, T] of what counts.

    evaluate: `nll_nats`, a sum over the row, and `tokens`, how many it is over.
    sample(state, key, *, n, prompt=None, max_new_tokens=None, sampling=Sampling()): tokens [n, max_new_tokens] after
        those of prompt [n, T]; without a prompt, after token 0. By default the context is filled.
    """
    ema = EMA(cfg.ema)

    def init_state(key):
        return start(init(cfg, key), cfg.optim, ema=ema)

    def counted(batch):
        tokens = batch["tokens"]
        return batch["mask"] if "mask" in batch else jnp.ones((tokens.shape[0], tokens.shape[1] - 1), jnp.float32)

    def loss(params, state, batch, key):
        each, mask = nll(cfg, params, batch["tokens"], key if cfg.dropout else None), counted(batch)
        count = mask.sum()
        return (each * mask).sum() / jnp.maximum(count, 1.0), (state.extra, {"weight": count})

    def evaluate(state, batch, key):
        mask = counted(batch)
        each = nll(cfg, ema.read(state), batch["tokens"]) * mask
        return {"nll_nats": each.sum(-1), "tokens": mask.sum(-1)}

    def sample(state: State, key, *, n: int, prompt=None, max_new_tokens=None, sampling=Sampling()):
        prompt = jnp.zeros((n, 1), jnp.int32) if prompt is None else jnp.asarray(prompt, jnp.int32)
        new = cfg.context - prompt.shape[1] if max_new_tokens is None else max_new_tokens
        return generate(cfg, ema.read(state), prompt, key, max_new_tokens=new, sampling=sampling)

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init_state, step, evaluate, sample)
