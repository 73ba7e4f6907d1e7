"""A conditional GAN on 8x8 digits: samples by class, their distance to held-out digits

    python -m experiments.gan_digits            about a minute on 2 cores; downloads nothing

Hinge loss, a spectrally normalised discriminator with projection, BatchNorm in the generator, all
small. Expect rows of recognisable digits, some of them wrong. Our classifier puts 98 % in their
class. Coverage is 0.75; that of as many training digits is 0.78. With 360 digits such a floor moves
by 0.02 from draw to draw, and that of fid_digits by 5. No paper has numbers for this set: the
criteria are ours.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from aigc_jax import figures, gan, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _gan, _pictures
from experiments._cli import Row, Scale, Source

MODEL = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    classes=10,
    condition="projection",
    latent_dim=32,
    loss="hinge",
    gen=gan.NetConfig(widths=(256, 256), norm="batch"),
    disc=gan.NetConfig(widths=(256, 256), activation="leaky_relu", norm="spectral"),
    ema=0.999,
    optim=Optim(lr=2e-4, b1=0.0, b2=0.9),
    disc_optim=Optim(lr=4e-4, b1=0.0, b2=0.9),
)
EVERY = {"eval_every": 500, "save_every": 5000, "log_every": 100, "steps_per_call": 100}
RUN = Run("runs/gan_digits", 10_000, 100, keep=1, **EVERY)


@dataclass(frozen=True)
class Setup:
    """Flags of gan_digits."""

    model: gan.Config = MODEL
    run: Run = RUN
    data: Source = Source("digits")
    training: int | None = None  # images; default 1,237 digits or 80 % of own ones; rest: watched

    def __post_init__(self):
        _pictures.check(self, "gan_digits", conditional=True, own=True)


SHORT = {"run.folder": "runs/gan_digits-smoke", "run.steps": 1000}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SHORT), "1,000 updates"),
    "cpu": Scale(Setup(), "our own set and network: no paper has GANs on digits 8x8"),
}
CRITERIA = {_pictures.ACCURACY: ">= 90", _gan.COVERAGE: ">= 0.6"}
INVARIANTS = {_pictures.ACCURACY: "> 20, twice chance"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures the samples against the 360 test digits."""
    training, held, test = _pictures.three(setup.data, setup.training, 1237)
    setup = _pictures.adopt(setup, SCALES, training.info, classes=True)
    watch = _pictures.health(training)
    result = train.fit(gan.make, setup.model, setup.run, training, valid=held, on_eval=watch)
    label = _cli.arrays(test)["label"]
    fake = train.sample(result, jax.random.key(setup.run.seed), n=len(label), label=label)
    found = _cli.kept()
    with _cli.costs(_pictures.ACCURACY, _gan.COVERAGE):
        seen, real = _pictures.pixels(training), _pictures.pixels(test)
        found += _pictures.distances(setup.data.name, fake, real, seen, label)
    plot(setup, folder, result, found)
    return found


@_cli.costs("gan_digits.png")
def plot(setup: Setup, folder: Path, result: train.Result, found: list[Row]) -> None:
    """Draws samples by class, and D's accuracy."""
    fig, ((samples, curves),) = figures.figure(1, 2)
    label = np.repeat(np.arange(min(20, setup.model.classes)), 12)
    fake = train.sample(result, jax.random.key(1), n=len(label), label=label)
    figures.images(samples, fake, 12, title="samples, not chosen; one class per row")
    _gan.draw_discriminator(curves, result, "D overfits where the first two lines part")
    length = f"{setup.run.steps} updates of {setup.run.batch_size} images"
    caption = f"{setup.model.loss} loss, {length}; {_pictures.caption(found)}"
    figures.save(fig, folder / "gan_digits.png", caption)


if __name__ == "__main__":
    _cli.main("gan_digits")
