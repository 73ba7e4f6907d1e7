"""Variational autoencoders (Kingma & Welling 2014, "Auto-Encoding Variational Bayes", AEVB below).

p(x, z) = p(x|z) N(z; 0, I), with a diagonal Gaussian q(z|x) from the encoder. Likelihoods and bounds are in nats,
summed over all pixels, per example. Images are floats in [0, 1]; only `preprocess` sees whole-number pixels.

    family = make(Config(shape=(8, 8, 1), levels=17))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from .core import EMA, Family, Optim, State, make_step, start

Params = dict[str, Any]  # {"encoder": ..., "decoder": ...}
Image = Float[Array, "B H W C"]
Latent = Float[Array, "B Z"]
Nats = Float[Array, "B"]

_ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "softplus": nn.softplus}


@dataclass(frozen=True)
class Config:
    """Defaults: the MNIST network of AEVB, section 5 (its 500 hidden units; our initialisation is Flax's own)."""

    shape: tuple[int, int, int] = (28, 28, 1)  # H, W, C
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    latent_dim: int = 20  # N_z
    hidden: tuple[int, ...] = (500,)  # widths of the encoder, in reverse those of the decoder; (): both are linear
    activation: str = "tanh"  # tanh | relu | softplus
    likelihood: str = "bernoulli"  # bernoulli: per-pixel probabilities, also for grey-level targets | gaussian
    sigma: float = 1.0  # gaussian: its standard deviation, in units of the [0, 1] pixel range
    binarisation: str = "none"  # none | static: one draw an image, for ever | dynamic: a new draw every time
    beta: float = 1.0  # weight of the KL term in the training loss only; 1: the ELBO
    ema: float = 0.0  # decay of the parameter average; 0: none
    micro: int = 1  # micro-batches a step
    optim: Optim = Optim()

    def __post_init__(self):
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"model.shape must be three positive numbers (H, W, C), got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"model.levels must lie in 2..256, got {self.levels}")
        for field in ("latent_dim", "micro"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, got {getattr(self, field)}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"model.hidden must hold positive widths, got {self.hidden}")
        choices = {
            "activation": tuple(_ACTIVATIONS),
            "likelihood": ("bernoulli", "gaussian"),
            "binarisation": ("none", "static", "dynamic"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}")
        if self.likelihood == "gaussian" and self.binarisation != "none":
            raise ValueError("model.binarisation makes images of zeros and ones: a gaussian likelihood needs none")
        if not self.sigma > 0:
            raise ValueError(f"model.sigma must be positive, got {self.sigma}")
        if not self.beta >= 0:
            raise ValueError(f"model.beta must not be negative, got {self.beta}")
        EMA(self.ema)

    def check(self, info) -> None:
        """Refuses data (a `data.Info`) that this model cannot take, before anything compiles."""
        if info.kind != "image":
            raise ValueError(f"a VAE takes images, this data set holds {info.kind}")
        if tuple(info.shape) != tuple(self.shape):
            raise ValueError(f"model.shape is {tuple(self.shape)}, the images are {tuple(info.shape)}")
        if info.levels != self.levels:
            raise ValueError(f"model.levels is {self.levels}, the images have {info.levels} levels")
        if self.binarisation == "static" and info.examples is None:
            raise ValueError("static binarisation draws once an image, so it needs a finite data set")


# ----------------------------------------------------------------------------------------------------- the mathematics


def gaussian_kl(mu: Float[Array, "... Z"], logvar: Float[Array, "... Z"]) -> Float[Array, "..."]:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, summed over latents (AEVB, appendix B)."""
    return 0.5 * jnp.sum(jnp.square(mu) + jnp.exp(logvar) - 1 - logvar, -1)


def log_normal(x: Float[Array, "..."], mu, logvar) -> Float[Array, "..."]:
    """log N(x; mu, exp(logvar)) in nats, summed over the last axis."""
    return -0.5 * jnp.sum(jnp.log(2 * jnp.pi) + logvar + jnp.square(x - mu) * jnp.exp(-logvar), -1)


def log_likelihood(
    cfg: Config, x: Float[Array, "... H W C"], decoded: Float[Array, "... H W C"]
) -> Float[Array, "..."]:
    """log p(x|z) in nats, summed over pixels; `decoded` is what `decode` returns.

    bernoulli: AEVB eq. 11. With grey levels x it is the negative cross-entropy, a bound on no discrete likelihood; the
        same formula that the literature calls MNIST with real-valued targets.
    gaussian: a density in [0, 1] pixel units, of fixed sigma (AEVB eq. 12 learns it).
    """
    # One axis of pixels: XLA's CPU code for a sum over [..., H, W, 1] is many times slower.
    x, decoded = (a.reshape(*a.shape[:-3], -1) for a in (x, decoded))
    if cfg.likelihood == "bernoulli":
        # x log p + (1 - x) log(1 - p), p = sigmoid(l), with one exp and one log; optax's two log-sigmoids take
        # 2.7 times as long on the CPU.
        softplus = jnp.maximum(decoded, 0) + jnp.log1p(jnp.exp(-jnp.abs(decoded)))
        return jnp.sum(x * decoded - softplus, -1)
    z = (x - decoded) / cfg.sigma
    return -jnp.sum(0.5 * jnp.square(z) + jnp.log(cfg.sigma) + 0.5 * jnp.log(2 * jnp.pi), -1)


# --------------------------------------------------------------------------------------------------------- the modules


class Encoder(nn.Module):
    """q(z|x): [..., H, W, C] -> mu, logvar, each [..., Z] (AEVB appendix C.2, with one head for both)."""

    cfg: Config

    @nn.compact
    def __call__(self, x):
        h = x.reshape(*x.shape[:-3], -1)
        for width in self.cfg.hidden:
            h = _ACTIVATIONS[self.cfg.activation](nn.Dense(width)(h))
        mu, logvar = jnp.split(nn.Dense(2 * self.cfg.latent_dim)(h), 2, axis=-1)
        return mu, jnp.clip(logvar, -30.0, 20.0)  # not in the paper: beyond these exp leaves float32


class Decoder(nn.Module):
    """p(x|z): [..., Z] -> [..., H, W, C], logits for bernoulli, means for gaussian (AEVB appendix C)."""

    cfg: Config

    @nn.compact
    def __call__(self, z):
        h = z
        for width in reversed(self.cfg.hidden):
            h = _ACTIVATIONS[self.cfg.activation](nn.Dense(width)(h))
        h = nn.Dense(self.cfg.shape[0] * self.cfg.shape[1] * self.cfg.shape[2])(h)
        return h.reshape(*h.shape[:-1], *self.cfg.shape)


def encode(cfg: Config, params: Params, x: Image) -> tuple[Latent, Latent]:
    """mu and logvar of q(z|x), for images in [0, 1]."""
    return Encoder(cfg).apply(params["encoder"], x)


def decode(cfg: Config, params: Params, z: Float[Array, "... Z"]) -> Float[Array, "... H W C"]:
    """Logits (bernoulli) or means (gaussian) of p(x|z), for any leading axes."""
    return Decoder(cfg).apply(params["decoder"], z)


def mean_image(cfg: Config, decoded: Float[Array, "..."]) -> Float[Array, "..."]:
    """The mean of p(x|z) in [0, 1] from what `decode` returns."""
    return jax.nn.sigmoid(decoded) if cfg.likelihood == "bernoulli" else jnp.clip(decoded, 0.0, 1.0)


# ---------------------------------------------------------------------------------------------------------- the bounds


def preprocess(cfg: Config, batch: dict, key: Key[Array, ""]) -> Image:
    """Pixels 0..levels-1 to floats in [0, 1], binarised as the config says. Once, before any chunking.

    static: image i of the set (`batch["index"]`, counted within the split that was loaded) keeps one Bernoulli draw in
        every epoch and every run.
    dynamic: a new draw every call (Burda et al. 2016, section 5.1).
    """
    x = jnp.asarray(batch["image"], jnp.float32) / (cfg.levels - 1)
    if cfg.binarisation == "none":
        return x
    if cfg.binarisation == "dynamic":
        u = jax.random.uniform(key, x.shape)
    else:
        own = jax.random.key(0x57A71C)  # of no run: key(0) is what seed 0 splits
        u = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(own, i), x.shape[1:]))(batch["index"])
    return (u < x).astype(jnp.float32)


def elbo(cfg: Config, params: Params, x: Image, key: Key[Array, ""]) -> dict[str, Nats]:
    """{"elbo", "reconstruction", "kl"} in nats, elbo = reconstruction - kl (AEVB eq. 7, 10), one sample of z.

    The KL term is exact; beta is never inside.
    """
    mu, logvar = encode(cfg, params, x)
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape, mu.dtype)
    reconstruction = log_likelihood(cfg, x, decode(cfg, params, z))
    kl = gaussian_kl(mu, logvar)
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


def log_weights(cfg: Config, params: Params, x: Image, key: Key[Array, ""], *, k: int) -> Float[Array, "k B"]:
    """log p(x, z_i) - log q(z_i|x) for k draws z_i ~ q(z|x), in nats (Burda et al. 2016, eq. 8).

    Their mean is the ELBO, their log-mean-exp the bound L_k. k draws are in memory at once: see `iwae_bound`.
    """
    mu, logvar = jax.tree.map(lambda a: a[None], encode(cfg, params, x))
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, (k, *mu.shape[1:]), mu.dtype)
    log_p = log_likelihood(cfg, x[None], decode(cfg, params, z)) + log_normal(z, 0.0, 0.0)
    return log_p - log_normal(z, mu, logvar)


def iwae_bound(cfg: Config, params: Params, x: Image, key: Key[Array, ""], *, k: int, chunk: int | None = None) -> Nats:
    """L_k = E log (1/k) sum_i w_i <= log p(x), in nats; it rises with k (Burda et al. 2016, eq. 8, theorem 1).

    chunk: draws in memory at once, default k; chunk j uses fold_in(key, j), so the draws depend on it. Compile with
        jax.jit(partial(iwae_bound, cfg, k=5000, chunk=100)).
    """
    chunk = min(chunk or k, k)
    if chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k={k}, chunk={chunk}")

    def one(total, j):
        log_w = log_weights(cfg, params, x, jax.random.fold_in(key, j), k=chunk)
        counts = j * chunk + jnp.arange(chunk) < k  # the last chunk may reach beyond k
        log_w = jnp.where(counts[:, None], log_w, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_w, 0)), None

    total, _ = jax.lax.scan(one, jnp.full(x.shape[0], -jnp.inf, x.dtype), jnp.arange(-(-k // chunk)))
    return total - jnp.log(k).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------------ pictures


def reconstruct(cfg: Config, params: Params, x: Image) -> Image:
    """The mean image at the mean of q(z|x)."""
    return mean_image(cfg, decode(cfg, params, encode(cfg, params, x)[0]))


def interpolate(cfg: Config, params: Params, x_a: Image, x_b: Image, *, steps: int) -> Float[Array, "B S H W C"]:
    """Mean images on the straight line between the two posterior means, both ends included."""
    z_a, z_b = encode(cfg, params, x_a)[0], encode(cfg, params, x_b)[0]
    at = jnp.linspace(0.0, 1.0, steps)[None, :, None]
    return mean_image(cfg, decode(cfg, params, z_a[:, None] * (1 - at) + z_b[:, None] * at))


def manifold(cfg: Config, params: Params, *, side: int = 20) -> Float[Array, "S S H W C"]:
    """Mean images on a grid through the inverse Gaussian CDF (AEVB fig. 4): z_1 grows rightwards, z_2 upwards.

    Needs latent_dim = 2. Coordinates are the middles of `side` equally probable intervals.
    """
    if cfg.latent_dim != 2:
        raise ValueError(f"a manifold needs latent_dim = 2, this model has {cfg.latent_dim}")
    at = jax.scipy.special.ndtri((jnp.arange(side) + 0.5) / side)
    z_1, z_2 = jnp.meshgrid(at, at[::-1])
    return mean_image(cfg, decode(cfg, params, jnp.stack([z_1, z_2], -1)))


# ---------------------------------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """The VAE as a Family. `evaluate` gives the negative ELBO, one sample of z an example, as `nll_nats`.

    `sample(state, key, *, n)` gives the mean images of p(x|z) for n draws of z ~ N(0, I), as AEVB fig. 5 shows them.
    """
    ema = EMA(cfg.ema)

    def init(key):
        k_encoder, k_decoder = jax.random.split(key)
        params = {
            "encoder": Encoder(cfg).init(k_encoder, jnp.zeros((1, *cfg.shape))),
            "decoder": Decoder(cfg).init(k_decoder, jnp.zeros((1, cfg.latent_dim))),
        }
        return start(params, cfg.optim, ema=ema)

    def loss(params, state, batch, key):
        k_x, k_z = jax.random.split(key)
        terms = elbo(cfg, params, preprocess(cfg, batch, k_x), k_z)
        metrics = {f"{name}_nats": value.mean() for name, value in terms.items()}
        return (cfg.beta * terms["kl"] - terms["reconstruction"]).mean(), (state.extra, metrics)

    def evaluate(state, batch, key):
        k_x, k_z = jax.random.split(key)
        terms = elbo(cfg, ema.read(state), preprocess(cfg, batch, k_x), k_z)
        return {
            "nll_nats": -terms["elbo"],
            "reconstruction_nats": terms["reconstruction"],
            "kl_nats": terms["kl"],
        }

    def sample(state: State, key, *, n: int):
        z = jax.random.normal(key, (n, cfg.latent_dim))
        return mean_image(cfg, decode(cfg, ema.read(state), z))

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample)
