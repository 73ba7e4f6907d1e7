"""Contrastive models of pictures and captions: CLIP (Radford et al. 2021) and SigLIP.

A text net and an image net map a caption and a picture to vectors of length 1. For a batch of K
pairs, training makes the K true pairs more similar than the others (the negatives). Cosines are
multiplied by a learned logit scale, 1 / temperature.

    info_nce: -log softmax of the true pair, among the K captions of a picture and among the K
        pictures of a caption; the mean of the two (CLIP, figure 3)
    sigmoid: each of the K^2 pairs is classified on its own (Zhai et al. 2023, "SigLIP")

ln K minus the mean InfoNCE loss is a lower bound of the mutual information, in nats (van den Oord
et al. 2018, "CPC"). It cannot exceed ln K.

Images are floats in [0, 1]. Only `preprocess` takes whole-number pixels. Token 0 is padding.

    family = make(Config(shape=(32, 32, 3), text=TextConfig(vocab=1000)))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, {"image": images, "tokens": captions}, step_key)
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ..core import EMA, Family, Optim, State, descend, finish, pixels, shard_rows, start
from .config import Config, ImageConfig, TextConfig
from .nets import (
    LARGEST_SCALE,
    Features,
    ImageEncoder,
    Params,
    Sequence,
    TextEncoder,
    check_tokens,
    encode_image,
    encode_text,
    encode_text_sequence,
    init,
    logit_scale,
    unit,
    zero_shot,
)

__all__ = [
    "Config",
    "ImageConfig",
    "ImageEncoder",
    "Optim",
    "Sequence",
    "TextConfig",
    "TextEncoder",
    "encode_image",
    "encode_text",
    "encode_text_sequence",
    "info_nce",
    "logit_scale",
    "make",
    "nce",
    "preprocess",
    "sigmoid_loss",
    "unit",
    "zero_shot",
]

Nats = Float[Array, "B"]
Critic = Float[Array | np.ndarray, "B K"]  # row i compares example i with all K examples
Pairs = (
    Bool[Array | np.ndarray, "B K"] | None
)  # True where example j is a negative of example i; None: all are

# ----------------------------------------------------------------------------------------- losses


def _diagonal(B: int, K: int, axis_name: str | None) -> tuple[Int[Array, "B"], Bool[Array, "B K"]]:
    """Returns the column of each row's true pair, [B], and where the true pairs are, [B, K]."""
    first = 0 if axis_name is None else B * jax.lax.axis_index(axis_name)
    column = first + jnp.arange(B)
    return column, column[:, None] == jnp.arange(K)[None]


def _gathered(x: Array, axis_name: str | None) -> Array:
    """Returns the rows of all devices, in order. Gradients flow back to the device of each row."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def nce(critic: Critic, *, negatives: Pairs = None, axis_name: str | None = None) -> Nats:
    """Returns -log softmax(critic[i])[i] for each row i (CPC, eq. 4).

    critic: any real values, large where a pair belongs together. The true pairs are the diagonal.
    negatives: False where a pair does not count. A true pair always counts.
    axis_name: the per-device view. The rows are those of one device, the columns those of all.

    log K - nce(critic).mean() is at most the mutual information in expectation, for every critic.
    It is tight for critic = log p(y|x) / p(y) as K grows.
    """
    critic = jnp.asarray(critic)
    column, true = _diagonal(*critic.shape, axis_name)
    own = jnp.take_along_axis(critic, column[:, None], 1)[:, 0]
    if negatives is not None:
        critic = jnp.where(negatives | true, critic, -jnp.inf)
    return jax.nn.logsumexp(critic, 1) - own


def info_nce(
    a: Features,
    b: Features,
    scale,
    *,
    negatives: Pairs = None,
    axis_name: str | None = None,
) -> Nats:
    """Returns the symmetric InfoNCE loss of each pair (a_i, b_i) in nats (CLIP, figure 3).

    The mean of `nce(scale * a b^T)` and `nce(scale * b a^T)`. If all features are equal, this is
    log K. `negatives` must be symmetric; `axis_name` is as in `nce`.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    options = {"negatives": negatives, "axis_name": axis_name}
    from_a = nce(scale * a @ _gathered(b, axis_name).T, **options)
    from_b = nce(scale * b @ _gathered(a, axis_name).T, **options)
    return (from_a + from_b) / 2


def sigmoid_loss(
    a: Features,
    b: Features,
    scale,
    bias,
    *,
    negatives: Pairs = None,
    axis_name: str | None = None,
) -> Nats:
    """Returns sum_j -log sigmoid(z_ij (scale a_i.b_j + bias)) for each i (SigLIP, algorithm 1).

    The paper's eq. 1 has the bias with the other sign; its algorithm 1 adds it, as here. z_ij is 1
    for true pairs and -1 for negatives. `negatives` and `axis_name` are as in `nce`.
    """
    logits = scale * jnp.asarray(a) @ _gathered(jnp.asarray(b), axis_name).T + bias
    _, true = _diagonal(*logits.shape, axis_name)
    nats = jnp.logaddexp(0.0, jnp.where(true, -logits, logits))
    if negatives is not None:
        nats = jnp.where(negatives | true, nats, 0)
    return nats.sum(1)


# --------------------------------------------------------------------- pictures, captions, training


def _shifted(x: Float[Array, "B H W C"], most: int, key) -> Float[Array, "B H W C"]:
    """Moves each image by -most..most pixels along both axes. Border pixels are repeated."""
    corners = shard_rows(jax.random.randint(key, (len(x), 2), 0, 2 * most + 1))
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), x.shape[1:])

    return jax.vmap(cut)(padded, corners)


def preprocess(cfg: Config, batch: dict, key: Key[Array, ""] | None = None):
    """Returns a batch's pixels 0..levels-1 as floats in [0, 1]: moved as in training, given a key.

    Raises ValueError for pixels that are floats, or beyond levels - 1.
    """
    x = pixels(batch["image"], cfg.levels) / (cfg.levels - 1)
    return x if key is None or not cfg.image.shift else _shifted(x, cfg.image.shift, key)


def _different(tokens: Int[Array, "B L"], axis_name: str | None) -> Bool[Array, "B K"]:
    """Returns where two captions differ."""
    everyone = _gathered(tokens, axis_name)
    return (tokens[:, None] != everyone[None]).any(-1)


def _compare(cfg: Config, params: Params, batch: dict, key, axis_name: str | None):
    """Returns the loss of each pair, and whether each picture and caption finds its partner."""
    if missing := [name for name in ("image", "tokens") if name not in batch]:
        got = ", ".join(batch)
        raise ValueError(f"a contrastive model needs {missing[0]} in a batch, got {got}")
    tokens = check_tokens(cfg, batch["tokens"])
    a = encode_image(cfg, params, preprocess(cfg, batch, key))
    b = encode_text(cfg, params, tokens)
    scale = logit_scale(params)
    options = {"negatives": _different(tokens, axis_name), "axis_name": axis_name}
    if cfg.loss == "sigmoid":
        nats = sigmoid_loss(a, b, scale, params["bias"], **options)
    else:
        nats = info_nce(a, b, scale, **options)
    return nats, _found(a, b, **options), _found(b, a, **options)


def _found(a, b, *, negatives, axis_name) -> Float[Array, "B"]:
    """Returns 1 where a_i is more similar to b_i than to every negative; ties do not count."""
    cosines = a @ _gathered(b, axis_name).T
    column, true = _diagonal(*cosines.shape, axis_name)
    own = jnp.take_along_axis(cosines, column[:, None], 1)
    rivals = (cosines >= own) & negatives & ~true
    return (~rivals.any(1)).astype(jnp.float32)


def loss(
    cfg: Config,
    params: Params,
    state: State,
    batch: dict,
    key: Key[Array, ""],
    *,
    axis_name: str | None = None,
):
    """Returns the mean loss of a batch, and (extra, metrics) for `core.descend`.

    Examples with equal captions are no negatives of each other. So neither several pictures of one
    caption nor an example that a batch holds twice counts as a mistake.
    """
    nats, by_image, by_text = _compare(cfg, params, batch, key, axis_name)
    metrics = {
        "image_to_text": by_image.mean(),
        "text_to_image": by_text.mean(),
        "scale": logit_scale(params),
    }
    return nats.mean(), (state.extra, metrics)


def evaluate(cfg: Config, state: State, batch: dict, key: Key[Array, ""]) -> dict[str, Nats]:
    """Returns the loss and the retrieval within the batch for each example; see `make`."""
    params = EMA(cfg.ema).read(state)
    nats, by_image, by_text = _compare(cfg, params, batch, None, None)
    return {"loss_nats": nats, "image_to_text": by_image, "text_to_image": by_text}


# --------------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """Returns the contrastive model as a Family.

    step: its negatives are the examples of the batch, on all devices, whose captions differ. After
        the update the logit scale is cut back to at most 100 (CLIP, section 2.5). The gradient is
        not cut, so that the scale can come down again.
    evaluate: `loss_nats` is the training loss per pair. `image_to_text` and `text_to_image` are 1
        where the partner is more similar than every example with another caption. These two are
        better when high. `Run.best` keeps the lowest value, so it cannot choose by them. All three
        depend on the batch size. The last batch of a validation is filled up with other examples of
        the set. They are negatives where their captions differ.
    sample: None. The model compares, it draws nothing.
    axis_name: the axis of devices in the per-device view (pmap, vmap, shard_map). Features of all
        devices are gathered, so that the loss is that of the whole batch.
    """
    ema = EMA(cfg.ema)
    objective = partial(loss, cfg, axis_name=axis_name)

    def step(state, batch, key):
        state, metrics = descend(objective, cfg.optim, state, batch, key, axis_name=axis_name)
        log_scale = jnp.minimum(state.params["log_scale"], math.log(LARGEST_SCALE))
        return finish(state._replace(params={**state.params, "log_scale": log_scale}), ema), metrics

    return Family(
        init=lambda key: start(init(cfg, key), cfg.optim, ema=ema),
        step=step,
        evaluate=partial(evaluate, cfg),
        sample=None,
    )
