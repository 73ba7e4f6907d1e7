"""The config of a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import EMA, Optim, Optimizer, check_at_least, check_data, check_fields
from .nets import NetConfig
from .schedules import (
    cosine_schedule,
    linear_schedule,
    straight_schedule,
)

SCHEDULES = {
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "straight": straight_schedule,
}
Objective = Literal["simple", "vlb", "hybrid", "snr", "truncated_snr", "min_snr"]


@dataclass(frozen=True)
class Config:
    """A diffusion model. The defaults are DDPM's for CIFAR-10 (section 4 and appendix B).

    DDPM also mirrors half of the images (`mirror`).

    Flow matching is schedule "straight", prediction "velocity" and objective "simple".
    Raises ValueError, which names the field and its value, for a model that cannot work.
    """

    shape: tuple[int, ...] = (32, 32, 3)  # (H, W, C) of images, (d,) of points
    # pixels are whole numbers in 0..levels-1; None: the examples are floats, such as latents
    levels: int | None = 256
    classes: int = 0  # the network is given a label in 0..classes-1; 0: no labels
    # share of labels and contexts withheld in training, which guidance needs
    unlabelled: float = 0.1
    T: int = 1000  # number of steps
    # learned: VDM, in continuous time, T is for sampling; straight: x_t = (1 - u) x_0 + u eps
    schedule: Literal["linear", "cosine", "learned", "straight"] = "linear"
    prediction: Literal["eps", "x_0", "v", "mu", "velocity"] = "eps"  # see `convert`
    # of p(x_{t-1} | x_t); learned: between the other two
    variance: Literal["beta", "beta_tilde", "learned"] = "beta"
    objective: Objective = "simple"  # see `losses`
    times: Literal["uniform", "low_discrepancy", "importance"] = "uniform"  # distribution of t
    terms: int = 8  # number of t that `evaluate` draws; 0: all T (with a learned schedule, one)
    mirror: bool = False  # mirror half of the training images left to right, as DDPM on CIFAR-10
    net: NetConfig = NetConfig()
    ema: float = 0.9999
    micro: int = 1
    optim: Optimizer = Optim(lr=2e-4, clip=1.0, warmup=5000)
    # (L, E): the network attends to L vectors of width E per example, such as a text's features
    context: tuple[int, int] | None = None

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 0, "classes", "terms")
        check_at_least(self, 1, "T", "micro")
        _check_numbers(self)
        _check_combination(self)
        self.net.check(self.shape)
        EMA(self.ema)  # raises ValueError for a decay outside [0, 1)

    @property
    def is_image(self) -> bool:
        """Whether examples are images of whole-number pixels, not points or latents."""
        return len(self.shape) == 3 and self.levels is not None

    def check(self, info) -> None:
        """Raises ValueError for data (a `data.Info`) that this model cannot take."""
        check_data(self, info)
        if info.context != (self.context and tuple(self.context)):
            has = f"the examples have contexts {info.context}" if info.context else "there are none"
            raise ValueError(f"model.context is {self.context}, {has}")


def _check_numbers(cfg: Config) -> None:
    if len(cfg.shape) not in (1, 3) or min(cfg.shape) < 1:
        rule = "model.shape must be (H, W, C) or (d,), all positive"
        raise ValueError(f"{rule}, got {cfg.shape}")
    if cfg.levels is not None and not 2 <= cfg.levels <= 256:
        raise ValueError(f"model.levels must lie in 2..256, got {cfg.levels}")
    if cfg.T > 10**6:  # a schedule is an array of T numbers
        raise ValueError(f"model.T must be at most 1,000,000, got {cfg.T}")
    if not 0 <= cfg.unlabelled < 1:
        raise ValueError(f"model.unlabelled must lie in [0, 1), got {cfg.unlabelled}")
    if cfg.mirror and not cfg.is_image:
        what = "points" if len(cfg.shape) == 1 else "floats (levels is None)"
        raise ValueError(f"model.mirror is for images, model.shape {tuple(cfg.shape)} is of {what}")
    if cfg.context is not None and min(cfg.context) < 1:
        rule = "model.context must be (L, E), both positive"
        raise ValueError(f"{rule}, got {tuple(cfg.context)}")
    if cfg.context is not None and cfg.net.kind == "mlp":
        raise ValueError("model.context needs model.net.kind unet or dit, got 'mlp'")


def _check_combination(cfg: Config) -> None:
    """Raises ValueError for choices that do not go together."""
    if cfg.variance == "learned" and cfg.objective not in ("vlb", "hybrid"):
        rule = "model.variance 'learned' is trained by objective vlb or hybrid"
        raise ValueError(f"{rule}, not {cfg.objective}")
    if cfg.objective == "hybrid" and cfg.variance != "learned":
        rule = "model.objective 'hybrid' trains a learned variance"
        raise ValueError(f"{rule}: set model.variance to learned, or use objective simple")
    if cfg.objective == "truncated_snr" and cfg.prediction == "eps":
        rule = "model.objective 'truncated_snr' is for nets that do not predict eps"
        raise ValueError(f"{rule}: Salimans & Ho's weight of eps grows without bound")
    if cfg.schedule == "straight" and cfg.prediction == "eps":
        rule = "model.schedule 'straight' ends in pure noise, where eps says nothing about x_0"
        raise ValueError(f"{rule}: set model.prediction to velocity, x_0, v or mu, not 'eps'")
    if cfg.schedule != "learned":
        SCHEDULES[cfg.schedule](cfg.T)
        return
    chosen = (cfg.prediction, cfg.variance, cfg.objective, cfg.times)
    if chosen != ("eps", "beta_tilde", "vlb", "low_discrepancy"):
        rule = (
            "model.schedule 'learned' (VDM) goes with prediction eps, variance beta_tilde, "
            "objective vlb and times low_discrepancy"
        )
        raise ValueError(f"{rule}, got {', '.join(chosen)}")
