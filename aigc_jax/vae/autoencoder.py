"""The KL autoencoder of latent diffusion (Rombach et al. 2022, "LDM"): its first stage.

A convolutional VAE whose latents keep the shape of an image: x [H, W, C] -> z [H/f, W/f, Z]. It is
trained by

    -log p(x|z) + beta KL(q(z|x) || N(0, I)),   z ~ q(z|x)               (LDM, appendix G)

with a tiny beta. The KL term only keeps the latents near 0; a second model learns their
distribution. A diffusion model expects data of unit variance. So `measure` stores the mean and
standard deviation of the latents of the training images in params["latents"]. `latents` and
`images` apply them. Neither the optimizer nor the average of the parameters moves them.

Where this differs from LDM: the loss is the likelihood alone. LDM adds a perceptual distance and a
patch discriminator, which make sharper pictures at a larger squared error. LDM divides all latents
by one number, measured on one batch; here each channel has its own mean and standard deviation,
measured on all images.

    cfg = AutoencoderConfig(widths=(32, 64, 128), groups=8)
    family = make_autoencoder(cfg)
    ...                                                    # train
    params = measure(cfg, weights(cfg, state), training_images)
    z = latents(cfg, params, x)                            # [B, H/f, W/f, Z], unit variance
    x_hat = images(cfg, params, z)                         # [B, H, W, C] in [0, 1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from ..core import (
    EMA,
    Family,
    Optim,
    Optimizer,
    State,
    check_at_least,
    check_data,
    check_fields,
    descend,
    finish,
    floats,
    pixels,
    start,
)
from ..nn import ImageDecoder, ImageEncoder
from .likelihoods import gaussian_kl

Params = dict[str, Any]  # {"encoder": ..., "decoder": ..., "latents": {"mean": [Z], "std": [Z]}}
Image = Float[Array, "B H W C"]
ImageLike = Shaped[Array | np.ndarray, "B H W C"]  # floats in [0, 1]
Latents = Float[Array, "B h w Z"]
Nats = Float[Array, "B"]


# -------------------------------------------------------------------------------------- the config


@dataclass(frozen=True)
class AutoencoderConfig:
    """A KL autoencoder: its data, nets, loss and optimizer.

    The defaults are LDM's net for f = 4 and its loss. LDM has Z = 3 for f = 4, and pixels in
    [-1, 1], where its Laplace scale is 1. Raises ValueError, which names the field and its value.
    """

    shape: tuple[int, int, int] = (32, 32, 3)  # H, W, C
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    latent_channels: int = 4  # Z
    widths: tuple[int, ...] = (128, 256, 512)  # channels at H/patch, H/(2 patch), ...; (): linear
    blocks: int = 2  # residual blocks per resolution
    groups: int = 32  # of GroupNorm
    patch: int = 1  # f = patch * 2^(len(widths) - 1); a patch of 2 saves the largest convolutions
    likelihood: Literal["laplace", "gaussian"] = "laplace"
    scale: float = 0.5  # of the likelihood, in units of [0, 1]: Laplace scale or standard deviation
    beta: float = 1e-6  # weight of the KL term in training; 1: the bound itself
    bfloat16: bool = False  # convolutions in bfloat16; parameters, latents and losses in float32
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] = False
    ema: float = 0.0  # decay of the average of the parameters; 0: no average
    micro: int = 1  # micro-batches per update
    optim: Optimizer = Optim()

    def __post_init__(self):
        check_fields(self)
        check_nets(self)
        check_at_least(self, 1, "latent_channels")
        check_at_least(self, 0, "beta")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape h, w, Z of one image's latents."""
        f = factor(self)
        return self.shape[0] // f, self.shape[1] // f, self.latent_channels

    def check(self, info) -> None:
        """Raises ValueError if the data that `info` (a `data.Info`) describes does not fit."""
        check_data(self, info)


def factor(cfg) -> int:
    """Returns f, by which the encoder divides H and W."""
    return cfg.patch * 2 ** max(0, len(cfg.widths) - 1)


def check_nets(cfg) -> None:
    """Raises ValueError for sizes that cannot work; for AutoencoderConfig and VQConfig."""
    if len(cfg.shape) != 3 or min(cfg.shape) < 1:
        raise ValueError(f"model.shape must be three positive numbers (H, W, C), got {cfg.shape}")
    if not 2 <= cfg.levels <= 256:
        raise ValueError(f"model.levels must lie in 2..256, got {cfg.levels}")
    check_at_least(cfg, 0, "blocks")
    check_at_least(cfg, 1, "groups", "patch", "micro")
    if any(width < 1 or width % cfg.groups for width in cfg.widths):
        raise ValueError(
            f"model.widths must be positive multiples of model.groups = {cfg.groups}, "
            f"got {cfg.widths}"
        )
    if cfg.shape[0] % factor(cfg) or cfg.shape[1] % factor(cfg):
        raise ValueError(
            f"model.shape must be divisible by {factor(cfg)}, which is patch {cfg.patch} times the "
            f"halvings of widths {cfg.widths}; got {cfg.shape[0]} x {cfg.shape[1]} pixels"
        )
    if not 0 < cfg.scale < float("inf"):
        raise ValueError(f"model.scale must be positive, got {cfg.scale}")
    EMA(cfg.ema)  # raises ValueError for a decay outside [0, 1)


# ------------------------------------------------------------------------------------------- nets


def encoder_of(cfg, out: int) -> ImageEncoder:
    """Returns the encoder of a config: images in [-1, 1] to `out` channels."""
    dtype = jnp.bfloat16 if cfg.bfloat16 else None
    return ImageEncoder(out, cfg.widths, cfg.blocks, cfg.groups, cfg.patch, dtype, cfg.remat)


def decoder_of(cfg) -> ImageDecoder:
    """Returns the decoder of a config: latents to images in about [-1, 1]."""
    dtype, channels = jnp.bfloat16 if cfg.bfloat16 else None, cfg.shape[2]
    return ImageDecoder(channels, cfg.widths, cfg.blocks, cfg.groups, cfg.patch, dtype, cfg.remat)


def init(cfg: AutoencoderConfig, key: Key[Array, ""]) -> Params:
    """Returns the initial parameters. Until `measure`, latents are left as they are."""
    k_encoder, k_decoder = jax.random.split(key)
    x, z = (jnp.zeros((1, *shape), jnp.float32) for shape in (cfg.shape, cfg.latent_shape))
    Z = cfg.latent_channels
    return {
        "encoder": encoder_of(cfg, 2 * Z).init(k_encoder, x),
        "decoder": decoder_of(cfg).init(k_decoder, z),
        "latents": {"mean": jnp.zeros(Z, jnp.float32), "std": jnp.ones(Z, jnp.float32)},
    }


def weights(cfg: AutoencoderConfig, state: State) -> Params:
    """Returns the parameters of a State for `encode` and `decode`, averaged with `cfg.ema`."""
    return EMA(cfg.ema).read(state)


def preprocess(cfg, batch: dict) -> Image:
    """Returns a batch's pixels 0..levels-1 as floats in [0, 1]; raises ValueError for others."""
    if "image" not in batch:
        raise ValueError(f"this model takes 'image' in a batch, got {', '.join(batch)}")
    return pixels(batch["image"], cfg.levels) / (cfg.levels - 1)


def check_images(cfg, x) -> Array:
    """Returns images in [0, 1] as floats of at least 32 bits.

    Raises ValueError for another shape, whole-number pixels and, unless traced, values outside
    [0, 1].
    """
    x = jnp.asarray(floats("image", x, within=(0, 1)))
    if x.shape[1:] != tuple(cfg.shape):
        raise ValueError(f"images must be [B, {', '.join(map(str, cfg.shape))}], got {x.shape}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def encode(cfg: AutoencoderConfig, params: Params, x: ImageLike) -> tuple[Latents, Latents]:
    """Returns mu and logvar of q(z|x) for images in [0, 1]. They are not scaled: see `latents`."""
    x = check_images(cfg, x)
    h = encoder_of(cfg, 2 * cfg.latent_channels).apply(params["encoder"], 2 * x - 1)
    mu, logvar = jnp.split(h, 2, axis=-1)
    return mu, jnp.clip(logvar, -30.0, 20.0)


def decode(cfg: AutoencoderConfig, params: Params, z: Latents) -> Image:
    """Returns the mean (or the median, for a Laplace) of p(x|z), not clipped to [0, 1]."""
    if z.shape[1:] != cfg.latent_shape:
        needs = ", ".join(map(str, cfg.latent_shape))
        raise ValueError(f"latents must be [B, {needs}], got {z.shape}")
    return 0.5 + 0.5 * decoder_of(cfg).apply(params["decoder"], z)


# ----------------------------------------------------------------------------- the bound, the loss


def log_likelihood(cfg, x: Image, x_hat: Image) -> Nats:
    """Returns log p(x|z) in nats, summed over pixels and channels. Pixels lie in [0, 1].

    laplace: -|x - x_hat| / b - log(2 b). gaussian: log N(x; x_hat, sigma^2). `cfg.scale` is b or
    sigma.
    """
    error, b = (x - x_hat).reshape(x.shape[0], -1), cfg.scale
    if cfg.likelihood == "laplace":
        return -jnp.sum(jnp.abs(error) / b + math.log(2 * b), -1)
    return -0.5 * jnp.sum(jnp.square(error / b) + math.log(2 * math.pi * b**2), -1)


def elbo(
    cfg: AutoencoderConfig, params: Params, x: ImageLike, key: Key[Array, ""]
) -> dict[str, Nats]:
    """Returns {"elbo", "reconstruction", "kl"} in nats per image. beta is not in it.

    elbo: reconstruction - kl, a lower bound of log p(x)
    reconstruction: log p(x|z) for one sample z ~ q(z|x)
    kl: KL(q(z|x) || N(0, I)), exact, summed over all latents
    """
    x = check_images(cfg, x)
    mu, logvar = encode(cfg, params, x)
    z = _sample_normal(mu, logvar, key)
    reconstruction = log_likelihood(cfg, x, decode(cfg, params, z))
    kl = gaussian_kl(*(a.reshape(a.shape[0], -1) for a in (mu, logvar)))
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


def _sample_normal(mu, logvar, key):
    return mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape, mu.dtype)


def loss(cfg: AutoencoderConfig, params: Params, state: State, batch: dict, key: Key[Array, ""]):
    """Returns beta KL - log p(x|z) as a mean over the batch, and (extra, metrics)."""
    terms = elbo(cfg, params, preprocess(cfg, batch), key)
    value = (cfg.beta * terms["kl"] - terms["reconstruction"]).mean()
    return value, (state.extra, {f"{name}_nats": term.mean() for name, term in terms.items()})


def evaluate(
    cfg: AutoencoderConfig, state: State, batch: dict, key: Key[Array, ""]
) -> dict[str, Nats]:
    """Returns the bound, its parts and the reconstruction's error for each image; see `make`."""
    params, x = weights(cfg, state), preprocess(cfg, batch)
    terms = elbo(cfg, params, x, key)
    return {
        "nll_nats": -terms["elbo"],
        "nll_nats_per_dim": -terms["elbo"] / math.prod(cfg.shape),
        "reconstruction_nats": terms["reconstruction"],
        "kl_nats": terms["kl"],
        **errors(x, reconstruct(cfg, params, x)),
    }


def errors(x: Image, x_hat: Image) -> dict[str, Nats]:
    """Returns the mean squared error per image, and PSNR = -10 log10 of it: at most 100 dB."""
    mse = jnp.square(x - x_hat).reshape(x.shape[0], -1).mean(-1)
    return {"mse": mse, "psnr_db": -10 * jnp.log10(jnp.maximum(mse, 1e-10))}


# ------------------------------------------------------------------------ latents of unit variance


def measure(
    cfg: AutoencoderConfig,
    params: Params,
    x: ImageLike,
    *,
    sampled: bool = False,
    chunk: int = 250,
) -> Params:
    """Returns the parameters with mean and standard deviation of the latents of these images.

    Each channel has its own, over all images and positions. Pass the training images, once
    training is over. With them, `latents` has mean 0 and variance 1 on these images.

    params: of a trained State, pass `weights(cfg, state)`. With `cfg.ema`, a State takes the result
        as both its params and its ema.
    sampled: count the variance of q(z|x) too, for a second model that is trained on samples of z.
    chunk: number of images that are encoded at once.
    """
    x = check_images(cfg, x)

    def encode_one(x):
        mu, logvar = encode(cfg, params, x[None])
        return mu[0], jnp.exp(logvar[0])

    mu, variance = jax.lax.map(encode_one, x, batch_size=chunk)
    axes = (0, 1, 2)
    noise = variance.mean(axes) if sampled else 0.0
    std = jnp.sqrt(mu.var(axes) + noise)
    return {**params, "latents": {"mean": mu.mean(axes), "std": jnp.maximum(std, 1e-6)}}


def latents(
    cfg: AutoencoderConfig, params: Params, x: ImageLike, key: Key[Array, ""] | None = None
) -> Latents:
    """Returns scaled latents (z - mean) / std of images in [0, 1].

    z is the mean of q(z|x), or a sample of it where `key` is given.
    """
    mu, logvar = encode(cfg, params, x)
    z = mu if key is None else _sample_normal(mu, logvar, key)
    mean, std = _moments(params)
    return (z - mean) / std


def images(cfg: AutoencoderConfig, params: Params, z: Latents) -> Image:
    """Returns the images in [0, 1] of scaled latents, as `latents` gives them."""
    mean, std = _moments(params)
    return jnp.clip(decode(cfg, params, mean + std * z), 0.0, 1.0)


def _moments(params):
    """Returns mean and standard deviation of the latents, each [1, 1, 1, Z]."""
    return (params["latents"][name][None, None, None] for name in ("mean", "std"))


def reconstruct(cfg: AutoencoderConfig, params: Params, x: ImageLike) -> Image:
    """Returns the images in [0, 1] of the means of q(z|x)."""
    return jnp.clip(decode(cfg, params, encode(cfg, params, x)[0]), 0.0, 1.0)


def sample(cfg: AutoencoderConfig, state: State, key: Key[Array, ""], *, n: int) -> Image:
    """Returns images of n latents whose numbers are independent normals.

    They show what the second model has to add: neighbouring latents of an image are not
    independent.
    """
    z = jax.random.normal(key, (n, *cfg.latent_shape), jnp.float32)
    return images(cfg, weights(cfg, state), z)


# -------------------------------------------------------------------------------------- the family


def make_autoencoder(cfg: AutoencoderConfig, *, axis_name: str | None = None) -> Family:
    """Returns the autoencoder as a Family.

    step: the mean and standard deviation of the latents stay as they are.
    evaluate: `nll_nats` is -ELBO per image, whatever beta is. `nll_nats_per_dim` divides it by
        H W C. `reconstruction_nats` and `kl_nats` are its terms. `mse` and `psnr_db` compare the
        image with that of the mean of q(z|x). `reconstruction_nats` and `psnr_db` are better when
        high. `Run.best` keeps the lowest value, so it cannot choose by these two.
    sample(state, key, *, n): images of latents that are independent normals.
    axis_name: the axis of devices in the per-device view (pmap, vmap, shard_map).
    """
    ema = EMA(cfg.ema)
    objective, options = partial(loss, cfg), {"micro": cfg.micro, "axis_name": axis_name}

    def step(state, batch, key):
        new, metrics = descend(objective, cfg.optim, state, batch, key, **options)
        still = state.params["latents"]  # constants: neither decayed nor averaged
        new = finish(new._replace(params={**new.params, "latents": still}), ema)
        if ema.decay:
            new = new._replace(ema={**new.ema, "latents": state.ema["latents"]})
        return new, metrics

    return Family(
        init=lambda key: start(init(cfg, key), cfg.optim, ema=ema),
        step=step,
        evaluate=partial(evaluate, cfg),
        sample=partial(sample, cfg),
    )
