"""The config of a VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import EMA, Optim, Optimizer, check_at_least, check_data, check_fields


@dataclass(frozen=True)
class Config:
    """A VAE: its data, nets, likelihood, bound and optimizer.

    The defaults are AEVB's net for MNIST (section 5: 500 hidden units), initialised as in Flax.
    Raises ValueError, which names the field and its value, for a model that cannot work.
    """

    shape: tuple[int, int, int] = (28, 28, 1)  # H, W, C
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    classes: int = 0  # number of labels that encoder and decoder take; 0: unconditional
    latent_dim: int = 20  # length of z, or of z_1
    channels: tuple[int, ...] = ()  # convolutions before the dense layers, each halves H and W
    hidden: tuple[int, ...] = (500,)  # dense layers of the encoder; reversed, those of the decoder
    upper_dim: int = 0  # length of z_2 (IWAE); 0: one stochastic layer
    upper_hidden: tuple[int, ...] = (100, 100)  # dense layers between z_1 and z_2, both ways
    activation: Literal["tanh", "relu", "softplus"] = "tanh"
    likelihood: Literal["bernoulli", "gaussian", "logistic"] = "bernoulli"  # see log_likelihood
    sigma: float | None = None  # gaussian: fixed standard deviation; None: learned per pixel
    binarisation: Literal["none", "static", "dynamic"] = "none"  # see preprocess
    objective: Literal["elbo", "iwae", "dreg"] = "elbo"  # dreg: L_k with the gradient of dreg_bound
    k: int = 1  # samples of z per image in training
    beta: float = 1.0  # weight of log p(z) - log q(z|x) in training; 1: the bound itself
    kl_warmup: int = 0  # updates over which beta rises from 0 (Sonderby et al. 2016); 0: none
    bfloat16: bool = False  # products and convolutions in bfloat16; all the rest in float32
    ema: float = 0.0  # decay of the average of the parameters; 0: no average
    micro: int = 1  # micro-batches per update
    optim: Optimizer = Optim()

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 0, "classes", "upper_dim", "kl_warmup", "beta")
        check_at_least(self, 1, "latent_dim", "k", "micro")
        _check_sizes(self)
        if self.likelihood != "bernoulli" and self.binarisation != "none":
            needs = f"likelihood {self.likelihood} needs none"
            raise ValueError(f"model.binarisation makes images of zeros and ones: {needs}")
        if self.sigma is not None and not (self.sigma > 0 and self.likelihood == "gaussian"):
            hint = "must be positive, and is for likelihood gaussian only"
            raise ValueError(f"model.sigma {hint}, got {self.sigma}")
        EMA(self.ema)  # raises ValueError for a decay outside [0, 1)

    def check(self, info) -> None:
        """Raises ValueError if the data that `info` (a `data.Info`) describes does not fit."""
        check_data(self, info)
        if self.binarisation == "static" and info.examples is None:
            hint = "samples each image once, so it needs a finite data set: use dynamic"
            raise ValueError(f"model.binarisation 'static' {hint}")


def _check_sizes(cfg: Config) -> None:
    if min(cfg.shape) < 1:
        raise ValueError(f"model.shape must be three positive numbers (H, W, C), got {cfg.shape}")
    if not 2 <= cfg.levels <= 256:
        raise ValueError(f"model.levels must lie in 2..256, got {cfg.levels}")
    for field in ("channels", "hidden", "upper_hidden"):
        if any(width < 1 for width in getattr(cfg, field)):
            raise ValueError(f"model.{field} must hold positive widths, got {getattr(cfg, field)}")
    halvings, (height, width, _) = len(cfg.channels), cfg.shape
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"model.channels {cfg.channels} halve H and W {halvings} times, which "
            f"{height} x {width} pixels do not allow"
        )
