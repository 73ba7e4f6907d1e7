"""A class-conditional diffusion model of 8x8 digits: samples, their denoising, and a bound in bits per dimension

    python -m experiments.ddpm_digits    about 5 minutes of training on 2 free cores; downloads nothing

A U-Net of 0.7 million parameters predicts v over 100 steps of the cosine schedule, with learned
variances (hybrid loss). A tenth of the labels is withheld, so that guidance can be tried. The bound
is that of Ho et al. 2020 (DDPM), eq. 5, with all 100 terms; the last is a discretised decoder over
the 17 grey levels, so that it compares with any model of these pixels. More steps make this bound
worse: they add noise finer than a grey level, whose bits the net does not win back. No paper has
numbers for this set: the criteria are ours. Expect digits as good as real ones to our classifier.
The test digits are by other writers than the training digits; held-out digits of the same writers
cost fewer bits. `ddim_steps`, `guidance` and `progressive` take this model apart: given the same
--run.folder, they find it trained.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from aigc_jax import ddpm, figures, train
from aigc_jax.train import Run
from experiments import _cli, _ddpm_digits, _diffusion, _pictures
from experiments._cli import Row, Scale, Source


@dataclass(frozen=True)
class Setup:
    """Flags of ddpm_digits."""

    model: ddpm.Config = _ddpm_digits.MODEL
    run: Run = _ddpm_digits.run("runs/ddpm_digits")
    data: Source = Source("digits")
    training: int | None = None  # images; default 1,237 digits, 80 % of own; the rest is watched

    def __post_init__(self):
        _pictures.check(self, "ddpm_digits", conditional=True, own=True)


SMOKE = Setup(_ddpm_digits.SMOKE, _ddpm_digits.smoke_run("runs/ddpm_digits-smoke"))
SCALES = {
    "smoke": Scale(SMOKE, "a tiny net, 50 steps, 400 updates"),
    "cpu": Scale(Setup(), "our own set and network: DDPM has no digits 8x8"),
}
BOUND = "bound on test, given the label (bits per dim)"
UNLABELLED = "the same without the label (bits per dim)"
HISTOGRAM = "histogram of each pixel, test (bits per dim)"
PRIOR = "of the bound, L_T (bits per dim)"
COVERAGE = f"{_pictures.COVERAGE}; oracle: training images"
CRITERIA = {
    BOUND: "< 2.39, below the histogram",
    PRIOR: "< 0.001",
    _pictures.ACCURACY: ">= 95",
    COVERAGE: ">= 0.7",
}
INVARIANTS = {BOUND: "< 4.1, log2 of 17 levels", _pictures.ACCURACY: "> 20, twice chance"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, bounds the test digits, measures the samples."""
    training, held, test = _pictures.three(setup.data, setup.training, 1237)
    setup = _pictures.adopt(setup, SCALES, training.info, classes=True)
    result = train.fit(ddpm.make, setup.model, setup.run, training, valid=held)
    k_given, k_not, k_sample = jax.random.split(jax.random.key(setup.run.seed), 3)
    seen = _cli.arrays(training)["image"]
    image, label = (_cli.arrays(test)[name] for name in ("image", "label"))
    x_0 = np.asarray(ddpm.preprocess(setup.model, {"image": image}))
    given = _diffusion.bound(result, x_0, label, k_given)
    alone = _diffusion.bound(result, x_0, None, k_not)
    found = _cli.kept()
    found += [
        Row(BOUND, float(given.sum())),
        Row(PRIOR, float(given[-1])),
        Row(UNLABELLED, float(alone.sum())),
        Row(HISTOGRAM, _diffusion.histogram_bits(seen, image, setup.model.levels)),
    ]
    fake = train.sample(result, k_sample, n=len(label), label=label)
    with _cli.costs(_pictures.ACCURACY, COVERAGE):
        real, seen = _pictures.pixels(test), seen / (setup.model.levels - 1)
        found += _pictures.distances(setup.data.name, fake, real, seen, label)
    plot(setup, folder, result, fake, label, float(given.sum()))
    return found


@_cli.costs("ddpm_digits.png")
def plot(setup: Setup, folder: Path, result: train.Result, fake, label, bits: float) -> None:
    """Draws samples by class, their denoising, the bound while training; the denoising as a GIF."""
    way = _diffusion.way(result, jax.random.key(2), n=40, label=np.arange(40) % setup.model.classes)
    samples = {"samples, not chosen: a class per row": (_pictures.by_class(fake, label, 12), 12)}
    few = tuple(x[:, 0:10:2] for x in way)
    caption = f"{_diffusion.about(setup)} Bound on test: {bits:.2f} bits per dim."
    _diffusion.plot(folder / "ddpm_digits.png", result, samples, few, caption, "held-out images")
    shown = np.unique(np.linspace(0, setup.model.T, 30).round().astype(int))
    figures.save_animation(folder / "ddpm_digits.gif", way[0][shown], 10)


if __name__ == "__main__":
    _cli.main("ddpm_digits")
