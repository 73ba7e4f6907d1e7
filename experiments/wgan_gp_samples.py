"""Generators trained by WGAN-GP on 8 Gaussians, 25 Gaussians and the swiss roll: Gulrajani et al. 2017, their toy script

    python -m experiments.wgan_gp_samples                  4 minutes on a GPU, 80 on 2 cores (estimate); downloads nothing
    python -m experiments.wgan_gp_samples --scale paper    the authors' 100,000 updates: half a day on 2 cores

The nets, rates and batches of the authors' `gan_toy.py`: three layers of 512 ReLUs and a linear
one, 5 updates of the critic per update of G, each on 256 points of its own. `wgan_gp_toys` has the
critics of the paper's fig. 1, where the generator is fixed; here it learns. Expect all modes and
few points between them. A sample is of high quality (HQ) if it lies within 3 standard deviations of
a mode, or of the roll. The paper has pictures of this and no numbers; the criteria are ours.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.data import points
from aigc_jax.train import Run
from experiments import _cli, _gan
from experiments._cli import Row, Scale

NET = gan.NetConfig(widths=(512, 512, 512), init="he")
ADAM = Optim(lr=1e-4, b1=0.5, b2=0.9)
MODEL = gan.Config(
    shape=(2,),
    latent_dim=2,
    gen=NET,
    disc=NET,
    loss="wasserstein",
    penalty="gp",
    penalty_weight=0.1,  # of the authors' code for these sets; the paper's text says 10
    n_critic=5,
    optim=ADAM,
    disc_optim=ADAM,
)
ANGLES = 1.5 * np.pi * (1 + 2 * np.linspace(0, 1, 2000))
ROLL = ANGLES[:, None] * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1) / 7.5
RING, GRID, NOISE = 2 / 1.414, 2 / 2.828, 0.25 / 7.5  # the scales of the authors' code
# Name: the set, its modes or points of its curve, its standard deviation.
SETS = {
    "8 Gaussians": (
        ("ring", {"radius": RING, "std": 0.02 / 1.414}),
        points.ring_modes(radius=RING),
        0.02 / 1.414,
    ),
    "25 Gaussians": (
        ("grid", {"step": GRID, "std": 0.05 / 2.828}),
        points.grid_modes(step=GRID),
        0.05 / 2.828,
    ),
    "swiss roll": (("swiss_roll", {}), ROLL, NOISE),
}
EVERY = {"eval_every": 1000, "save_every": 1000, "log_every": 100, "steps_per_call": 10}


@dataclass(frozen=True)
class Setup:
    """Flags of wgan_gp_samples."""

    model: gan.Config = MODEL
    run: Run = Run("runs/wgan_gp_samples", 10_000, 5 * 256, keep=1, **EVERY)
    samples: int = 2500

    def __post_init__(self):
        _cli.at_least(self, samples=2)


SMOKE = {"run.folder": "runs/wgan_gp_samples-smoke", "run.steps": 60, "run.eval_every": 30}
SMOKE |= {"model.gen.widths": (64, 64), "model.disc.widths": (64, 64), "run.log_every": 30}
PAPER = {"run.folder": "runs/wgan_gp_samples-paper", "run.steps": 100_000}
DIFFERENCE = (
    "fresh points for 100,000 fixed ones of 25 Gaussians; first weights are truncated normals of the "
    "same variance as the authors' uniform ones"
)
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "60 updates of narrow nets"),
    "cpu": Scale(Setup(), f"10,000 updates of G for 100,000; {DIFFERENCE}"),
    "paper": Scale(_cli.change(Setup(), PAPER), DIFFERENCE),
}
FOUND = "{}: modes with a sample of high quality"
QUALITY = "{}: HQ samples (%)"
LEAST = "{}: emptiest mode (% of HQ samples)"
EVEN = "{}: reverse KL (nats)"
CRITERIA = {
    FOUND.format("8 Gaussians"): ">= 8",
    FOUND.format("25 Gaussians"): ">= 25",
    **{QUALITY.format(name): ">= 60" for name in SETS},
}
INVARIANTS = {QUALITY.format("swiss roll"): ">= 5"}


def trained(setup: Setup, name: str, folder: Path) -> train.Result:
    """Trains on a set. The share of HQ samples is measured while it trains."""
    (source, options), modes, std = SETS[name]
    training = data.load(source, "train", **options)
    sample = jax.jit(partial(gan.sample, setup.model, n=setup.samples))

    def on_eval(family, state, step):
        x = np.asarray(sample(state, jax.random.key(step)))
        return {"quality": 100 * metrics.mode_count(x, modes, std).high_quality}

    place = replace(setup.run, folder=str(folder / name.replace(" ", "-")))
    return train.fit(gan.make, setup.model, place, training, on_eval=on_eval)


def rows_of(name: str, x: np.ndarray, real: np.ndarray) -> list[Row]:
    """Returns the rows of samples [N, 2]; real: as many true points, the oracle."""
    _, modes, std = SETS[name]
    count, true = (metrics.mode_count(each, modes, std) for each in (x, real))
    rows = [Row(QUALITY.format(name), 100 * count.high_quality, oracle=100 * true.high_quality)]
    if name == "swiss roll":
        return rows
    least, even = (
        [float(f(c.histogram)) if c.modes else None for c in (count, true)]
        for f in (lambda h: 100 * h.min() / h.sum(), metrics.reverse_kl)
    )
    reason = None if count.modes else "no sample is of high quality"
    return [
        Row(FOUND.format(name), count.modes, oracle=true.modes),
        *rows,
        Row(LEAST.format(name), least[0], oracle=least[1], reason=reason),
        Row(EVEN.format(name), even[0], oracle=even[1], reason=reason),
    ]


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains on each set, and judges the samples."""
    rows, results, samples = _cli.kept(), {}, {}
    for name, ((source, options), *_) in SETS.items():
        results[name] = trained(setup, name, folder)
        n = setup.samples
        samples[name] = train.sample(results[name], jax.random.key(setup.run.seed), n=n, chunk=n)
        real = data.load(source, "test", **options).batch(0, 0, n)["points"]
        rows += rows_of(name, samples[name], real)
    plot(setup, folder, results, samples)
    return rows


@_cli.costs("wgan_gp_samples.png")
def plot(setup: Setup, folder: Path, results: dict, samples: dict) -> None:
    """Draws real points, samples and level sets of the critic; then HQ samples against updates."""
    fig, axes = figures.figure(2, 3)
    for i, (name, ((source, options), *_)) in enumerate(SETS.items()):
        result, ax = results[name], axes[0, i]
        real = data.load(source, "train", **options).batch(1, 0, 1000)["points"]
        _gan.draw_levels(ax, result, 2.5, linewidths=0.7)
        ax.plot(*real.T, ".", color=figures.COLOURS[1], markersize=2, label="real")
        ax.plot(*samples[name][:1000].T, ".", color=figures.COLOURS[0], markersize=2, label="G")
        ax.set(title=name)
        curve = {"samples": _cli.history(result.folder, "quality")}
        figures.curves(
            axes[1, i], curve, xlabel="updates of G", ylabel="HQ samples (%)", title=name
        )
    axes[0, 0].legend(loc="upper right", markerscale=5)
    caption = f"{setup.run.steps:,} updates of G. Lines: level sets of the critic."
    figures.save(fig, folder / "wgan_gp_samples.png", caption)


if __name__ == "__main__":
    _cli.main("wgan_gp_samples")
