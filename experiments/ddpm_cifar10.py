"""The recipe of DDPM for CIFAR-10: Ho et al. 2020, section 4 and appendix B, table 1

    python -m experiments.ddpm_cifar10    about 25 minutes on 2 cores; CIFAR-10 (170 MB)
    python -m experiments.ddpm_cifar10 --scale paper    800,000 updates; the paper: 10.6 hours of a TPU v3-8

Downloads CIFAR-10, or takes cifar-10-binary.tar.gz from --data.folder or AIGC_DATA. Scale paper is
`ddpm.Config(mirror=True)`: a U-Net of 35,746,307 parameters, 1000 linear steps, eps by the simple
loss, sigma^2 = beta. An update takes 128 images, half of them mirrored, with Adam at 2e-4 after
5,000 updates of warm-up, gradients clipped at 1, dropout 0.1 and averages of 0.9999. In the end all
terms of the bound are taken of 10,000 images of test and of train: 2e7 passes. On two cores one
update takes minutes. Scale cpu runs the same code on a net of 1.1 million for 2,000 updates. Expect
blurred colours. Its bound cannot be compared with the paper's 3.75. FID and Inception score need
Inception's weights and are not measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from aigc_jax import ddpm, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _diffusion, _pictures
from experiments._cli import Row, Scale, Source

MODEL = ddpm.Config(mirror=True)
RUN = Run("runs/ddpm_cifar10-paper", 800_000, eval_every=10_000, save_every=10_000, log_every=100)


@dataclass(frozen=True)
class Setup:
    """Flags of ddpm_cifar10."""

    model: ddpm.Config = MODEL
    run: Run = RUN
    data: Source = Source("cifar10")
    watched: int = 500  # training images whose bound is watched: like the paper, none is held out
    images: int = 10_000  # whose bound is taken in the end, of test and of train
    terms: int = 0  # of the bound's T, for each of them; 0: all
    samples: int = 64

    def __post_init__(self):
        model = self.model
        if model.classes:
            raise ValueError(f"the model is unconditional: model.classes cannot be {model.classes}")
        if model.schedule == "learned":
            raise ValueError("the schedule has T steps: model.schedule cannot be learned")
        if not 0 <= self.terms <= model.T:
            raise ValueError(f"terms must lie in 0..model.T, got {self.terms}")
        _cli.at_least(self, watched=1, samples=1, images=2)


TINY = ddpm.NetConfig(widths=(16,), blocks=1, attention=(), groups=8)
SMALL = replace(MODEL.net, widths=(32, 64, 64), blocks=1, groups=8)
OPTIM = Optim(lr=2e-3, clip=1.0, warmup=20)
SMOKE_RUN = Run("runs/ddpm_cifar10-smoke", 200, 64, eval_every=100, save_every=200, log_every=100)
SMOKE_MODEL = ddpm.Config(
    shape=(8, 8, 1), levels=17, T=50, terms=4, ema=0.98, optim=OPTIM, net=TINY
)
SMOKE = Setup(SMOKE_MODEL, SMOKE_RUN, Source("digits"), watched=100, images=100, terms=10)
EVERY = dict(eval_every=500, save_every=500, log_every=100, keep=1)
CPU_MODEL = replace(MODEL, net=SMALL, ema=0.995, optim=Optim(lr=1e-3, clip=1.0, warmup=200))
CPU_RUN = Run("runs/ddpm_cifar10", 2000, 64, **EVERY)
CPU = Setup(CPU_MODEL, CPU_RUN, watched=200, images=200, terms=20)
DIFFERS = (
    "the same code at reduced scale, not comparable: 1.1 million parameters, 2,000 updates of 64, "
    "lr 1e-3, averages of 0.995"
)
SCALES = {
    "smoke": Scale(SMOKE, "digits 8x8, a tiny net, 50 steps, 200 updates"),
    "cpu": Scale(CPU, DIFFERS),
    "paper": Scale(Setup(), "no FID"),
}
BOUND = "bound on test (bits per dim; +- s.e. over images)"
TRAIN = "bound on train (bits per dim; +- s.e. over images)"
PRIOR = "of the bound, L_T (bits per dim)"
PARAMETERS = "parameters"
AWAY = "bound on test less the paper's, by its net and updates (bits per dim)"
UNMEASURED = "not measured: needs Inception"
PAPER = {BOUND: 3.75, TRAIN: 3.72, PRIOR: 1e-5, PARAMETERS: "35.7 million"}
NAIVE = "< 8, what a pixel costs without a model"
CRITERIA = {BOUND: NAIVE, PRIOR: "< 2e-5", AWAY: "within 0.03 of 0"}
INVARIANTS = {BOUND: "< 4.1, log2 of 17 levels", PRIOR: "< 0.001"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, bounds test and training images."""
    training, test = _pictures.parts(setup.data, "train", "test")
    watched = setup.data.load(f"train[:{min(setup.watched, training.info.examples)}]")
    setup = _pictures.adopt(setup, SCALES, training.info)
    result = train.fit(ddpm.make, setup.model, setup.run, training, valid=watched)
    k_test, k_train, k_samples, k_way = jax.random.split(jax.random.key(setup.run.seed), 4)
    paper = PAPER if setup.data.name == "cifar10" else {}
    found = _cli.kept()
    for what, source, key in ((BOUND, test, k_test), (TRAIN, training, k_train)):
        first = {name: a[: setup.images] for name, a in _cli.arrays(source).items()}
        bits, error = _diffusion.sampled_bound(result, first, key, terms=setup.terms)
        found.append(Row(what, bits, paper.get(what), error))
    if paper and (setup.model.net, setup.run.steps) == (MODEL.net, RUN.steps):
        found.append(Row(AWAY, found[0].ours - PAPER[BOUND]))
    plot(setup, folder, result, found[0].ours, k_samples, k_way)
    images = _cli.arrays(test)["image"][: setup.images]
    return [
        *found,
        Row(PRIOR, _diffusion.prior(setup.model, images), paper.get(PRIOR)),
        Row(PARAMETERS, _cli.parameters(result), paper.get(PARAMETERS)),
        Row("FID to train", UNMEASURED, 3.17 if paper else None),
        Row("Inception score", UNMEASURED, 9.46 if paper else None),
    ]


@_cli.costs("ddpm_cifar10.png")
def plot(setup: Setup, folder: Path, result: train.Result, bits: float, k_samples, k_way) -> None:
    """Draws samples of all T steps, their denoising, the bound while training."""
    samples = {"samples, not chosen": (train.sample(result, k_samples, n=setup.samples), 8)}
    caption = f"{_diffusion.about(setup)} Bound on test: {bits:.2f} bits per dim."
    way, watched = _diffusion.way(result, k_way, n=4), f"{setup.watched} training images"
    _diffusion.plot(folder / "ddpm_cifar10.png", result, samples, way, caption, watched)


if __name__ == "__main__":
    _cli.main("ddpm_cifar10")
