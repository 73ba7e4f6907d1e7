"""A VAE on 8x8 digits: its bound in nats, samples, reconstructions, a map of its latents

    python -m experiments.vae_digits            about 12 s on 2 cores; downloads nothing

Expect a negative bound of about 23.9 nats on the 360 test digits (grey-level targets; a per-pixel marginal pays 26.8).
Trains on the first 1,237 digits, keeps the checkpoint that is best on the next 200, reads the test digits once.
The paper has no numbers for this set: the criteria are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from aigc_jax import data, figures, train, vae
from aigc_jax.core import EMA, Optim
from aigc_jax.train import Run

from experiments import _cli, _pictures
from experiments._cli import Row, Scale, Source

MODEL = vae.Config(
    shape=(8, 8, 1),
    levels=17,
    latent_dim=10,
    hidden=(200,),
    activation="relu",
    ema=0.999,
    optim=Optim(lr=3e-3, decay=16_000, floor=0.05),
)
RUN = Run(
    folder="runs/vae_digits",
    steps=16_000,
    batch_size=100,
    eval_every=1000,
    save_every=4000,
    log_every=100,
    steps_per_call=100,
    best="nll_nats",
)


@dataclass(frozen=True)
class Setup:
    """Flags of vae_digits."""

    model: vae.Config = MODEL
    run: Run = RUN
    data: Source = Source("digits")
    seeds: int = 1  # runs; run.seed is the first


SCALES = {
    "smoke": Scale(
        Setup(
            model=replace(MODEL, ema=0.0, optim=Optim(lr=3e-3)),
            run=replace(
                RUN, folder="runs/vae_digits-smoke", steps=600, eval_every=200, save_every=200
            ),
        ),
        "600 steps",
    ),
    "cpu": Scale(Setup(), "our own set and network: AEVB has no digits 8x8"),
}
BOUND = "negative bound, test (nats, -ELBO; +- s.e. over seeds)"
MARGINAL = "per-pixel marginal, test (nats)"
BITS = "the same (bits per dim of the grey-level cross-entropy)"
CRITERIA = {BOUND: "<= 24.4, below the marginal"}
INVARIANTS = {BOUND: "< 26.8, the per-pixel marginal"}


def marginal_nats(train_images: np.ndarray, test_images: np.ndarray) -> float:
    """Cross-entropy of grey-level test pixels under independent Bernoullis with the training means, nats an image."""
    n = len(train_images)
    p = (train_images.sum(0) + 0.5) / (n + 1)
    return float(
        -(test_images * np.log(p) + (1 - test_images) * np.log1p(-p)).sum((1, 2, 3)).mean()
    )


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains one run a seed, measures the test bound, draws the first seed's figure."""
    if setup.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {setup.seeds}")
    training, valid, test = _pictures.parts(setup.data, "train[:1237]", "train[1237:]", "test")
    setup = _pictures.adopt(setup, SCALES, training.info)
    found, results = _cli.kept(), []
    for run in _cli.seeded(setup.run, setup.seeds):
        train.fit(vae.make, setup.model, run, training, valid=valid)
        results.append(train.load(run.folder))  # the best checkpoint on the validation digits

    bounds = [train.evaluate(result, test)["nll_nats"] for result in results]
    bound, error = _cli.mean_and_error(bounds)
    levels, shape = setup.model.levels - 1, setup.model.shape
    dims = np.prod(shape) * np.log(2)
    bits_error = None if error is None else error / dims
    found.append(Row(BOUND, bound, error=error))
    marginal = marginal_nats(
        training.resident[0]["image"] / levels, test.resident[0]["image"] / levels
    )
    found += [Row(MARGINAL, marginal), Row(BITS, bound / dims, error=bits_error)]
    plot(setup, folder, results[0], test, bounds[0], marginal)
    return found


@_cli.costs("vae_digits.png")
def plot(
    setup: Setup, folder: Path, result: train.Result, test: data.Data, bound: float, marginal: float
) -> None:
    """Samples, reconstructions, the latent map and the learning curve, in one figure."""
    cfg, params = result.config, EMA(result.config.ema).read(result.state)
    batch = test.batch(0, 0, test.info.examples)
    x = vae.preprocess(cfg, batch, jax.random.key(0))
    mu = np.asarray(vae.encode(cfg, params, x)[0])
    pairs = np.concatenate(
        [
            np.stack([x[i : i + 10], vae.reconstruct(cfg, params, x[i : i + 10])])
            for i in range(0, min(30, len(x) - 9), 10)
        ]
    )
    _, _, axes = np.linalg.svd(mu - mu.mean(0), full_matrices=False)

    fig, ((a, b), (c, d)) = figures.figure(2, 2, size=(9, 8.5))
    samples = train.sample(result, jax.random.split(jax.random.key(setup.run.seed), 4)[3], n=100)
    figures.images(a, samples, 10, title="samples: mean of p(x|z), z ~ N(0, I)")
    figures.images(
        b,
        pairs.reshape(-1, *cfg.shape),
        10,
        title="test images (rows 1, 3, 5) and their reconstructions",
    )
    figures.points(
        c,
        mu @ axes[:2].T,
        batch.get("label"),
        title=f"posterior means of the {len(x)} test images",
        axes=("first principal axis of mu", "second principal axis of mu"),
    )
    lines = train.metrics(result.folder)
    seen = {
        "train (one batch)": [(r["step"], r["train"]["loss"]) for r in lines if "train" in r],
        "validation (averaged weights)": [
            (r["step"], r["valid"]["nll_nats"]) for r in lines if "valid" in r
        ],
    }
    figures.curves(
        d,
        {name: np.array(v).T for name, v in seen.items()},
        xlabel="updates",
        ylabel="negative bound (nats an image)",
        title="learning curve",
    )
    d.axhline(marginal, color="0.4", linewidth=1)
    d.annotate(
        "per-pixel marginal",
        (0.98, marginal),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
    )
    d.set_ylim(None, marginal + 1)
    setting = (
        f"VAE {cfg.hidden} x {cfg.latent_dim} latents, batches of {setup.run.batch_size} images"
    )
    chosen = f"update {int(result.state.step)}, the best of {setup.run.steps} on validation"
    figures.save(
        fig,
        folder / "vae_digits.png",
        f"{setting}; {chosen}; test: {bound:.2f} nats (-ELBO, grey levels)",
    )


if __name__ == "__main__":
    _cli.main("vae_digits")
