"""The two nets of a contrastive model, and how they are applied."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from ..core import floats
from ..nn import Decoder, ResNet
from .config import Config

Params = dict[str, Any]  # {"text": ..., "image": ..., "log_scale": []}; sigmoid: also "bias" []
Tokens = Int[Array | np.ndarray, "B L"]  # 0 is padding
ImageLike = Shaped[Array | np.ndarray, "B H W C"]  # floats in [0, 1]
Features = Float[Array | np.ndarray, "B D"]

LARGEST_SCALE = 100.0  # CLIP, section 2.5


class Sequence(NamedTuple):
    """The features of every token of a caption, before pooling: what cross-attention reads."""

    features: Float[Array, "B T E"]  # T = 1 + L: the start token, then the caption
    mask: Bool[Array, "B T"]  # True where there is a token; always True at the start token


def unit(x: Float[Array | np.ndarray, "*B D"]) -> Float[Array, "*B D"]:
    """Returns x / |x| over the last axis, in float32 or more.

    The zero vector stays 0. Its gradient is finite there: 1e6, which float16 cannot hold.
    """
    x = _at_least_float32(jnp.asarray(x))
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


def _dtype(cfg: Config):
    return jnp.bfloat16 if cfg.bfloat16 else jnp.float32


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class TextEncoder(nn.Module):
    """Tokens [B, L] -> a `Sequence` and the features [B, D] before they are normalised.

    A start token is put before the caption. So an empty caption has features, too. Every token sees
    every other token but no padding. The last features are averaged over the tokens.
    """

    cfg: Config

    @nn.compact
    def __call__(self, tokens):
        cfg, text, dtype = self.cfg, self.cfg.text, _dtype(self.cfg)
        (B, L), E = tokens.shape, text.width
        normal = nn.initializers.normal(0.02)
        words = nn.Embed(text.vocab, E, embedding_init=normal, dtype=dtype, name="words")(tokens)
        start = self.param("start", normal, (1, 1, E), jnp.float32).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(start, (B, 1, E)), words], 1)
        mask = jnp.concatenate([jnp.ones((B, 1), bool), tokens != 0], 1)
        positions = jnp.broadcast_to(jnp.arange(1 + L)[None], mask.shape)
        trunk = Decoder(
            text.layers,
            text.heads,
            E,
            4 * E,
            context=1 + text.context,
            dtype=dtype,
            remat=cfg.remat,
            name="trunk",
        )
        everyone = jnp.broadcast_to(mask[:, None], (B, 1 + L, 1 + L))
        x = _at_least_float32(trunk(x, everyone, positions)[0])
        x = jnp.where(mask[..., None], x, 0)
        pooled = x.sum(1) / mask.sum(1, keepdims=True)
        return Sequence(x, mask), nn.Dense(cfg.dim, use_bias=False, name="out")(pooled)


class ImageEncoder(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> features [B, D] before they are normalised."""

    cfg: Config

    @nn.compact
    def __call__(self, x):
        image, options = self.cfg.image, {"dtype": _dtype(self.cfg), "remat": self.cfg.remat}
        trunk = ResNet(image.widths, image.blocks, image.groups, **options, name="trunk")
        h = trunk(2 * x - 1)
        return nn.Dense(self.cfg.dim, use_bias=False, name="out")(h.reshape(len(h), -1))


def init(cfg: Config, key: Key[Array, ""]) -> Params:
    """Returns the initial parameters."""
    k_text, k_image = jax.random.split(key)
    first = {"info_nce": 1 / 0.07, "sigmoid": 10.0}[cfg.loss] if cfg.scale is None else cfg.scale
    params = {
        "text": TextEncoder(cfg).init(k_text, jnp.ones((1, cfg.text.context), jnp.int32)),
        "image": ImageEncoder(cfg).init(k_image, jnp.zeros((1, *cfg.shape), jnp.float32)),
        "log_scale": jnp.array(math.log(first), jnp.float32),
    }
    if cfg.loss == "sigmoid":
        params["bias"] = jnp.array(cfg.bias, jnp.float32)
    return params


def check_tokens(cfg: Config, tokens) -> Int[Array, "B L"]:
    """Returns tokens [B, L]. Raises ValueError for what the text net cannot read."""
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"tokens must be whole numbers [B, L], got {got}")
    if tokens.shape[1] > cfg.text.context:
        most = f"model.text.context is {cfg.text.context}"
        raise ValueError(f"{most}, the captions have {tokens.shape[1]} tokens")
    if tokens.size and not isinstance(tokens, jax.core.Tracer):
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= cfg.text.vocab:
            raise ValueError(f"tokens must lie in 0..{cfg.text.vocab - 1}, got {low}..{high}")
    return jnp.asarray(tokens)


def encode_text(cfg: Config, params: Params, tokens: Tokens) -> Features:
    """Returns the features of captions, of length 1. Padding changes nothing.

    Raises ValueError for captions longer than the context and, unless traced, for tokens outside
    0..vocab-1.
    """
    return unit(TextEncoder(cfg).apply(params["text"], check_tokens(cfg, tokens))[1])


def encode_text_sequence(cfg: Config, params: Params, tokens: Tokens) -> Sequence:
    """Returns the features [B, 1 + L, width] of every token, and their mask [B, 1 + L].

    The first is the start token, which even an empty caption has. Features of padding are 0.
    Raises as `encode_text` does.
    """
    return TextEncoder(cfg).apply(params["text"], check_tokens(cfg, tokens))[0]


def encode_image(cfg: Config, params: Params, image: ImageLike) -> Features:
    """Returns the features of images in [0, 1], of length 1.

    Raises ValueError for whole-number pixels and, unless traced, for values outside [0, 1].
    """
    x = _at_least_float32(jnp.asarray(floats("image", image, within=(0, 1))))
    return unit(ImageEncoder(cfg).apply(params["image"], x))


def logit_scale(params: Params) -> Float[Array, ""]:
    """Returns the factor of the cosines, 1 / temperature. Training keeps it at most 100."""
    return jnp.exp(params["log_scale"])


def zero_shot(images: Features, class_texts: Float[Array | np.ndarray, "K D"]) -> Int[Array, "B"]:
    """Returns the class whose text is most similar to each image (CLIP, section 3.1).

    Takes features of length 1. For several texts per class, pass `unit` of their mean.
    """
    return jnp.argmax(jnp.asarray(images) @ jnp.asarray(class_texts).T, -1)
