"""A conditional GAN on 8x8 digits: samples by class, their distance to held-out digits

    python -m experiments.gan_digits            about 40 s on 2 cores; downloads nothing

Hinge loss, a spectrally normalised discriminator with projection, BatchNorm in the generator, all small. Expect rows of
recognisable digits, some of them wrong: 98 % of class by our own classifier, and a coverage of .75 (as many training
digits: .78; with 360 digits such floors move by .02, that of fid_digits by 5, from draw to draw). No paper has numbers
for this set: the criteria are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from aigc_jax import figures, gan, train
from aigc_jax.core import Optim
from aigc_jax.train import Run

from experiments import _cli, _pictures
from experiments._cli import Row, Scale, Source

MODEL = gan.Config(
    shape=(8, 8, 1),
    levels=17,
    classes=10,
    condition="projection",
    latent_dim=32,
    loss="hinge",
    gen=gan.Net(widths=(256, 256), norm="batch"),
    disc=gan.Net(widths=(256, 256), activation="leaky_relu", norm="spectral"),
    ema=0.999,
    optim=Optim(lr=2e-4, b1=0.0, b2=0.9),
    disc_optim=Optim(lr=4e-4, b1=0.0, b2=0.9),
)
RUN = Run(
    folder="runs/gan_digits",
    steps=10_000,
    batch_size=100,
    eval_every=500,
    save_every=5000,
    log_every=100,
    keep=1,
    steps_per_call=100,
)


@dataclass(frozen=True)
class Setup:
    """Flags of gan_digits."""

    model: gan.Config = MODEL
    run: Run = RUN
    data: Source = Source("digits")
    training: int | None = (
        None  # images of train, by default 1,237 digits or 80 % of own pictures; D is watched on the rest
    )

    def __post_init__(self):
        _pictures.check(self, "gan_digits", conditional=True, own=True)


SCALES = {
    "smoke": Scale(
        Setup(run=replace(RUN, folder="runs/gan_digits-smoke", steps=1000)), "1,000 updates"
    ),
    "cpu": Scale(Setup(), "our own set and network: no paper has GANs on digits 8x8"),
}
COVERAGE = f"{_pictures.COVERAGE}; oracle: training images"
CRITERIA = {
    _pictures.ACCURACY: ">= 90",
    COVERAGE: ">= 0.6",
}
INVARIANTS = {_pictures.ACCURACY: "> 20, twice chance"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures the samples against the 360 test digits, draws."""
    training, held, test = _pictures.three(setup.data, setup.training, 1237)
    setup = _pictures.adopt(setup, SCALES, training.info, classes=True)
    result = train.fit(
        gan.make, setup.model, setup.run, training, valid=held, on_eval=_pictures.health(training)
    )
    label = test.resident[0]["label"]
    fake = train.sample(result, jax.random.key(setup.run.seed), n=len(label), label=label)
    found = _cli.kept()
    with _cli.costs(_pictures.ACCURACY, COVERAGE):
        found += _pictures.distances(
            setup.data.name, fake, _pictures.pixels(test), _pictures.pixels(training), label
        )
    plot(setup, folder, result, found)
    return found


@_cli.costs("gan_digits.png")
def plot(setup: Setup, folder: Path, result: train.Result, found: list[Row]) -> None:
    """Samples by class, D's accuracy."""
    fig, (axes,) = figures.figure(1, 2, size=(9.5, 4.4))
    label = np.repeat(np.arange(min(20, setup.model.classes)), 12)
    drawn = train.sample(result, jax.random.key(1), n=len(label), label=label)
    figures.images(axes[0], drawn, 12, title="samples, not chosen; one class a row")
    lines = [
        (line["step"], line["valid"]) for line in train.metrics(result.folder) if "valid" in line
    ]
    names = {"training images": "seen_real", "held-out images": "real", "samples": "fake"}
    kind = "accuracy" if "real_accuracy" in lines[-1][1] else "logit"
    curves = {
        who: (np.array([s for s, _ in lines]), np.array([v[f"{name}_{kind}"] for _, v in lines]))
        for who, name in names.items()
    }
    figures.curves(
        axes[1],
        curves,
        xlabel="updates",
        ylabel=f"D's {kind}",
        title="the gap is what D knows by heart",
    )
    caption = f"{setup.model.loss}, {setup.run.steps} updates of {setup.run.batch_size} images"
    figures.save(fig, folder / "gan_digits.png", f"{caption}; {_pictures.caption(found)}")


if __name__ == "__main__":
    _cli.main("gan_digits")
