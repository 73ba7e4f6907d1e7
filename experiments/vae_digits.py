"""A VAE on 8x8 digits: its bound in nats, samples, reconstructions, a map of its latents

    python -m experiments.vae_digits            about 12 s on 2 cores; downloads nothing

Expect a negative bound of about 23.9 nats on the 360 test digits, whose targets are grey levels. A
per-pixel marginal costs 26.8 nats. The script trains on the first 1,237 digits, keeps the
checkpoint that is best on the next 200, and reads the test digits once. The paper has no numbers
for this set: the criteria are ours.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, figures, train, vae
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _pictures
from experiments._cli import Row, Scale, Source
from experiments._vae import marginal_nats

OPTIM = Optim(lr=3e-3, decay=16_000, floor=0.05)
NET = {"latent_dim": 10, "hidden": (200,), "activation": "relu"}
MODEL = vae.Config(shape=(8, 8, 1), levels=17, **NET, ema=0.999, optim=OPTIM)
EVERY = {"eval_every": 1000, "save_every": 4000, "log_every": 100, "steps_per_call": 100}


@dataclass(frozen=True)
class Setup:
    """Flags of vae_digits."""

    model: vae.Config = MODEL
    run: Run = Run("runs/vae_digits", 16_000, 100, best="nll_nats", **EVERY)
    data: Source = Source("digits")
    seeds: int = 1  # runs; run.seed is the first

    def __post_init__(self):
        _cli.at_least(self, seeds=1)


SHORT = {"run.steps": 600, "run.eval_every": 200, "run.save_every": 200}
PLAIN = {"model.ema": 0.0, "model.optim": Optim(lr=3e-3)}
SMOKE = _cli.change(Setup(), {"run.folder": "runs/vae_digits-smoke", **SHORT, **PLAIN})
SCALES = {
    "smoke": Scale(SMOKE, "600 steps"),
    "cpu": Scale(Setup(), "our own set and network: AEVB has no digits 8x8"),
}
BOUND = "negative bound, test (nats, -ELBO; +- s.e. over seeds)"
MARGINAL = "per-pixel marginal, test (nats)"
BITS = "the same (bits per dim of the grey-level cross-entropy)"
CRITERIA = {BOUND: "<= 24.4, below the marginal"}
INVARIANTS = {BOUND: "< 26.8, the per-pixel marginal"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains one run per seed, measures the test bound, plots the first seed."""
    training, valid, test = _pictures.parts(setup.data, "train[:1237]", "train[1237:]", "test")
    setup = _pictures.adopt(setup, SCALES, training.info)
    found, results = _cli.kept(), []
    for run in _cli.seeded(setup.run, setup.seeds):
        train.fit(vae.make, setup.model, run, training, valid=valid)
        results.append(train.load(run.folder))  # the best checkpoint on the validation digits
    bounds = [train.evaluate(result, test)["nll_nats"] for result in results]
    bound, error = _cli.mean_and_error(bounds)
    dims = np.prod(setup.model.shape) * np.log(2)
    found.append(Row(BOUND, bound, error=error))
    found.append(Row(MARGINAL, marginal := marginal_nats(training, test)))
    found.append(Row(BITS, bound / dims, error=None if error is None else error / dims))
    plot(setup, folder, results[0], test, bounds[0], marginal)
    return found


@_cli.costs("vae_digits.png")
def plot(setup: Setup, folder: Path, result, test: data.Data, bound, marginal) -> None:
    """Draws samples, reconstructions, the latent map and the learning curve."""
    cfg, params = result.config, _cli.weights(result)
    batch = test.batch(0, 0, test.info.examples)
    x = vae.preprocess(cfg, batch, jax.random.key(0))
    mu = np.asarray(vae.encode(cfg, params, x)[0])
    tens = [x[i : i + 10] for i in range(0, min(30, len(x) - 9), 10)]
    pairs = np.concatenate([np.stack([ten, vae.reconstruct(cfg, params, ten)]) for ten in tens])
    _, _, axes = np.linalg.svd(mu - mu.mean(0), full_matrices=False)
    samples = train.sample(result, jax.random.split(jax.random.key(setup.run.seed), 4)[3], n=100)

    fig, ((a, b), (c, d)) = figures.figure(2, 2)
    figures.images(a, samples, 10, title="samples: means of p(x|z) for z ~ N(0, I)")
    title = "test images (rows 1, 3, 5), below each its reconstruction"
    figures.images(b, pairs.reshape(-1, *cfg.shape), 10, title=title)
    names = {"title": "posterior means, on their principal axes", "axes": ("axis 1", "axis 2")}
    figures.points(c, mu @ axes[:2].T, batch.get("label"), **names)
    curves = {
        "train, one batch": _cli.history(result.folder, "loss", "train"),
        "validation, averaged weights": _cli.history(result.folder, "nll_nats"),
    }
    names = {"ylabel": "negative bound (nats per image)", "title": "learning curve"}
    figures.curves(d, curves, xlabel="updates", **names)
    figures.level(d, marginal, "per-pixel marginal", at=0.98)
    d.set_ylim(None, marginal + 1)
    caption = (
        f"Hidden layers {cfg.hidden}, {cfg.latent_dim} latents, batches of {setup.run.batch_size}. "
        f"Update {int(result.state.step)} of {setup.run.steps} is the best on validation. "
        f"Test: {bound:.2f} nats (-ELBO, grey levels)."
    )
    figures.save(fig, folder / "vae_digits.png", caption)


if __name__ == "__main__":
    _cli.main("vae_digits")
