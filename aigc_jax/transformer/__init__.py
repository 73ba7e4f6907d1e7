"""Decoder-only transformers: GPT-2 (Radford et al. 2019) and what has changed in them since.

Shapes stand in the names: B rows, T positions, D = width, V = vocab, S slots of the cache, H heads of K channels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
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
from .beams import Rules, search
from .gpt2 import load_gpt2, save_gpt2
from .sampling import Sampling, ban_repeats, draw, filter_logits, occurred, penalise

__all__ = [
    "Cache", "Config", "Sampling", "Transformer", "apply", "attention", "backbone", "ban_repeats", "beam_search",
    "decode", "draw", "filter_logits", "generate", "init", "load_gpt2", "make", "penalise", "prefill", "save_gpt2",
]  # fmt: skip

Params = Any
Whole = Array | np.ndarray | Sequence  # whole numbers; a prompt's are [B, T]


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
    eos: tuple[int, ...] | None = None  # tokens that end a text where `Sampling.stop` names none
    bos: int | None = None  # the token before a text; only written with the weights
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
        for token in (*(self.eos or ()), *(() if self.bos is None else (self.bos,))):
            if token < 0:
                raise ValueError(f"model.eos and model.bos must not be negative, got {token}")
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


def _check_tokens(cfg: Config, tokens) -> None:
    if not cfg.vocab or isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    values = np.asarray(tokens)  # operations on tokens itself would be traced inside of jit
    if values.size and not 0 <= values.min() <= values.max() < cfg.vocab:
        raise ValueError(f"tokens lie in 0..{cfg.vocab - 1} (model.vocab), got {values.min()}..{values.max()}")


def init(cfg: Config, key: Key[Array, ""]) -> Params:
    """First parameters: N(0, std^2), the kernels that write to the stream / sqrt(2 layers) (GPT-2, section 2.3)."""
    x = jnp.zeros((1, 1), jnp.int32) if cfg.vocab else jnp.zeros((1, 1, cfg.width))
    return Transformer(cfg).init(key, x)["params"]


def apply(
    cfg: Config, params: Params, tokens_BT: Int[Array, "B T"], key: Key[Array, ""] | None = None
) -> Float[Array, "B T V"]:
    """Logits of the next token at every position. With a key, dropout is on.

    Raises ValueError where T > context, and for tokens that are not in the vocabulary where they are not traced.
    """
    _check_length(cfg, tokens_BT.shape[1])
    _check_tokens(cfg, tokens_BT)
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
    """-log p(token t+1 | tokens 0 .. t), nats, from T+1 tokens a row. With a key, dropout is on.

    Raises ValueError for tokens that are not in the vocabulary. Traced ones cannot be refused: they give NaN.
    """
    _check_tokens(cfg, tokens)
    wrong = (tokens < 0) | (tokens >= cfg.vocab)
    tokens = jnp.where(wrong, 0, tokens)  # a NaN here would reach all positions
    each = optax.softmax_cross_entropy_with_integer_labels(apply(cfg, params, tokens[:, :-1], key), tokens[:, 1:])
    return jnp.where(wrong[:, :-1] | wrong[:, 1:], jnp.nan, each)


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
    lengths: Whole | None = None,
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


def _whole(name: str, x: Whole, shape: tuple, low: int, high: int, words: str) -> Int[Array, "..."]:
    """x as int32 of this shape (None: any size). Refuses what is not, and values that lie outside.

    What is traced has no values to look at; of what is compiled, the caller keeps count.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
    try:  # a list that jit was given holds tracers
        x = x if isinstance(x, jax.Array) else jnp.asarray(x) if traced else np.asarray(x)
    except (ValueError, TypeError) as e:  # rows of unequal lengths
        raise ValueError(words) from e
    if x.ndim != len(shape) or any(size not in (None, got) for size, got in zip(shape, x.shape, strict=True)):
        raise ValueError(words)
    if not x.size:
        raise ValueError("the prompt is empty: a model continues at least one token")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} of a prompt are whole numbers, got {x.dtype}")
    if not traced and getattr(x, "is_fully_addressable", True):
        values = np.asarray(x)  # operations on x itself would be traced inside of jit
        if not low <= values.min() <= values.max() <= high:
            raise ValueError(f"{name} of a prompt lie in {low}..{high}, got {values.min()}..{values.max()}")
    return jnp.asarray(x, jnp.int32)


def _count(name: str, value: Any, least: int) -> int:
    """value, where it is a whole number that is known before anything compiles."""
    try:
        value = operator.index(value)
    except TypeError as e:
        raise ValueError(f"{name} must be a whole number, got {value!r:.40}") from e
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class _Asked(NamedTuple):
    """A prompt that was checked, and what to do with it."""

    prompt: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    new: int
    ngram: int  # 0: none can occur twice
    text: Int[Array, "B S"]  # columns of -1, the prompts, aligned on the right, and `new` columns of -1


def _ask(cfg: Config, prompt, lengths, max_new_tokens, max_length, ngram) -> _Asked:
    """Refuses what the model cannot do."""
    _check_length(cfg, 1)
    words = "a prompt is tokens [B, T], as Tokenizer.encode(text)[None] gives them"
    prompt = _whole("tokens", prompt, (None, None), 0, cfg.vocab - 1, words)
    B, T = prompt.shape
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError("say either max_new_tokens or max_length, which counts the prompt too")
    if max_length is None:
        new = _count("max_new_tokens", max_new_tokens, 1)
    elif (new := _count("max_length", max_length, 1) - T) < 1:
        raise ValueError(f"max_length {max_length} leaves no new token after a prompt of {T}")
    if T + new - 1 > cfg.context:  # the last new token takes no position: nothing follows it
        most = f", or ask for at most {cfg.context - T + 1}" if T <= cfg.context else ""
        raise ValueError(
            f"a prompt of {T} tokens and {new} new ones exceed the context of {cfg.context}: cut the prompt{most}"
        )
    lengths = np.full(B, T) if lengths is None else lengths
    lengths = _whole("lengths", lengths, (B,), 1, T, f"lengths are one number for each of {B} prompts")
    ngram = _count("no_repeat_ngram_size", ngram, 0)
    ngram = ngram if ngram < T + new else 0
    at = jnp.arange(T)[None] - T + lengths[:, None]
    text = jnp.where(at < 0, -1, jnp.take_along_axis(prompt, jnp.maximum(at, 0), 1))
    text = jnp.pad(text, ((0, 0), (max(0, ngram - 1), new)), constant_values=-1)
    return _Asked(prompt, lengths, new, ngram, text)


def _stops(cfg: Config, stop: Any) -> Int[Array, "E"]:
    """The tokens that end a text."""
    stop = cfg.eos if stop is None else stop
    return jnp.asarray(() if stop is None else stop, jnp.int32).reshape(-1)


def _read(cfg: Config, params: Params, asked: _Asked, copies: int) -> tuple[Float[Array, "Bn V"], Cache]:
    """One prefill a prompt, then a copy of its logits and its cache for each text that continues it."""
    slots = asked.prompt.shape[1] + asked.new - 1
    logits, cache = prefill(cfg, params, asked.prompt, asked.lengths, slots=slots)
    several = cache._replace(at=jnp.zeros(len(logits)))
    logits, several = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), (logits, several))
    return logits, several._replace(at=cache.at)


def generate(
    cfg: Config,
    params: Params,
    prompt: Whole,
    key: Key[Array, ""],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    sampling: Sampling = Sampling(),
    lengths: Whole | None = None,
    n: int = 1,
    no_repeat_ngram_size: int = 0,
) -> Int[Array, "Bn N"]:
    """Continuations of each prompt [B, T], n in a row for each, from a cache that is laid out once.

        jax.jit(partial(transformer.generate, cfg, max_new_tokens=100))(params, prompt, key, sampling=Sampling(.8))

    The numbers in `sampling` are traced: another temperature does not compile again. The law of a token is that of
    `transformers`: penalties for repetition first, then temperature, top_k, top_p and min_p in turn.

    max_length: of prompt and continuation together, T included, in place of max_new_tokens.
    lengths: of prompts that are unequal, 1 to T; they are filled up on the right with any token.
    no_repeat_ngram_size: no run of so many tokens occurs twice in prompt and continuation; 0: they may. Where all
        tokens are forbidden, the token is 0.

    After a stop token come only stop tokens, and the loop ends where all rows have one. Stop tokens are
    `sampling.stop`, else `cfg.eos`; those beyond the vocabulary never occur. Where logits are NaN, which means damaged
    weights, the token is -1.

    Raises ValueError where prompt and continuation exceed the context by more than the last token, which takes no
    position; for a prompt that is empty or holds other than whole numbers; and, where they are not traced, for tokens
    beyond the vocabulary and lengths beyond T.
    """
    asked, n = _ask(cfg, prompt, lengths, max_new_tokens, max_length, no_repeat_ngram_size), _count("n", n, 1)
    stop, new = _stops(cfg, sampling.stop), asked.new
    logits, cache = _read(cfg, params, asked, n)
    text = jnp.repeat(asked.text, n, axis=0)
    used = occurred(text, cfg.vocab)
    rows, begin = jnp.arange(len(text)), text.shape[1] - new

    def choose(i, logits, used, done, last, text):
        logits = ban_repeats(penalise(logits, used, sampling.repetition), text, begin + i, asked.ngram)
        token = jnp.where(done, last, draw(logits, jax.random.fold_in(key, i), sampling))
        done = done | (token[:, None] == stop[None]).any(-1)
        return token, used.at[rows, token].set(True), done, text.at[:, begin + i].set(token)

    def more(carry):
        i, _, _, _, done, _ = carry
        return (i < new) & ~done.all()

    def one(carry):
        i, token, cache, used, done, text = carry
        logits, cache = decode(cfg, params, token, cache)
        token, used, done, text = choose(i, logits, used, done, token, text)
        return i + 1, token, cache, used, done, text

    token, used, done, text = choose(0, logits, used, jnp.zeros(len(text), bool), jnp.zeros(len(text), jnp.int32), text)
    i, last, *_, text = jax.lax.while_loop(more, one, (jnp.array(1), token, cache, used, done, text))
    return jnp.where(jnp.arange(new)[None] < i, text[:, begin:], last[:, None])


def beam_search(
    cfg: Config,
    params: Params,
    prompt: Whole,
    key: Key[Array, ""] | None = None,
    *,
    beams: int,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    lengths: Whole | None = None,
    stop: Any = None,
    length_penalty: Any = 1.0,
    early_stopping: bool | str = False,
    no_repeat_ngram_size: int = 0,
    sampling: Sampling = Sampling(),
) -> tuple[Int[Array, "B M N"], Float[Array, "B M"]]:
    """The M = `beams` best continuations found of each prompt [B, T], best first, and their scores.

    The score is log p / length**length_penalty, nats, over new tokens with their stop token: tokens and scores are
    those of `transformers`. length_penalty 0 scores by log p. A text that ended is filled up with its stop token.

    early_stopping: when a prompt is done, once M texts ended. True: at once. False: when the likeliest beam, ended now,
        would score no better than the worst of them. "never": when it could not at any length.
    key: with one, `sampling` draws the beams (beam sampling): from the filtered log p of all together, without
        replacement. Without one only its repetition and stop count.
    stop: tokens that end a text, else those of `sampling.stop`, else `cfg.eos`; their number is static.
    max_length, lengths, no_repeat_ngram_size: as in `generate`.

    Where fewer than M texts exist, the rest have score -inf and tokens -1. Where logits are NaN, scores are NaN and
    tokens -1. Raises ValueError where beams exceed the vocabulary, and where `generate` does.
    """
    asked = _ask(cfg, prompt, lengths, max_new_tokens, max_length, no_repeat_ngram_size)
    if not 1 <= _count("beams", beams, 1) <= cfg.vocab:
        raise ValueError(f"beams must lie in 1..{cfg.vocab}, got {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}')
    early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
    if isinstance(length_penalty, (int, float)) and not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    logits, cache = _read(cfg, params, asked, beams)

    def step(cache, rows, token):
        return decode(cfg, params, token, cache._replace(kv=jax.tree.map(lambda x: x[rows], cache.kv)))

    stops = _stops(cfg, sampling.stop if stop is None else stop)
    text = jnp.repeat(asked.text[:, None], beams, axis=1)
    rules = Rules(asked.new, stops, length_penalty, early_stopping, asked.ngram, sampling)
    return search(logits, cache, step, text, key, rules)


# ---------------------------------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """The transformer as a Family, on batches `tokens` [B, T+1] with an optional `mask` [B, T] of what counts.

    evaluate: `nll_nats`, a sum over the row, and `tokens`, how many it is over.
    sample(state, key, *, n, prompt=None, max_new_tokens=None, max_length=None, sampling=Sampling(),
        no_repeat_ngram_size=0): tokens [n, N] after those of a prompt, as `generate` draws them. One prompt, [T] or
        [1, T], is continued n times, prompts [n, T] once each; without a prompt, token 0 is continued. By default the
        context is filled.
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
        return jnp.where(mask > 0, each * mask, 0.0).sum() / jnp.maximum(count, 1.0), (state.extra, {"weight": count})

    def evaluate(state, batch, key):
        mask = counted(batch)
        each = jnp.where(mask > 0, nll(cfg, ema.read(state), batch["tokens"]) * mask, 0.0)
        return {"nll_nats": each.sum(-1), "tokens": mask.sum(-1)}

    def sample(
        state: State, key, *, n: int, prompt=None, max_new_tokens=None, max_length=None, sampling=Sampling(),
        no_repeat_ngram_size=0,
    ):  # fmt: skip
        prompt = [0] if prompt is None else prompt
        prompt = prompt if isinstance(prompt, jax.Array) else np.asarray(prompt)
        prompt = prompt[None] if prompt.ndim == 1 else prompt
        if prompt.ndim != 2 or len(prompt) not in (1, n):
            raise ValueError(f"a prompt is tokens [T], [1, T] or [n, T] with n = {n}, got {list(prompt.shape)}")
        if max_new_tokens is None and max_length is None:
            max_new_tokens = max(1, cfg.context - prompt.shape[1])
        return generate(
            cfg, ema.read(state), prompt, key, max_new_tokens=max_new_tokens, max_length=max_length, sampling=sampling,
            n=n if len(prompt) == 1 else 1, no_repeat_ngram_size=no_repeat_ngram_size,
        )  # fmt: skip

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init_state, step, evaluate, sample)
