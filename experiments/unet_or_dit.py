"""A U-Net or a transformer over patches, by the minute: DDPM's net beside DiT's (Peebles & Xie 2023) on 8x8 digits

    python -m experiments.unet_or_dit           about 10 minutes on 2 cores; downloads nothing

The model of `ddpm_digits` with its U-Net of 0.7 million parameters and with a DiT of as many, both
at the U-Net's rate. They train one after the other, alone on the machine. The held-out bound is
shown against updates and against minutes, beside the quality of the samples in the end. The minutes
are this machine's; a GPU would give others. No paper has numbers for this set, so the only
criterion is that both learn.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from aigc_jax import ddpm, figures, train
from aigc_jax.train import Run
from experiments import _cli, _ddpm_digits, _diffusion, _pictures
from experiments._cli import Row, Scale, Source


@dataclass(frozen=True)
class Setup:
    """Flags of unet_or_dit."""

    model: ddpm.Config = _ddpm_digits.MODEL
    dit: ddpm.NetConfig = ddpm.NetConfig("dit", widths=(96,) * 4, heads=4, patch=2, dropout=0.1)
    run: Run = _ddpm_digits.run("runs/unet_or_dit", steps=2000)
    data: Source = Source("digits")
    training: int | None = None  # images; default 1,237 digits or 80 % of own pictures

    def __post_init__(self):
        _pictures.check(self, "unet_or_dit", conditional=True, own=True)
        if self.dit.kind != "dit" or self.model.net.kind != "unet":
            raise ValueError("dit.kind must be dit and model.net.kind unet")


SMOKE = Setup(
    _ddpm_digits.SMOKE,
    ddpm.NetConfig("dit", widths=(32,) * 2, heads=2, patch=2, dropout=0.0),
    _ddpm_digits.smoke_run("runs/unet_or_dit-smoke", steps=200, eval_every=100),
)
SIZES = "8x8 digits, 0.7 million parameters (ImageNet, 33 to 675 million)"
DIFFERS = f"{SIZES}; one rate for both, the U-Net's, its decay cut off after 2,000 of 2,500 updates"
SCALES = {"smoke": Scale(SMOKE, "tiny nets, 200 updates"), "cpu": Scale(Setup(), DIFFERS)}
NETS = ("U-Net", "DiT")
BITS = {net: f"{net}: bound on test, given the label (bits per dim)" for net in NETS}
CRITERIA = {BITS[net]: "< 2.39, below the histogram (2.6 when it was run)" for net in NETS}
INVARIANTS = {BITS[net]: "< 4.1, log2 of 17 levels" for net in NETS}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both, bounds the test digits, measures samples."""
    training, held, test = _pictures.three(setup.data, setup.training, 1237)
    setup = _pictures.adopt(setup, SCALES, training.info, classes=True)
    setup.dit.check(setup.model.shape)
    image, label = (_cli.arrays(test)[name] for name in ("image", "label"))
    x_0 = np.asarray(ddpm.preprocess(setup.model, {"image": image}))
    seen = _cli.arrays(training)["image"] / (setup.model.levels - 1)
    found, curves, samples = _cli.kept(), {}, {}
    for net, form in zip(NETS, (setup.model.net, setup.dit), strict=True):
        run = replace(setup.run, folder=str(folder / form.kind))
        model, watch = replace(setup.model, net=form), _cli.clock(run.folder)
        result = train.fit(ddpm.make, model, run, training, valid=held, on_eval=watch)
        steps, bound = _cli.history(run.folder, "nll_bits_per_dim")
        _, minutes = _cli.history(run.folder, "minutes")
        curves[net] = steps, minutes, bound
        k_bound, k_samples = jax.random.split(jax.random.key(setup.run.seed))
        what = f"{net}: minutes of training, compiling and evaluating included"
        bits = float(_diffusion.bound(result, x_0, label, k_bound).sum())
        found += [Row(f"{net}: parameters", _cli.parameters(result)), Row(what, float(minutes[-1]))]
        found.append(Row(BITS[net], bits))
        fake = train.sample(result, k_samples, n=len(label), label=label)
        samples[net] = _pictures.by_class(fake, label, 10)
        measured = _pictures.distances(setup.data.name, fake, _pictures.pixels(test), seen, label)
        found += [row._replace(quantity=f"{net}: {row.quantity}") for row in measured]
    plot(setup, folder, curves, samples)
    return found


@_cli.costs("unet_or_dit.png")
def plot(setup: Setup, folder: Path, curves: dict, samples: dict) -> None:
    """Draws the bound against updates and against minutes, and samples of both nets."""
    fig, ((by_update, by_minute), grids) = figures.figure(2, 2)
    lines = {net: (steps, bound) for net, (steps, _, bound) in curves.items()}
    ylabel = "bound, held-out images (bits per dim)"
    figures.curves(by_update, lines, xlabel="updates", ylabel=ylabel, title="bound by updates")
    lines = {net: (minutes, bound) for net, (_, minutes, bound) in curves.items()}
    title = "bound by time"
    figures.curves(by_minute, lines, xlabel="minutes of two cores", ylabel=ylabel, title=title)
    for ax, (net, drawn) in zip(grids, samples.items(), strict=True):
        figures.images(ax, drawn, 10, title=f"{net}: samples, not chosen")
    updates = f"{setup.run.steps:,} updates of {setup.run.batch_size} images"
    caption = f"Trained on {setup.data.name}: T = {setup.model.T}, {updates}, both at one rate."
    figures.save(fig, folder / "unet_or_dit.png", caption)


if __name__ == "__main__":
    _cli.main("unet_or_dit")
