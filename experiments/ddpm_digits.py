"""A class-conditional diffusion model of 8x8 digits: samples, their denoising, and a bound in bits per dimension

    python -m experiments.ddpm_digits           about 5 minutes of training on 2 free cores; downloads nothing

A U-Net of .7 million parameters predicts v over 100 steps of the cosine schedule, with learned variances (hybrid loss);
a tenth of the labels is withheld so that guidance can be tried. The bound is that of Ho et al. 2020 (DDPM), eq. 5: all
100 terms, the last a discretised decoder over the 17 grey levels, so that it stands beside any other model of these
pixels. More steps make this bound worse: noise far finer than a grey level costs bits that a net does not win back. No
paper has numbers for this set: the criteria are ours. `ddim_steps`, `guidance` and `progressive` take this model apart:
given the same --run.folder they find it trained. Expect digits as good as real ones to our classifier. The test digits
are other writers' than the training digits: held-out digits of the same writers cost fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from aigc_jax import ddpm, figures, train
from aigc_jax.core import EMA, Optim
from aigc_jax.train import Run
from aigc_jax.train.progress import counted

from experiments import _cli, _diffusion, _pictures
from experiments._cli import Row, Scale, Source

MODEL = ddpm.Config(
    shape=(8, 8, 1),
    levels=17,
    classes=10,
    unlabelled=0.1,
    T=100,
    schedule="cosine",
    prediction="v",
    variance="learned",
    objective="hybrid",
    terms=8,
    net=ddpm.Net(widths=(32, 64), blocks=1, attention=(4,), groups=8, dropout=0.1),
    ema=0.99,
    optim=Optim(lr=2e-3, clip=1.0, warmup=100, decay=2400, floor=0.05),
)
RUN = Run(
    folder="runs/ddpm_digits",
    steps=2500,
    batch_size=128,
    eval_every=250,
    save_every=500,
    log_every=100,
    keep=1,
)


@dataclass(frozen=True)
class Setup:
    """Flags of ddpm_digits."""

    model: ddpm.Config = MODEL
    run: Run = RUN
    data: Source = Source("digits")
    training: int | None = (
        None  # images of train, by default 1,237 digits or 80 % of own pictures; the rest is watched
    )

    def __post_init__(self):
        _pictures.check(self, "ddpm_digits", conditional=True, own=True)


SMOKE = replace(
    MODEL,
    T=50,
    terms=4,
    net=replace(MODEL.net, widths=(16, 32), attention=(), dropout=0.0),
    ema=0.98,
    optim=Optim(lr=2e-3, clip=1.0, warmup=20),
)
SCALES = {
    "smoke": Scale(
        Setup(
            SMOKE,
            replace(
                RUN,
                folder="runs/ddpm_digits-smoke",
                steps=400,
                batch_size=64,
                eval_every=200,
                save_every=400,
            ),
        ),
        "a tiny net, 50 steps, 400 updates",
    ),
    "cpu": Scale(Setup(), "our own set and network: DDPM has no digits 8x8"),
}
BOUND = "bound on test, given the label (bits per dim)"
UNLABELLED = "the same without the label (bits per dim)"
HISTOGRAM = "histogram of each pixel, test (bits per dim)"
PRIOR = "of the bound, L_T (bits per dim)"
COVERAGE = f"{_pictures.COVERAGE}; oracle: training images"
CRITERIA = {
    BOUND: "< 2.39, below the histogram",
    PRIOR: "< 0.001",
    _pictures.ACCURACY: ">= 95",
    COVERAGE: ">= 0.7",
}
INVARIANTS = {
    BOUND: "< 4.1, log2 of 17 levels",
    _pictures.ACCURACY: "> 20, twice chance",
}


def fitted(setup) -> train.Result:
    """The model in setup.run.folder, trained there unless it is."""
    training, held, _ = _pictures.three(setup.data, setup.training, 1237)
    return train.fit(ddpm.make, setup.model, setup.run, training, valid=held)


def bound(result: train.Result, x_0: np.ndarray, label, key, *, batch: int = 180) -> np.ndarray:
    """Every term of the bound, mean over the images x_0 [N, H, W, C] in [-1, 1]: [T + 1], bits per dim."""
    cfg = result.config
    params = EMA(cfg.ema).read(result.state)

    def terms(params, x_0, label, key):
        schedule = ddpm.schedule_of(cfg, params)
        eps_fn = ddpm.eps_fn_of(cfg, params, label)
        return ddpm.vlb_terms(schedule, eps_fn, x_0, key, levels=cfg.levels, sigma2=cfg.variance)

    run, found = _diffusion.compiled(terms), []
    for i in counted("bound", range(0, len(x_0), batch)):
        given = None if label is None else jnp.asarray(label[i : i + batch])
        of_part = run(params, jnp.asarray(x_0[i : i + batch]), given, jax.random.fold_in(key, i))
        found.append(np.asarray(of_part, np.float64))
    nats = np.concatenate(found, -1).mean(-1)
    return nats / (x_0[0].size * np.log(2))


def histogram_bits(training: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Bits per dim of the test pixels under each pixel's own histogram over training, one count added a level."""
    counts = (
        np.stack([(training == level).sum(0) for level in range(levels)]).astype(np.float64) + 1
    )
    p = np.take_along_axis(counts / counts.sum(0), test.astype(int), 0)
    return float(-np.log2(p).mean())


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, bounds the test digits, measures the samples, draws."""
    training, held, test = _pictures.three(setup.data, setup.training, 1237)
    setup = _pictures.adopt(setup, SCALES, training.info, classes=True)
    result = train.fit(ddpm.make, setup.model, setup.run, training, valid=held)
    training = training.resident[0]
    pixels, label = test.resident[0]["image"], test.resident[0]["label"]
    x_0, key = (
        np.asarray(ddpm.preprocess(setup.model, {"image": pixels})),
        jax.random.key(setup.run.seed),
    )
    k_given, k_not, k_draw = jax.random.split(key, 3)
    given = bound(result, x_0, label, k_given)
    alone = bound(result, x_0, None, k_not)
    found = _cli.kept()
    found += [
        Row(BOUND, float(given.sum())),
        Row(PRIOR, float(given[-1])),
        Row(UNLABELLED, float(alone.sum())),
        Row(HISTOGRAM, histogram_bits(training["image"], pixels, setup.model.levels)),
    ]
    fake = train.sample(result, k_draw, n=len(label), label=label)
    seen = training["image"] / (setup.model.levels - 1)
    with _cli.costs(_pictures.ACCURACY, COVERAGE):
        found += _pictures.distances(setup.data.name, fake, _pictures.pixels(test), seen, label)
    plot(setup, folder, result, fake, label, float(given.sum()))
    return found


@_cli.costs("ddpm_digits.png")
def plot(
    setup: Setup,
    folder: Path,
    result: train.Result,
    fake: np.ndarray,
    label: np.ndarray,
    bits: float,
) -> None:
    """Samples by class, what the net sees on the way, the bound while training; and the way as a GIF."""
    fig, (axes,) = figures.figure(1, 3, size=(15, 4.4))
    figures.images(
        axes[0],
        _pictures.by_class(fake, label, 12),
        12,
        title="samples, not chosen; one class a row",
    )
    T = setup.model.T
    way = _diffusion.way(result, jax.random.key(2), n=40, label=np.arange(40) % setup.model.classes)
    _diffusion.strip(axes[1], way, range(0, 10, 2))
    _diffusion.curve(axes[2], result, "held-out images")
    caption = f"U-Net {setup.model.net.widths}, T = {T}, {setup.run.steps} updates of {setup.run.batch_size} images"
    figures.save(fig, folder / "ddpm_digits.png", f"{caption}; test bound {bits:.2f} bits per dim")
    shown = np.unique(np.linspace(0, T, 30).round().astype(int))
    figures.save_animation(folder / "ddpm_digits.gif", way[0][shown], 10)


if __name__ == "__main__":
    _cli.main("ddpm_digits")
