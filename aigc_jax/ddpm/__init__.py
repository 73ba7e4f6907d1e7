"""Denoising diffusion: Ho et al. 2020 ("DDPM"), and what came of it: implicit samplers (Song et al. 2021, "DDIM"),
cosine schedules and learned variances (Nichol & Dhariwal 2021), guidance (Ho & Salimans 2022), v (Salimans & Ho 2022),
learned schedules in continuous time (Kingma et al. 2021, "VDM").

A process q adds noise in T steps; a net sees x_t and t and says what was added. Samplers and bounds are functions of a
`Schedule` and an `eps_fn(x_t, t) -> eps_hat`, whatever made it: a net, or an exact score. Images are floats in [-1, 1]
here; only `preprocess` sees whole-number pixels, and `Family.sample` gives images in [0, 1].

    family = make(Config(shape=(8, 8, 1), levels=17, net=Net(widths=(32, 64), groups=8)))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ..core import EMA, Family, Optim, Optimizer, State, floats, labels, make_step, pixels, spread, start
from .binomial import DiscreteConfig, make_discrete
from .bounds import (
    continuous_vlb,
    gaussian_kl,
    log_discretised,
    low_discrepancy,
    ode_log_likelihood,
    prior_kl,
    step_at,
    vlb,
    vlb_term,
    vlb_terms,
)
from .nets import MLP, DiT, Net, UNet, module
from .process import (
    Given,
    Sample,
    Schedule,
    at,
    convert,
    cosine_schedule,
    discretise,
    learned_variance,
    linear_schedule,
    noise2,
    q_posterior,
    q_sample,
    respace,
    roots,
)
from .samplers import (
    ddim_invert,
    guide,
    inpaint,
    interpolate,
    said,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    slerp,
)

__all__ = [
    "Config", "DiT", "DiscreteConfig", "MLP", "Net", "Schedule", "UNet", "continuous_vlb", "convert", "cosine_schedule",
    "ddim_invert", "discretise", "eps_fn_of", "gamma", "gaussian_kl", "guide", "init_gamma", "inpaint", "interpolate",
    "learned_variance", "linear_schedule", "log_discretised", "make", "make_discrete", "noise2", "ode_log_likelihood",
    "predict", "predict_fn_of", "preprocess", "prior_kl", "q_posterior", "q_sample", "respace", "sample_ddim",
    "sample_ddpm", "sample_dpm_solver", "sample_heun", "schedule_of", "slerp", "vlb", "vlb_terms",
]  # fmt: skip

Params = Any
Label = Any  # classes 0..classes-1 as whole numbers [B], or one for all; `core.labels` checks them


@dataclass(frozen=True)
class Config:
    """Defaults: DDPM's for CIFAR-10 (section 4 and appendix B)."""

    shape: tuple[int, ...] = (32, 32, 3)  # (H, W, C) of images, (d,) of points
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    classes: int = 0  # the net is given a label in 0..classes-1; 0: unconditional
    unlabelled: float = 0.1  # share of labels withheld in training, for guidance; nothing without classes
    T: int = 1000
    schedule: str = "linear"  # linear | cosine | learned (VDM: continuous time, T only where it is sampled)
    prediction: str = "eps"  # eps | x_0 | v | mu
    variance: str = "beta"  # of p(x_{t-1} | x_t): beta | beta_tilde | learned, between them
    objective: str = "simple"  # simple | vlb | hybrid | snr | truncated_snr | min_snr
    times: str = "uniform"  # how t is drawn: uniform | low_discrepancy | importance
    terms: int = 8  # t that `evaluate` draws for its estimate of the bound; 0: all T (of a learned schedule, one)
    mirror: bool = False  # half of the training images are mirrored, left to right; DDPM's of CIFAR-10 are
    net: Net = Net()
    ema: float = 0.9999
    micro: int = 1
    optim: Optimizer = Optim(lr=2e-4, clip=1.0, warmup=5000)

    def __post_init__(self):
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"model.shape must be (H, W, C) or (d,), all positive, got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"model.levels must lie in 2..256, got {self.levels}")
        for field, low in {"classes": 0, "T": 1, "terms": 0, "micro": 1}.items():
            if getattr(self, field) < low:
                raise ValueError(f"model.{field} must be at least {low}, got {getattr(self, field)}")
        if self.T > 10**6:  # a schedule is an array of T numbers
            raise ValueError(f"model.T must be at most 1,000,000, got {self.T}")
        choices = {
            "schedule": (*_SCHEDULES, "learned"),
            "prediction": ("eps", "x_0", "v", "mu"),
            "variance": ("beta", "beta_tilde", "learned"),
            "objective": ("simple", "vlb", "hybrid", *_WEIGHTS),
            "times": ("uniform", "low_discrepancy", "importance"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}")
        if not 0 <= self.unlabelled < 1:
            raise ValueError(f"model.unlabelled must lie in [0, 1), got {self.unlabelled}")
        if self.mirror and len(self.shape) == 1:
            raise ValueError(f"model.mirror is for images, model.shape {tuple(self.shape)} is of points")
        if self.variance == "learned" and self.objective not in ("vlb", "hybrid"):
            raise ValueError(f"model.variance 'learned' is trained by objective vlb or hybrid, not {self.objective}")
        if self.objective == "hybrid" and self.variance != "learned":
            raise ValueError("model.objective 'hybrid' is simple, and vlb for a learned variance: set model.variance")
        if self.objective == "truncated_snr" and self.prediction == "eps":
            raise ValueError("model.objective 'truncated_snr' is for nets that do not predict eps: Salimans & Ho's "
                             "weight of eps grows without bound")  # fmt: skip
        if self.schedule == "learned":
            asked = (self.prediction, self.variance, self.objective, self.times)
            if asked != ("eps", "beta_tilde", "vlb", "low_discrepancy"):
                raise ValueError("model.schedule 'learned' (VDM) goes with prediction eps, variance beta_tilde, "
                                 f"objective vlb and times low_discrepancy, got {', '.join(asked)}")  # fmt: skip
        else:
            _SCHEDULES[self.schedule](self.T)
        self.net.check(self.shape)
        EMA(self.ema)

    def check(self, info) -> None:
        """Refuses data (a `data.Info`) that this model cannot take, before anything compiles."""
        kind = "image" if len(self.shape) == 3 else "points"
        if info.kind != kind:
            raise ValueError(f"model.shape {tuple(self.shape)} is for {kind}, this data set holds {info.kind}")
        if tuple(info.shape) != tuple(self.shape):
            raise ValueError(f"model.shape is {tuple(self.shape)}, the examples are {tuple(info.shape)}")
        if kind == "image" and info.levels != self.levels:
            raise ValueError(f"model.levels is {self.levels}, the images have {info.levels} levels")
        if self.classes and info.classes != self.classes:
            raise ValueError(f"model.classes is {self.classes}, the examples have {info.classes or 'no'} classes")


# ------------------------------------------------------------------------------------------------ schedule and net

_SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


def init_gamma(key: Key[Array, ""], *, levels: int = 256) -> Params:
    """gamma from 2 log(2 / 6(levels - 1)), where the noise is a sixth of the distance of grey levels, to 5, nearly
    straight between them. Of 256 levels the first is VDM's -13.3 (section 6).

    The sigmoids rise at places of their own, spread over [0, 1]; with all of them at one place, as biases of 0 have
    it, gamma stays nearly straight however long it learns.
    """
    k_first, k_places, k_last = jax.random.split(key, 3)
    return {
        "ends": jnp.array([2 * math.log(2 / 6 / (levels - 1)), 5.0], jnp.float32),
        "line": jnp.zeros((), jnp.float32),
        "first": 0.5 + 0.25 * jax.random.normal(k_first, (1024,), jnp.float32),
        "place": math.log(2) * jax.random.uniform(k_places, (1024,), jnp.float32),  # log 2: the line's end, softplus(0)
        "last": jax.random.normal(k_last, (1024,), jnp.float32) - 6.0,
    }


def gamma(params: Params, u: Float[Array, "B"]) -> Float[Array, "B"]:
    """VDM's monotone net (appendix H): minus the log signal-to-noise ratio at u in [0, 1], both ends learned.

    u and 1024 sigmoids of it with positive weights, scaled so that `ends` are the values at 0 and 1.
    """

    def rise(u):
        line = jax.nn.softplus(params["line"]) * u
        slope = 20 * jax.nn.softplus(params["first"])
        h = jax.nn.sigmoid(slope[None] * (line[:, None] - params["place"][None]))
        return line + h @ jax.nn.softplus(params["last"])

    low, high = rise(jnp.array([0.0, 1.0], jnp.float32))
    return params["ends"][0] + (params["ends"][1] - params["ends"][0]) * (rise(u) - low) / (high - low)


def schedule_of(cfg: Config, params: Params) -> Schedule:
    """The T levels that a model samples through and is scored on."""
    if cfg.schedule == "learned":
        return discretise(lambda u: gamma(params["gamma"], u), cfg.T)
    return _SCHEDULES[cfg.schedule](cfg.T)


def preprocess(cfg: Config, batch: dict) -> Sample:
    """Pixels 0..levels-1 as floats in [-1, 1]; points as they are.

    Raises ValueError for pixels that are floats, or beyond levels - 1.
    """
    if "image" in batch:
        return pixels(batch["image"], cfg.levels) * (2 / (cfg.levels - 1)) - 1
    return jnp.asarray(batch["points"], jnp.float32)


def _net(cfg: Config):
    return module(cfg.net, cfg.shape, cfg.classes, several=2 if cfg.variance == "learned" else 1)


def _labels_or_none(cfg: Config, label: Label, n: int):
    """`labels` of one more class, which stands for none."""
    return labels(label, cfg.classes + 1 if cfg.classes else 0, (n,))


def predict(
    cfg: Config, params: Params, x_t: Given, t: Array, label: Label = None, key: Key[Array, ""] | None = None
) -> tuple[Sample, Sample | None]:
    """What the net says of x_t: its `cfg.prediction`, and of a learned variance the raw v, else None.

    t: steps 0..T-1; of a learned schedule u in [0, 1]. label: classes stands for none. With a key, dropout is on.
    """
    if cfg.classes and label is None:
        label = jnp.full(len(x_t), cfg.classes)
    x_t, label = floats("x_t", x_t), _labels_or_none(cfg, label, len(x_t))
    time = 1000.0 * t / (1 if cfg.schedule == "learned" else cfg.T)
    rngs = None if key is None else {"dropout": key}
    out = _net(cfg).apply({"params": params["net"]}, x_t, time, label, rngs=rngs)
    if label is not None:
        out = jnp.where(label.reshape(-1, *[1] * (out.ndim - 1)) < 0, jnp.nan, out)  # see core.labels
    value, *raw = jnp.split(out.reshape(len(x_t), *out.shape[1:]), 2, -1) if cfg.variance == "learned" else [out]
    return value.reshape(x_t.shape), raw[0].reshape(x_t.shape) if raw else None


def _native(cfg: Config, schedule: Schedule, value: Sample, x_t: Sample, t: Array) -> tuple[Sample, str]:
    """The net's value as samplers and bounds take it, and its name: itself, but x_0 for mu, which is of cfg.T steps."""
    if cfg.prediction != "mu":
        return value, cfg.prediction
    return convert(schedule, value, x_t, t, given="mu", wanted="x_0"), "x_0"


def predict_fn_of(cfg: Config, params: Params, label: Label = None, w: Any = 0.0):
    """(fn, prediction) for samplers and bounds: fn(x_t, t) of the net for these labels, guided where w is not 0.

    fn gives the net's own prediction, "eps", "x_0" or "v", without a detour through another; of a net that predicts mu
    it gives x_0. t are steps, for VDM's too. Of a net with learned variances fn gives (prediction, raw), for
    sigma2 = "learned"; guided, raw is the labelled one.
    """
    schedule = schedule_of(cfg, params)
    continuous = cfg.schedule == "learned"
    guided = not isinstance(w, (int, float)) or w != 0
    if guided and label is None:
        raise ValueError("w guides towards labels: give a label for each example")

    def one(x_t, t, label):
        # The levels of `discretise`: both ends, of one step the last.
        time = t if not continuous else t / (cfg.T - 1) if cfg.T > 1 else jnp.ones(len(x_t))
        value, raw = predict(cfg, params, x_t, time, label)
        return _native(cfg, schedule, value, x_t, t)[0], raw

    def fn(x_t, t):
        if guided:
            towards = _labels_or_none(cfg, label, len(x_t))
            nobody = jnp.full_like(towards, cfg.classes)
            value, raw = one(*(jnp.concatenate(pair) for pair in ((x_t, x_t), (t, t), (towards, nobody))))
            value, raw = guide(*jnp.split(value, 2), w), None if raw is None else raw[: len(x_t)]
        else:
            value, raw = one(x_t, t, label)
        return value if raw is None else (value, raw)

    return fn, "x_0" if cfg.prediction == "mu" else cfg.prediction


def eps_fn_of(cfg: Config, params: Params, label: Label = None, w: Any = 0.0):
    """eps_fn(x_t, t) of the net: `predict_fn_of`, converted to eps. Of a net with learned variances it gives
    (eps_hat, raw). Samplers and bounds lose fewer digits with `predict_fn_of`.
    """
    schedule = schedule_of(cfg, params)
    fn, prediction = predict_fn_of(cfg, params, label, w)

    def eps_fn(x_t, t):
        value, raw = said(fn, x_t, t)
        eps_hat = convert(schedule, value, x_t, t, given=prediction, wanted="eps")
        return eps_hat if raw is None else (eps_hat, raw)

    return eps_fn


# ------------------------------------------------------------------------------------------------------ objectives

# Weights of |x_0 - x_0_hat|^2 by the signal-to-noise ratio (Salimans & Ho 2022, section 4; Hang et al. 2023).
_WEIGHTS = {
    "snr": lambda snr: snr,  # |eps - eps_hat|^2
    "truncated_snr": lambda snr: jnp.maximum(snr, 1.0),
    "min_snr": lambda snr: jnp.minimum(snr, 5.0),
}


def _mean(x: Array) -> Float[Array, "B"]:
    return x.reshape(len(x), -1).mean(-1)


def losses(
    cfg: Config, params: Params, x_0: Sample, t: Int[Array, "B"], eps: Sample, label: Label, key=None
) -> Float[Array, "B"]:
    """The objective at one t an example.

    simple: mean square of the net's own error, whatever it predicts (DDPM eq. 14; for mu the "MSE" of its table 2).
    vlb: T L_t in bits a dimension, whose mean over t is the bound but for L_T (DDPM eq. 5).
    hybrid: simple + .001 vlb, in which only the variance learns (Nichol & Dhariwal, eq. 16).
    snr, truncated_snr, min_snr: mean square error of x_0 with that weight.
    """
    schedule = schedule_of(cfg, params)
    x_t = q_sample(schedule, x_0, t, eps)
    signal, noise = (at(a, t, x_0) for a in roots(schedule))
    value, raw = predict(cfg, params, x_t, t, label, key)

    def bound(value):
        levels = cfg.levels if len(cfg.shape) == 3 else None
        value, prediction = _native(cfg, schedule, value, x_t, t)
        told = value if raw is None else (value, raw)
        term = vlb_term(
            schedule, lambda *_: told, x_0, t, eps, levels=levels, sigma2=cfg.variance, prediction=prediction
        )
        return cfg.T * term / (math.prod(cfg.shape) * math.log(2))

    if cfg.objective in _WEIGHTS:
        ab = jnp.asarray(schedule.alpha_bar / noise2(schedule), jnp.float32)[t]
        x_0_hat = convert(schedule, value, x_t, t, given=cfg.prediction, wanted="x_0")
        return _WEIGHTS[cfg.objective](ab) * _mean((x_0 - x_0_hat) ** 2)
    if cfg.objective == "vlb":
        return bound(value)
    target = {  # of x_0 and eps themselves, not of x_t through a division by sqrt(alpha_bar)
        "eps": eps,
        "x_0": x_0,
        "v": signal * eps - noise * x_0,
        "mu": q_posterior(schedule, x_0, x_t, t)[0],
    }[cfg.prediction]
    simple = _mean((target - value) ** 2)
    return simple if cfg.objective == "simple" else simple + 0.001 * bound(jax.lax.stop_gradient(value))


def _continuous(cfg: Config, params: Params, x_0: Sample, label: Label, key, dropout=None) -> Float[Array, "B"]:
    """VDM's bound, nats."""
    levels = cfg.levels if len(cfg.shape) == 3 else None
    return continuous_vlb(
        lambda u: gamma(params["gamma"], u), lambda x, u: predict(cfg, params, x, u, label, dropout)[0], x_0, key,
        levels=levels,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """The diffusion model as a Family, on batches `image` or `points`, with `label` where cfg.classes.

    evaluate: `nll_nats`, an upper bound on -log p per example, unbiased from cfg.terms of its T terms; of images also
        `nll_bits_per_dim`.
    sample(state, key, *, n, label=None, w=0.0, sampler="ddpm", steps=0, eta=0.0, spacing=None): images [n, H, W, C] in
        [0, 1], or points. sampler: ddpm | ddim | dpm_solver | heun; steps: 0 is all T; w: guidance.
        label: one class in 0..classes-1, or [n]; by default the classes in turn.
        spacing: which steps, see `spaced`; by default uniform, of dpm_solver and heun log_snr.
    """
    ema, D, images = EMA(cfg.ema), math.prod(cfg.shape), len(cfg.shape) == 3
    levels = cfg.levels if images else None

    def init(key):
        k_net, k_gamma = jax.random.split(key)
        label = jnp.zeros(1, int) if cfg.classes else None
        params = {
            "net": _net(cfg).init(k_net, *(jnp.zeros((1, *shape), jnp.float32) for shape in (cfg.shape, ())), label)[
                "params"
            ]
        }
        if cfg.schedule == "learned":
            params["gamma"] = init_gamma(k_gamma, levels=levels or 256)
        extra = None
        if cfg.times == "importance":
            extra = {"square": jnp.ones(cfg.T, jnp.float32), "count": jnp.zeros(cfg.T, jnp.int32)}
        return start(params, cfg.optim, extra=extra, ema=ema)

    def draw(extra, key, n):
        """t [n], and what makes a mean over them one over all t."""
        if cfg.times == "low_discrepancy":
            return step_at(low_discrepancy(key, n), cfg.T), jnp.ones(n, jnp.float32)
        if cfg.times == "uniform":
            return jax.random.randint(key, (n,), 0, cfg.T), jnp.ones(n, jnp.float32)
        # p_t ~ sqrt(E[L_t^2]) once every t was seen ten times (Nichol & Dhariwal, eq. 18), a thousandth of it uniform.
        # The paper keeps the last ten losses of each t, ours a running mean.
        p = jnp.sqrt(extra["square"])
        total = p.sum()
        p = 0.999 * p / jnp.where(total > 0, total, 1.0) + 0.001 / cfg.T
        p = jnp.where((extra["count"] >= 10).all() & (total > 0), p, 1 / cfg.T)
        t = jax.random.categorical(key, jnp.log(p), shape=(n,))
        return t, 1 / (cfg.T * p[t])

    def remember(extra, t, each):
        if cfg.times != "importance":
            return extra
        seen = (
            jnp.zeros(cfg.T, jnp.float32).at[t].add(jax.lax.stop_gradient(each) ** 2),
            jnp.zeros(cfg.T, jnp.int32).at[t].add(1),
        )
        if axis_name is not None:  # extra is equal on every device: what is recorded is gathered
            seen = jax.lax.psum(seen, axis_name)
        square, count = seen
        mean = 0.9 * extra["square"] + 0.1 * square / jnp.maximum(count, 1)
        return {"square": jnp.where(count > 0, mean, extra["square"]), "count": extra["count"] + count}

    def given(batch, n):
        return labels(batch.get("label") if cfg.classes else None, cfg.classes, (n,))

    def withheld(label, key):
        if label is None:
            return None
        return jnp.where(jax.random.uniform(key, label.shape) < cfg.unlabelled, cfg.classes, label)

    def loss(params, state, batch, key):
        k_t, k_eps, k_label, k_drop, k_mirror = jax.random.split(key, 5)
        x_0 = preprocess(cfg, batch)
        label = withheld(given(batch, len(x_0)), k_label)
        k_drop = k_drop if cfg.net.dropout else None
        if cfg.mirror:
            side = jax.random.bernoulli(k_mirror, 0.5, (len(x_0), 1, 1, 1))
            x_0 = jnp.where(side, x_0[:, :, ::-1], x_0)
        if cfg.schedule == "learned":
            fixed = jax.lax.stop_gradient(params)
            inside = {**params["gamma"], "ends": fixed["gamma"]["ends"]}
            scale = 1 / (D * math.log(2))
            # The bound depends on the ends of gamma only; between them it learns to lessen the estimate's variance.
            ends = {**fixed["gamma"], "ends": params["gamma"]["ends"]}
            k_drops = (None, None) if k_drop is None else jax.random.split(k_drop)
            k_each, k_noisy = jax.random.split(k_eps)
            each = scale * _continuous(cfg, {**params, "gamma": ends}, x_0, label, k_each, k_drops[0])
            noisy = scale * _continuous(cfg, {**fixed, "gamma": inside}, x_0, label, k_noisy, k_drops[1])
            noisy = (noisy**2).mean()
            return each.mean() + noisy - jax.lax.stop_gradient(noisy), (state.extra, {})
        t, weight = draw(state.extra, k_t, len(x_0))
        eps = jax.random.normal(k_eps, x_0.shape, x_0.dtype)
        each = losses(cfg, params, x_0, t, eps, label, k_drop)
        return (weight * each).mean(), (remember(state.extra, t, each), {})

    def evaluate(state, batch, key):
        params, x_0 = ema.read(state), preprocess(cfg, batch)
        label = given(batch, len(x_0))
        k_t, k_eps = jax.random.split(key)
        if cfg.schedule == "learned":
            count = max(1, cfg.terms)
            draws = jax.lax.map(lambda k: _continuous(cfg, params, x_0, label, k), jax.random.split(k_eps, count))
            nll = draws.mean(0)
        else:
            schedule = schedule_of(cfg, params)
            fn, prediction = predict_fn_of(cfg, params, label)
            how = {"levels": levels, "sigma2": cfg.variance, "prediction": prediction}
            if cfg.terms in (0, cfg.T):
                nll = vlb(schedule, fn, x_0, k_eps, **how)
            else:
                u = jax.random.uniform(k_t, (len(x_0),), jnp.float32)

                def term(i):
                    t = step_at((u + i / cfg.terms) % 1, cfg.T)
                    eps = jax.random.normal(jax.random.fold_in(k_eps, i), x_0.shape, x_0.dtype)
                    return vlb_term(schedule, fn, x_0, t, eps, **how)

                nll = cfg.T * jax.lax.map(term, jnp.arange(cfg.terms)).mean(0) + prior_kl(schedule, x_0)
        return {"nll_nats": nll, **({"nll_bits_per_dim": nll / (D * math.log(2))} if images else {})}

    def sample(state: State, key, *, n: int, label=None, w=0.0, sampler="ddpm", steps=0, eta=0.0,
               spacing=None):  # fmt: skip
        guided = not isinstance(w, (int, float)) or w != 0
        if guided and not (cfg.classes and cfg.unlabelled):
            raise ValueError("w guides a model that was trained with labels and, a share of the time, without")
        if eta and sampler != "ddim":
            raise ValueError(f"eta is of the sampler ddim, not of {sampler!r}")
        # The label for none, cfg.classes, is not for callers: `eps_fn_of` takes it.
        label = labels(label, cfg.classes, (n,), in_turn=True)
        params = ema.read(state)
        schedule, steps = schedule_of(cfg, params), steps or cfg.T
        spacing = spacing or {"dpm_solver": "log_snr", "heun": "log_snr"}.get(sampler, "uniform")
        fn, prediction = predict_fn_of(cfg, params, label, w)
        how = {"clip": 1.0 if images else None, "prediction": prediction}
        k_start, k_way = jax.random.split(key)
        x_T = spread(jax.random.normal(k_start, (n, *cfg.shape), jnp.float32))
        if sampler == "ddpm":
            x_0 = sample_ddpm(schedule, fn, x_T, k_way, steps=steps, spacing=spacing, sigma2=cfg.variance, **how)
        elif sampler == "ddim":
            x_0 = sample_ddim(schedule, fn, x_T, k_way, steps=steps, eta=eta, spacing=spacing, **how)
        elif sampler in ("dpm_solver", "heun"):
            solve = {"dpm_solver": sample_dpm_solver, "heun": sample_heun}[sampler]
            x_0 = solve(schedule, fn, x_T, steps=steps, spacing=spacing, **how)
        else:
            raise ValueError(f"sampler must be ddpm, ddim, dpm_solver or heun, not {sampler!r}")
        return jnp.clip((x_0 + 1) / 2, 0, 1) if images else x_0

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample)
