"""What the VAE scripts share."""

import numpy as np

from aigc_jax import data
from aigc_jax.core import Optim
from experiments._runs import arrays

ADAGRAD = Optim("adagrad", lr=0.02, eps=0.0, eps_root=1e-8)  # of the paper


def marginal_nats(training: data.Data, test: data.Data) -> float:
    """Returns the cross-entropy of grey-level test pixels, nats per image, without a model.

    Each pixel is an independent Bernoulli with its mean over the training images.
    """
    seen, x = (arrays(part)["image"] / (part.info.levels - 1) for part in (training, test))
    p = (seen.sum(0) + 0.5) / (len(seen) + 1)
    return float(-(x * np.log(p) + (1 - x) * np.log1p(-p)).sum((1, 2, 3)).mean())


def check_latents(latents: tuple[int, ...]) -> None:
    """Raises ValueError unless the latent sizes rise from 1 on."""
    if not latents or latents[0] < 1 or list(latents) != sorted(set(latents)):
        raise ValueError(f"latents must be rising numbers from 1 on, got {latents}")
