"""Denoising diffusion (Ho et al. 2020, "DDPM") and its successors.

- implicit samplers: Song, Meng & Ermon 2021 ("DDIM")
- cosine schedule, learned variances, importance sampling of t: Nichol & Dhariwal 2021
- guidance: Ho & Salimans 2022
- prediction of v: Salimans & Ho 2022
- learned schedule in continuous time: Kingma et al. 2021 ("VDM")
- straight paths, flow matching: Lipman et al. 2022, Liu et al. 2022

A process q adds noise to x_0 in T steps (`schedules.py`, `process.py`). A network is trained to
predict the noise in x_t, given t (this file). Samplers (`samplers.py`) and likelihoods
(`bounds.py`) are functions of a `Schedule` and any function of (x_t, t) that predicts eps, x_0, v
or velocity, whether a network or an exact score.

`step` and `evaluate` take whole-number pixels, and `sample` returns images in [0, 1]. In between,
images are floats in [-1, 1].

    family = make(Config(shape=(8, 8, 1), levels=17, net=NetConfig(widths=(32, 64), groups=8)))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ..core import (
    EMA,
    Family,
    State,
    floats,
    labels,
    make_step,
    pixels,
    shard_rows,
    start,
)
from ..nn import sharding
from . import importance, learned_schedule
from .binomial import DiscreteConfig, make_discrete
from .bounds import (
    continuous_vlb,
    gaussian_kl,
    log_discretised,
    low_discrepancy,
    mean_over_steps,
    ode_log_likelihood,
    prior_kl,
    step_at,
    vlb,
    vlb_term,
    vlb_terms,
)
from .config import SCHEDULES, Config
from .learned_schedule import gamma, init_gamma
from .nets import MLP, DiT, NetConfig, UNet, module
from .process import (
    Given,
    convert,
    learned_variance,
    q_posterior,
    q_sample,
)
from .samplers import (
    call_eps_fn,
    ddim_invert,
    guide,
    inpaint,
    interpolate,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    slerp,
)
from .schedules import (
    Sample,
    Schedule,
    cosine_schedule,
    discretise,
    linear_schedule,
    noise_variance,
    respace,
    signal_and_noise,
    straight_schedule,
)
from .token_model import TokenConfig, make_tokens
from .tokens import sample_tokens, token_vlb

noise2 = noise_variance  # its old name, which still works

__all__ = [
    "Config",
    "DiT",
    "DiscreteConfig",
    "MLP",
    "NetConfig",
    "Schedule",
    "TokenConfig",
    "UNet",
    "continuous_vlb",
    "convert",
    "cosine_schedule",
    "ddim_invert",
    "discretise",
    "eps_fn_of",
    "gamma",
    "gaussian_kl",
    "guide",
    "init_gamma",
    "inpaint",
    "interpolate",
    "learned_variance",
    "linear_schedule",
    "log_discretised",
    "make",
    "make_discrete",
    "make_tokens",
    "noise2",
    "noise_variance",
    "ode_log_likelihood",
    "predict",
    "predict_fn_of",
    "preprocess",
    "prior_kl",
    "q_posterior",
    "q_sample",
    "respace",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpm_solver",
    "sample_heun",
    "sample_tokens",
    "schedule_of",
    "slerp",
    "straight_schedule",
    "token_vlb",
    "vlb",
    "vlb_terms",
]

Net = NetConfig  # its former name

Params = Any  # {"net": ...}, and with a learned schedule "gamma"
Context = Any  # floats [B, L, E], or one for all; zeros stand for no context
Label = Any  # classes 0..classes-1 as whole numbers [B], or one for all; `core.labels` checks them

# Weights of |x_0 - x_0_hat|^2 by the signal-to-noise ratio (Salimans & Ho 2022, section 4; Hang et
# al. 2023 for min_snr).
_WEIGHTS = {
    "snr": lambda snr: snr,  # |eps - eps_hat|^2
    "truncated_snr": lambda snr: jnp.maximum(snr, 1.0),
    "min_snr": lambda snr: jnp.minimum(snr, 5.0),
}


def _grey_levels(cfg: Config) -> int | None:
    """Returns the number of grey levels of images, None for floats: their bound is of a density."""
    return cfg.levels if cfg.is_image else None


def _nats_per_bit_per_dim(cfg: Config) -> float:
    return math.prod(cfg.shape) * math.log(2)


# --------------------------------------------------------------------------- schedule and network


def schedule_of(cfg: Config, params: Params) -> Schedule:
    """Returns the T levels of the model, for sampling and for its bound."""
    if cfg.schedule == "learned":
        return discretise(lambda u: gamma(params["gamma"], u), cfg.T)
    return SCHEDULES[cfg.schedule](cfg.T)


def preprocess(cfg: Config, batch: dict) -> Sample:
    """Returns pixels 0..levels-1 as floats in [-1, 1]; points and latents as they are.

    Raises ValueError for pixels that are floats, or larger than levels - 1.
    """
    kind = "image" if cfg.is_image else "points"
    if kind not in batch:
        raise ValueError(f"this model takes {kind!r} in a batch, got {', '.join(batch)}")
    if (got := tuple(batch[kind].shape[1:])) != tuple(cfg.shape):
        raise ValueError(f"model.shape is {tuple(cfg.shape)}, the batch has {kind} of shape {got}")
    if kind == "image":
        return pixels(batch["image"], cfg.levels) * (2 / (cfg.levels - 1)) - 1
    return jnp.asarray(batch["points"], jnp.float32)


def _net(cfg: Config):
    return module(cfg.net, cfg.shape, cfg.classes, several=2 if cfg.variance == "learned" else 1)


def init_state(cfg: Config, key: Key[Array, ""]) -> State:
    """Returns the State before the first update."""
    k_net, k_gamma = jax.random.split(key)
    label = jnp.zeros(1, int) if cfg.classes else None
    x_t, t = jnp.zeros((1, *cfg.shape), jnp.float32), jnp.zeros((1,), jnp.float32)
    params = {"net": _net(cfg).init(k_net, x_t, t, label, *_context(cfg, None, 1))["params"]}
    if cfg.schedule == "learned":
        params["gamma"] = init_gamma(k_gamma, levels=_grey_levels(cfg) or 256)
    history = importance.init_history(cfg.T) if cfg.times == "importance" else None
    return start(params, cfg.optim, extra=history, ema=EMA(cfg.ema))


def _label_or_none(cfg: Config, label: Label, n: int):
    """Checks labels, of which cfg.classes stands for no label."""
    return labels(label, cfg.classes + 1 if cfg.classes else 0, (n,))


def _context(cfg: Config, context: Context, n: int) -> tuple[Array, ...]:
    """Returns (context [n, L, E],), zeros where there is none; () for a model without contexts.

    A single context [L, E] or [1, L, E] serves all n.
    """
    if cfg.context is None:
        if context is not None:
            raise ValueError(
                "this model takes no context: model.context is None, leave context out"
            )
        return ()
    if context is None:
        return (jnp.zeros((n, *cfg.context), jnp.float32),)
    context = floats("context", context)
    if context.shape[-2:] != tuple(cfg.context) or context.shape[:-2] not in ((), (1,), (n,)):
        expected = f"({n}, {cfg.context[0]}, {cfg.context[1]})"
        raise ValueError(f"context must have the shape {expected}, got {context.shape}")
    return (jnp.broadcast_to(context, (n, *cfg.context)),)


def predict(
    cfg: Config,
    params: Params,
    x_t: Given,
    t: Array,
    label: Label = None,
    key: Key[Array, ""] | None = None,
    context: Context = None,
) -> tuple[Sample, Sample | None]:
    """Returns (prediction, raw) of the network.

    prediction: its `cfg.prediction`. raw: the input of `learned_variance`, None unless cfg.variance
    is "learned".

    t: steps 0..T-1 [B]; with a learned schedule u in [0, 1].
    label: [B]; None, or the class number cfg.classes, is no label.
    key: with a key, dropout is on.
    context: [B, L, E], one for all, or None, which is no context.
    """
    if cfg.classes and label is None:
        label = jnp.full(len(x_t), cfg.classes)
    x_t, label = floats("x_t", x_t), _label_or_none(cfg, label, len(x_t))
    time = 1000.0 * t / (1 if cfg.schedule == "learned" else cfg.T)
    rngs = None if key is None else {"dropout": key}
    given = (label, *_context(cfg, context, len(x_t)))
    out = _net(cfg).apply({"params": params["net"]}, x_t, time, *given, rngs=rngs)
    if label is not None:
        is_wrong = label.reshape(-1, *[1] * (out.ndim - 1)) < 0
        out = jnp.where(is_wrong, jnp.nan, out)  # see core.labels
    if cfg.variance != "learned":
        return out.reshape(x_t.shape), None
    value, raw = jnp.split(out, 2, -1)
    return value.reshape(x_t.shape), raw.reshape(x_t.shape)


def _without_mu(cfg: Config, schedule: Schedule, value: Sample, x_t: Sample, t: Array):
    """Returns (value, prediction) that samplers and bounds accept: x_0 for mu, else unchanged.

    mu depends on the T steps of training, which samplers need not visit.
    """
    if cfg.prediction != "mu":
        return value, cfg.prediction
    return convert(schedule, value, x_t, t, given="mu", wanted="x_0"), "x_0"


def _is_guided(w) -> bool:
    return not isinstance(w, (int, float)) or w != 0


def predict_fn_of(
    cfg: Config,
    params: Params,
    label: Label = None,
    w: Any = 0.0,
    *,
    context: Context = None,
    negative: Context = None,
):
    """Returns (fn, prediction) for samplers and bounds, where fn(x_t, t) is the network.

    fn returns the network's own prediction, "eps", "x_0", "v" or "velocity"; for a network that
    predicts mu, x_0. With learned variances it returns (prediction, raw), for sigma2 = "learned".
    t are steps, with a learned schedule too.

    label: the classes [B], or one for all. context: [B, L, E], or one for all.
    w: guidance weight, away from no label and no context; raw is then that of the condition.
    negative: the context that guidance leads away from instead (a "negative prompt").
    """
    schedule = schedule_of(cfg, params)
    guided = _is_guided(w)
    if label is not None and not cfg.classes:
        raise ValueError("model.classes is 0: it takes no labels, leave label out")
    for name, given in (("context", context), ("negative", negative)):
        if given is not None and cfg.context is None:
            raise ValueError(
                f"this model takes no context: model.context is None, leave {name} out"
            )
    if guided and label is None and context is None:
        raise ValueError("guidance (w) needs a label or a context to lead to")
    if negative is not None and not guided:
        raise ValueError("a negative context acts through guidance: give w")

    def call_net(x_t, t, label, context):
        time = t
        if cfg.schedule == "learned":  # step t is u = t / (T - 1), as in `discretise`
            time = t / (cfg.T - 1) if cfg.T > 1 else jnp.ones(len(x_t))
        value, raw = predict(cfg, params, x_t, time, label, context=context)
        return _without_mu(cfg, schedule, value, x_t, t)[0], raw

    def guided_net(x_t, t):
        """One call of the net for both halves: with the condition, and without."""
        n = len(x_t)
        labels_, contexts = None, None
        if cfg.classes:
            none = jnp.full(n, cfg.classes)
            given = none if label is None else label
            labels_ = jnp.concatenate([_label_or_none(cfg, given, n), none])
        if cfg.context:
            halves = [_context(cfg, each, n)[0] for each in (context, negative)]
            contexts = jnp.concatenate(halves)
        twice = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])
        value, raw = call_net(*twice, labels_, contexts)
        return guide(*jnp.split(value, 2), w), None if raw is None else raw[:n]

    def fn(x_t, t):
        value, raw = guided_net(x_t, t) if guided else call_net(x_t, t, label, context)
        return value if raw is None else (value, raw)

    return fn, "x_0" if cfg.prediction == "mu" else cfg.prediction


def eps_fn_of(cfg: Config, params: Params, label: Label = None, w: Any = 0.0, **contexts: Context):
    """Returns eps_fn(x_t, t) of the network: `predict_fn_of`, converted to eps.

    With learned variances it returns (eps_hat, raw). Prefer `predict_fn_of` for samplers and
    bounds: the conversion loses digits.
    """
    schedule = schedule_of(cfg, params)
    fn, prediction = predict_fn_of(cfg, params, label, w, **contexts)

    def eps_fn(x_t, t):
        value, raw = call_eps_fn(fn, x_t, t)
        eps_hat = convert(schedule, value, x_t, t, given=prediction, wanted="eps")
        return eps_hat if raw is None else (eps_hat, raw)

    return eps_fn


# ---------------------------------------------------------------------------------------- losses


def _mean_per_example(x: Array) -> Float[Array, "B"]:
    return x.reshape(len(x), -1).mean(-1)


def losses(
    cfg: Config,
    params: Params,
    x_0: Sample,
    t: Int[Array, "B"],
    eps: Sample,
    label: Label,
    key=None,
    context: Context = None,
) -> Float[Array, "B"]:
    """Returns the objective of each example, at one t each. With a key, dropout is on.

    simple: mean squared error of the network's own prediction (DDPM eq. 14; for mu the "MSE" of
        table 2). With prediction velocity on a straight path it is flow matching's loss (Lipman et
        al. 2022, eq. 23), here per dimension and at T times.
    vlb: T L_t in bits per dimension. Its mean over t is the bound without L_T (DDPM eq. 5).
    hybrid: simple + 0.001 vlb, in which vlb trains the variance only (Nichol & Dhariwal, eq. 16).
    snr, truncated_snr, min_snr: mean squared error of x_0, weighted by the signal-to-noise ratio.
    """
    schedule = schedule_of(cfg, params)
    x_t = q_sample(schedule, x_0, t, eps)
    signal, noise = signal_and_noise(schedule, t, x_0)
    value, raw = predict(cfg, params, x_t, t, label, key, context)

    def bound(value):
        value, prediction = _without_mu(cfg, schedule, value, x_t, t)
        out = value if raw is None else (value, raw)
        options = {"levels": _grey_levels(cfg), "sigma2": cfg.variance, "prediction": prediction}
        term = vlb_term(schedule, lambda *_: out, x_0, t, eps, **options)
        return cfg.T * term / _nats_per_bit_per_dim(cfg)

    if cfg.objective in _WEIGHTS:
        snr = jnp.asarray(schedule.alpha_bar / noise_variance(schedule), jnp.float32)[t]
        x_0_hat = convert(schedule, value, x_t, t, given=cfg.prediction, wanted="x_0")
        return _WEIGHTS[cfg.objective](snr) * _mean_per_example((x_0 - x_0_hat) ** 2)
    if cfg.objective == "vlb":
        return bound(value)
    targets = {  # from x_0 and eps: computing them from x_t would divide by sqrt(alpha_bar)
        "eps": eps,
        "x_0": x_0,
        "v": signal * eps - noise * x_0,
        "mu": q_posterior(schedule, x_0, x_t, t)[0],
    }
    target = eps - x_0 if cfg.prediction == "velocity" else targets[cfg.prediction]
    simple = _mean_per_example((target - value) ** 2)
    if cfg.objective == "simple":
        return simple
    return simple + 0.001 * bound(jax.lax.stop_gradient(value))


def continuous_nll(
    cfg: Config,
    params: Params,
    x_0: Sample,
    label: Label,
    key: Key[Array, ""],
    k_drop: Key[Array, ""] | None = None,
    context: Context = None,
) -> Float[Array, "B"]:
    """Returns VDM's bound on -log p(x_0), nats, from one u per example."""

    def gamma_fn(u):
        return gamma(params["gamma"], u)

    def eps_fn(x_u, u):
        return predict(cfg, params, x_u, u, label, k_drop, context)[0]

    return continuous_vlb(gamma_fn, eps_fn, x_0, key, levels=_grey_levels(cfg))


def vdm_loss(
    cfg: Config,
    params: Params,
    x_0: Sample,
    label: Label,
    key,
    k_drop=None,
    context: Context = None,
):
    """Returns the mean of VDM's bound in bits per dimension: see `learned_schedule.loss`."""

    def bits_per_dim(params, key, k_drop):
        nats = continuous_nll(cfg, params, x_0, label, key, k_drop, context)
        return 1 / _nats_per_bit_per_dim(cfg) * nats

    return learned_schedule.loss(bits_per_dim, params, key, k_drop)


# ------------------------------------------------------------------- training (DDPM, algorithm 1)


def labels_in(cfg: Config, batch: dict, n: int):
    """Returns the labels [n] of a batch, None for an unconditional model."""
    return labels(batch.get("label") if cfg.classes else None, cfg.classes, (n,))


def context_in(cfg: Config, batch: dict) -> Context:
    """Returns the context [B, L, E] of a batch, None for a model without contexts."""
    if cfg.context is None:
        return None
    if "context" not in batch:
        raise ValueError("model.context is set, and the batch has no 'context'")
    return batch["context"]


def withhold(cfg: Config, label, context: Context, key: Key[Array, ""]):
    """Withholds the labels and contexts of a share cfg.unlabelled of the rows.

    Returns (label, context): cfg.classes stands for no label, zeros for no context.
    """
    given = label if context is None else context
    if given is None:
        return None, None
    withheld = jax.random.uniform(key, given.shape[:1]) < cfg.unlabelled
    if label is not None:
        label = jnp.where(withheld, cfg.classes, label)
    if context is not None:
        context = jnp.where(withheld[:, None, None], 0, context)
    return label, context


def mirror_half(x_0: Sample, key: Key[Array, ""]) -> Sample:
    """Mirrors half of the images left to right."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(x_0), 1, 1, 1))
    return jnp.where(mirrored, x_0[:, :, ::-1], x_0)


def draw_t(cfg: Config, history, key: Key[Array, ""], n: int):
    """Returns t [n] and weights [n]: the mean of weight * loss estimates the mean loss over all t.

    history: of the losses of each t, see `importance`.
    """
    if cfg.times == "low_discrepancy":
        return step_at(low_discrepancy(key, n), cfg.T), jnp.ones(n, jnp.float32)
    if cfg.times == "uniform":
        return jax.random.randint(key, (n,), 0, cfg.T), jnp.ones(n, jnp.float32)
    return importance.draw_t(history, key, n)


def training_loss(
    cfg: Config,
    params: Params,
    state: State,
    batch: dict,
    key: Key[Array, ""],
    *,
    axis_name: str | None = None,
):
    """Returns (loss, (extra, metrics)) of one update, as `core.descend` takes it.

    DDPM, algorithm 1: x_0 ~ data, t ~ Uniform, eps ~ N(0, I), then a step against the gradient of
    |eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t)|^2.
    """
    k_t, k_eps, k_label, k_drop, k_mirror = jax.random.split(key, 5)
    x_0 = preprocess(cfg, batch)
    label, context = labels_in(cfg, batch, len(x_0)), context_in(cfg, batch)
    label, context = withhold(cfg, label, context, k_label)
    k_drop = k_drop if cfg.net.dropout else None
    if cfg.mirror:
        x_0 = mirror_half(x_0, k_mirror)
    if cfg.schedule == "learned":
        return vdm_loss(cfg, params, x_0, label, k_eps, k_drop, context), (state.extra, {})
    t, weight = draw_t(cfg, state.extra, k_t, len(x_0))
    eps = jax.random.normal(k_eps, x_0.shape, x_0.dtype)
    loss = losses(cfg, params, x_0, t, eps, label, k_drop, context)
    mean, extra = (weight * loss).mean(), state.extra
    if cfg.times == "importance":
        extra = importance.update_history(extra, t, loss, axis_name)
    return mean, (extra, {})


# ------------------------------------------------------------------------------------ likelihood


def nll_nats(cfg: Config, params: Params, batch: dict, key: Key[Array, ""]) -> Float[Array, "B"]:
    """Returns an unbiased estimate of an upper bound on -log p(x_0) per example.

    It draws cfg.terms of the bound's T terms, all if cfg.terms is 0. With a learned schedule it
    draws max(1, cfg.terms) values of u.
    """
    x_0 = preprocess(cfg, batch)
    label, context = labels_in(cfg, batch, len(x_0)), context_in(cfg, batch)
    k_t, k_eps = jax.random.split(key)
    if cfg.schedule == "learned":

        def estimate(k):
            return continuous_nll(cfg, params, x_0, label, k, context=context)

        return jax.lax.map(estimate, jax.random.split(k_eps, max(1, cfg.terms))).mean(0)
    schedule = schedule_of(cfg, params)
    fn, prediction = predict_fn_of(cfg, params, label, context=context)
    options = {"levels": _grey_levels(cfg), "sigma2": cfg.variance, "prediction": prediction}
    if cfg.terms in (0, cfg.T):
        return vlb(schedule, fn, x_0, k_eps, **options)

    def term(t, i):
        eps = jax.random.normal(jax.random.fold_in(k_eps, i), x_0.shape, x_0.dtype)
        return vlb_term(schedule, fn, x_0, t, eps, **options)

    mean = mean_over_steps(term, k_t, len(x_0), T=cfg.T, terms=cfg.terms)
    return cfg.T * mean + prior_kl(schedule, x_0)


def evaluate(cfg: Config, state: State, batch: dict, key: Key[Array, ""]) -> dict:
    """Returns `nll_nats` of each example, and for images `nll_bits_per_dim`; see `make`."""
    nll = nll_nats(cfg, EMA(cfg.ema).read(state), batch, key)
    if not cfg.is_image:
        return {"nll_nats": nll}
    return {"nll_nats": nll, "nll_bits_per_dim": nll / _nats_per_bit_per_dim(cfg)}


# ------------------------------------------------------------------- sampling (DDPM, algorithm 2)


def generate(
    cfg: Config,
    params: Params,
    key: Key[Array, ""],
    *,
    n: int,
    label: Label = None,
    context: Context = None,
    negative: Context = None,
    w: Any = 0.0,
    sampler: str = "ddpm",
    steps: int = 0,
    eta: Any = 0.0,
    spacing: str | None = None,
) -> Sample:
    """Samples n images [n, H, W, C] in [0, 1], points or latents.

    label: a class in 0..classes-1, one for all or [n]; by default the classes in turn.
    context: [L, E] for all, or [n, L, E]; by default none. negative: see `predict_fn_of`.
    w: guidance weight, see `guide`.
    sampler: ddpm (DDPM's algorithm 2) | ddim | dpm_solver | heun. eta: of ddim.
    steps: 0 is all T. spacing: which steps, see `schedules.spaced`; by default uniform, for
        dpm_solver and heun log_snr.
    """
    if _is_guided(w) and not ((cfg.classes or cfg.context) and cfg.unlabelled):
        rule = "guidance (w) needs labels or contexts in training, some of them withheld"
        raise ValueError(f"{rule}: set model.classes or model.context, and model.unlabelled")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is an option of the sampler ddim, not of {sampler!r}")
    # Callers may not pass the class that stands for no label: `predict_fn_of` accepts it.
    label = labels(label, cfg.classes, (n,), in_turn=True)
    schedule, steps = schedule_of(cfg, params), steps or cfg.T
    default_spacing = "log_snr" if sampler in ("dpm_solver", "heun") else "uniform"
    fn, prediction = predict_fn_of(cfg, params, label, w, context=context, negative=negative)
    options = {
        "steps": steps,
        "spacing": spacing or default_spacing,
        "clip": 1.0 if cfg.is_image else None,
        "prediction": prediction,
    }
    k_start, k_steps = jax.random.split(key)
    x_T = shard_rows(jax.random.normal(k_start, (n, *cfg.shape), jnp.float32))
    if sampler == "ddpm":
        x_0 = sample_ddpm(schedule, fn, x_T, k_steps, sigma2=cfg.variance, **options)
    elif sampler == "ddim":
        x_0 = sample_ddim(schedule, fn, x_T, k_steps, eta=eta, **options)
    elif sampler == "dpm_solver":
        x_0 = sample_dpm_solver(schedule, fn, x_T, **options)
    elif sampler == "heun":
        x_0 = sample_heun(schedule, fn, x_T, **options)
    else:
        raise ValueError(f"sampler must be ddpm, ddim, dpm_solver or heun, not {sampler!r}")
    return jnp.clip((x_0 + 1) / 2, 0, 1) if cfg.is_image else x_0


# ------------------------------------------------------------------------------------ the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """Returns the diffusion model as a Family.

    Batches hold `image` or `points` (float32 [B, ...], such as latents), `label` if cfg.classes is
    set, and `context` [B, L, E] if cfg.context is.

    evaluate: `nll_nats`, an unbiased estimate of an upper bound on -log p(x | label, context) per
        example; of images also `nll_bits_per_dim`. It and `sample` use the averaged parameters.
    sample(state, key, *, n, label=None, context=None, negative=None, w=0.0, sampler="ddpm",
            steps=0, eta=0.0, spacing=None):
        images [n, H, W, C] in [0, 1], points or latents. The options are those of `generate`.
    """
    ema = EMA(cfg.ema)
    loss = partial(training_loss, cfg, axis_name=axis_name)
    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)

    def sample(
        state,
        key,
        *,
        n,
        label=None,
        context=None,
        negative=None,
        w=0.0,
        sampler="ddpm",
        steps=0,
        eta=0.0,
        spacing=None,
    ):
        given = {"label": label, "context": context, "negative": negative, "w": w}
        options = {"sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing}
        return generate(cfg, ema.read(state), key, n=n, **given, **options)

    rules = sharding.UNET if cfg.net.kind == "unet" else sharding.TRANSFORMER
    return Family(partial(init_state, cfg), step, partial(evaluate, cfg), sample, rules)
