"""Samples beside their nearest training images, and a walk between codes: Goodfellow et al. 2014 (GAN), figs. 2 and 3

    python -m experiments.gan_mnist                     about 11 minutes on 2 cores; MNIST (12 MB)

Downloads MNIST or takes its files as vae_manifold does. The nets of the paper under Adam, 3e6
images; samples are not chosen. Expect digits, some malformed, none copied: their distance to the
nearest training image is 1.03 times that of test images. Coverage is 0.80 and fid_mnist 19; the
first 10,000 training images have 2.5 (as recorded), random ones 1.6 (as measured now). Such
distances use the features of our own small classifier. They compare with what training images
score, and with no published FID. `python -m experiments.parzen_table` trains by the authors' own
schedule. Other nets and losses by flags: --model.loss wasserstein --model.penalty gp
--model.n-critic 5 --run.batch-size 500.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from aigc_jax import figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _gan, _pictures
from experiments._cli import Row, Scale, Source

ADAM = Optim(lr=2e-4, b1=0.5)
MODEL = gan.Config(optim=ADAM, disc_optim=ADAM, ema=0.999)
EVERY = {"eval_every": 1000, "save_every": 10_000, "log_every": 100, "steps_per_call": 100}


@dataclass(frozen=True)
class Setup:
    """Flags of gan_mnist."""

    model: gan.Config = MODEL
    run: Run = Run("runs/gan_mnist", 30_000, 100, keep=1, **EVERY)
    data: Source = Source("mnist")
    training: int | None = None  # images; default 50,000 or 80 % of own ones; the rest is watched
    samples: int = 10_000

    def __post_init__(self):
        _pictures.check(self, "gan_mnist", conditional=False, own=True)
        _cli.at_least(self, "which the figure shows", samples=40)


SMALL = {"model": _gan.small(replace(MODEL, ema=0.99)), "data.name": "digits", "samples": 360}
SHORT = {"run.steps": 800, "run.eval_every": 400, "run.steps_per_call": 50}
SMOKE = _cli.change(Setup(), {**SMALL, **SHORT, "run.folder": "runs/gan_mnist-smoke"})
SCALES = {
    "smoke": Scale(SMOKE, "digits 8x8, small nets, 800 updates"),
    "cpu": Scale(
        Setup(), "3e6 images (the authors' code: 1.25e7), Adam for SGD, averaged generator"
    ),
}
CLASSES = "digit classes among the samples (our classifier)"
CRITERIA = {_gan.NEAR: "within 0.5 .. 2", _gan.COPIES: "> 0", CLASSES: "= 10"}
INVARIANTS = {_gan.COPIES: CRITERIA[_gan.COPIES]}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures samples against test images."""
    training, held, test = _pictures.three(setup.data, setup.training, 50_000)
    setup = _pictures.adopt(setup, SCALES, training.info)
    watch = _pictures.health(training)
    result = train.fit(gan.make, setup.model, setup.run, training, valid=held, on_eval=watch)
    seen, real = _pictures.pixels(training), _pictures.pixels(test)
    fake = train.sample(result, jax.random.key(setup.run.seed), n=setup.samples, chunk=500)
    found = _cli.kept()
    with _cli.costs("distances"):
        found += _pictures.distances(setup.data.name, fake, real, seen)
    score = found[0] if found else None
    with _cli.costs(_gan.NEAR, _gan.COPIES):
        found += _gan.nearest_rows(fake, seen, real)
    with _cli.costs(CLASSES):
        if not setup.data.pictures:  # our classifiers know named sets only
            logits, _ = metrics.load_classifier(setup.data.name).apply(fake)
            found.append(Row(CLASSES, len(np.unique(logits.argmax(-1)))))
    for words, name in _gan.WHO.items():
        _, accuracy = _cli.history(result.folder, f"{name}_accuracy")
        if len(accuracy):
            found.append(Row(f"D's accuracy on {words} (%)", 100 * accuracy[-1]))
    plot(setup, folder, result, fake, seen, score)
    return found


@_cli.costs("gan_mnist.png")
def plot(setup: Setup, folder: Path, result: train.Result, fake, seen, score: Row | None) -> None:
    """Draws samples beside training images (fig. 2), lines between latents (fig. 3), and D."""
    cfg = result.config
    fig, ((samples, lines, curves),) = figures.figure(1, 3)
    nearest = seen[metrics.nearest(fake[4:40:5], seen)[1]]
    table = np.concatenate([fake[:40].reshape(8, 5, *cfg.shape), nearest[:, None]], 1)
    title = "samples, not chosen; last column: the training image nearest to the fifth"
    figures.images(samples, table.reshape(-1, *cfg.shape), 6, title=title)
    ends = gan.noise(cfg, jax.random.key(1), 16).reshape(8, 2, -1)
    share = np.linspace(0, 1, 9, dtype=np.float32)[None, :, None]
    z = (ends[:, :1] * (1 - share) + ends[:, 1:] * share).reshape(-1, cfg.latent_dim)
    walk = (np.asarray(gan.generate(cfg, gan.generator_of(cfg, result.state), z)) + 1) / 2
    figures.images(lines, walk, 9, title="each row is a straight line between two latents")
    _gan.draw_discriminator(curves, result, "D on each kind of image")
    updates = f"{setup.run.steps} updates of {setup.run.batch_size} images"
    caption = f"{setup.data.name}. {cfg.loss} loss, penalty {cfg.penalty}, {updates}."
    if score is not None:
        name = score.quantity.split(",")[0]
        caption += f" {name}: {score.ours:.3g}; of training images: {score.oracle:.3g}."
    figures.save(fig, folder / "gan_mnist.png", caption)


if __name__ == "__main__":
    _cli.main("gan_mnist")
