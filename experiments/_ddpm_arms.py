"""Diffusion models of 8x8 digits that differ in one thing, trained and measured alike: an arm is {field: value}."""

from dataclasses import replace

import jax
import numpy as np

from aigc_jax import ddpm, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli

MODEL = ddpm.Config(
    shape=(8, 8, 1),
    levels=17,
    T=200,
    terms=8,
    net=ddpm.NetConfig(widths=(32, 64), blocks=1, attention=(4,), groups=8),
    ema=0.995,
    optim=Optim(lr=1e-3, clip=1.0, warmup=100, decay=2000, floor=0.1),
)
DIFFERS = "8x8 digits, T = 200, 0.7 million parameters, 2,000 updates of 64"
SMOKE = replace(MODEL, T=50, net=ddpm.NetConfig("mlp", (32,), dropout=0.0), ema=0.9)


def run(folder: str, **changes) -> Run:
    """Returns the run of scale cpu, with changes."""
    usual = Run(
        folder, steps=2000, batch_size=64, eval_every=500, save_every=2000, log_every=100, keep=1
    )
    return replace(usual, **changes)


def smoke_run(folder: str) -> Run:
    """Returns the run of scale smoke."""
    return run(folder, steps=40, eval_every=0, save_every=0)


def check(setup, script: str) -> None:
    """Raises ValueError for flags that the measurements after the training could not take."""
    if setup.seeds < 1 or not 2 <= setup.samples <= 1437 or not 1 <= setup.images <= 360:
        raise ValueError("seeds must be at least 1, samples lie in 2..1437 and images in 1..360")
    if setup.data.name != "digits":
        instead = (
            "; for own pictures: python -m experiments.own_pictures" if setup.data.pictures else ""
        )
        raise ValueError(
            f"{script} measures by our classifier of digits, not of {setup.data.name}{instead}"
        )


def rows(arm: str, quantities, papers, values) -> list[_cli.Row]:
    """Returns an arm's row of each quantity: the paper's number, our mean and error over seeds.

    papers: a number or None per quantity. values: for each seed, a number per quantity.
    """
    ours = map(_cli.mean_and_error, zip(*values, strict=True))
    return [
        _cli.Row(f"{arm}: {quantity}", mean, paper, error)
        for quantity, paper, (mean, error) in zip(quantities, papers, ours, strict=True)
    ]


class Digits:
    """The digits, and our classifier of them, by which all arms are measured."""

    def __init__(self, setup):
        self.training = setup.data.load("train")
        image = _cli.arrays(setup.data.load("test"))["image"][: setup.images]
        self.x_0 = np.asarray(ddpm.preprocess(setup.model, {"image": image}))
        self.net = metrics.load_classifier("digits")
        seen = _cli.arrays(self.training)["image"] / (setup.model.levels - 1)
        self.real = self.net.apply(seen)[1]

    def fid(self, x: np.ndarray) -> float:
        """Returns the Frechet distance of images in [0, 1] to the training digits."""
        return metrics.frechet_distance(self.real, self.net.apply(x)[1])

    def score(self, x: np.ndarray) -> float:
        """Returns the classifier score of images in [0, 1]."""
        return metrics.classifier_score(np.asarray(jax.nn.softmax(self.net.apply(x)[0], -1)))

    def fit(self, setup, arm: str, changes: dict, folder):
        """Trains an arm with every seed; yields (run, result)."""
        base = replace(setup.run, folder=str(folder / arm.replace(", ", "-").replace(" ", "-")))
        for run in _cli.seeded(base, setup.seeds):
            model = replace(setup.model, **changes)
            yield run, train.fit(ddpm.make, model, run, self.training)
