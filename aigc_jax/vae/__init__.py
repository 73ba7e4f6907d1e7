"""Variational autoencoders (Kingma & Welling 2014, "AEVB" below).

The model is p(x, z) = p(x|z) N(z; 0, I). An encoder gives q(z|x), a diagonal Gaussian.
Training maximises a lower bound of log p(x):

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z))                              (AEVB eq. 3)
    L_k  = E log (1/k) sum_i p(x, z_i) / q(z_i|x), z_i ~ q(z|x)              ("IWAE" eq. 8)

IWAE is Burda, Grosse & Salakhutdinov 2016. With two stochastic layers (IWAE, section 5) z
is (z_1, z_2), p(x, z) = p(x|z_1) p(z_1|z_2) N(z_2; 0, I) and q(z|x) = q(z_1|x) q(z_2|z_1).
Encoder and decoder may take a label (Sohn et al. 2015).

Likelihoods and bounds are in nats per example, summed over pixels. Images are floats in
[0, 1]. Only `preprocess` takes whole-number pixels.

    family = make(Config(shape=(8, 8, 1), levels=17))
    state = family.init(key)
    step = jax.jit(family.step)
    state, metrics = step(state, batch, step_key)

Two relatives keep the latents in the shape of an image, each in a file of its own: `autoencoder`
(the first stage of latent diffusion) and `vq` (the VQ-VAE).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..core import EMA, Family, Optim, State, labels, make_step, pixels, start
from . import autoencoder, vq
from .autoencoder import AutoencoderConfig, make_autoencoder
from .config import Config
from .likelihoods import (
    bits_per_dim,
    gaussian_kl,
    log_likelihood,
    log_logistic,
    log_normal,
    mean_image,
)
from .nets import (
    Decoder,
    Encoder,
    Gaussian,
    ImageLike,
    Label,
    Params,
    check_images,
    decode,
    decode_upper,
    encode,
    encode_upper,
    init,
)
from .vq import VQConfig, make_vq

__all__ = [
    "AutoencoderConfig",
    "Config",
    "Decoder",
    "Encoder",
    "Gaussian",
    "Optim",
    "VQConfig",
    "activity",
    "autoencoder",
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
    "make_autoencoder",
    "make_vq",
    "manifold",
    "mean_image",
    "preprocess",
    "reconstruct",
    "sample_posterior",
    "vq",
]

Image = Float[Array, "B H W C"]
Latents = tuple[Float[Array, "k B _"], ...]  # (z_1,) or (z_1, z_2): k samples for each of B images
Nats = Float[Array, "B"]

# -------------------------------------------------------------------- data and samples of z


def preprocess(cfg: Config, batch: dict, key: Key[Array, ""]) -> Image:
    """Returns a batch's pixels 0..levels-1 as floats in [0, 1], binarised as the config says.

    A binarised pixel is 1 with its grey level as probability.

    static: each image has one binarisation, the same in all epochs and runs. It depends on
        `batch["index"]`, the image's number within the loaded split.
    dynamic: each call binarises anew (IWAE, section 5.1). Call it once per bound, also where the
        samples of z come in chunks.

    Raises ValueError for pixels that are floats, or beyond levels - 1.
    """
    needed = ("image", "index") if cfg.binarisation == "static" else ("image",)
    if missing := [name for name in needed if name not in batch]:
        raise ValueError(f"this model takes {missing[0]!r} in a batch, got {', '.join(batch)}")
    x = pixels(batch["image"], cfg.levels) / (cfg.levels - 1)
    if cfg.binarisation == "none":
        return x
    if cfg.binarisation == "dynamic":
        u = jax.random.uniform(key, x.shape, jnp.float32)
        return (u < x).astype(jnp.float32)
    fixed_key = jax.random.key(0x57A71C)  # a number that is hardly the seed of a run

    def uniform_of(index):
        return jax.random.uniform(jax.random.fold_in(fixed_key, index), x.shape[1:], jnp.float32)

    return (jax.vmap(uniform_of)(batch["index"]) < x).astype(jnp.float32)


def _sample_normal(mu, logvar, key, shape):
    """Samples N(mu, exp(logvar)), reparameterised (AEVB, section 2.4)."""
    return mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, shape, mu.dtype)


def sample_posterior(
    cfg: Config, params: Params, x: ImageLike, key: Key[Array, ""], *, k: int, label: Label = None
) -> Latents:
    """Samples k times z ~ q(z|x) for each image, reparameterised.

    Returns (z_1,), or (z_1, z_2) for two layers, each [k, B, Z].
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k_1, k_2 = jax.random.split(key) if cfg.upper_dim else (key, None)
    mu, logvar = encode(cfg, params, x, label)
    z_1 = _sample_normal(mu[None], logvar[None], k_1, (k, *mu.shape))
    if not cfg.upper_dim:
        return (z_1,)
    mu, logvar = encode_upper(cfg, params, z_1)
    return z_1, _sample_normal(mu, logvar, k_2, mu.shape)


draw = sample_posterior  # the former name


# ------------------------------------------------------------------------------- the bounds


def log_prior(cfg: Config, params: Params, z: Latents) -> Float[Array, "k B"]:
    """Returns log p(z) in nats."""
    log_p = log_normal(z[-1], 0.0, 0.0)
    if not cfg.upper_dim:
        return log_p
    return log_p + log_normal(z[0], *decode_upper(cfg, params, z[1]))


def log_posterior(
    cfg: Config,
    params: Params,
    x: ImageLike,
    z: Latents,
    label: Label = None,
) -> Float[Array, "k B"]:
    """Returns log q(z|x) in nats."""
    mu, logvar = encode(cfg, params, x, label)
    log_q = log_normal(z[0], mu[None], logvar[None])
    if not cfg.upper_dim:
        return log_q
    return log_q + log_normal(z[1], *encode_upper(cfg, params, z[0]))


def _likelihood_and_ratio(cfg, params, q_params, x, z, label):
    """Returns log p(x|z) and log p(z) - log q(z|x), each [k, B]; q has the parameters q_params."""
    log_p_x = log_likelihood(cfg, x[None], decode(cfg, params, z[0], label))
    return log_p_x, log_prior(cfg, params, z) - log_posterior(cfg, q_params, x, z, label)


def log_weights(
    cfg: Config, params: Params, x: ImageLike, key: Key[Array, ""], *, k: int, label: Label = None
) -> Float[Array, "k B"]:
    """Returns log w_i = log p(x, z_i) - log q(z_i|x) in nats for k samples z_i ~ q(z|x).

    Their mean estimates the ELBO, their log-mean-exp the bound L_k (IWAE eq. 8). All k
    samples are in memory at once; `iwae_bound` takes them in chunks.
    """
    z = sample_posterior(cfg, params, x, key, k=k, label=label)
    return sum(_likelihood_and_ratio(cfg, params, params, x, z, label))


def elbo(
    cfg: Config,
    params: Params,
    x: ImageLike,
    key: Key[Array, ""],
    *,
    k: int = 1,
    label: Label = None,
) -> dict[str, Nats]:
    """Returns {"elbo", "reconstruction", "kl"} in nats (AEVB eq. 7, 10). beta is not in it.

    elbo: reconstruction - kl
    reconstruction: log p(x|z), a mean over k samples of z
    kl: exact for one layer. For two layers KL(q(z_2|z_1) || p(z_2)) is exact, and the rest is a
        mean over the samples.
    """
    z = sample_posterior(cfg, params, x, key, k=k, label=label)
    reconstruction = log_likelihood(cfg, x[None], decode(cfg, params, z[0], label)).mean(0)
    mu, logvar = encode(cfg, params, x, label)
    if cfg.upper_dim:
        log_q = log_normal(z[0], mu[None], logvar[None])
        kl_1 = log_q - log_normal(z[0], *decode_upper(cfg, params, z[1]))
        kl = (kl_1 + gaussian_kl(*encode_upper(cfg, params, z[0]))).mean(0)
    else:
        kl = gaussian_kl(mu, logvar)
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


def _log_mean_exp(log_w):
    return jax.nn.logsumexp(log_w, 0) - jnp.log(log_w.shape[0]).astype(log_w.dtype)


def iwae_bound(
    cfg: Config,
    params: Params,
    x: ImageLike,
    key: Key[Array, ""],
    *,
    k: int,
    chunk: int | None = None,
    label: Label = None,
) -> Nats:
    """Returns an estimate of L_k <= log p(x) in nats; L_k rises with k (IWAE eq. 8, theorem 1).

    chunk: number of samples in memory at once, by default k. Chunk j uses fold_in(key, j), so the
        samples depend on it. Compile with jax.jit(partial(iwae_bound, cfg, k=5000, chunk=100)).
    """
    x, chunk = check_images(cfg, x), k if chunk is None else min(chunk, k)
    if chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got k={k}, chunk={chunk}")

    def add_chunk(total, j):
        log_w = log_weights(cfg, params, x, jax.random.fold_in(key, j), k=chunk, label=label)
        within_k = j * chunk + jnp.arange(chunk) < k  # the last chunk may have more samples
        log_w = jnp.where(within_k[:, None], log_w, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_w, 0)), None

    nothing = jnp.full(x.shape[0], -jnp.inf, x.dtype)
    total, _ = jax.lax.scan(add_chunk, nothing, jnp.arange(-(-k // chunk)))
    return total - jnp.log(k).astype(x.dtype)


# The doubly reparameterised gradient: `_dreg` returns L_k and log w for given z. The
# derivative by z is weighted twice.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dreg(cfg, params, q_params, x, z, label, beta):
    return _dreg_forward(cfg, params, q_params, x, z, label, beta)[0]


def _dreg_forward(cfg, params, q_params, x, z, label, beta):
    def log_weights_of(params, z):
        log_p_x, log_ratio = _likelihood_and_ratio(cfg, params, q_params, x, z, label)
        return log_p_x + beta * log_ratio, log_p_x + log_ratio

    log_w_beta, vjp, log_w = jax.vjp(log_weights_of, params, z, has_aux=True)
    bound, w = _log_mean_exp(log_w_beta), jax.nn.softmax(log_w_beta, 0)
    return (bound, log_w), (w, vjp, q_params, x, beta)


def _dreg_backward(cfg, residuals, cotangents):
    w, vjp, q_params, x, beta = residuals
    d_params, d_z = vjp(w * cotangents[0][None])
    d_z = tuple((1 - beta + beta * w)[..., None] * d for d in d_z)  # beta = 1: w^2 of eq. 8
    d_q_params = jax.tree.map(jnp.zeros_like, q_params)
    return d_params, d_q_params, jnp.zeros_like(x), d_z, None, jnp.zeros_like(beta)


_dreg.defvjp(_dreg_forward, _dreg_backward)


def dreg_bound(
    cfg: Config,
    params: Params,
    x: ImageLike,
    key: Key[Array, ""],
    *,
    k: int,
    label: Label = None,
    beta=1.0,
) -> tuple[Nats, Float[Array, "k B"]]:
    """Returns L_k and log w_i; L_k has the gradient of Tucker et al. 2019 ("DReG", eq. 8).

    The values are those of `log_weights`. With w_i normalised over k, the gradients are:

        decoder: sum_i w_i grad log p(x, z_i)
        encoder: sum_i w_i^2 (d log w_i / d z_i) grad z_i

    Unlike IWAE's, the encoder's gradient does not drown in noise as k grows. x and log w_i
    have no gradient.

    beta: weight of log p(z) - log q(z|x) in L_k. It is not in the paper. The paper's identity for
        these weights gives the encoder w_i (1 - beta + beta w_i) in place of w_i^2.
    """
    x = jax.lax.stop_gradient(check_images(cfg, x))
    z = sample_posterior(cfg, params, x, key, k=k, label=label)
    q_params = jax.lax.stop_gradient(params)
    return _dreg(cfg, params, q_params, x, z, label, jnp.asarray(beta, x.dtype))


def activity(
    cfg: Config,
    params: Params,
    x: ImageLike,
    key: Key[Array, ""],
    *,
    k: int = 32,
    label: Label = None,
) -> tuple[Float[Array, "_"], ...]:
    """Returns A_u = Var_x E_q(u|x)[u] for each unit u, one array per layer (IWAE, section 5.2).

    A unit is active where A_u exceeds 0.01. The first layer's values are exact for these
    images. The second layer's E_q is a mean over samples of z_1. Var_x is then the
    covariance over x of two such means, each of its own k samples: unlike a variance, it is
    not raised by their noise.
    """
    mu, _ = encode(cfg, params, x, label)
    first = jnp.var(mu, 0)
    if not cfg.upper_dim:
        return (first,)
    z_1, _ = sample_posterior(cfg, params, x, key, k=2 * k, label=label)
    mu = encode_upper(cfg, params, z_1)[0]
    a, b = (half.mean(0) - half.mean((0, 1))[None] for half in jnp.split(mu, 2))
    return first, jnp.mean(a * b, 0)


# --------------------------------------------------------------------------------- pictures


def reconstruct(cfg: Config, params: Params, x: ImageLike, label: Label = None) -> Image:
    """Returns the mean image at the mean of q(z_1|x)."""
    mu, _ = encode(cfg, params, x, label)
    return mean_image(cfg, decode(cfg, params, mu, label))


def interpolate(
    cfg: Config,
    params: Params,
    x_a: ImageLike,
    x_b: ImageLike,
    *,
    steps: int,
    label: Label = None,
) -> Float[Array, "B S H W C"]:
    """Returns mean images along the line from the posterior mean of z_1 of x_a to that of x_b.

    Both ends are included.
    """
    (z_a, _), (z_b, _) = encode(cfg, params, x_a, label), encode(cfg, params, x_b, label)
    weight = jnp.linspace(0.0, 1.0, steps)[None, :, None]
    z = z_a[:, None] * (1 - weight) + z_b[:, None] * weight
    label = labels(label, cfg.classes, x_a.shape[:1])
    label = None if label is None else label[:, None].repeat(steps, 1)
    return mean_image(cfg, decode(cfg, params, z, label))


def manifold(
    cfg: Config,
    params: Params,
    *,
    side: int = 20,
    label: Label = None,
) -> Float[Array, "S S H W C"]:
    """Returns mean images on a grid of the latent plane (AEVB, fig. 4).

    The first coordinate grows to the right, the second upwards. Both run over the inverse
    Gaussian distribution function at the middles of `side` equally probable intervals.
    Needs latent_dim = 2 and one layer. `label` is one class.
    """
    if cfg.latent_dim != 2 or cfg.upper_dim:
        got = f"{cfg.latent_dim} and upper_dim {cfg.upper_dim}"
        raise ValueError(f"a manifold needs latent_dim = 2 and one layer, got {got}")
    quantiles = jax.scipy.special.ndtri((jnp.arange(side) + 0.5) / side)
    right, up = jnp.meshgrid(quantiles, quantiles[::-1])
    return mean_image(cfg, decode(cfg, params, jnp.stack([right, up], -1), label))


# ---------------------------------------------------------- the training loss and estimates


def _label_of(cfg: Config, batch: dict):
    return batch.get("label") if cfg.classes else None


def loss(cfg: Config, params: Params, state: State, batch: dict, key: Key[Array, ""]):
    """Returns minus the bound as a mean over the batch, and (extra, metrics) for `core.descend`.

    beta and its warm-up weigh log p(z) - log q(z|x) in the loss, but not in the metrics.
    """
    k_x, k_z = jax.random.split(key)
    x, label = preprocess(cfg, batch, k_x), _label_of(cfg, batch)
    beta = cfg.beta
    if cfg.kl_warmup:
        beta *= jnp.minimum(1.0, state.step / cfg.kl_warmup)
    if cfg.objective == "elbo":
        terms = elbo(cfg, params, x, k_z, k=cfg.k, label=label)
        value = beta * terms["kl"] - terms["reconstruction"]
    else:
        if cfg.objective == "dreg":
            bound, log_w = dreg_bound(cfg, params, x, k_z, k=cfg.k, label=label, beta=beta)
        else:
            z = sample_posterior(cfg, params, x, k_z, k=cfg.k, label=label)
            log_p_x, log_ratio = _likelihood_and_ratio(cfg, params, params, x, z, label)
            bound, log_w = _log_mean_exp(log_p_x + beta * log_ratio), log_p_x + log_ratio
        value = -bound
        terms = {"iwae": _log_mean_exp(log_w), "elbo": log_w.mean(0)}
    value = value.mean()
    metrics = {f"{name}_nats": term.mean() for name, term in terms.items()}
    return value, (state.extra, metrics)


def evaluate(cfg: Config, state: State, batch: dict, key: Key[Array, ""]) -> dict[str, Nats]:
    """Returns minus the trained bound and its parts for each image; see `make`."""
    k_x, k_z = jax.random.split(key)
    params = EMA(cfg.ema).read(state)
    x, label = preprocess(cfg, batch, k_x), _label_of(cfg, batch)
    if cfg.objective == "elbo":
        terms = elbo(cfg, params, x, k_z, label=label)
        values = {
            "nll_nats": -terms["elbo"],
            "reconstruction_nats": terms["reconstruction"],
            "kl_nats": terms["kl"],
        }
    else:
        log_w = log_weights(cfg, params, x, k_z, k=cfg.k, label=label)
        values = {"nll_nats": -_log_mean_exp(log_w), "elbo_nats": log_w.mean(0)}
    if cfg.likelihood != "bernoulli" or cfg.binarisation != "none" or cfg.levels == 2:
        values["nll_bits_per_dim"] = bits_per_dim(cfg, values["nll_nats"])
    return values


def sample(cfg: Config, state: State, key: Key[Array, ""], *, n: int, label: Label = None) -> Image:
    """Returns the mean images of p(x|z) for n samples z ~ p(z) (AEVB, fig. 5)."""
    params = EMA(cfg.ema).read(state)
    k_1, k_2 = jax.random.split(key)
    z = jax.random.normal(k_1, (n, cfg.upper_dim or cfg.latent_dim), jnp.float32)
    if cfg.upper_dim:
        z = _sample_normal(*decode_upper(cfg, params, z), k_2, (n, cfg.latent_dim))
    label = labels(label, cfg.classes, (n,), in_turn=True)
    return mean_image(cfg, decode(cfg, params, z, label))


# ------------------------------------------------------------------------------- the family


def make(cfg: Config, *, axis_name: str | None = None) -> Family:
    """Returns the VAE as a Family.

    evaluate: `nll_nats` is minus the trained bound per image. For objective elbo this is -ELBO,
        with its two terms. Otherwise it is -L_k for the config's k, with `elbo_nats`.
        `nll_bits_per_dim` is there if p(x|z) is a distribution of the images themselves.
    sample(state, key, *, n, label=None): mean images for n samples of z. `label` is one class in
        0..classes-1, or [n] classes. A conditional model without it takes the classes in turn.
    axis_name: the axis of devices in the per-device view (pmap, vmap, shard_map).
    """
    ema = EMA(cfg.ema)
    step = make_step(partial(loss, cfg), cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(
        init=lambda key: start(init(cfg, key), cfg.optim, ema=ema),
        step=step,
        evaluate=partial(evaluate, cfg),
        sample=partial(sample, cfg),
    )
