"""The config of a GAN."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from ..core import EMA, Optim, Optimizer, check_at_least, check_data, check_fields
from .nets import NetConfig

LossName = Literal[
    "minimax", "non_saturating", "least_squares", "wasserstein", "hinge", "relativistic"
]


@dataclass(frozen=True)
class Config:
    """A GAN: its data, nets, losses and optimizers.

    The defaults are GAN's nets for MNIST, from the authors' code, with DCGAN's optimizer.
    Raises ValueError, which names the field and its value, for a model that cannot work.
    """

    shape: tuple[int, ...] = (28, 28, 1)  # (H, W, C) of images, (d,) of points
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    classes: int = 0  # number of labels that both nets take (CGAN); 0: unconditional
    condition: Literal["concat", "projection"] = "concat"  # how D takes labels; G concatenates them
    latent_dim: int = 100  # length of z
    # z ~ N(0, I); uniform in [0, 1) (CGAN); or uniform in [-sqrt 3, sqrt 3), of variance 1 (the
    # code of GAN).
    latent: Literal["normal", "uniform", "unit_uniform"] = "normal"
    gen: NetConfig = NetConfig(init="uniform", init_scale=0.05)
    disc: NetConfig = NetConfig(
        widths=(240, 240),
        activation="maxout",
        dropout=(0.2, 0.5),
        init="uniform",
        init_scale=0.005,
    )
    output_bias: tuple[float, ...] = ()  # initial biases of G's last layer (mlp only); (): zeros
    loss: LossName = "non_saturating"  # see discriminator_loss and generator_loss
    # On D: that of WGAN-GP; R1 (at real examples); R1 and R2 (at fakes too); clipping (WGAN).
    penalty: Literal["none", "gp", "r1", "r1_r2", "clip"] = "none"
    penalty_weight: float | None = None  # lambda, gamma or bound; None: 10, or 0.01 (clip)
    lazy: int | None = None  # compute the penalty in every lazy-th update, times lazy; None: 1
    n_critic: int = 1  # updates of D per step, each on its own part of the batch
    # Update both nets from the parameters before the step, as the code of GAN and PacGAN does.
    # None, False: G is updated after D, through the updated D (GAN, algorithm 1).
    simultaneous: bool | None = None
    # Change real and fake images before D sees them, differentiably (Zhao et al. 2020). diff: their
    # colour, translation and cutout. Penalties are taken at the changed images. The authors
    # differentiate by the images before the change.
    augment: Literal["diff"] | None = None
    packing: int = 1  # number of samples that D judges together (PacGAN)
    unrolled: int = 0  # updates of D that G's gradient looks ahead (Metz et al. 2017); 0: none
    # Of a generator of kind style: the share of images that take the styles of two z ("mixing"),
    # and the weight of the penalty on path lengths (StyleGAN2: 0.9 and 2). None: none.
    mixing: float | None = None
    path_length: float | None = None
    ema: float = 0.0  # decay of the average of G's parameters and statistics; 0: no average
    micro: int = 1  # micro-batches per update
    optim: Optimizer = Optim(lr=2e-4, b1=0.5)  # of G
    disc_optim: Optimizer = Optim(lr=2e-4, b1=0.5)  # of D

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 0, "classes", "unrolled")
        check_at_least(self, 1, "latent_dim", "n_critic", "packing", "micro")
        _check_numbers(self)
        _check_nets(self)
        _check_objective(self)
        _check_style(self)

    @property
    def weight(self) -> float:
        """The penalty's weight, or the bound of clipping; by default that of its paper."""
        if self.penalty_weight is not None:
            return self.penalty_weight
        return 0.01 if self.penalty == "clip" else 10.0

    @property
    def cuts(self) -> dict[str, int]:
        """The factors, by name, whose product must divide the batch on each device."""
        return {"micro-batches": self.micro, "n_critic": self.n_critic, "packing": self.packing}

    def check(self, info) -> None:
        """Raises ValueError if the data that `info` (a `data.Info`) describes does not fit."""
        check_data(self, info)


def _check_numbers(cfg: Config) -> None:
    if len(cfg.shape) not in (1, 3) or min(cfg.shape) < 1:
        raise ValueError(f"model.shape must be (H, W, C) or (d,), all positive, got {cfg.shape}")
    if not 2 <= cfg.levels <= 256:
        raise ValueError(f"model.levels must lie in 2..256, got {cfg.levels}")
    if cfg.penalty_weight is not None and not cfg.penalty_weight > 0:
        raise ValueError(f"model.penalty_weight must be positive, got {cfg.penalty_weight}")
    EMA(cfg.ema)  # raises ValueError for a decay outside [0, 1)


def _check_nets(cfg: Config) -> None:
    for name, net in (("gen", cfg.gen), ("disc", cfg.disc)):
        net.check(name)
        if net.kind == "mlp":
            continue
        halvings = len(net.widths) - (net.kind == "style")
        if len(cfg.shape) != 3 or any(side % 2**halvings for side in cfg.shape[:2]):
            raise ValueError(
                f"model.{name}.widths {net.widths} halve H and W {halvings} times, "
                f"which shape {cfg.shape} does not allow"
            )
        normed = net.kind == "resnet" or len(net.widths) > 1  # a DCGAN's first layer has no norm
        pixels = prod(side >> halvings for side in cfg.shape[:2])
        if net.norm == "instance" and normed and pixels < 2:
            raise ValueError(
                f"model.{name}.norm 'instance' makes maps of one pixel 0: use fewer than "
                f"{len(net.widths)} widths for shape {cfg.shape}"
            )
        # D's maps are half as high as the image, or less. The last map of a DCGAN is the image.
        of_gen = range(net.kind == "dcgan", halvings)
        levels = of_gen if name == "gen" else range(1, halvings + 1)
        heights = [cfg.shape[0] >> i for i in levels]
        if net.attention is not None and net.attention not in heights:
            rule = f"must be a height of its maps ({', '.join(map(str, heights)) or 'none'})"
            raise ValueError(f"model.{name}.attention {rule}; got {net.attention}")
    if cfg.gen.norm not in ("none", "batch", "class_batch"):
        norms = "none, batch or class_batch"
        raise ValueError(f"model.gen.norm {cfg.gen.norm!r} is for the discriminator: use {norms}")
    if cfg.disc.norm == "class_batch":
        raise ValueError("model.disc.norm 'class_batch' is for the generator")
    if cfg.gen.norm == "class_batch" and not cfg.classes:
        raise ValueError("model.gen.norm 'class_batch' needs classes")
    if cfg.output_bias and (cfg.gen.kind != "mlp" or len(cfg.output_bias) != prod(cfg.shape)):
        needs = f"needs gen.kind mlp and {prod(cfg.shape)} values"
        raise ValueError(f"model.output_bias {needs}, got {len(cfg.output_bias)}")
    if cfg.condition == "projection" and not cfg.classes:
        raise ValueError("model.condition 'projection' needs classes")
    if cfg.disc.kind == "style" and cfg.classes and cfg.condition != "projection":
        raise ValueError(
            f"model.disc of kind style takes labels by projection, not by {cfg.condition!r}: "
            "set model.condition to projection"
        )
    if cfg.disc.mapping is not None:
        raise ValueError("model.disc.mapping is for the generator: set model.gen.mapping")


def _check_style(cfg: Config) -> None:
    for field in ("mixing", "path_length"):
        value = getattr(cfg, field)
        if value is None:
            continue
        if cfg.gen.kind != "style":
            raise ValueError(f"model.{field} needs gen.kind style, got {cfg.gen.kind}")
        if value < 0 or (field == "mixing" and value > 1):
            raise ValueError(f"model.{field} must be a share or a weight, at least 0, got {value}")
    if (cfg.mixing or cfg.path_length) and (cfg.packing > 1 or cfg.unrolled):
        raise ValueError("model.mixing and model.path_length go with neither packing nor unrolled")


def _check_objective(cfg: Config) -> None:
    if cfg.augment and len(cfg.shape) != 3:
        raise ValueError(f"model.augment is for images, got shape {cfg.shape}")
    if cfg.lazy is not None and (cfg.lazy < 1 or cfg.penalty not in ("gp", "r1", "r1_r2")):
        raise ValueError(
            f"model.lazy must be at least 1, for penalty gp, r1 or r1_r2; got {cfg.lazy} and "
            f"{cfg.penalty}"
        )
    if cfg.disc.norm == "batch" and cfg.penalty in ("gp", "r1", "r1_r2"):
        raise ValueError(
            f"model.penalty {cfg.penalty!r} needs the gradient of each logit by its own example, "
            "but model.disc.norm 'batch' makes a logit depend on the whole batch "
            "(Gulrajani et al. 2017, section 4): set disc.norm to none, layer, instance or spectral"
        )
    # Self-attention is not Lipschitz (Kim et al. 2021), and its products are not normalised here.
    bounded = cfg.disc.norm == "spectral" and cfg.disc.attention is None
    if cfg.loss == "wasserstein" and cfg.penalty == "none" and not bounded:
        raise ValueError(
            "model.loss 'wasserstein' needs a Lipschitz constraint on the critic: set penalty to "
            "gp, r1, r1_r2 or clip, or disc.norm to spectral without disc.attention"
        )
    if cfg.simultaneous and cfg.n_critic > 1:
        raise ValueError(
            f"model.simultaneous makes one update of each net, but model.n_critic is {cfg.n_critic}"
        )
    optim = cfg.disc_optim
    if cfg.unrolled and isinstance(optim, Optim) and optim.name != "sgd" and not optim.eps_root:
        raise ValueError(
            f"model.unrolled differentiates through the update of D's {optim.name}, whose square "
            "root has no derivative at 0: set disc_optim.eps_root, for example to 1e-12"
        )
