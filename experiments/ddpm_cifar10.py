"""The recipe of DDPM for CIFAR-10: Ho et al. 2020, section 4 and appendix B, table 1

    python -m experiments.ddpm_cifar10                  about 25 minutes on 2 cores; CIFAR-10 (170 MB)
    python -m experiments.ddpm_cifar10 --scale paper    800,000 updates; the paper: 10.6 hours of a TPU v3-8

Downloads CIFAR-10, or takes cifar-10-binary.tar.gz from --data.folder or AIGC_DATA. Scale paper is
`ddpm.Config(mirror=True)`: the U-Net of 35,746,307 parameters, 1000 linear steps, eps by the simple loss, sigma^2 =
beta, 128 images an update, half of them mirrored, Adam at 2e-4 after 5,000 updates of warm-up, gradients clipped at 1,
dropout .1, averages of .9999; it then takes all terms of the bound of 10,000 images twice, 2e7 passes. On two cores an
update of it takes minutes. Scale cpu runs the same code on a net of 1.1 million for 2,000 updates: expect blots of the
right colours, and a bound that is nothing to compare with the paper's 3.75. FID and Inception score need Inception's
weights and are not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
from aigc_jax import ddpm, figures, train
from aigc_jax.core import Optim
from aigc_jax.train import Run

from experiments import _cli, _diffusion, _pictures, ddpm_fashion
from experiments._cli import Row, Scale, Source

MODEL = ddpm.Config(mirror=True)
RUN = Run(
    folder="runs/ddpm_cifar10-paper",
    steps=800_000,
    batch_size=128,
    eval_every=10_000,
    save_every=10_000,
    log_every=100,
    keep=2,
)


@dataclass(frozen=True)
class Setup:
    """Flags of ddpm_cifar10."""

    model: ddpm.Config = MODEL
    run: Run = RUN
    data: Source = Source("cifar10")
    watched: int = 500  # training images whose bound is taken while training: like the paper, no image is held out
    images: int = 10_000  # whose bound is taken in the end, of test and of train
    terms: int = 0  # of the bound's T, for each of them; 0: all
    samples: int = 64

    def __post_init__(self):
        if self.model.classes:
            raise ValueError(
                f"ddpm_cifar10 trains an unconditional model: model.classes cannot be {self.model.classes}"
            )
        if self.model.schedule == "learned":
            raise ValueError(
                "ddpm_cifar10 takes schedules of T steps: model.schedule cannot be learned"
            )
        if (
            min(self.watched, self.samples) < 1
            or self.images < 2
            or not 0 <= self.terms <= self.model.T
        ):
            raise ValueError(
                "watched and samples must be at least 1, images at least 2, and terms lie in 0..model.T"
            )


SCALES = {
    "smoke": Scale(
        Setup(
            ddpm.Config(
                shape=(8, 8, 1),
                levels=17,
                T=50,
                terms=4,
                ema=0.98,
                optim=Optim(lr=2e-3, clip=1.0, warmup=20),
                net=ddpm.Net(widths=(16,), blocks=1, attention=(), groups=8),
            ),
            replace(
                RUN,
                folder="runs/ddpm_cifar10-smoke",
                steps=200,
                batch_size=64,
                eval_every=100,
                save_every=200,
            ),
            Source("digits"),
            watched=100,
            images=100,
            terms=10,
        ),
        "digits 8x8, a tiny net, 50 steps, 200 updates",
    ),
    "cpu": Scale(
        Setup(
            replace(
                MODEL,
                net=replace(MODEL.net, widths=(32, 64, 64), blocks=1, groups=8),
                ema=0.995,
                optim=Optim(lr=1e-3, clip=1.0, warmup=200),
            ),
            replace(
                RUN,
                folder="runs/ddpm_cifar10",
                steps=2000,
                batch_size=64,
                eval_every=500,
                save_every=500,
                keep=1,
            ),
            watched=200,
            images=200,
            terms=20,
        ),
        "the same code at reduced scale, nothing to compare: 1.1 million parameters, 2,000 updates of 64, lr "
        "1e-3, averages of .995",
    ),
    "paper": Scale(Setup(), "no FID"),
}
BOUND = "bound on test (bits per dim; +- s.e. over images)"
TRAIN = "bound on train (bits per dim; +- s.e. over images)"
PRIOR = "of the bound, L_T (bits per dim)"
PARAMETERS = "parameters"
AWAY = "bound on test less the paper's, by its net and updates (bits per dim)"
UNMEASURED = "not measured: needs Inception"
PAPER = {BOUND: 3.75, TRAIN: 3.72, PRIOR: 1e-5, PARAMETERS: "35.7 million"}
CRITERIA = {
    BOUND: "< 8, what a pixel costs without a model",
    PRIOR: "< 2e-5",
    AWAY: "within 0.03 of 0",
}
INVARIANTS = {
    BOUND: "< 4.1, log2 of 17 levels",
    PRIOR: "< 0.001",
}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, bounds test and training images, draws."""
    training, test = _pictures.parts(setup.data, "train", "test")
    watched = setup.data.load(f"train[:{min(setup.watched, training.info.examples)}]")
    setup = _pictures.adopt(setup, SCALES, training.info)
    result = train.fit(ddpm.make, setup.model, setup.run, training, valid=watched)
    k_test, k_train, k_draw, k_way = jax.random.split(jax.random.key(setup.run.seed), 4)
    compared = PAPER if setup.data.name == "cifar10" else {}
    found = _cli.kept()
    for what, source, key in ((BOUND, test, k_test), (TRAIN, training, k_train)):
        few = {name: a[: setup.images] for name, a in source.resident[0].items()}
        bits, error = ddpm_fashion.bound(result, few, key, terms=setup.terms)
        found.append(Row(what, bits, compared.get(what), error))
    if setup.data.name == "cifar10" and (setup.model.net, setup.run.steps) == (
        MODEL.net,
        RUN.steps,
    ):
        found.append(Row(AWAY, found[0].ours - PAPER[BOUND]))
    plot(setup, folder, result, found[0].ours, k_draw, k_way)
    count = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    images = test.resident[0]["image"][: setup.images]
    return [
        *found,
        Row(PRIOR, ddpm_fashion.prior(setup.model, images), compared.get(PRIOR)),
        Row(PARAMETERS, count, compared.get(PARAMETERS)),
        Row("FID to train", UNMEASURED, 3.17 if compared else None),
        Row("Inception score", UNMEASURED, 9.46 if compared else None),
    ]


@_cli.costs("ddpm_cifar10.png")
def plot(setup: Setup, folder: Path, result: train.Result, bits: float, k_draw, k_way) -> None:
    """Samples of all T steps, a denoising strip, the bound while training."""
    fig, (axes,) = figures.figure(1, 3, size=(15, 4.4))
    drawn = train.sample(result, k_draw, n=setup.samples)
    figures.images(axes[0], drawn, 8, title="samples, not chosen")
    _diffusion.strip(axes[1], _diffusion.way(result, k_way, n=4), range(4))
    _diffusion.curve(axes[2], result, f"{setup.watched} training images")
    caption = f"{setup.data.name}, U-Net {setup.model.net.widths}, T = {setup.model.T}, {setup.run.steps} updates of "
    figures.save(
        fig,
        folder / "ddpm_cifar10.png",
        f"{caption}{setup.run.batch_size}; test bound {bits:.2f} bits per dim",
    )


if __name__ == "__main__":
    _cli.main("ddpm_cifar10")
