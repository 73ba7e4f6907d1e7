"""The VQ-VAE: an autoencoder whose latents are codes (van den Oord, Vinyals & Kavukcuoglu 2017).

The encoder maps an image to an array z_e [h, w, D]. The codebook holds K vectors e_1 .. e_K. The
nearest code takes the place of each vector z = z_e[i, j], and the decoder sees the codes alone:

    k = argmin_m |z - e_m|^2,   z_q[i, j] = e_k                                        (eq. 1, 2)
    loss = -log p(x|z_q) + commitment * (sum over i, j of |z - sg(e_k)|^2)

The loss is eq. 3 without its codebook term, which a moving average replaces. sg stops the gradient.
The gradient with respect to z_q is copied to z_e ("straight-through"). Each code follows an
exponential moving average of the vectors that chose it (appendix A.1). The codebook lives in
`State.extra`, because no optimizer moves it.

With a uniform prior over codes, log p(x) >= log p(x|z_q) - h w log K.

One addition to the paper, and one numerical choice. A code that too few vectors choose can be moved
to a vector of the batch (`restart`; Dhariwal et al. 2020, "Jukebox", section 3.1). Distances are
sums of squared differences: the usual |z|^2 + |e|^2 - 2 z e loses small distances where vectors are
long.

    cfg = VQConfig(codes=512, widths=(32, 64, 128), groups=8)
    family = make_vq(cfg)
    ...                                                    # train
    w = weights(cfg, state)                                # the parameters and the codes
    indices = encode(cfg, w, x)                            # int32 [B, H/f, W/f]
    x_hat = decode(cfg, w, indices)                        # [B, H, W, C] in [0, 1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ..core import (
    EMA,
    Family,
    Optim,
    Optimizer,
    State,
    check_at_least,
    check_data,
    check_fields,
    make_step,
    start,
)
from .autoencoder import (
    Image,
    ImageLike,
    Nats,
    check_images,
    check_nets,
    decoder_of,
    encoder_of,
    errors,
    factor,
    log_likelihood,
    preprocess,
)

Codes = Float[Array, "K D"]
Codebook = dict[str, Array]  # {"codes": [K, D], "count": [K], "sum": [K, D]}
Weights = dict[str, Any]  # {"encoder": ..., "decoder": ..., "codes": [K, D]}, called w below
Indices = Int[Array, "B h w"]


# -------------------------------------------------------------------------------------- the config


@dataclass(frozen=True)
class VQConfig:
    """A VQ-VAE: its data, nets, codebook, loss and optimizer.

    The codebook's defaults are the paper's. The nets are those of `AutoencoderConfig`, larger than
    the paper's. Raises ValueError, which names the field and its value.
    """

    shape: tuple[int, int, int] = (32, 32, 3)  # H, W, C
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    codes: int = 512  # K
    code_dim: int = 64  # D
    decay: float = 0.99  # of the codebook's moving averages
    commitment: float = 0.25  # weight of |z_e - sg(e)|^2, summed over latents
    restart: float = 0.0  # a code with less than this share of the mean use moves; 0: none moves
    widths: tuple[int, ...] = (128, 256, 256)  # channels at H/patch, H/(2 patch), ...; (): linear
    blocks: int = 2  # residual blocks per resolution
    groups: int = 32  # of GroupNorm
    patch: int = 1  # f = patch * 2^(len(widths) - 1)
    likelihood: Literal["laplace", "gaussian"] = "gaussian"
    scale: float = 0.5  # of the likelihood, in units of [0, 1]: Laplace scale or standard deviation
    bfloat16: bool = False  # convolutions in bfloat16; parameters, codes and losses in float32
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] = False
    ema: float = 0.0  # decay of the average of parameters and codes; 0: no average
    micro: int = 1  # micro-batches per update; each of them moves the codebook
    optim: Optimizer = Optim()

    def __post_init__(self):
        check_fields(self)
        check_nets(self)
        check_at_least(self, 1, "codes", "code_dim")
        check_at_least(self, 0, "commitment")
        for field in ("decay", "restart"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise ValueError(f"model.{field} must lie in [0, 1), got {value}")

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape h, w of one image's indices."""
        return self.shape[0] // factor(self), self.shape[1] // factor(self)

    def check(self, info) -> None:
        """Raises ValueError if the data that `info` (a `data.Info`) describes does not fit."""
        check_data(self, info)


# ------------------------------------------------------------------------------------ the codebook


def nearest(codes: Codes, z: Float[Array, "... D"]) -> Int[Array, "..."]:
    """Returns the index of the code nearest to each vector, int32; of equal ones the first (eq. 1).

    Computed in float32, at least.
    """
    dtype = jnp.promote_types(jnp.result_type(codes, z), jnp.float32)
    vectors = jax.lax.stop_gradient(z).astype(dtype).reshape(-1, z.shape[-1]).T
    # Sums over the first axis are vectorised over the codes. XLA never stores all differences.
    differences = vectors[:, :, None] - codes.astype(dtype).T[:, None, :]
    indices = jnp.argmin(jnp.square(differences).sum(0), -1)
    return indices.reshape(z.shape[:-1]).astype(jnp.int32)


def straight_through(z: Float[Array, "*a D"], e: Float[Array, "*a D"]) -> Float[Array, "*a D"]:
    """Returns e, with the gradient of z (section 3.2)."""
    return z + jax.lax.stop_gradient(e - z)


def start_codebook(cfg: VQConfig, key: Key[Array, ""]) -> Codebook:
    """Returns codes that are standard normal, each with the weight of one vector."""
    codes = jax.random.normal(key, (cfg.codes, cfg.code_dim), jnp.float32)
    return {"codes": codes, "count": jnp.ones(cfg.codes, jnp.float32), "sum": jnp.copy(codes)}


def update_codebook(
    cfg: VQConfig,
    book: Codebook,
    z: Float[Array, "B h w D"],
    indices: Indices,
    key: Key[Array, ""],
    *,
    axis_name: str | None = None,
) -> tuple[Codebook, Float[Array, "K"]]:
    """Returns the codebook after a batch, and how many vectors chose each code (appendix A.1).

        count_k <- decay count_k + (1 - decay) n_k
        sum_k   <- decay sum_k + (1 - decay) sum of the n_k vectors
        e_k     <- sum_k / count_k

    A code that no vector chooses stays where it is. `cfg.restart` moves each code whose count is
    below that share of the mean count. It moves to a random vector of the batch. Its count is set
    to the mean count, and its sum to match.

    axis_name: n_k and the sums are those of all devices. Device i draws the vectors of the codes i,
        i + devices, i + 2 devices, ...
    """
    K, codes = cfg.codes, book["codes"]
    vectors = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1]).astype(codes.dtype)
    chosen = jax.nn.one_hot(indices.reshape(-1), K, dtype=codes.dtype)
    n = chosen.sum(0)
    sums = jnp.matmul(chosen.T, vectors, precision="highest")
    if axis_name is not None:
        n, sums = jax.lax.psum((n, sums), axis_name)
    count = cfg.decay * book["count"] + (1 - cfg.decay) * n
    total = cfg.decay * book["sum"] + (1 - cfg.decay) * sums
    used = (count > 1e-6)[:, None]  # False: not chosen for long. This avoids 0 / 0.
    codes = jnp.where(used, total / jnp.maximum(count, 1e-6)[:, None], codes)
    if cfg.restart:
        mean = count.mean()
        dead = count < cfg.restart * mean
        codes = jnp.where(dead[:, None], _drawn(vectors, K, key, axis_name), codes)
        count = jnp.where(dead, mean, count)
        total = jnp.where(dead[:, None], codes * mean, total)
    return {"codes": codes, "count": count, "sum": total}, n


def _drawn(vectors, K: int, key, axis_name: str | None):
    """Returns K of the vectors, drawn at random: [K, D], equal on all devices."""
    drawn = vectors[jax.random.randint(key, (K,), 0, len(vectors))]
    if axis_name is None:
        return drawn
    here = jnp.arange(K) % jax.lax.axis_size(axis_name) == jax.lax.axis_index(axis_name)
    return jax.lax.psum(jnp.where(here[:, None], drawn, 0), axis_name)


def perplexity(count: Float[Array, "K"]) -> Float[Array, ""]:
    """Returns exp of the entropy of the codes' shares: K if all are used alike, 1 if one is."""
    share = count / count.sum()
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def usage(indices: Int[Array, "..."], codes: int) -> Float[Array, "_"]:
    """Returns how often each of 0..codes-1 stands in an array of indices, float32."""
    return jnp.zeros(codes, jnp.float32).at[indices.reshape(-1)].add(1.0)


# ------------------------------------------------------------------------------------------- nets


def init_params_and_codebook(cfg: VQConfig, key: Key[Array, ""]) -> tuple[dict, Codebook]:
    """Returns the initial parameters and codebook."""
    k_encoder, k_decoder, k_codes = jax.random.split(key, 3)
    z = jnp.zeros((1, *cfg.latent_shape, cfg.code_dim), jnp.float32)
    encoder = encoder_of(cfg, cfg.code_dim)
    params = {
        "encoder": encoder.init(k_encoder, jnp.zeros((1, *cfg.shape), jnp.float32)),
        "decoder": decoder_of(cfg).init(k_decoder, z),
    }
    return params, start_codebook(cfg, k_codes)


def _weights_of(state: State) -> Weights:
    return {**state.params, "codes": state.extra["codes"]}


def weights(cfg: VQConfig, state: State) -> Weights:
    """Returns what `encode` and `decode` take: parameters and codes, averaged with `cfg.ema`."""
    return EMA(cfg.ema, _weights_of).read(state)


def encode_vectors(cfg: VQConfig, params: Weights, x: ImageLike) -> Float[Array, "B h w D"]:
    """Returns z_e for images in [0, 1]: vectors before they are replaced by codes."""
    return encoder_of(cfg, cfg.code_dim).apply(params["encoder"], 2 * check_images(cfg, x) - 1)


def decode_vectors(cfg: VQConfig, params: Weights, z: Float[Array, "B h w D"]) -> Image:
    """Returns the mean (or the median, for a Laplace) of p(x|z), not clipped to [0, 1]."""
    return 0.5 + 0.5 * decoder_of(cfg).apply(params["decoder"], z)


def encode(cfg: VQConfig, w: Weights, x: ImageLike) -> Indices:
    """Returns the codes' indices of images in [0, 1]: int32 in 0..K-1."""
    return nearest(w["codes"], encode_vectors(cfg, w, x))


def decode(cfg: VQConfig, w: Weights, indices: Indices) -> Image:
    """Returns the images in [0, 1] of indices [B, h, w]; an index out of range gives NaN."""
    if indices.shape[1:] != cfg.latent_shape:
        needs = ", ".join(map(str, cfg.latent_shape))
        raise ValueError(f"indices must be [B, {needs}], got {indices.shape}")
    known = (indices >= 0) & (indices < cfg.codes)
    z = jnp.where(known[..., None], w["codes"][indices], jnp.nan)
    return jnp.clip(decode_vectors(cfg, w, z), 0.0, 1.0)


# ---------------------------------------------------------------------- the loss and the estimates


def loss(
    cfg: VQConfig,
    params: dict,
    state: State,
    batch: dict,
    key: Key[Array, ""],
    *,
    axis_name: str | None = None,
):
    """Returns the loss as a mean over the batch, and (codebook after the batch, metrics).

    It is eq. 3 without its codebook term, which the moving average replaces.
    """
    x, book = preprocess(cfg, batch), state.extra
    z = encode_vectors(cfg, params, x)
    indices = nearest(book["codes"], z)
    e = book["codes"][indices]
    x_hat = decode_vectors(cfg, params, straight_through(z, e))
    reconstruction = log_likelihood(cfg, x, x_hat).mean()
    distance = jnp.square(z - jax.lax.stop_gradient(e)).sum((1, 2, 3)).mean()
    book, n = update_codebook(cfg, book, z, indices, key, axis_name=axis_name)
    metrics = {
        "reconstruction_nats": reconstruction,
        "commitment": distance,
        "perplexity": perplexity(n),
    }
    return cfg.commitment * distance - reconstruction, (book, metrics)


def evaluate(cfg: VQConfig, state: State, batch: dict, key: Key[Array, ""]) -> dict[str, Nats]:
    """Returns the bound, its parts and the reconstruction's error for each image; see `make_vq`."""
    w, x = weights(cfg, state), preprocess(cfg, batch)
    z = encode_vectors(cfg, w, x)
    indices = nearest(w["codes"], z)
    e = w["codes"][indices]
    x_hat = decode_vectors(cfg, w, e)
    reconstruction = log_likelihood(cfg, x, x_hat)
    kl = jnp.full_like(reconstruction, math.prod(cfg.latent_shape) * math.log(cfg.codes))
    return {
        "nll_nats": kl - reconstruction,
        "nll_nats_per_dim": (kl - reconstruction) / math.prod(cfg.shape),
        "reconstruction_nats": reconstruction,
        "kl_nats": kl,
        "commitment": jnp.square(z - e).sum((1, 2, 3)),
        **errors(x, jnp.clip(x_hat, 0.0, 1.0)),
    }


def sample(cfg: VQConfig, state: State, key: Key[Array, ""], *, n: int) -> Image:
    """Returns the images of n arrays of independent, equally probable codes.

    They show what a second model has to add: neighbouring codes of an image are not independent.
    """
    indices = jax.random.randint(key, (n, *cfg.latent_shape), 0, cfg.codes)
    return decode(cfg, weights(cfg, state), indices)


# -------------------------------------------------------------------------------------- the family


def make_vq(cfg: VQConfig, *, axis_name: str | None = None) -> Family:
    """Returns the VQ-VAE as a Family.

    evaluate: `nll_nats` is -log p(x|z_q) + h w log K per image. `nll_nats_per_dim` divides it by
        H W C. `reconstruction_nats` is log p(x|z_q), and `kl_nats` is h w log K. `mse` and
        `psnr_db` compare image and reconstruction. `reconstruction_nats` and `psnr_db` are better
        when high. `Run.best` keeps the lowest value, so it cannot choose by these two.
    sample(state, key, *, n): images of independent, equally probable codes.
    axis_name: the axis of devices in the per-device view (pmap, vmap, shard_map).
    """
    ema = EMA(cfg.ema, _weights_of)
    objective = partial(loss, cfg, axis_name=axis_name)
    step = make_step(objective, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)

    def first_state(key):
        params, book = init_params_and_codebook(cfg, key)
        return start(params, cfg.optim, extra=book, ema=ema)

    return Family(
        init=first_state,
        step=step,
        evaluate=partial(evaluate, cfg),
        sample=partial(sample, cfg),
    )
