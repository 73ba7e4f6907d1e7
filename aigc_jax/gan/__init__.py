"""Generative adversarial networks: Goodfellow et al. 2014 ("GAN" below), conditional (Mirza & Osindero 2014, "CGAN"),
convolutional (Radford et al. 2016, "DCGAN"), Wasserstein (Arjovsky et al. 2017, "WGAN"; Gulrajani et al. 2017,
"WGAN-GP"), least squares (Mao et al. 2017), hinge with spectral normalisation (Miyato et al. 2018, "SNGAN"), packed
(Lin et al. 2018, "PacGAN"), unrolled (Metz et al. 2017).

A generator G makes samples of noise z; a discriminator D, or critic, gives a sample one logit, high for real ones. Each
has its own optimizer, and an update of one leaves the other as it is. Images are floats in [-1, 1] here; only
`preprocess` sees whole-number pixels, and `Family.sample` gives images in [0, 1].

    family = make(Config(shape=(28, 28, 1)))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, Shaped

from ..core import (
    EMA,
    Family,
    Optim,
    Optimizer,
    State,
    descend,
    finish,
    floats,
    labels,
    one_hot,
    parts,
    pixels,
    spread,
    start,
)
from .nets import Discriminator, Generator, Net

__all__ = [
    "Config",
    "Discriminator",
    "Generator",
    "Net",
    "discriminate",
    "discriminator_loss",
    "generate",
    "generator_loss",
    "generator_of",
    "gradient_penalty",
    "make",
    "noise",
    "preprocess",
    "r1_penalty",
]

Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...} of one net
Sample = Float[Array, "B ..."]  # images [B, H, W, C] in [-1, 1], or points [B, d]
Logits = Float[Array, "B"]
Label = Any  # classes 0..classes-1 as whole numbers [B], or one for all; `core.labels` checks them


@dataclass(frozen=True)
class Config:
    """Defaults: the MNIST nets of GAN, from the authors' code, with DCGAN's optimizer."""

    shape: tuple[int, ...] = (28, 28, 1)  # (H, W, C) of images, (d,) of points
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    classes: int = 0  # both nets are given a label in 0..classes-1 (CGAN); 0: unconditional
    condition: str = "concat"  # concat | projection (Miyato & Koyama 2018): how D takes it; G has it beside the noise
    latent_dim: int = 100
    latent: str = "normal"  # normal | uniform in [0, 1) (CGAN, section 4.1)
    gen: Net = Net(init="uniform", init_scale=0.05)
    disc: Net = Net(widths=(240, 240), activation="maxout", dropout=(0.2, 0.5), init="uniform", init_scale=0.005)
    output_bias: tuple[float, ...] = ()  # mlp: the last layer of G begins with these biases; (): zeros
    loss: str = "non_saturating"  # minimax | non_saturating | least_squares | wasserstein | hinge
    penalty: str = "none"  # none | gp (WGAN-GP) | r1 (Mescheder et al. 2018) | clip (WGAN)
    penalty_weight: float | None = None  # None: lambda = 10 of gp, gamma = 10 of r1, the bound .01 of clip
    n_critic: int = 1  # updates of D a step, each on its own part of the batch
    packing: int = 1  # samples that D judges together (PacGAN)
    unrolled: int = 0  # updates of D ahead; G then minimises minus D's whole loss after them (Metz et al. 2017)
    ema: float = 0.0  # decay of the generator's average, BatchNorm statistics included; 0: none
    micro: int = 1  # micro-batches an update
    optim: Optimizer = Optim(lr=2e-4, b1=0.5)  # of G
    disc_optim: Optimizer = Optim(lr=2e-4, b1=0.5)

    def __post_init__(self):
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"model.shape must be (H, W, C) or (d,), all positive, got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"model.levels must lie in 2..256, got {self.levels}")
        lowest = {"classes": 0, "latent_dim": 1, "n_critic": 1, "packing": 1, "unrolled": 0, "micro": 1}
        for field, low in lowest.items():
            if getattr(self, field) < low:
                raise ValueError(f"model.{field} must be at least {low}, got {getattr(self, field)}")
        choices = {
            "condition": ("concat", "projection"),
            "latent": ("normal", "uniform"),
            "loss": tuple(_LOSSES),
            "penalty": ("none", "gp", "r1", "clip"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}")
        for name, net in (("gen", self.gen), ("disc", self.disc)):
            net.check(name)
            if net.kind != "mlp":
                halvings = len(net.widths)
                if len(self.shape) != 3 or any(side % 2**halvings for side in self.shape[:2]):
                    raise ValueError(f"model.{name}.widths {net.widths} halve H and W {halvings} times, which shape "
                                     f"{self.shape} does not allow")  # fmt: skip
        if self.gen.norm == "spectral":
            raise ValueError("model.gen.norm 'spectral' is for the discriminator only: use none or batch")
        if self.disc.norm == "batch" and self.penalty in ("gp", "r1"):
            raise ValueError(
                f"model.disc.norm 'batch' makes a logit depend on the whole batch, and penalty {self.penalty!r} is on "
                "the slope at single examples (Gulrajani et al. 2017, section 4): use none or spectral"
            )
        if self.output_bias and (self.gen.kind != "mlp" or len(self.output_bias) != prod(self.shape)):
            raise ValueError(
                f"model.output_bias needs gen.kind mlp and {prod(self.shape)} values, got {len(self.output_bias)}"
            )
        if self.penalty_weight is not None and not self.penalty_weight > 0:
            raise ValueError(f"model.penalty_weight must be positive, got {self.penalty_weight}")
        if self.loss == "wasserstein" and self.penalty == "none" and self.disc.norm != "spectral":
            raise ValueError("model.loss 'wasserstein' needs a critic whose slope is held: penalty gp, r1 or clip, or "
                             "disc.norm spectral")  # fmt: skip
        if self.condition == "projection" and not self.classes:
            raise ValueError("model.condition 'projection' needs classes")
        of_d = self.disc_optim
        if self.unrolled and isinstance(of_d, Optim) and of_d.name != "sgd" and not of_d.eps_root:
            raise ValueError(f"model.unrolled looks through D's {of_d.name}, whose square root has no slope at 0: "
                             "set disc_optim.eps_root, say to 1e-12")  # fmt: skip
        EMA(self.ema)

    @property
    def weight(self) -> float:
        """The penalty's weight, or the bound of D's weights: as given, else that of the penalty's paper."""
        return (0.01 if self.penalty == "clip" else 10.0) if self.penalty_weight is None else self.penalty_weight

    @property
    def cuts(self) -> dict[str, int]:
        """What a batch must divide into."""
        return {"micro-batches": self.micro, "n_critic": self.n_critic, "packing": self.packing}

    def check(self, info) -> None:
        """Refuses data (a `data.Info`) that this model cannot take, before anything compiles."""
        kind = "image" if len(self.shape) == 3 else "points"
        if info.kind != kind:
            raise ValueError(f"model.shape {tuple(self.shape)} is for {kind}, this data set holds {info.kind}")
        if tuple(info.shape) != tuple(self.shape):
            raise ValueError(f"model.shape is {tuple(self.shape)}, the examples are {tuple(info.shape)}")
        if kind == "image" and info.levels != self.levels:
            raise ValueError(f"model.levels is {self.levels}, the images have {info.levels} levels")
        if self.classes and info.classes is None:
            raise ValueError(f"model.classes is {self.classes}, but the examples have no labels")
        if self.classes and info.classes != self.classes:
            raise ValueError(f"model.classes is {self.classes}, the examples have {info.classes} classes")


# ---------------------------------------------------------------------------------------------- losses and penalties

# (D's loss of real and fake logits, G's loss of fake logits); softplus(-l) = -log D, softplus(l) = -log(1 - D).
_LOSSES = {
    "minimax": (lambda r, f: nn.softplus(-r) + nn.softplus(f), lambda f: -nn.softplus(f)),
    "non_saturating": (lambda r, f: nn.softplus(-r) + nn.softplus(f), lambda f: nn.softplus(-f)),
    "least_squares": (lambda r, f: 0.5 * (jnp.square(r - 1) + jnp.square(f)), lambda f: 0.5 * jnp.square(f - 1)),
    "wasserstein": (lambda r, f: f - r, lambda f: -f),
    "hinge": (lambda r, f: nn.relu(1 - r) + nn.relu(1 + f), lambda f: -f),
}


def discriminator_loss(name: str, real_logits: Logits, fake_logits: Logits) -> Logits:
    """What D minimises, per pair of a real and a fake example.

    minimax, non_saturating: -log D(x) - log(1 - D(G(z))), D the sigmoid of the logit (GAN eq. 1)
    least_squares: ((r - 1)^2 + f^2) / 2 (Mao et al. 2017, eq. 9)
    wasserstein: f - r (WGAN eq. 2); needs a penalty
    hinge: max(0, 1 - r) + max(0, 1 + f) (SNGAN eq. 16)
    """
    return _LOSSES[name][0](real_logits, fake_logits)


def generator_loss(name: str, fake_logits: Logits) -> Logits:
    """What G minimises, per fake example.

    minimax: log(1 - D(G(z))) (GAN eq. 1), flat where D is sure; non_saturating: -log D(G(z)) (GAN, section 3)
    least_squares: (f - 1)^2 / 2; wasserstein, hinge: -f
    """
    return _LOSSES[name][1](fake_logits)


def _square_norms(slope: Sample) -> Logits:
    return jnp.sum(jnp.square(slope.reshape(slope.shape[0], -1)), -1)


def r1_penalty(critic: Callable[[Sample], Logits], real: Sample) -> Logits:
    """|grad_x D(x)|^2 at each real example (Mescheder et al. 2018, eq. 9, without gamma / 2).

    `critic` must judge every example by itself.
    """
    return _square_norms(jax.grad(lambda x: critic(x).sum())(real))


def gradient_penalty(critic: Callable[[Sample], Logits], real: Sample, fake: Sample, key: Key[Array, ""]) -> Logits:
    """(|grad_x D(x)| - 1)^2 at one point x of each line from a real to a fake example (WGAN-GP eq. 3, without lambda).

    The norm is over all axes of an example; where the slope is 0 its derivative is 0, not NaN. `critic` must judge
    every example by itself.
    """
    at = jax.random.uniform(key, (real.shape[0],) + (1,) * (real.ndim - 1), real.dtype)
    square = r1_penalty(critic, real + at * (fake - real))
    flat = square == 0
    norm = jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, square)))
    return jnp.square(norm - 1)


# ----------------------------------------------------------------------------------------------------- the nets applied


def _nets(cfg: Config, axis_name: str | None = None) -> dict[str, nn.Module]:
    projection = cfg.classes > 0 and cfg.condition == "projection"
    return {
        "gen": Generator(cfg.gen, tuple(cfg.shape), tuple(cfg.output_bias), axis_name),
        "disc": Discriminator(cfg.disc, projection, axis_name),
    }


def generate(cfg: Config, variables: Variables, z: Float[Array, "B Z"], label: Label = None) -> Sample:
    """G(z), with the running BatchNorm statistics: images in [-1, 1], or points.

    `variables` of a state: `generator_of(cfg, state)`.
    """
    return _nets(cfg)["gen"].apply(variables, z, one_hot(label, cfg.classes, z.shape[:1]), False)


def discriminate(
    cfg: Config, variables: Variables, x: Shaped[Array | np.ndarray, "B ..."], label: Label = None
) -> Logits:
    """D's logits of samples, with the running statistics. A packed D judges x with the packing - 1 that follow it."""
    x = floats("x", x)
    y = one_hot(label, cfg.classes, x.shape[:1])
    together = [jnp.concatenate([jnp.roll(a, -i, 0) for i in range(cfg.packing)], -1) for a in (x, y)]
    return _nets(cfg)["disc"].apply(variables, *together, False)


def _pack(cfg: Config, x):
    """[B, ..., C] -> [B / p, ..., C p]: p neighbours each, all real or all generated (PacGAN, section 3)."""
    if cfg.packing == 1:
        return x
    rows, *_, channels = x.shape
    if rows % cfg.packing:
        raise ValueError(f"a batch of {rows} does not divide by packing {cfg.packing}")
    rows //= cfg.packing
    together = jnp.moveaxis(x.reshape(rows, cfg.packing, *x.shape[1:]), 1, -2)
    return together.reshape(rows, *x.shape[1:-1], cfg.packing * channels)


def _average(cfg: Config) -> EMA:
    return EMA(cfg.ema, of=lambda state: {"params": state.params["gen"], "batch_stats": state.extra["gen"]})


def generator_of(cfg: Config, state: State) -> Variables:
    """What `generate` takes of a state: the generator's average where there is one, else the generator itself."""
    return _average(cfg).read(state)


def noise(cfg: Config, key: Key[Array, ""], n: int) -> Float[Array, "n Z"]:
    """z for n samples."""
    draw = jax.random.normal if cfg.latent == "normal" else jax.random.uniform
    return draw(key, (n, cfg.latent_dim), jnp.float32)


def preprocess(cfg: Config, batch: dict) -> Sample:
    """Pixels 0..levels-1 to floats in [-1, 1]; points as they are.

    Raises ValueError for pixels that are floats, or beyond levels - 1.
    """
    if len(cfg.shape) == 1:
        return batch["points"]
    return pixels(batch["image"], cfg.levels) * (2 / (cfg.levels - 1)) - 1


# ---------------------------------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """The GAN as a Family; params, opt_state and extra are {"gen": ..., "disc": ...}.

    step: n_critic updates of D, then one of G. With n_critic = 1 both see the same batch; the noise is always new.
    evaluate: `real_logit` and `fake_logit` of the example and of a fake one, and for losses that decide between the
        two, `real_accuracy` and `fake_accuracy` (compare them on training and held-out examples: their gap is what D
        knows by heart). G from its average, running statistics, no dropout.
    sample(state, key, *, n, label=None): label is one class in 0..classes-1, or [n]; where a conditional model is given
        none, the classes in turn.
    """
    nets = _nets(cfg, axis_name)
    ema = _average(cfg)

    def init(key):
        k_gen, k_disc = jax.random.split(key)
        z, y = (jnp.zeros((1, size), jnp.float32) for size in (cfg.latent_dim, cfg.classes))
        x = jnp.zeros((1, *cfg.shape[:-1], cfg.shape[-1] * cfg.packing), jnp.float32)
        variables = {
            "gen": nets["gen"].init(k_gen, z, y, False),
            "disc": nets["disc"].init(k_disc, x, jnp.tile(y, cfg.packing), False),
        }
        params = {net: v["params"] for net, v in variables.items()}
        extra = {net: v.get("batch_stats", {}) for net, v in variables.items()}
        return start(params, {"gen": cfg.optim, "disc": cfg.disc_optim}, extra=extra, ema=ema)

    def applied(net, params, stats, x, y, key):
        """A net in training: its output, and its statistics after it."""
        variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key}
        out, new = nets[net].apply(variables, x, y, True, rngs=rngs, mutable=["batch_stats"])
        return out, new.get("batch_stats", {})

    def given(batch):
        x = preprocess(cfg, batch)
        return x, one_hot(batch.get("label") if cfg.classes else None, cfg.classes, x.shape[:1])

    def fakes(params, stats, y, key):
        k_z, k_dropout = jax.random.split(key)
        return applied("gen", params, stats, spread(noise(cfg, k_z, y.shape[0])), y, k_dropout)

    def judged(params, stats, x, fake, y, key):
        """D's logits of real and of given fake examples, all packed, and its statistics after both."""
        k_real, k_fake = jax.random.split(key)
        real_logits, stats = applied("disc", params, stats, x, y, k_real)
        fake_logits, stats = applied("disc", params, stats, fake, y, k_fake)
        return real_logits, fake_logits, stats

    def compare(params, state, x, fake, y, key):
        """D's loss on packed examples, as `descend` takes it."""
        k_judge, k_at, k_penalty = jax.random.split(key, 3)
        real_logits, fake_logits, stats = judged(params, state.extra["disc"], x, fake, y, k_judge)
        value = discriminator_loss(cfg.loss, real_logits, fake_logits).mean()
        seen = {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}

        def critic(x):
            return applied("disc", params, stats, x, y, k_penalty)[0]

        if cfg.penalty == "gp":
            seen["penalty"] = gradient_penalty(critic, x, fake, k_at).mean()
            value += cfg.weight * seen["penalty"]
        if cfg.penalty == "r1":
            seen["penalty"] = r1_penalty(critic, x).mean()
            value += 0.5 * cfg.weight * seen["penalty"]
        return value, ({**state.extra, "disc": stats}, seen)

    def update_disc(loss, state, batch, key, micro):
        shared = {"micro": micro, "axis_name": axis_name}
        state, metrics = descend(loss, cfg.disc_optim, state, batch, key, net="disc", **shared)
        if cfg.penalty == "clip":
            bound = cfg.weight
            clipped = jax.tree.map(lambda w: jnp.clip(w, -bound, bound), state.params["disc"])
            state = state._replace(params={**state.params, "disc": clipped})
        return state, metrics

    def packed(*arrays):
        return tuple(_pack(cfg, a) for a in arrays)

    def disc_loss(params, state, batch, key):
        k_fake, k_compare = jax.random.split(key)
        x, y = given(batch)
        fake, _ = fakes(state.params["gen"], state.extra["gen"], y, k_fake)
        return compare(params, state, *packed(x, fake, y), k_compare)

    def gen_loss(params, state, batch, key):
        k_fake, k_disc, k_unrolled = jax.random.split(key, 3)
        x, y = given(batch)
        fake, stats = fakes(params, state.extra["gen"], y, k_fake)
        extra, (x, fake, y) = {**state.extra, "gen": stats}, packed(x, fake, y)

        def surrogate(disc, state, _, key):
            return compare(disc, state, x, fake, y, key)

        # Surrogate updates of D on this batch and these fakes: D's parameters become a function of G's.
        for i in range(cfg.unrolled):
            state, _ = update_disc(surrogate, state, batch, jax.random.fold_in(k_unrolled, i), 1)
        if cfg.unrolled:
            # G maximises all that D minimises (Metz et al. 2017, eq. 3): where D is at its best, only then has what G
            # does to D no part in G's gradient.
            return -surrogate(state.params["disc"], state, batch, k_disc)[0], (extra, {})
        _, fake_logits, _ = judged(state.params["disc"], state.extra["disc"], x, fake, y, k_disc)
        return generator_loss(cfg.loss, fake_logits).mean(), (extra, {})

    def step(state, batch, key):
        k_disc, k_gen = jax.random.split(key)
        for i, part in enumerate(parts(batch, cfg.n_critic)):
            state, seen = update_disc(disc_loss, state, part, jax.random.fold_in(k_disc, i), cfg.micro)
        shared = {"micro": cfg.micro, "axis_name": axis_name}
        state, metrics = descend(gen_loss, cfg.optim, state, part, k_gen, net="gen", **shared)
        return finish(state, ema), {**seen, **metrics}

    def evaluate(state, batch, key):
        x, label = preprocess(cfg, batch), batch.get("label") if cfg.classes else None
        fake = generate(cfg, generator_of(cfg, state), noise(cfg, key, x.shape[0]), label)
        judge = partial(discriminate, cfg, {"params": state.params["disc"], "batch_stats": state.extra["disc"]})
        values = {"real_logit": judge(x, label), "fake_logit": judge(fake, label)}
        if cfg.loss != "wasserstein":
            even = 0.5 if cfg.loss == "least_squares" else 0.0
            values["real_accuracy"] = (values["real_logit"] > even).astype(jnp.float32)
            values["fake_accuracy"] = (values["fake_logit"] < even).astype(jnp.float32)
        return values

    def sample(state: State, key, *, n: int, label=None):
        label = labels(label, cfg.classes, (n,), in_turn=True)
        x = generate(cfg, generator_of(cfg, state), noise(cfg, key, n), label)
        return (x + 1) / 2 if len(cfg.shape) == 3 else x

    return Family(init, step, evaluate, sample)
