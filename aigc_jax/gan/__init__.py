"""Generative adversarial networks (Goodfellow et al. 2014, "GAN" below).

A generator G turns noise z into samples. A discriminator D (or critic) gives each sample
one logit, high for real samples. D learns to tell real samples from G's; G learns to raise
D's logits:

    min_G max_D  E_x[log D(x)] + E_z[log(1 - D(G(z)))]    with D = sigmoid(logit)    (GAN eq. 1)

Variants, as fields of `Config`:
    labels     conditional (Mirza & Osindero 2014, "CGAN"), projection (Miyato & Koyama 2018)
    nets       convolutional (Radford et al. 2016, "DCGAN"), residual with spectral normalisation
               (Miyato et al. 2018, "SNGAN"), StyleGAN2 (Karras et al. 2020; see `style.py`)
    losses     least squares (Mao et al. 2017), hinge (SNGAN), Wasserstein (Arjovsky et al. 2017,
               "WGAN"), relativistic (Huang et al. 2024, "R3GAN")
    penalties  weight clipping (WGAN), gradient penalty (Gulrajani et al. 2017, "WGAN-GP"), R1
               (Mescheder et al. 2018), R1 and R2 (R3GAN); at every few steps (Karras et al. 2020)
    parts      class-conditional BatchNorm, self-attention (Zhang et al. 2019, "SAGAN"), norms per
               example, differentiable augmentation (Zhao et al. 2020)
    training   packing (Lin et al. 2018, "PacGAN"), unrolling (Metz et al. 2017)

`cycle.py` has CycleGAN (Zhu et al. 2017), which translates between two sets of images.

G and D have one optimizer each. An update of one net leaves the other's parameters
unchanged. Images are floats in [-1, 1] here. Only `preprocess` takes whole-number pixels,
and `Family.sample` returns images in [0, 1].

    family = make(Config(shape=(28, 28, 1)))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key, Shaped

from ..core import (
    EMA,
    Family,
    Optim,
    State,
    descend,
    finish,
    floats,
    labels,
    one_hot,
    parts,
    pixels,
    shard_rows,
    start,
)
from . import style
from .augment import diff_augment
from .config import Config, LossName
from .cycle import CycleConfig, make_cycle
from .nets import Discriminator, Generator, NetConfig

__all__ = [
    "Config",
    "CycleConfig",
    "Discriminator",
    "Generator",
    "NetConfig",
    "Optim",
    "discriminate",
    "diff_augment",
    "discriminator_loss",
    "generate",
    "generator_loss",
    "generator_of",
    "gradient_penalty",
    "make",
    "make_cycle",
    "noise",
    "preprocess",
    "r1_penalty",
]

Net = NetConfig  # its former name

Params = dict[str, Any]
# Flax's "batch_stats": running means of BatchNorm, vectors of SpectralNorm, StyleGAN2's mean style.
Stats = dict[str, Any]
Variables = dict[str, Any]  # {"params": Params, "batch_stats": Stats} of one net
Sample = Float[Array, "B ..."]  # images [B, H, W, C] in [-1, 1], or points [B, d]
OneHot = Float[Array, "B classes"]
Logits = Float[Array, "B"]
Label = Any  # whole numbers 0..classes-1 [B], or one for all; checked by `core.labels`


# -------------------------------------------------------------------- the losses of D and G


def discriminator_loss(name: LossName, real_logits: Logits, fake_logits: Logits) -> Logits:
    """Returns what D minimises, for each pair of a real logit r and a fake logit f.

    minimax, non_saturating: -log D(x) - log(1 - D(G(z))), D = sigmoid(logit) (GAN eq. 1)
    least_squares: ((r - 1)^2 + f^2) / 2 (Mao et al. 2017, eq. 9)
    wasserstein: f - r (WGAN eq. 3); needs a Lipschitz constraint
    hinge: max(0, 1 - r) + max(0, 1 + f) (SNGAN eq. 16)
    relativistic: -log sigmoid(r - f), a pair is judged as one (Huang et al. 2024, "R3GAN")
    """
    r, f = real_logits, fake_logits
    match name:
        case "minimax" | "non_saturating":  # softplus(-l) = -log D, softplus(l) = -log(1 - D)
            return nn.softplus(-r) + nn.softplus(f)
        case "least_squares":
            return 0.5 * (jnp.square(r - 1) + jnp.square(f))
        case "wasserstein":
            return f - r
        case "hinge":
            return nn.relu(1 - r) + nn.relu(1 + f)
        case "relativistic":
            return nn.softplus(f - r)
    raise ValueError(f"the loss must be one of {', '.join(get_args(LossName))}, not {name!r}")


def generator_loss(
    name: LossName, fake_logits: Logits, real_logits: Logits | None = None
) -> Logits:
    """Returns what G minimises, for each fake logit f. Only "relativistic" needs real logits r.

    minimax: log(1 - D(G(z))) (GAN eq. 1); its gradient vanishes where D is sure of a fake
    non_saturating: -log D(G(z)) (GAN, section 3)
    least_squares: (f - 1)^2 / 2 (Mao et al. 2017, eq. 9)
    wasserstein, hinge: -f (WGAN, SNGAN eq. 17)
    relativistic: -log sigmoid(f - r) (R3GAN)
    """
    f = fake_logits
    match name:
        case "minimax":
            return -nn.softplus(f)
        case "non_saturating":
            return nn.softplus(-f)
        case "least_squares":
            return 0.5 * jnp.square(f - 1)
        case "wasserstein" | "hinge":
            return -f
        case "relativistic":
            if real_logits is None:
                raise ValueError("the relativistic loss of G needs real_logits")
            return nn.softplus(real_logits - f)
    raise ValueError(f"the loss must be one of {', '.join(get_args(LossName))}, not {name!r}")


# --------------------------------------------------------------------------- penalties on D


def r1_penalty(critic: Callable[[Sample], Logits], real: Sample) -> Logits:
    """Returns |grad_x D(x)|^2 at each real x (Mescheder et al. 2018, eq. 9, without gamma / 2).

    `critic` maps examples [B, ...] to logits [B]. Each logit must depend on its own example only.
    """
    gradient = jax.grad(lambda x: critic(x).sum())(real)
    return jnp.sum(jnp.square(gradient.reshape(gradient.shape[0], -1)), -1)


def gradient_penalty(
    critic: Callable[[Sample], Logits],
    real: Sample,
    fake: Sample,
    key: Key[Array, ""],
) -> Logits:
    """Returns (|grad_x D(x)| - 1)^2 at x = real + u (fake - real), u ~ U[0, 1) for each pair.

    This is WGAN-GP eq. 3 without lambda. The norm is over all axes of an example. Where the
    gradient is 0, the norm's derivative is 0 instead of NaN. `critic` is as for
    `r1_penalty`.
    """
    u = jax.random.uniform(key, (real.shape[0],) + (1,) * (real.ndim - 1), real.dtype)
    squared_norm = r1_penalty(critic, real + u * (fake - real))
    is_zero = squared_norm == 0
    norm = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared_norm)))
    return jnp.square(norm - 1)


# ---------------------------------------------------------------- the nets and their inputs


def _nets(cfg: Config, axis_name: str | None = None) -> dict[str, nn.Module]:
    """Returns G and D. With `axis_name`, BatchNorm averages over the devices of that axis."""
    projection = cfg.classes > 0 and cfg.condition == "projection"
    return {
        "gen": Generator(
            cfg.gen, tuple(cfg.shape), tuple(cfg.output_bias), axis_name, cfg.latent_dim
        ),
        "disc": Discriminator(cfg.disc, projection, axis_name),
    }


def generate(
    cfg: Config,
    variables: Variables,
    z: Float[Array, "B Z"],
    label: Label = None,
    *,
    truncation: float = 1.0,
) -> Sample:
    """Returns G(z): images in [-1, 1], or points. BatchNorm uses its running statistics.

    `generator_of(cfg, state)` gives the variables of a state. truncation: of a generator of kind
    style, how far its styles go from their mean; 0: the mean image, 1: as in training.
    """
    y = one_hot(label, cfg.classes, z.shape[:1])
    if cfg.gen.kind == "style":
        return _nets(cfg)["gen"].apply(variables, z, y, False, truncation)
    if truncation != 1.0:
        raise ValueError(f"truncation needs a generator of kind style, got {cfg.gen.kind}")
    return _nets(cfg)["gen"].apply(variables, z, y, False)


def discriminate(
    cfg: Config,
    variables: Variables,
    x: Shaped[Array | np.ndarray, "B ..."],
    label: Label = None,
) -> Logits:
    """Returns D's logits [B] of images in [-1, 1], or of points. BatchNorm uses running statistics.

    Images of `Family.sample` lie in [0, 1]: give 2 x - 1. A packed D judges each sample together
    with the packing - 1 samples that follow it in the batch.
    """
    x = floats("x", x)
    y = one_hot(label, cfg.classes, x.shape[:1])
    x, y = (jnp.concatenate([jnp.roll(a, -i, 0) for i in range(cfg.packing)], -1) for a in (x, y))
    return _nets(cfg)["disc"].apply(variables, x, y, False)


def noise(cfg: Config, key: Key[Array, ""], n: int) -> Float[Array, "n Z"]:
    """Samples z for n examples. For kind style, N(0, 1) noise inputs follow the latents."""
    if cfg.gen.kind != "style":
        return _latents(cfg, key, n)
    k_latents, k_inputs = jax.random.split(key)
    inputs = jax.random.normal(k_inputs, (n, _nets(cfg)["gen"].noise_size))
    return jnp.concatenate([_latents(cfg, k_latents, n), inputs], -1)


def _latents(cfg: Config, key: Key[Array, ""], n: int) -> Float[Array, "n Z"]:
    shape = (n, cfg.latent_dim)
    if cfg.latent == "normal":
        return jax.random.normal(key, shape, jnp.float32)
    bound = 3**0.5
    low, high = (0.0, 1.0) if cfg.latent == "uniform" else (-bound, bound)
    return jax.random.uniform(key, shape, jnp.float32, low, high)


def preprocess(cfg: Config, batch: dict) -> Sample:
    """Returns a batch's pixels 0..levels-1 as floats in [-1, 1], or its points unchanged.

    Raises ValueError for pixels that are floats, or beyond levels - 1.
    """
    if len(cfg.shape) == 1:
        return batch["points"]
    return pixels(batch["image"], cfg.levels) * (2 / (cfg.levels - 1)) - 1


def _real_examples(cfg: Config, batch: dict) -> tuple[Sample, OneHot]:
    """Returns examples and one-hot labels [B, classes]; [B, 0] for a model without classes."""
    x = preprocess(cfg, batch)
    return x, one_hot(batch.get("label") if cfg.classes else None, cfg.classes, x.shape[:1])


def _augmented(cfg: Config, real: Sample, fake: Sample, key) -> tuple[Sample, Sample]:
    """Returns what D sees of real and fake images: each changed by draws of its own."""
    if not cfg.augment:
        return real, fake
    k_real, k_fake = jax.random.split(key)
    return diff_augment(real, k_real), diff_augment(fake, k_fake)


def _pack(cfg: Config, x):
    """Puts p neighbours, all real or all fake, into one example (PacGAN, section 2).

    [B, ..., C] -> [B / p, ..., p C]. Raises ValueError if p does not divide B.
    """
    if cfg.packing == 1:
        return x
    rows, *_, channels = x.shape
    if rows % cfg.packing:
        raise ValueError(f"a batch of {rows} does not divide by packing {cfg.packing}")
    rows //= cfg.packing
    together = jnp.moveaxis(x.reshape(rows, cfg.packing, *x.shape[1:]), 1, -2)
    return together.reshape(rows, *x.shape[1:-1], cfg.packing * channels)


def _apply(cfg: Config, net: str, params: Params, stats: Stats, x, y, key, axis_name):
    """Returns the output of `net` ("gen" or "disc") in training mode, and its new statistics."""
    outputs, new = _nets(cfg, axis_name)[net].apply(
        {"params": params, "batch_stats": stats},
        x,
        y,
        True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return outputs, new.get("batch_stats", {})


def _fake_examples(cfg: Config, params: Params, stats: Stats, y: OneHot, key, axis_name):
    """Returns G(z) for a new z per label, and G's new statistics.

    A packed GAN draws the i-th samples of all packs together, for each i. So BatchNorm sees as many
    samples as there are packs, whatever the packing (the authors' code of PacGAN).
    """
    k_z, k_dropout = jax.random.split(key)
    z = shard_rows(noise(cfg, k_z, y.shape[0]))
    if cfg.mixing:
        ws, inputs, stats = _styles(cfg, params, stats, z, y, k_dropout, axis_name)
        return _images(cfg, params, stats, ws, inputs), stats
    if cfg.packing == 1 or cfg.gen.norm not in ("batch", "class_batch"):
        return _apply(cfg, "gen", params, stats, z, y, k_dropout, axis_name)
    packs = len(z) // cfg.packing
    z, y = (a.reshape(packs, cfg.packing, a.shape[-1]) for a in (z, y))
    found = [
        _apply(cfg, "gen", params, stats, z[:, i], y[:, i], k, axis_name)
        for i, k in enumerate(jax.random.split(k_dropout, cfg.packing))
    ]
    x = jnp.stack([x for x, _ in found], 1)
    means = jax.tree.map(lambda *each: sum(each) / len(each), *(new for _, new in found))
    return x.reshape(-1, *x.shape[2:]), means


def _styles(cfg: Config, params: Params, stats: Stats, z, y, key, axis_name):
    """Returns mixed styles [B, layers, D], the noise inputs, and G's new statistics."""
    net, (k_z, k_mix) = _nets(cfg, axis_name)["gen"], jax.random.split(key)
    variables = {"params": params, "batch_stats": stats}
    options = {"method": "styles", "mutable": ["batch_stats"]}
    w, new = net.apply(variables, z, y, True, **options)
    other = shard_rows(noise(cfg, k_z, len(z)))
    other = net.apply(variables, other, y, False, method="styles")
    ws = style.mixed(net, w, other, cfg.mixing or 0.0, k_mix)
    return ws, z[:, cfg.latent_dim :], new["batch_stats"]


def _images(cfg: Config, params: Params, stats: Stats, ws, inputs) -> Sample:
    """Returns the images of styles and noise inputs."""
    variables = {"params": params, "batch_stats": stats}
    return _nets(cfg)["gen"].apply(variables, ws, inputs, method="images")


def _path_penalty(cfg: Config, params: Params, state: State, y: OneHot, key, axis_name):
    """Returns the path penalty and the new running mean of path lengths; see `style`.

    It is computed at every PATH_EVERY-th step, on half of the batch. In other steps it is 0.
    """
    stats, mean = state.extra["gen"], state.extra["path"]

    k_z, k_mix, k_y = jax.random.split(key, 3)
    y_half = y[: max(1, len(y) // 2)]
    z = shard_rows(noise(cfg, k_z, len(y_half)))
    ws, inputs, _ = _styles(cfg, params, stats, z, y_half, k_mix, None)
    directions = shard_rows(jax.random.normal(k_y, (len(y_half), *cfg.shape)))

    def penalty():
        lengths = style.path_lengths(
            lambda ws: _images(cfg, params, stats, ws, inputs), ws, directions
        )
        return style.path_penalty(lengths, mean, axis_name)

    return jax.lax.cond(_is_due(state, style.PATH_EVERY), penalty, lambda: (jnp.zeros(()), mean))


def _is_due(state: State, every: int) -> Bool[Array, ""]:
    """Returns whether a lazy penalty is computed: in the last of `every` updates.

    The log has updates whose number, counted from 1, is a multiple of `run.log_every`.
    """
    return (state.step + 1) % every == 0


def _logits(cfg: Config, params: Params, stats: Stats, examples, key, axis_name):
    """Returns D's logits of real and of fake examples, and D's statistics after both.

    `examples` are (real, fake, one-hot labels), packed.
    """
    real, fake, y = examples
    k_real, k_fake = jax.random.split(key)
    real_logits, stats = _apply(cfg, "disc", params, stats, real, y, k_real, axis_name)
    fake_logits, stats = _apply(cfg, "disc", params, stats, fake, y, k_fake, axis_name)
    return real_logits, fake_logits, stats


# -------------------------------------------------------------------------- one update of D

# `core.descend` makes an update. It takes a loss (params, state, batch, key) -> (loss,
# (extra, metrics)), where params are those of the net under training, and extra its state's
# new `extra`.


def _penalised_loss(cfg: Config, params: Params, state: State, examples, key, *, axis_name=None):
    """D's mean loss plus its penalty, on given examples: (real, fake, one-hot labels), packed."""
    real, fake, y = examples
    k_logits, k_line, k_dropout = jax.random.split(key, 3)
    stats = state.extra["disc"]
    real_logits, fake_logits, stats = _logits(cfg, params, stats, examples, k_logits, axis_name)
    loss = discriminator_loss(cfg.loss, real_logits, fake_logits).mean()
    metrics = {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}

    def critic(x):
        return _apply(cfg, "disc", params, stats, x, y, k_dropout, axis_name)[0]

    def penalty():
        if cfg.penalty == "gp":
            return gradient_penalty(critic, real, fake, k_line).mean()
        both = [real, fake] if cfg.penalty == "r1_r2" else [real]
        return sum(r1_penalty(critic, x).mean() for x in both)

    if cfg.penalty in ("gp", "r1", "r1_r2"):
        every = cfg.lazy or 1  # StyleGAN2: in every `lazy`-th update, with the weight times `lazy`
        metrics["penalty"] = (
            penalty()
            if every == 1
            else jax.lax.cond(_is_due(state, every), penalty, lambda: jnp.zeros(()))
        )
        half = 1.0 if cfg.penalty == "gp" else 0.5
        loss += half * every * cfg.weight * metrics["penalty"]
    return loss, ({**state.extra, "disc": stats}, metrics)


def _disc_objective(cfg: Config, params: Params, state: State, batch, key, *, axis_name=None):
    """D's loss on a batch and as many new fakes. G's parameters and statistics stay as they are."""
    k_fake, k_loss, k_augment = jax.random.split(key, 3)
    real, y = _real_examples(cfg, batch)
    gen, stats = state.params["gen"], state.extra["gen"]
    fake, _ = _fake_examples(cfg, gen, stats, y, k_fake, axis_name)
    real, fake = _augmented(cfg, real, fake, k_augment)
    examples = tuple(_pack(cfg, a) for a in (real, fake, y))
    return _penalised_loss(cfg, params, state, examples, k_loss, axis_name=axis_name)


def _update_disc(cfg: Config, objective, state: State, batch, key, *, micro: int, axis_name):
    """Makes one update of D. Returns the new state and metrics.

    objective: `_disc_objective` for a batch of data, `_penalised_loss` for examples.
    """
    loss = partial(objective, cfg, axis_name=axis_name)
    update = partial(descend, net="disc", micro=micro, axis_name=axis_name)
    state, metrics = update(loss, cfg.disc_optim, state, batch, key)
    if cfg.penalty == "clip":  # WGAN, algorithm 1
        bound = cfg.weight
        clipped = jax.tree.map(lambda w: jnp.clip(w, -bound, bound), state.params["disc"])
        state = state._replace(params={**state.params, "disc": clipped})
    return state, metrics


# -------------------------------------------------------------------------- one update of G


def _unroll(cfg: Config, state: State, examples, key, axis_name) -> State:
    """Returns the state after `cfg.unrolled` updates of D on the same examples.

    The updates are differentiable: D's new parameters are a function of the fakes, and so
    of G (Metz et al. 2017, section 2.2).
    """
    update = partial(_update_disc, cfg, _penalised_loss, micro=1, axis_name=axis_name)
    for i in range(cfg.unrolled):
        state, _ = update(state, examples, jax.random.fold_in(key, i))
    return state


def _gen_objective(cfg: Config, params: Params, state: State, batch, key, *, axis_name=None):
    """G's loss on new fakes. D's parameters and statistics stay as they are.

    With `cfg.unrolled` it is minus D's whole loss, penalty included, after the unrolled
    updates (Metz et al. 2017, section 2.2), whatever `cfg.loss` is. The gradient through
    D's updates then vanishes where D is at its optimum.
    """
    if cfg.path_length:
        key, k_path = jax.random.split(key)
    k_fake, k_logits, k_unroll, k_augment = jax.random.split(key, 4)
    real, y = _real_examples(cfg, batch)
    fake, stats = _fake_examples(cfg, params, state.extra["gen"], y, k_fake, axis_name)
    real, fake = _augmented(cfg, real, fake, k_augment)
    extra = {**state.extra, "gen": stats}
    examples = tuple(_pack(cfg, a) for a in (real, fake, y))
    if cfg.unrolled:
        state = _unroll(cfg, state, examples, k_unroll, axis_name)
        disc = state.params["disc"]
        disc_loss, _ = _penalised_loss(cfg, disc, state, examples, k_logits, axis_name=axis_name)
        return -disc_loss, (extra, {})
    disc, disc_stats = state.params["disc"], state.extra["disc"]
    real_logits, fake_logits, _ = _logits(cfg, disc, disc_stats, examples, k_logits, axis_name)
    loss, metrics = generator_loss(cfg.loss, fake_logits, real_logits).mean(), {}
    if cfg.path_length:
        metrics["path"], extra["path"] = _path_penalty(cfg, params, state, y, k_path, axis_name)
        loss += style.PATH_EVERY * cfg.path_length * metrics["path"]
    return loss, (extra, metrics)


def _update_gen(cfg: Config, state: State, batch, key, axis_name):
    """Makes one update of G. Returns the new state and metrics."""
    loss = partial(_gen_objective, cfg, axis_name=axis_name)
    update = partial(descend, net="gen", micro=cfg.micro, axis_name=axis_name)
    return update(loss, cfg.optim, state, batch, key)


def _with_gen_of(updated: State, state: State) -> State:
    """Returns `state` with G's parameters, optimizer state and statistics of `updated`."""
    own = ("gen", "path")  # path: of StyleGAN2, in extra
    new = {}
    for tree in ("params", "opt_state", "extra"):
        moved = {name: x for name, x in getattr(updated, tree).items() if name in own}
        new[tree] = {**getattr(state, tree), **moved}
    return state._replace(**new)


# --------------------------------------------------------- initialisation and training step


def init_state(cfg: Config, key: Key[Array, ""]) -> State:
    """Returns the state before step 0."""
    nets = _nets(cfg)
    k_gen, k_disc = jax.random.split(key)
    latents = jax.eval_shape(lambda key: noise(cfg, key, 1), key).shape[-1]
    z, y = (jnp.zeros((1, size), jnp.float32) for size in (latents, cfg.classes))
    x = jnp.zeros((1, *cfg.shape[:-1], cfg.shape[-1] * cfg.packing), jnp.float32)
    variables = {
        "gen": nets["gen"].init(k_gen, z, y, False),
        "disc": nets["disc"].init(k_disc, x, jnp.tile(y, cfg.packing), False),
    }
    params = {net: v["params"] for net, v in variables.items()}
    stats = {net: v.get("batch_stats", {}) for net, v in variables.items()}
    optims = {"gen": cfg.optim, "disc": cfg.disc_optim}
    if cfg.path_length:
        stats["path"] = jnp.zeros(())  # the running mean of path lengths
    return start(params, optims, extra=stats, ema=_ema(cfg))


def step(cfg: Config, state: State, batch, key, *, axis_name: str | None = None):
    """Makes n_critic updates of D, then one of G (GAN, algorithm 1). Returns the state and metrics.

    Each update of D has its own part of the batch; G has the last part. Each samples new noise.
    With `cfg.simultaneous`, G's update starts from D as it was before the step.
    """
    before = state
    k_disc, k_gen = jax.random.split(key)
    update_disc = partial(_update_disc, cfg, _disc_objective, micro=cfg.micro, axis_name=axis_name)
    for i, part in enumerate(parts(batch, cfg.n_critic)):
        state, disc_metrics = update_disc(state, part, jax.random.fold_in(k_disc, i))
    through = before if cfg.simultaneous else state
    updated, gen_metrics = _update_gen(cfg, through, part, k_gen, axis_name)
    state = _with_gen_of(updated, state)
    return finish(state, _ema(cfg)), {**disc_metrics, **gen_metrics}


# ------------------------------------------------------------------ evaluation and sampling


def _ema(cfg: Config) -> EMA:
    """Returns the moving average of G's parameters and statistics. D has no average."""
    return EMA(
        cfg.ema,
        of=lambda state: {"params": state.params["gen"], "batch_stats": state.extra["gen"]},
    )


def generator_of(cfg: Config, state: State) -> Variables:
    """Returns what `generate` needs of a state: G's average if there is one, else G itself."""
    return _ema(cfg).read(state)


def evaluate(cfg: Config, state: State, batch, key) -> dict[str, Logits]:
    """Returns D's logits of each example and of one fake per example, and whether D is right.

    Fakes are of G's average. There is no dropout, and BatchNorm uses its running
    statistics. The Wasserstein and the relativistic loss give only logits, because they have no
    threshold between real and fake.
    """
    x, label = preprocess(cfg, batch), batch.get("label") if cfg.classes else None
    fake = generate(cfg, generator_of(cfg, state), noise(cfg, key, x.shape[0]), label)
    disc = {"params": state.params["disc"], "batch_stats": state.extra["disc"]}
    real_logit = discriminate(cfg, disc, x, label)
    fake_logit = discriminate(cfg, disc, fake, label)
    values = {"real_logit": real_logit, "fake_logit": fake_logit}
    if cfg.loss not in ("wasserstein", "relativistic"):
        threshold = 0.5 if cfg.loss == "least_squares" else 0.0
        values["real_accuracy"] = (real_logit > threshold).astype(jnp.float32)
        values["fake_accuracy"] = (fake_logit < threshold).astype(jnp.float32)
    return values


def sample(
    cfg: Config, state: State, key, *, n: int, label: Label = None, truncation: float = 1.0
) -> Sample:
    """Returns n samples of G: images in [0, 1], or points. truncation: see `generate`."""
    label = labels(label, cfg.classes, (n,), in_turn=True)
    z = noise(cfg, key, n)
    x = generate(cfg, generator_of(cfg, state), z, label, truncation=truncation)
    return ((x + 1) / 2).clip(0, 1) if len(cfg.shape) == 3 else x


# ------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """Returns the GAN as a Family. Its params, opt_state and extra are {"gen": ..., "disc": ...}.

    With path_length, extra also has "path", the running mean of path lengths.

    step: n_critic updates of D on parts of the batch, then one of G. For n_critic = 1 both have the
        whole batch.
    evaluate: `real_logit` and `fake_logit` per example. Losses with a threshold add
        `real_accuracy` and `fake_accuracy`: 1 where D is right. If D is more accurate on
        training examples than on held-out ones, it has memorised them.
    sample(state, key, *, n, label=None, truncation=1.0): n samples of G's average. `label` is one
        class in 0..classes-1, or [n] classes. A conditional model without `label` takes the classes
        in turn. truncation: see `generate`.
    axis_name: the axis of devices in the per-device view (pmap, vmap, shard_map).
    """
    return Family(
        init=partial(init_state, cfg),
        step=partial(step, cfg, axis_name=axis_name),
        evaluate=partial(evaluate, cfg),
        sample=partial(sample, cfg),
    )
