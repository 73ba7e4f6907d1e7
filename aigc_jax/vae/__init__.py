"""Variational autoencoders: Kingma & Welling 2014 ("AEVB" below), importance weighted (Burda, Grosse & Salakhutdinov
2016, "IWAE"), with one stochastic layer or two, unconditional or given a label.

p(x, z) = p(x|z) N(z; 0, I), with a diagonal Gaussian q(z|x) from the encoder. With a second layer (IWAE, section 5)
z = (z_1, z_2), p(x, z) = p(x|z_1) p(z_1|z_2) N(z_2; 0, I) and q(z|x) = q(z_1|x) q(z_2|z_1). Likelihoods and bounds are
in nats, summed over all pixels, per example. Images are floats in [0, 1]; only `preprocess` sees whole-number pixels.

    family = make(Config(shape=(8, 8, 1), levels=17))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, Shaped

from ..core import EMA, Family, Optim, Optimizer, State, floats, labels, make_step, one_hot, pixels, start
from ..nn import pixel_shuffle
from .likelihoods import bits_per_dim, gaussian_kl, log_likelihood, log_logistic, log_normal, mean_image

__all__ = [
    "Config",
    "Decoder",
    "Encoder",
    "Gaussian",
    "activity",
    "bits_per_dim",
    "decode",
    "decode_upper",
    "draw",
    "dreg_bound",
    "elbo",
    "encode",
    "encode_upper",
    "gaussian_kl",
    "interpolate",
    "iwae_bound",
    "log_likelihood",
    "log_logistic",
    "log_normal",
    "log_posterior",
    "log_prior",
    "log_weights",
    "make",
    "manifold",
    "mean_image",
    "preprocess",
    "reconstruct",
]

Params = dict[str, Any]  # {"encoder": ..., "decoder": ...}, of two layers also "upper_encoder", "upper_decoder"
Image = Float[Array, "B H W C"]
Given = Shaped[Array | np.ndarray, "B H W C"]  # floats in [0, 1], or bool; `_images` checks them
Latent = Float[Array, "B Z"]
Draws = tuple[Float[Array, "k B _"], ...]  # (z_1,) or (z_1, z_2): k draws for each of B images
Label = Any  # classes 0..classes-1 as whole numbers [B], or one for all; `core.labels` checks them
Nats = Float[Array, "B"]

_ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "softplus": nn.softplus}


@dataclass(frozen=True)
class Config:
    """Defaults: the MNIST network of AEVB, section 5 (its 500 hidden units; our initialisation is Flax's own)."""

    shape: tuple[int, int, int] = (28, 28, 1)  # H, W, C
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    classes: int = 0  # encoder and decoder are given a label in 0..classes-1 (Sohn et al. 2015); 0: unconditional
    latent_dim: int = 20  # N_z
    channels: tuple[int, ...] = ()  # convolutions before the dense layers, each halves H and W; (): none
    hidden: tuple[int, ...] = (500,)  # dense widths of the encoder, in reverse those of the decoder; (): both linear
    upper_dim: int = 0  # latents of a second stochastic layer above the first (IWAE); 0: none
    upper_hidden: tuple[int, ...] = (100, 100)  # widths between the two layers, in both directions
    activation: str = "tanh"  # tanh | relu | softplus
    likelihood: str = "bernoulli"  # bernoulli, also for grey-level targets | gaussian | logistic (discretised)
    sigma: float | None = None  # gaussian: a fixed standard deviation in [0, 1] pixel units; None: learned, a pixel
    binarisation: str = "none"  # none | static: one draw an image, for ever | dynamic: a new draw every time
    objective: str = "elbo"  # elbo | iwae | dreg: iwae with the doubly reparameterised gradient
    k: int = 1  # draws of z an image in training
    beta: float = 1.0  # weight of log q(z|x) - log p(z) in the training loss only; 1: the bound
    kl_warmup: int = 0  # updates over which that weight rises from 0 (Sonderby et al. 2016); 0: none
    bfloat16: bool = False  # products and convolutions in bfloat16; parameters, likelihoods, optimizer stay float32
    ema: float = 0.0  # decay of the parameter average; 0: none
    micro: int = 1  # micro-batches a step
    optim: Optimizer = Optim()

    def __post_init__(self):
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"model.shape must be three positive numbers (H, W, C), got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"model.levels must lie in 2..256, got {self.levels}")
        lowest = {"latent_dim": 1, "micro": 1, "k": 1, "classes": 0, "upper_dim": 0, "kl_warmup": 0}
        for field, low in lowest.items():
            if getattr(self, field) < low:
                raise ValueError(f"model.{field} must be at least {low}, got {getattr(self, field)}")
        for field in ("channels", "hidden", "upper_hidden"):
            if any(width < 1 for width in getattr(self, field)):
                raise ValueError(f"model.{field} must hold positive widths, got {getattr(self, field)}")
        if any(side % 2 ** len(self.channels) for side in self.shape[:2]):
            raise ValueError(f"model.channels {self.channels} halve H and W {len(self.channels)} times, which "
                             f"{self.shape[0]} x {self.shape[1]} pixels do not allow")  # fmt: skip
        choices = {
            "activation": tuple(_ACTIVATIONS),
            "likelihood": ("bernoulli", "gaussian", "logistic"),
            "binarisation": ("none", "static", "dynamic"),
            "objective": ("elbo", "iwae", "dreg"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}")
        if self.likelihood != "bernoulli" and self.binarisation != "none":
            raise ValueError(
                f"model.binarisation makes images of zeros and ones: likelihood {self.likelihood} needs none"
            )
        if self.sigma is not None and not (self.sigma > 0 and self.likelihood == "gaussian"):
            raise ValueError(f"model.sigma must be positive, and is for likelihood gaussian only, got {self.sigma}")
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
        if self.classes and info.classes is None:
            raise ValueError(f"model.classes is {self.classes}, but the images have no labels")
        if self.classes and info.classes != self.classes:
            raise ValueError(f"model.classes is {self.classes}, the images have {info.classes} classes")
        if self.binarisation == "static" and info.examples is None:
            raise ValueError("static binarisation draws once an image, so it needs a finite data set")


# --------------------------------------------------------------------------------------------------------- the modules


def _dtype(cfg: Config):
    return jnp.bfloat16 if cfg.bfloat16 else None  # None: that of the parameters, float64 where a test wants it


def _float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _images(cfg: Config, x):
    """Images in [0, 1], checked, in at least float32; binarised ones may be bool. A gaussian has a density anywhere."""
    within = None if cfg.likelihood == "gaussian" else (0, 1)
    return _float32(floats("image", _float32(x) if x.dtype == bool else x, within=within))


class Gaussian(nn.Module):
    """A diagonal Gaussian given a vector: [..., D] -> mu, logvar, each [..., dim] (AEVB appendix C.2, one head)."""

    cfg: Config
    dim: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, h):
        for width in self.hidden:
            h = _ACTIVATIONS[self.cfg.activation](nn.Dense(width, dtype=_dtype(self.cfg))(h))
        mu, logvar = jnp.split(_float32(nn.Dense(2 * self.dim, dtype=_dtype(self.cfg))(h)), 2, axis=-1)
        return mu, jnp.clip(logvar, -30.0, 20.0)  # not in the paper: beyond these exp leaves float32


class Encoder(nn.Module):
    """q(z_1|x): [..., H, W, C] and one-hot labels [..., classes] -> mu, logvar, each [..., Z]."""

    cfg: Config

    @nn.compact
    def __call__(self, x, y):
        cfg = self.cfg
        for width in cfg.channels:
            x = _ACTIVATIONS[cfg.activation](nn.Conv(width, (3, 3), strides=2, dtype=_dtype(cfg))(x))
        h = jnp.concatenate([x.reshape(*x.shape[:-3], -1), y.astype(x.dtype)], -1)
        return Gaussian(cfg, cfg.latent_dim, cfg.hidden)(h)


class Decoder(nn.Module):
    """p(x|z_1): [..., Z] and one-hot labels [..., classes] -> [..., H, W, D] (AEVB appendix C).

    D = C: logits for bernoulli, means for a gaussian of fixed sigma. D = 2C: means and raw log scales.
    """

    cfg: Config

    @nn.compact
    def __call__(self, z, y):
        cfg, (height, width, depth) = self.cfg, self.cfg.shape
        act, dtype = _ACTIVATIONS[cfg.activation], _dtype(cfg)
        if cfg.likelihood == "logistic" or (cfg.likelihood == "gaussian" and cfg.sigma is None):
            depth *= 2
        h = jnp.concatenate([z, y.astype(z.dtype)], -1)
        for features in reversed(cfg.hidden):
            h = act(nn.Dense(features, dtype=dtype)(h))
        halvings = len(cfg.channels)
        height, width = height >> halvings, width >> halvings
        first = cfg.channels[-1] if cfg.channels else depth
        h = nn.Dense(height * width * first, dtype=dtype)(h).reshape(*h.shape[:-1], height, width, first)
        for features in (*reversed(cfg.channels[:-1]), depth) if cfg.channels else ():
            h = pixel_shuffle(nn.Conv(4 * features, (3, 3), dtype=dtype)(act(h)))
        return _float32(h)


def encode(cfg: Config, params: Params, x: Given, label: Label = None) -> tuple[Latent, Latent]:
    """mu and logvar of q(z_1|x), for images in [0, 1]. Raises ValueError for whole-number pixels, and, where they are
    not traced, for others."""
    x = _images(cfg, x)
    return Encoder(cfg).apply(params["encoder"], x, one_hot(label, cfg.classes, x.shape[:-3]))


def decode(cfg: Config, params: Params, z: Float[Array, "... Z"], label=None) -> Float[Array, "... H W D"]:
    """What `log_likelihood` and `mean_image` take: logits, means, or means and log scales of p(x|z_1).

    For any leading axes; label [...] has the last of them (B of z [k, B, Z]).
    """
    y = one_hot(label, cfg.classes, z.shape[:-1])
    if not cfg.channels or z.ndim < 3:
        return Decoder(cfg).apply(params["decoder"], z, y)
    # Convolutions take one axis of rows: with the images outermost a mesh can leave each on its device.
    decoded = Decoder(cfg).apply(params["decoder"], jnp.moveaxis(z, -2, 0), jnp.moveaxis(y, -2, 0))
    return jnp.moveaxis(decoded, 0, -4)


def _upper(cfg: Config) -> tuple[Gaussian, Gaussian]:
    """q(z_2|z_1) and p(z_1|z_2)."""
    return Gaussian(cfg, cfg.upper_dim, cfg.upper_hidden), Gaussian(cfg, cfg.latent_dim, cfg.upper_hidden[::-1])


def encode_upper(cfg: Config, params: Params, z_1: Float[Array, "... Z"]):
    """mu and logvar of q(z_2|z_1)."""
    return _upper(cfg)[0].apply(params["upper_encoder"], z_1)


def decode_upper(cfg: Config, params: Params, z_2: Float[Array, "... Z"]):
    """mu and logvar of p(z_1|z_2)."""
    return _upper(cfg)[1].apply(params["upper_decoder"], z_2)


# ---------------------------------------------------------------------------------------------------------- the bounds


def preprocess(cfg: Config, batch: dict, key: Key[Array, ""]) -> Image:
    """Pixels 0..levels-1 to floats in [0, 1], binarised as the config says. Once, before any chunking.

    static: image i of the set (`batch["index"]`, counted within the split that was loaded) keeps one Bernoulli draw in
        every epoch and every run.
    dynamic: a new draw every call (IWAE, section 5.1).

    Raises ValueError for pixels that are floats, or beyond levels - 1.
    """
    x = pixels(batch["image"], cfg.levels) / (cfg.levels - 1)
    if cfg.binarisation == "none":
        return x
    if cfg.binarisation == "dynamic":
        u = jax.random.uniform(key, x.shape, jnp.float32)
    else:
        own = jax.random.key(0x57A71C)  # of no run: key(0) is what seed 0 splits
        u = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(own, i), x.shape[1:], jnp.float32))(batch["index"])
    return (u < x).astype(jnp.float32)


def _normal(mu, logvar, key, shape):
    return mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, shape, mu.dtype)


def draw(cfg: Config, params: Params, x: Given, key: Key[Array, ""], *, k: int, label: Label = None) -> Draws:
    """k reparameterised draws of z ~ q(z|x) for each image: (z_1,), or (z_1, z_2) of two layers."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k_1, k_2 = jax.random.split(key) if cfg.upper_dim else (key, None)
    mu, logvar = encode(cfg, params, x, label)
    z_1 = _normal(mu[None], logvar[None], k_1, (k, *mu.shape))
    if not cfg.upper_dim:
        return (z_1,)
    mu, logvar = encode_upper(cfg, params, z_1)
    return z_1, _normal(mu, logvar, k_2, mu.shape)


def log_prior(cfg: Config, params: Params, z: Draws) -> Float[Array, "k B"]:
    """log p(z) in nats."""
    log_p = log_normal(z[-1], 0.0, 0.0)
    return log_p + log_normal(z[0], *decode_upper(cfg, params, z[1])) if cfg.upper_dim else log_p


def log_posterior(cfg: Config, params: Params, x: Given, z: Draws, label: Label = None) -> Float[Array, "k B"]:
    """log q(z|x) in nats."""
    log_q = log_normal(z[0], *(a[None] for a in encode(cfg, params, x, label)))
    return log_q + log_normal(z[1], *encode_upper(cfg, params, z[0])) if cfg.upper_dim else log_q


def _terms(cfg, params, blind, x, z, label):
    """log p(x|z) and log p(z) - log q(z|x), each [k, B]; the density of q with parameters `blind`."""
    likelihood = log_likelihood(cfg, x[None], decode(cfg, params, z[0], label))
    return likelihood, log_prior(cfg, params, z) - log_posterior(cfg, blind, x, z, label)


def log_weights(
    cfg: Config, params: Params, x: Given, key: Key[Array, ""], *, k: int, label: Label = None
) -> Float[Array, "k B"]:
    """log p(x, z_i) - log q(z_i|x) for k draws z_i ~ q(z|x), in nats (IWAE eq. 8).

    Their mean is the ELBO, their log-mean-exp the bound L_k. k draws are in memory at once: see `iwae_bound`.
    """
    return sum(_terms(cfg, params, params, x, draw(cfg, params, x, key, k=k, label=label), label))


def elbo(
    cfg: Config, params: Params, x: Given, key: Key[Array, ""], *, k: int = 1, label: Label = None
) -> dict[str, Nats]:
    """{"elbo", "reconstruction", "kl"} in nats, elbo = reconstruction - kl (AEVB eq. 7, 10), means over k draws of z.

    The KL term is exact for one layer; of two, KL(q(z_2|z_1) || p(z_2)) is, and the rest is over the draws. beta is
    never inside.
    """
    z = draw(cfg, params, x, key, k=k, label=label)
    reconstruction = log_likelihood(cfg, x[None], decode(cfg, params, z[0], label)).mean(0)
    mu, logvar = encode(cfg, params, x, label)
    if cfg.upper_dim:
        kl = log_normal(z[0], mu[None], logvar[None]) - log_normal(z[0], *decode_upper(cfg, params, z[1]))
        kl = (kl + gaussian_kl(*encode_upper(cfg, params, z[0]))).mean(0)
    else:
        kl = gaussian_kl(mu, logvar)
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


def _log_mean_exp(log_w):
    return jax.nn.logsumexp(log_w, 0) - jnp.log(log_w.shape[0]).astype(log_w.dtype)


def iwae_bound(
    cfg: Config, params: Params, x: Given, key: Key[Array, ""], *, k: int, chunk: int | None = None, label: Label = None
) -> Nats:
    """L_k = E log (1/k) sum_i w_i <= log p(x), in nats; it rises with k (IWAE eq. 8, theorem 1).

    chunk: draws in memory at once, default k; chunk j uses fold_in(key, j), so the draws depend on it. Compile with
        jax.jit(partial(iwae_bound, cfg, k=5000, chunk=100)).
    """
    x, chunk = _images(cfg, x), k if chunk is None else min(chunk, k)
    if chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k={k}, chunk={chunk}")

    def one(total, j):
        log_w = log_weights(cfg, params, x, jax.random.fold_in(key, j), k=chunk, label=label)
        counts = j * chunk + jnp.arange(chunk) < k  # the last chunk may reach beyond k
        log_w = jnp.where(counts[:, None], log_w, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_w, 0)), None

    total, _ = jax.lax.scan(one, jnp.full(x.shape[0], -jnp.inf, x.dtype), jnp.arange(-(-k // chunk)))
    return total - jnp.log(k).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _doubly(cfg, params, blind, x, z, label, beta):
    return _doubly_forward(cfg, params, blind, x, z, label, beta)[0]


def _doubly_forward(cfg, params, blind, x, z, label, beta):
    def weights(params, z):
        likelihood, ratio = _terms(cfg, params, blind, x, z, label)
        return likelihood + beta * ratio, likelihood + ratio

    tempered, pull, log_w = jax.vjp(weights, params, z, has_aux=True)
    return (_log_mean_exp(tempered), log_w), (jax.nn.softmax(tempered, 0), pull, blind, x, beta)


def _doubly_backward(cfg, residuals, cotangents):
    w, pull, blind, x, beta = residuals
    params, z = pull(w * cotangents[0][None])
    z = tuple((1 - beta + beta * w)[..., None] * slope for slope in z)  # for beta = 1 the second w of eq. 8
    return params, jax.tree.map(jnp.zeros_like, blind), jnp.zeros_like(x), z, None, jnp.zeros_like(beta)


_doubly.defvjp(_doubly_forward, _doubly_backward)


def dreg_bound(
    cfg: Config, params: Params, x: Given, key: Key[Array, ""], *, k: int, label: Label = None, beta=1.0
) -> tuple[Nats, Float[Array, "k B"]]:
    """L_k and its log weights, with the doubly reparameterised gradient (Tucker et al. 2019, eq. 8).

    Values as `log_weights`; the decoder's gradient is sum_i w_i grad log p(x, z_i), w normalised over k; the encoder's
    sum_i w_i^2 (d log w_i / d z_i) grad z_i, whose signal does not vanish against its noise as k grows. x and log_w
    carry no gradient.

    beta: weight of log p(z) - log q(z|x) in the bound. Not in the paper: its identity, applied to these weights, gives
        the encoder w_i (1 - beta + beta w_i) in place of w_i^2.
    """
    x = jax.lax.stop_gradient(_images(cfg, x))
    z = draw(cfg, params, x, key, k=k, label=label)
    return _doubly(cfg, params, jax.lax.stop_gradient(params), x, z, label, jnp.asarray(beta, x.dtype))


def activity(
    cfg: Config, params: Params, x: Given, key: Key[Array, ""], *, k: int = 32, label: Label = None
) -> tuple[Float[Array, "_"], ...]:
    """A_u = Var_x E_q(u|x)[u] for each unit u of each layer; a unit is active where it exceeds .01 (IWAE, section 5.2).

    Exact but for the images in the first layer. In the second E_q is a mean over draws of z_1, and its variance the
    covariance of two means of k draws each, so that their noise adds nothing.
    """
    mu, _ = encode(cfg, params, x, label)
    first = jnp.var(mu, 0)
    if not cfg.upper_dim:
        return (first,)
    z_1, _ = draw(cfg, params, x, key, k=2 * k, label=label)
    mu = encode_upper(cfg, params, z_1)[0]
    a, b = (half.mean(0) - half.mean((0, 1))[None] for half in jnp.split(mu, 2))
    return first, jnp.mean(a * b, 0)


# ------------------------------------------------------------------------------------------------------------ pictures


def reconstruct(cfg: Config, params: Params, x: Given, label: Label = None) -> Image:
    """The mean image at the mean of q(z_1|x)."""
    return mean_image(cfg, decode(cfg, params, encode(cfg, params, x, label)[0], label))


def interpolate(
    cfg: Config, params: Params, x_a: Given, x_b: Given, *, steps: int, label: Label = None
) -> Float[Array, "B S H W C"]:
    """Mean images on the straight line between the two posterior means of z_1, both ends included."""
    z_a, z_b = encode(cfg, params, x_a, label)[0], encode(cfg, params, x_b, label)[0]
    at = jnp.linspace(0.0, 1.0, steps)[None, :, None]
    z = z_a[:, None] * (1 - at) + z_b[:, None] * at
    label = labels(label, cfg.classes, x_a.shape[:1])
    return mean_image(cfg, decode(cfg, params, z, None if label is None else label[:, None].repeat(steps, 1)))


def manifold(cfg: Config, params: Params, *, side: int = 20, label=None) -> Float[Array, "S S H W C"]:
    """Mean images on a grid through the inverse Gaussian CDF (AEVB fig. 4): z_1 grows rightwards, z_2 upwards.

    Needs latent_dim = 2 and one layer; `label` is one class. Coordinates are the middles of `side` equally probable
    intervals.
    """
    if cfg.latent_dim != 2 or cfg.upper_dim:
        raise ValueError(
            f"a manifold needs latent_dim = 2 and one layer, got {cfg.latent_dim} and upper_dim {cfg.upper_dim}"
        )
    at = jax.scipy.special.ndtri((jnp.arange(side) + 0.5) / side)
    z_1, z_2 = jnp.meshgrid(at, at[::-1])
    return mean_image(cfg, decode(cfg, params, jnp.stack([z_1, z_2], -1), label))


# ---------------------------------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """The VAE as a Family.

    evaluate: `nll_nats` is the negative of the bound that is trained, -ELBO with its two terms, or -L_k with the
        config's k and `elbo_nats` beside it; `nll_bits_per_dim` where the likelihood is one of the images as they are.
    sample(state, key, *, n, label=None): the mean images of p(x|z) for n draws of z ~ p(z), as AEVB fig. 5 shows them.
        label: one class in 0..classes-1, or [n]; where a conditional model is given none, the classes in turn.
    """
    ema = EMA(cfg.ema)

    def init(key):
        k_encoder, k_decoder, *k_upper = jax.random.split(key, 4 if cfg.upper_dim else 2)
        y, z = (jnp.zeros((1, size), jnp.float32) for size in (cfg.classes, cfg.latent_dim))
        params = {
            "encoder": Encoder(cfg).init(k_encoder, jnp.zeros((1, *cfg.shape), jnp.float32), y),
            "decoder": Decoder(cfg).init(k_decoder, z, y),
        }
        if cfg.upper_dim:
            upwards, downwards = _upper(cfg)
            params["upper_encoder"] = upwards.init(k_upper[0], z)
            params["upper_decoder"] = downwards.init(k_upper[1], jnp.zeros((1, cfg.upper_dim), jnp.float32))
        return start(params, cfg.optim, ema=ema)

    def given(batch):
        return batch.get("label") if cfg.classes else None

    def loss(params, state, batch, key):
        k_x, k_z = jax.random.split(key)
        x, label = preprocess(cfg, batch, k_x), given(batch)
        beta = cfg.beta * jnp.minimum(1.0, state.step / cfg.kl_warmup) if cfg.kl_warmup else cfg.beta
        if cfg.objective == "elbo":
            terms = elbo(cfg, params, x, k_z, k=cfg.k, label=label)
            value = beta * terms["kl"] - terms["reconstruction"]
        else:
            if cfg.objective == "dreg":
                bound, log_w = dreg_bound(cfg, params, x, k_z, k=cfg.k, label=label, beta=beta)
            else:
                z = draw(cfg, params, x, k_z, k=cfg.k, label=label)
                likelihood, ratio = _terms(cfg, params, params, x, z, label)
                bound, log_w = _log_mean_exp(likelihood + beta * ratio), likelihood + ratio
            value, terms = -bound, {"iwae": _log_mean_exp(log_w), "elbo": log_w.mean(0)}
        return value.mean(), (state.extra, {f"{name}_nats": term.mean() for name, term in terms.items()})

    def evaluate(state, batch, key):
        k_x, k_z = jax.random.split(key)
        params, x, label = ema.read(state), preprocess(cfg, batch, k_x), given(batch)
        if cfg.objective == "elbo":
            terms = elbo(cfg, params, x, k_z, label=label)
            values = {"nll_nats": -terms["elbo"]}
            values |= {"reconstruction_nats": terms["reconstruction"], "kl_nats": terms["kl"]}
        else:
            log_w = log_weights(cfg, params, x, k_z, k=cfg.k, label=label)
            values = {"nll_nats": -_log_mean_exp(log_w), "elbo_nats": log_w.mean(0)}
        if cfg.likelihood != "bernoulli" or cfg.binarisation != "none" or cfg.levels == 2:
            values["nll_bits_per_dim"] = bits_per_dim(cfg, values["nll_nats"])
        return values

    def sample(state: State, key, *, n: int, label=None):
        params, (k_1, k_2) = ema.read(state), jax.random.split(key)
        z = jax.random.normal(k_1, (n, cfg.upper_dim or cfg.latent_dim), jnp.float32)
        if cfg.upper_dim:
            z = _normal(*decode_upper(cfg, params, z), k_2, (n, cfg.latent_dim))
        label = labels(label, cfg.classes, (n,), in_turn=True)
        return mean_image(cfg, decode(cfg, params, z, label))

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample)
