"""Samples beside their nearest training images, and a walk between codes: Goodfellow et al. 2014 (GAN), figs. 2 and 3

    python -m experiments.gan_mnist                     about 11 minutes on 2 cores; MNIST (12 MB)

Downloads MNIST or takes its files as vae_manifold does. The nets of the paper under Adam, 3e6 images; samples are not
chosen. Expect digits, some malformed, none copied: their distance to the nearest training image is that of test images
(1.03 times it), fid_mnist 19 (training images: 2.5 for the first 10,000, as recorded; 1.6 drawn at random, as now),
coverage .80.
Distances of distributions (fid_mnist and others) are in the features of our own small classifier and stand beside what
training images score; they compare with no published FID. `python -m experiments.parzen_table` trains by the authors'
own schedule. Other nets and losses by flags: --model.loss wasserstein --model.penalty gp --model.n-critic 5
--run.batch-size 500.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from aigc_jax import figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run

from experiments import _cli, _pictures
from experiments._cli import Row, Scale, Source

MODEL = gan.Config(optim=Optim(lr=2e-4, b1=0.5), disc_optim=Optim(lr=2e-4, b1=0.5), ema=0.999)
RUN = Run(
    folder="runs/gan_mnist",
    steps=30_000,
    batch_size=100,
    eval_every=1000,
    save_every=10_000,
    log_every=100,
    keep=1,
    steps_per_call=100,
)


@dataclass(frozen=True)
class Setup:
    """Flags of gan_mnist."""

    model: gan.Config = MODEL
    run: Run = RUN
    data: Source = Source("mnist")
    training: int | None = (
        None  # images of train, by default 50,000 or 80 % of own pictures; D is watched on the rest
    )
    samples: int = 10_000

    def __post_init__(self):
        _pictures.check(self, "gan_mnist", conditional=False, own=True)
        if self.samples < 40:
            raise ValueError(
                f"samples must be at least 40, which the figure shows, got {self.samples} (--samples)"
            )


SCALES = {
    "smoke": Scale(
        Setup(
            replace(
                MODEL,
                shape=(8, 8, 1),
                levels=17,
                latent_dim=10,
                gen=replace(MODEL.gen, widths=(64, 64)),
                disc=replace(MODEL.disc, widths=(32, 32)),
                ema=0.99,
            ),
            replace(
                RUN, folder="runs/gan_mnist-smoke", steps=800, eval_every=400, steps_per_call=50
            ),
            Source("digits"),
            samples=360,
        ),
        "digits 8x8, small nets, 800 updates",
    ),
    "cpu": Scale(
        Setup(), "3e6 images (the authors' code: 1.25e7), Adam for SGD, averaged generator"
    ),
}
NEAR = "median distance of a sample to its nearest training image, over that of test images"
COPIES = "smallest distance of a sample to a training image (pixels in [0, 1])"
CLASSES = "digit classes among the samples (our classifier)"
CRITERIA = {
    NEAR: "within 0.5 .. 2",
    COPIES: "> 0",
    CLASSES: "= 10",
}
INVARIANTS = {COPIES: CRITERIA[COPIES]}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, draws the paper's two figures, measures samples against test images."""
    training, held, test = _pictures.three(setup.data, setup.training, 50_000)
    setup = _pictures.adopt(setup, SCALES, training.info)
    result = train.fit(
        gan.make, setup.model, setup.run, training, valid=held, on_eval=_pictures.health(training)
    )
    seen, real = _pictures.pixels(training), _pictures.pixels(test)
    fake = train.sample(result, jax.random.key(setup.run.seed), n=setup.samples, chunk=500)
    last = [line["valid"] for line in train.metrics(result.folder) if "valid" in line][-1]
    found = _cli.kept()
    with _cli.costs("distances"):
        found += _pictures.distances(setup.data.name, fake, real, seen)
    score = found[0] if found else None
    with _cli.costs(NEAR, COPIES):
        near, copies = _pictures.neighbours(fake, seen, real)
        found += [Row(NEAR, near), Row(COPIES, copies)]
    with _cli.costs(CLASSES):
        found += classes(setup.data, fake)
    found += [
        Row(f"D's accuracy on {who} (%)", 100 * last[name])
        for who, name in (
            ("training images", "seen_real_accuracy"),
            ("held-out images", "real_accuracy"),
            ("samples", "fake_accuracy"),
        )
        if name in last
    ]
    plot(setup, folder, result, fake, seen, score)
    return found


def classes(source: Source, fake: np.ndarray) -> list[Row]:
    """How many of the set's classes our classifier sees among the samples; of own pictures nothing."""
    if source.pictures:
        return []
    seen = metrics.load_classifier(source.name).apply(fake)[0].argmax(-1)
    return [Row(CLASSES, int(len(np.unique(seen))))]


@_cli.costs("gan_mnist.png")
def plot(
    setup: Setup,
    folder: Path,
    result: train.Result,
    fake: np.ndarray,
    seen: np.ndarray,
    score: Row | None,
) -> None:
    """Fig. 2: five samples a row and the last one's nearest training image; fig. 3: straight lines between codes; D."""
    cfg, variables = result.config, gan.generator_of(result.config, result.state)
    fig, (axes,) = figures.figure(1, 3, size=(13.5, 4.8))
    last = fake[4:40:5]
    nearest = seen[metrics.nearest(last, seen)[1]]
    table = np.concatenate([fake[:40].reshape(8, 5, *cfg.shape), nearest[:, None]], 1).reshape(
        -1, *cfg.shape
    )
    figures.images(
        axes[0], table, 6, title="samples, not chosen; last: training image\nnearest to the fifth"
    )
    ends = gan.noise(cfg, jax.random.key(1), 16).reshape(8, 2, -1)
    at = np.linspace(0, 1, 9, dtype=np.float32)[None, :, None]
    z = ends[:, :1] * (1 - at) + ends[:, 1:] * at
    walk = (np.asarray(gan.generate(cfg, variables, z.reshape(-1, cfg.latent_dim))) + 1) / 2
    figures.images(axes[1], walk, 9, title="G on straight lines between two codes")
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
        axes[2], curves, xlabel="updates", ylabel=f"D's {kind}", title="what D says of each"
    )
    caption = f"{setup.data.name}, {cfg.loss}, penalty {cfg.penalty}, {setup.run.steps} updates of {setup.run.batch_size}"
    if score is not None:
        name = score.quantity.split(",")[0]
        caption = f"{caption}; {name} {score.ours:.3g}, of training images {score.oracle:.3g}"
    figures.save(fig, folder / "gan_mnist.png", caption)


if __name__ == "__main__":
    _cli.main("gan_mnist")
