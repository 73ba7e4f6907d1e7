"""A transformer that predicts the tokens of `tokens.py`, and its Family: Shi et al. 2024 ("MD4").

The network is the decoder's, but looks both ways, and knows one token more: the mask. For the
process "absorbing" it gets no time, because the posterior of a masked token does not depend on it
(Sahoo et al. 2024, "MDLM"). For "uniform" a vector of the time is added to every token's. So the
nets of both processes are equally large but for the time's two layers. The network of "uniform"
predicts what D3PM's does: log q(x_t | x_0) is added to its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

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
from ..nn import Decoder, sharding
from ..nn.embeddings import Condition
from .samplers import guide
from .tokens import LogitsFn, log_evidence, masked_cross_entropy, sample_tokens, token_vlb

Params = Any


@dataclass(frozen=True)
class TokenConfig:
    """A diffusion model of texts. The default net is as large as the smallest GPT-2."""

    vocab: int = 27  # V, without the mask token
    context: int = 256  # largest number of tokens, L
    process: Literal["absorbing", "uniform"] = "absorbing"
    schedule: Literal["linear", "cosine"] = "linear"
    steps: int | None = None  # T of the bound; None: continuous time
    # Training loss. "flat": the bound without its weight (`masked_cross_entropy`). None: "bound".
    weighting: Literal["bound", "flat"] | None = None
    terms: int = 4  # times t per text that `evaluate` draws
    # Share of the texts that train without their given tokens (batch "mask" 0), for guidance.
    unlabelled: float = 0.0
    layers: int = 12
    heads: int = 12
    width: int = 768
    positions: Literal["learned", "rotary"] = "rotary"
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    # Of the initial kernels; None: 0.02. Kernels whose output is added to the stream have
    # std / sqrt(2 layers).
    std: float | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] = False
    scan: bool | None = None  # blocks as one lax.scan: compiles in the time of one
    ema: float = 0.0
    micro: int = 1
    optim: Optimizer = Optim(lr=5e-4, b2=0.98, weight_decay=0.03, clip=1.0, warmup=100)

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 1, "vocab", "context", "terms", "layers", "heads", "width", "micro")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"model.steps must be at least 1 or None, got {self.steps}")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} does not divide into {self.heads} heads")
        if self.positions == "rotary" and self.width // self.heads % 2:
            head = self.width // self.heads
            raise ValueError(f"rotary positions need heads of even width, got {head}")
        if self.std is not None and not self.std > 0:
            raise ValueError(f"model.std must be positive, got {self.std}")
        if self.weighting == "flat" and (self.process != "absorbing" or self.steps is not None):
            asked = f"process {self.process!r} and steps {self.steps}"
            raise ValueError(f"weighting 'flat' needs process absorbing, steps None; got {asked}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        if not 0 <= self.unlabelled < 1:
            raise ValueError(f"model.unlabelled must lie in [0, 1), got {self.unlabelled}")
        EMA(self.ema)

    def check(self, info) -> None:
        """Raises ValueError for data (a `data.Info`) that are no texts of this size."""
        check_text(self, info)
        if info.shape[0] > self.context:
            raise ValueError(
                f"model.context is {self.context}, the data's texts have {info.shape[0]} tokens: "
                "set model.context to at least that, or shorten the data"
            )


# --------------------------------------------------------------------------------- the network


class TokenNet(nn.Module):
    """x_t [B, L] of tokens 0 .. V, V is the mask; t [B] in 0 .. 1 -> logits [B, L, V], float32."""

    cfg: TokenConfig

    @nn.compact
    def __call__(self, x_t, t):
        cfg, (B, L) = self.cfg, x_t.shape
        std = 0.02 if cfg.std is None else cfg.std
        dtype, normal = jnp.dtype(cfg.dtype), nn.initializers.normal(std)
        wte = nn.Embed(cfg.vocab + 1, cfg.width, embedding_init=normal, dtype=dtype, name="wte")
        trunk = Decoder(
            layers=cfg.layers,
            heads=cfg.heads,
            width=cfg.width,
            hidden=4 * cfg.width,
            context=cfg.context if cfg.positions == "learned" else 0,
            rotary=cfg.positions == "rotary",
            norm=cfg.norm,
            activation=cfg.activation,
            dropout=cfg.dropout,
            std=std,
            dtype=dtype,
            remat=cfg.remat,
            scan=bool(cfg.scan),
            name="trunk",
        )
        h = wte(x_t)
        if cfg.process == "uniform":
            h += Condition(cfg.width, 256, 0, dtype, name="time")(1000 * t, None)[:, None]
        everywhere = jnp.ones((1, L, L), bool)
        positions = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
        h, _ = trunk(h, everywhere, positions)
        return nn.Dense(cfg.vocab, kernel_init=normal, dtype=dtype, name="head")(h).astype(
            jnp.float32
        )


def init_tokens(cfg: TokenConfig, key: Key[Array, ""]) -> Params:
    """Returns first parameters of the network."""
    x_t, t = jnp.zeros((1, cfg.context), jnp.int32), jnp.zeros(1, jnp.float32)
    return TokenNet(cfg).init(key, x_t, t)["params"]


def token_logits_fn(
    cfg: TokenConfig,
    params: Params,
    key: Key[Array, ""] | None = None,
    *,
    w: Any = 0.0,
    given: Any = None,
) -> LogitsFn:
    """Returns logits_fn(x_t, t) of the network. With a key, dropout is on.

    w: weight of guidance by the given tokens. log p is (1 + w) log p(with them) - w log p(without),
    up to a constant. given [B, L]: True at these tokens.
    """
    rngs = None if key is None else {"dropout": key}

    def logits_fn(x_t, t):
        logits = TokenNet(cfg).apply({"params": params}, x_t, t, rngs=rngs)
        if cfg.process == "uniform":
            logits += log_evidence(x_t, t, vocab=cfg.vocab, schedule=cfg.schedule)
        return logits

    def guided(x_t, t):
        blind = jnp.where(given, cfg.vocab, x_t)
        both = (jax.nn.log_softmax(logits_fn(x, t)) for x in (x_t, blind))
        return guide(*both, w)

    return logits_fn if given is None else guided


# ------------------------------------------------------------------------- training and evaluation


def counted(batch: dict) -> Float[Array, "B L"]:
    """Returns 1 for tokens that the model has to predict and 0 for given ones, such as a title.

    batch "mask" is that of the targets tokens[:, 1:]. The first token counts like its neighbour.
    """
    mask = target_mask(batch).astype(jnp.float32)
    return jnp.concatenate([mask[:, :1], mask], 1)


def token_loss(cfg: TokenConfig, params: Params, state: State, batch: dict, key):
    """Returns the loss in nats per counted token, from one t per text, and (extra, metrics).

    Some texts train without their given tokens: there, these are masked.
    """
    k_bound, k_drop, k_blind = jax.random.split(key, 3)
    tokens, mask = batch["tokens"], counted(batch)
    logits_fn = token_logits_fn(cfg, params, k_drop if cfg.dropout else None)
    if cfg.unlabelled:
        blind = jax.random.bernoulli(k_blind, cfg.unlabelled, (len(tokens), 1)) & (mask == 0)
        seeing = logits_fn

        def logits_fn(x_t, t):
            return seeing(jnp.where(blind, cfg.vocab, x_t), t)

    over = {"mask": mask, "schedule": cfg.schedule}
    if cfg.weighting == "flat":
        nats = masked_cross_entropy(logits_fn, tokens, k_bound, **over)
    else:
        nats = token_vlb(cfg.process, logits_fn, tokens, k_bound, steps=cfg.steps, **over)
    count = mask.sum()
    return nats.sum() / jnp.maximum(count, 1.0), (state.extra, {"weight": count})


def evaluate_tokens(cfg: TokenConfig, state: State, batch: dict, key) -> dict[str, Array]:
    """Returns `nll_nats` [B], an upper bound on -log p of each text, and `tokens` [B].

    `tokens` is how many of a text's tokens count. The first token is given, as it
    is for an autoregressive model of the same batch.
    """
    mask = counted(batch).at[:, 0].set(0.0)
    nats = token_vlb(
        cfg.process,
        token_logits_fn(cfg, EMA(cfg.ema).read(state)),
        batch["tokens"],
        key,
        steps=cfg.steps,
        mask=mask,
        schedule=cfg.schedule,
        terms=cfg.terms,
    )
    return {"nll_nats": nats, "tokens": mask.sum(-1)}


def sample_texts(
    cfg: TokenConfig,
    state: State,
    key,
    *,
    n: int,
    known: Any = None,
    length: int | None = None,
    steps: int | None = None,
    temperature: Any = 1.0,
    order: str = "random",
    block: int = 0,
    w: Any = 0.0,
) -> Array:
    """Returns n texts [n, L], as `sample_tokens` draws them.

    known: [L] or [n, L], -1 where free. length: L, by default that of known, else cfg.context.
    steps: by default one per token. w: guidance by the known tokens.
    """
    if known is not None:
        known = jnp.asarray(known)
        length = known.shape[-1] if length is None else length
    length = cfg.context if length is None else length
    if not 1 <= length <= cfg.context:
        raise ValueError(f"a text must have 1..{cfg.context} tokens, got {length}")
    given = None
    if not (isinstance(w, (int, float)) and w == 0):
        if known is None:
            raise ValueError("w guides by known tokens, and there are none")
        if not cfg.unlabelled:
            raise ValueError("w needs a model with unlabelled > 0, this one has never been blind")
        given = jnp.broadcast_to(known >= 0, (n, length))
    return sample_tokens(
        cfg.process,
        token_logits_fn(cfg, EMA(cfg.ema).read(state), w=w, given=given),
        key,
        shape=(n, length),
        vocab=cfg.vocab,
        steps=length if steps is None else steps,
        temperature=temperature,
        known=known,
        schedule=cfg.schedule,
        order=order,
        block=block,
    )


def make_tokens(cfg: TokenConfig, *, axis_name: str | None = None) -> Family:
    """Returns the diffusion of tokens as a Family, for the batches of the transformer.

    Batches hold `tokens` [B, L], and optionally `mask` [B, L-1], 1 for targets that count, else 0.
    Tokens that do not count are given. evaluate: see `evaluate_tokens`. sample: see `sample_texts`.
    """
    ema = EMA(cfg.ema)

    def init(key):
        return start(init_tokens(cfg, key), cfg.optim, ema=ema)

    loss = partial(token_loss, cfg)
    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    sample = partial(sample_texts, cfg)
    return Family(init, step, partial(evaluate_tokens, cfg), sample, sharding.TRANSFORMER)
