"""A text-to-image model made of three families: its config, and how it samples.

The families meet here, as plain functions of arrays: contrastive gives a vector per word, ddpm
latents that attend to these vectors, vae the picture of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from aigc_jax import contrastive, ddpm, train, vae
from aigc_jax.core import Family, Optim, State, check_fields
from aigc_jax.vae import autoencoder
from experiments import _cli, _emoji

STEPS = 12_000
DIFFUSION = ddpm.Config(
    shape=(8, 8, 4),
    levels=None,
    context=(17, 128),  # a start token and 16 words
    unlabelled=0.1,
    schedule="cosine",
    prediction="v",
    times="low_discrepancy",
    net=ddpm.NetConfig("unet", (64, 112), 1, (4,), heads=4, groups=16, dropout=0.1),
    ema=0.9995,
    optim=Optim(lr=1e-3, clip=1.0, warmup=200, decay=STEPS - 200),
)


@dataclass(frozen=True)
class TextToImage:
    """A text-to-image model: the three models, and how it samples where nothing else is asked."""

    text: contrastive.Config = _emoji.CLIP
    autoencoder: vae.AutoencoderConfig = _emoji.AUTOENCODER
    diffusion: ddpm.Config = DIFFUSION
    w: float = 2.0  # guidance weight
    sampler: Literal["ddpm", "ddim", "dpm_solver", "heun"] = "dpm_solver"
    steps: int = 20

    def __post_init__(self):
        check_fields(self)
        tokens, width = 1 + self.text.text.context, self.text.text.width
        if self.diffusion.context != (tokens, width):
            got = f"got {self.diffusion.context}"
            raise ValueError(f"diffusion.context must be {(tokens, width)}, as text has it, {got}")
        if tuple(self.diffusion.shape) != self.autoencoder.latent_shape:
            latents = self.autoencoder.latent_shape
            got = f"got {self.diffusion.shape}"
            raise ValueError(f"diffusion.shape must be {latents}, as autoencoder has it, {got}")

    def check(self, info) -> None:
        """Raises ValueError for data (a `data.Info`) that this model cannot take."""
        self.text.check(info)
        self.autoencoder.check(info)


def contexts(cfg: TextToImage, text: Any, tokens) -> jax.Array:
    """Returns what the diffusion model attends to [n, 1 + L, E]; zeros for an empty caption."""
    tokens = jnp.asarray(tokens)
    features = contrastive.encode_text_sequence(cfg.text, {"text": text}, tokens).features
    return jnp.where((tokens != 0).any(-1)[:, None, None], features, 0)


def make_text_to_image(cfg: TextToImage, *, axis_name: str | None = None) -> Family:
    """Returns the three trained models as one Family, which only samples.

    params: {"text", "autoencoder", "diffusion"}; see `assembled`.
    sample(state, key, *, n, prompt=None, negative=None, w=cfg.w, sampler=cfg.sampler,
            steps=cfg.steps, eta=0.0, spacing=None): images [n, H, W, C] in [0, 1].
        prompt: captions as tokens [n, L], padded with 0; by default none. negative: captions that
        guidance leads away from. The others are options of `ddpm.make`'s sample.
    """

    def init(key):
        k_text, k_autoencoder, k_diffusion = jax.random.split(key, 3)
        of = autoencoder.init(cfg.autoencoder, k_autoencoder)
        params = {
            "text": contrastive.init(cfg.text, k_text)["text"],
            "autoencoder": {name: of[name] for name in ("decoder", "latents")},
            "diffusion": ddpm.make(cfg.diffusion).init(k_diffusion).params,
        }
        return State(jnp.zeros((), jnp.int32), params, None)

    def sample(
        state,
        key,
        *,
        n,
        prompt=None,
        negative=None,
        w=cfg.w,
        sampler=cfg.sampler,
        steps=cfg.steps,
        eta=0.0,
        spacing=None,
    ):
        no_text = jnp.zeros((n, cfg.text.text.context), jnp.int32)
        given = {"context": no_text if prompt is None else prompt}
        if negative is not None:
            given["negative"] = negative
        given = {name: contexts(cfg, state.params["text"], each) for name, each in given.items()}
        options = {"w": w, "sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing}
        z = ddpm.generate(cfg.diffusion, state.params["diffusion"], key, n=n, **given, **options)
        return autoencoder.images(cfg.autoencoder, state.params["autoencoder"], z)

    def untrained(*_):
        raise ValueError("a text-to-image model is trained in three parts: see text_to_image")

    return Family(init, untrained, untrained, sample)


def assembled(cfg: TextToImage, clip, params, diffusion) -> train.Result:
    """Returns the system made of three trained models.

    clip, diffusion: results of `fit`. params: of the autoencoder, with the latents' moments.
    """
    parts = {
        "text": _cli.weights(clip)["text"],
        "autoencoder": {name: params[name] for name in ("decoder", "latents")},
        "diffusion": _cli.weights(diffusion),
    }
    state = State(diffusion.state.step, parts, None)
    return train.Result(make_text_to_image(cfg), state, cfg, clip.info, None)
