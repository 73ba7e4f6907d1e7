"""The learned manifold of a VAE with two latents: AEVB (Kingma & Welling 2014), fig. 4

    python -m experiments.vae_manifold    about 3 minutes on 2 cores; MNIST (12 MB)
    python -m experiments.vae_manifold --data.name fashion_mnist    Fashion-MNIST (31 MB)
    python -m experiments.vae_manifold --scale paper    1e8 images: about 70 minutes on 2 cores

The first start downloads the set, or takes its four .gz files from --data.folder FOLDER or
AIGC_DATA/<name>. Debian's dataset-fashion-mnist is found by itself. Expect a test bound about 58
nats below a per-pixel marginal on MNIST, and digits that turn into one another along the grid. The
paper prints the picture and no number.
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
from experiments._vae import ADAGRAD, marginal_nats

OPTIM = Optim(lr=3e-3, decay=24_000, floor=0.05)
EVERY = {"eval_every": 2000, "save_every": 4000, "log_every": 200, "steps_per_call": 100}


@dataclass(frozen=True)
class Setup:
    """Flags of vae_manifold."""

    model: vae.Config = vae.Config(latent_dim=2, hidden=(500,), activation="tanh", optim=OPTIM)
    run: Run = Run("runs/vae_manifold", 24_000, 100, **EVERY)
    data: Source = Source("mnist")


SHORT = {"run.folder": "runs/vae_manifold-smoke", "run.steps": 500, "run.eval_every": 500}
SMOKE = _cli.change(Setup(), {**SHORT, "model.hidden": (64,), "model.optim": Optim(lr=3e-3)})
LONG = {"run.folder": "runs/vae_manifold-paper", "run.steps": 1_000_000, "run.eval_every": 50_000}
SCALES = {
    "smoke": Scale(SMOKE, "500 updates of a small net"),
    "cpu": Scale(
        Setup(),
        "2.4e6 images, Adam for Adagrad, no weight decay, Flax's initialisation; grey-level "
        "targets",
    ),
    "paper": Scale(
        _cli.change(Setup(), {**LONG, "model.optim": ADAGRAD}),
        "1e8 images (the paper gives no length here); no N(0, I) prior on the weights, Flax's "
        "initialisation",
    ),
}
BELOW = "negative bound, test: below the per-pixel marginal (nats)"
CRITERIA = {BELOW: ">= 30"}
INVARIANTS = {BELOW: "> 0"}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures the test bound, plots the manifold."""
    if setup.model.latent_dim != 2:
        raise ValueError(
            f"the manifold of this figure has model.latent-dim 2, not {setup.model.latent_dim}"
        )
    training, valid, test = _pictures.parts(setup.data, "train[:55000]", "train[55000:]", "test")
    setup = _pictures.adopt(setup, SCALES, training.info)
    result = train.fit(vae.make, setup.model, setup.run, training, valid=valid)
    scores = train.evaluate(result, test)
    found, nats = _cli.kept(), scores["nll_nats"]
    found.append(Row("negative bound, test (nats, -ELBO)", nats))
    found.append(Row("its KL term (nats)", scores["kl_nats"]))
    marginal = marginal_nats(training, test)
    found += [Row("per-pixel marginal, test (nats)", marginal), Row(BELOW, marginal - nats)]
    plot(setup, folder, result, test, nats)
    return found


@_cli.costs("vae_manifold.png")
def plot(setup: Setup, folder: Path, result: train.Result, test: data.Data, nats: float) -> None:
    """Draws the decoder over a grid of latents, and where the encoder puts the test images."""
    cfg, params = result.config, _cli.weights(result)
    batch = test.batch(0, 0, min(2000, test.info.examples))
    mu = np.asarray(vae.encode(cfg, params, vae.preprocess(cfg, batch, jax.random.key(0)))[0])
    grid = vae.manifold(cfg, params, side=20)
    fig, ((a, b),) = figures.figure(1, 2)
    title = "means of p(x|z): z on a grid, through the inverse Gaussian CDF"
    figures.images(a, grid.reshape(-1, *cfg.shape), 20, title=title)
    title = f"posterior means of {len(mu):,} test images{', by class' if 'label' in batch else ''}"
    figures.points(b, mu, batch.get("label"), title=title, axes=("z_1", "z_2"))
    caption = (
        f"{setup.data.name}. Hidden layers {cfg.hidden}, 2 latents. "
        f"{setup.run.steps} updates of {setup.run.batch_size} images. "
        f"Test: {nats:.1f} nats (-ELBO, grey-level targets)."
    )
    figures.save(fig, folder / "vae_manifold.png", caption)


if __name__ == "__main__":
    _cli.main("vae_manifold")
