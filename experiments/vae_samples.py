"""Random samples for four latent sizes: AEVB (Kingma & Welling 2014), fig. 5

    python -m experiments.vae_samples                  about 4 minutes on 2 cores; MNIST (12 MB)
    python -m experiments.vae_samples --scale paper    1e8 images per size: about 2 hours on 2 cores

Downloads MNIST or takes its files as vae_manifold does. Expect strokes that sharpen with the number
of latents. With more latent dimensions the bound improves, but fewer samples look like digits: the
prior fits the codes less well. The paper prints pictures and no numbers.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from aigc_jax import figures, train, vae
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _pictures
from experiments._cli import Row, Scale, Source
from experiments._vae import ADAGRAD, check_latents

OPTIM = Optim(lr=2e-3, decay=24_000, floor=0.05)
EVERY = {"save_every": 8000, "log_every": 200, "keep": 1, "steps_per_call": 100}


@dataclass(frozen=True)
class Setup:
    """Flags of vae_samples."""

    model: vae.Config = vae.Config(hidden=(500,), activation="tanh", optim=OPTIM)
    run: Run = Run("runs/vae_samples", 24_000, 100, **EVERY)
    data: Source = Source("mnist")
    latents: tuple[int, ...] = (2, 5, 10, 20)  # N_z

    def __post_init__(self):
        check_latents(self.latents)


SMALL = {"model.shape": (8, 8, 1), "model.levels": 17, "model.hidden": (32,), "latents": (2, 8)}
SHORT = {"run.folder": "runs/vae_samples-smoke", "run.steps": 600, "model.optim": Optim(lr=3e-3)}
SMOKE = _cli.change(Setup(), {**SMALL, **SHORT, "data.name": "digits"})
LONG = {"run.folder": "runs/vae_samples-paper", "run.steps": 1_000_000, "run.save_every": 50_000}
PAPER = _cli.change(Setup(), {**LONG, "model.optim": ADAGRAD})
SCALES = {
    "smoke": Scale(SMOKE, "digits 8x8, 600 updates"),
    "cpu": Scale(
        Setup(),
        "2.4e6 images per size, Adam for Adagrad, no prior on the weights, Flax's initialisation; "
        "grey-level targets",
    ),
    "paper": Scale(
        PAPER,
        "1e8 images (the paper gives no length here), no prior on the weights, one step size where "
        "the paper chooses from three, Flax's initialisation; grey-level targets",
    ),
}
ORDER = "smallest gain of the bound from one size to the next (nats, test)"
CRITERIA = {ORDER: "> 0"}
INVARIANTS = CRITERIA


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains a net per size and measures its bound."""
    training, test = _pictures.parts(setup.data, "train", "test")
    setup = _pictures.adopt(setup, SCALES, training.info)
    found, results, bounds = _cli.kept(), {}, {}
    for latents in setup.latents:
        run, model = replace(setup.run, folder=str(folder / f"{latents}")), setup.model
        results[latents] = train.fit(vae.make, replace(model, latent_dim=latents), run, training)
        score = train.evaluate(results[latents], test)
        bounds[latents], who = -score["nll_nats"], f"{latents} latents"
        found.append(Row(f"{who}: negative bound, test (nats, -ELBO)", score["nll_nats"]))
        found.append(Row(f"{who}: its KL term (nats)", score["kl_nats"]))
    found.append(Row(ORDER, float(min(np.diff(list(bounds.values())), default=np.nan))))
    plot(setup, folder, results, bounds)
    return found


@_cli.costs("vae_samples.png")
def plot(setup: Setup, folder: Path, results: dict, bounds: dict) -> None:
    """Draws 100 samples per size, from the same key."""
    fig, (axes,) = figures.figure(1, len(results))
    for ax, (latents, result) in zip(axes, results.items(), strict=True):
        samples = train.sample(result, jax.random.key(setup.run.seed), n=100)
        title = f"{latents} latents: {-bounds[latents]:.1f} nats (-ELBO)"
        figures.images(ax, samples, 10, title=title)
    caption = (
        f"{setup.data.name}. Means of p(x|z) for z ~ N(0, I), not chosen. "
        f"Hidden layers {setup.model.hidden}. "
        f"{setup.run.steps} updates of {setup.run.batch_size} images per size."
    )
    figures.save(fig, folder / "vae_samples.png", caption)


if __name__ == "__main__":
    _cli.main("vae_samples")
