"""Decoder-only transformers: GPT-2 (Radford et al. 2019), and what has changed in them since.

model.py       Config, the module, logits, attention weights, nll
sampling.py    from logits to a token
generation.py  the cache, `generate`, `beam_search`
beams.py       beam search over any next-token function
gpt2.py        GPT-2's weights, in the layout of Hugging Face

Below: the loss, evaluation and sampling on batches, and `make`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..core import EMA, Family, State, make_step, start, target_mask
from ..nn import sharding
from .generation import Cache, beam_search, decode, generate, prefill
from .gpt2 import load_gpt2, save_gpt2
from .model import Config, Params, Transformer, apply, attention, backbone, init, nll
from .sampling import (
    Sampling,
    ban_repeats,
    draw,
    filter_logits,
    occurred,
    penalise,
    sample_token,
)

__all__ = [
    "Cache",
    "Config",
    "Sampling",
    "Transformer",
    "apply",
    "attention",
    "backbone",
    "ban_repeats",
    "beam_search",
    "decode",
    "draw",
    "filter_logits",
    "generate",
    "init",
    "load_gpt2",
    "make",
    "nll",
    "occurred",
    "penalise",
    "prefill",
    "sample_token",
    "save_gpt2",
]


def loss(cfg: Config, params: Params, state: State, batch: dict, key) -> tuple[Array, tuple]:
    """Returns the mean nll in nats over the targets that count, and (extra, metrics)."""
    each = nll(cfg, params, batch["tokens"], key if cfg.dropout else None)
    mask = target_mask(batch)
    count = mask.sum()
    total = jnp.where(mask > 0, each * mask, 0.0).sum()
    return total / jnp.maximum(count, 1.0), (state.extra, {"weight": count})


def evaluate(cfg: Config, state: State, batch: dict, key) -> dict[str, Array]:
    """Returns `nll_nats` [B], summed over each row, and `tokens` [B], the number of its targets."""
    params, mask = EMA(cfg.ema).read(state), target_mask(batch)
    each = jnp.where(mask > 0, nll(cfg, params, batch["tokens"]) * mask, 0.0)
    return {"nll_nats": each.sum(-1), "tokens": mask.sum(-1)}


def sample(
    cfg: Config,
    state: State,
    key,
    *,
    n: int,
    prompt: Any = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    sampling: Sampling = Sampling(),
    no_repeat_ngram_size: int = 0,
) -> Array:
    """Returns n continuations [n, N], without their prompts, as `generate` samples them.

    prompt: [T] or [1, T], continued n times; or [n, T], continued once each; by default token 0.
    By default the continuation fills the context.
    """
    prompt = [0] if prompt is None else prompt
    prompt = prompt if isinstance(prompt, jax.Array) else np.asarray(prompt)
    prompt = prompt[None] if prompt.ndim == 1 else prompt
    if prompt.ndim != 2 or len(prompt) not in (1, n):
        got = list(prompt.shape)
        raise ValueError(f"a prompt is tokens [T], [1, T] or [n, T] with n = {n}, got {got}")
    if max_new_tokens is None and max_length is None:
        max_new_tokens = max(1, cfg.context - prompt.shape[1])
    return generate(
        cfg,
        EMA(cfg.ema).read(state),
        prompt,
        key,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        sampling=sampling,
        n=n if len(prompt) == 1 else 1,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """Returns the transformer as a Family.

    Batches hold `tokens` [B, T+1], and optionally `mask` [B, T], 1 for targets that count, else 0.
    The family's functions are `loss` (inside its step), `evaluate` and `sample`, bound to cfg.
    """
    ema = EMA(cfg.ema)

    def init_state(key):
        return start(init(cfg, key), cfg.optim, ema=ema)

    step = make_step(partial(loss, cfg), cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    rules = sharding.TRANSFORMER
    return Family(init_state, step, partial(evaluate, cfg), partial(sample, cfg), rules)
