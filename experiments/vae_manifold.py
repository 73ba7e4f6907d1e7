"""The learned manifold of a VAE with two latents: AEVB (Kingma & Welling 2014), fig. 4

    python -m experiments.vae_manifold    about 2 minutes on 2 cores; MNIST (12 MB)
    python -m experiments.vae_manifold --data.name fashion_mnist    Fashion-MNIST (31 MB)
    python -m experiments.vae_manifold --scale paper    1e8 images: about 70 minutes on 2 cores

The first start downloads the set, or takes its four .gz files from --data.folder FOLDER or
AIGC_DATA/<name>. Debian's dataset-fashion-mnist is found by itself. Expect a test bound about 58
nats below a per-pixel marginal on MNIST, and digits that turn into one another along the grid. The
paper prints the picture and no number.
"""

from dataclasses import dataclass, replace
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
MODEL = vae.Config(latent_dim=2, hidden=(500,), activation="tanh", optim=OPTIM)
RUN = Run(
    "runs/vae_manifold",
    24_000,
    100,
    eval_every=2000,
    save_every=4000,
    log_every=200,
    steps_per_call=100,
)


@dataclass(frozen=True)
class Setup:
    """Flags of vae_manifold."""

    model: vae.Config = MODEL
    run: Run = RUN
    data: Source = Source("mnist")


SMOKE = Setup(
    replace(MODEL, hidden=(64,), optim=Optim(lr=3e-3)),
    replace(RUN, folder="runs/vae_manifold-smoke", steps=500, eval_every=500),
)
PAPER = Setup(
    replace(MODEL, optim=ADAGRAD),
    replace(RUN, folder="runs/vae_manifold-paper", steps=1_000_000, eval_every=50_000),
)
SCALES = {
    "smoke": Scale(SMOKE, "500 updates of a small net"),
    "cpu": Scale(
        Setup(),
        "2.4e6 images, Adam for Adagrad, no weight decay, Flax's initialisation; grey-level "
        "targets",
    ),
    "paper": Scale(
        PAPER,
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
    found += [
        Row("negative bound, test (nats, -ELBO)", nats),
        Row("its KL term (nats)", scores["kl_nats"]),
    ]
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
    fig, ((a, b),) = figures.figure(1, 2, size=(12, 6))
    title = "mean of p(x|z), z through the inverse Gaussian CDF of a grid"
    figures.images(a, grid.reshape(-1, *cfg.shape), 20, title=title)
    title = f"posterior means of {len(mu):,} test images{', by class' if 'label' in batch else ''}"
    figures.points(b, mu, batch.get("label"), title=title, axes=("z_1", "z_2"))
    caption = (
        f"{setup.data.name}, {cfg.hidden} x 2 latents, {setup.run.steps} updates of "
        f"{setup.run.batch_size}"
    )
    score = f"test: {nats:.1f} nats (-ELBO, grey-level targets)"
    figures.save(fig, folder / "vae_manifold.png", f"{caption}; {score}")


if __name__ == "__main__":
    _cli.main("vae_manifold")
