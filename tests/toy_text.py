"""The contract's row for transformers until the family is built: a character model on crops, with micro-batches."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from aigc_jax.core import EMA, Family, Optim, make_step, start
from aigc_jax.data import Data, Info

V, WIDTH, CONTEXT = 12, 16, 8


@dataclass(frozen=True)
class Config:
    ema: float = 0.0
    micro: int = 2
    optim: Optim = Optim(lr=1e-2, weight_decay=0.1, decay=100)


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(V, WIDTH)(tokens) + nn.Embed(CONTEXT, WIDTH)(jnp.arange(tokens.shape[1]))[None]
        q, k, v = jnp.split(nn.Dense(3 * WIDTH)(h), 3, -1)
        seen = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
        weights = nn.softmax(jnp.where(seen[None], jnp.einsum("bqd,bkd->bqk", q, k), -1e9))
        return nn.Dense(V)(nn.LayerNorm()(h + jnp.einsum("bqk,bkd->bqd", weights, v)))


def crops(seed=0):
    """Random crops of a fixed string, from the device: rows say where they begin."""
    text = np.random.default_rng(seed).integers(0, V, 500).astype(np.int32)

    def rows(seed, i, size):
        return np.random.default_rng([seed, i]).integers(0, len(text) - CONTEXT, size).astype(np.int32)

    def take(arrays, rows):
        return {"tokens": arrays["text"][rows[:, None] + np.arange(CONTEXT + 1)[None]]}

    info = Info(kind="text", shape=(CONTEXT + 1,), classes=None, fingerprint="crops")
    return Data(info, lambda *at: take({"text": text}, rows(*at)), ({"text": text}, rows, take))


def make(cfg, *, axis_name=None):
    net, ema = Net(), EMA(cfg.ema)

    def init(key):
        return start(net.init(key, jnp.zeros((1, CONTEXT), jnp.int32)), cfg.optim, ema=ema)

    def nll(params, tokens):
        logits = net.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def loss(params, state, batch, key):
        return nll(params, batch["tokens"]).mean(), (state.extra, {})

    def evaluate(state, batch, key):
        each = nll(ema.read(state), batch["tokens"])
        return {"nll_nats": each.sum(-1), "tokens": jnp.full(len(each), each.shape[1], jnp.float32)}

    def sample(state, key, *, n):
        def one(tokens, i):
            logits = net.apply(ema.read(state), tokens)[:, i]
            return tokens.at[:, i + 1].set(jax.random.categorical(jax.random.fold_in(key, i), logits)), None

        return jax.lax.scan(one, jnp.zeros((n, CONTEXT), jnp.int32), jnp.arange(CONTEXT - 1))[0]

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample)
