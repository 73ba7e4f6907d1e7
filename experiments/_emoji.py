"""The models of emoji that more than one script trains, and how the scripts apply them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import contrastive, vae
from aigc_jax.contrastive import ImageConfig, TextConfig
from aigc_jax.core import Optim

CLIP_STEPS, AUTOENCODER_STEPS = 1000, 4500
CLIP = contrastive.Config(
    text=TextConfig(vocab=1521, context=16),
    image=ImageConfig(shift=2),
    optim=Optim(lr=1e-3, b2=0.98, weight_decay=0.1, clip=1.0, warmup=50, decay=CLIP_STEPS - 50),
)
NETS = {"widths": (64, 128), "blocks": 2, "groups": 8, "patch": 2, "likelihood": "gaussian"}


def autoencoder_optim(steps: int) -> Optim:
    """Returns Adam with a warm-up and a cosine decay to 0 that ends with the run.

    The loss is a sum over 3,072 numbers, so gradients are long: the clip is for outliers.
    """
    warmup = min(100, steps // 10)
    return Optim(lr=2e-3, b2=0.99, clip=1500.0, warmup=warmup, decay=steps - warmup)


AUTOENCODER = vae.AutoencoderConfig(
    **NETS, scale=0.1, beta=1e-3, ema=0.998, optim=autoencoder_optim(AUTOENCODER_STEPS)
)


def in_chunks(function, x: np.ndarray, size: int = 250) -> np.ndarray:
    """Returns a compiled function of all x, made from equal chunks; the last one is filled up."""
    function, pieces = jax.jit(function), []
    for i in range(0, len(x), size):
        rows = np.minimum(np.arange(i, i + size), len(x) - 1)
        pieces.append(np.asarray(function(jnp.asarray(x[rows]))))
    return np.concatenate(pieces)[: len(x)]
