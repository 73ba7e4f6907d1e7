"""A U-Net or a transformer over patches, by the minute: DDPM's net beside DiT's (Peebles & Xie 2023) on 8x8 digits

    python -m experiments.unet_or_dit           about 10 minutes on 2 cores; downloads nothing

The model of `ddpm_digits` with its U-Net of .7 million parameters and with a DiT of as many, both at the U-Net's
rate, alone on the machine one after the other: held-out bound against updates and against minutes, and what the
samples are worth in the end. Its minutes are this machine's; a GPU would give others. No paper has numbers for this
set, so there is no criterion but that both learn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from aigc_jax import ddpm, figures, train
from aigc_jax.train import Run

from experiments import _cli, _pictures, ddpm_digits
from experiments._cli import Row, Scale, Source

DIT = ddpm.Net("dit", widths=(96,) * 4, heads=4, patch=2, dropout=0.1)


@dataclass(frozen=True)
class Setup:
    """Flags of unet_or_dit."""

    model: ddpm.Config = ddpm_digits.MODEL
    dit: ddpm.Net = DIT
    run: Run = replace(ddpm_digits.RUN, folder="runs/unet_or_dit", steps=2000)
    data: Source = Source("digits")
    training: int | None = None  # images of train, by default 1,237 digits or 80 % of own pictures

    def __post_init__(self):
        _pictures.check(self, "unet_or_dit", conditional=True, own=True)
        if self.dit.kind != "dit" or self.model.net.kind != "unet":
            raise ValueError("dit.kind must be dit and model.net.kind unet")


SCALES = {
    "smoke": Scale(
        Setup(
            ddpm_digits.SMOKE,
            ddpm.Net("dit", widths=(32,) * 2, heads=2, patch=2, dropout=0.0),
            replace(
                ddpm_digits.SCALES["smoke"].setup.run,
                folder="runs/unet_or_dit-smoke",
                steps=200,
                eval_every=100,
            ),
        ),
        "tiny nets, 200 updates",
    ),
    "cpu": Scale(
        Setup(),
        "8x8 digits, .7 million parameters (ImageNet, 33 to 675 million); one rate for both, the U-Net's, its decay"
        " cut off after 2,000 of 2,500 updates",
    ),
}
NETS = ("U-Net", "DiT")


def bits(net: str) -> str:
    return f"{net}: bound on test, given the label (bits per dim)"


CRITERIA = {bits(net): "< 2.39, below the histogram (2.6 when it was run)" for net in NETS}
INVARIANTS = {bits(net): "< 4.1, log2 of 17 levels" for net in NETS}


def clock(folder: str):
    """An `on_eval` that says how many minutes the run has taken, those before it was stopped and resumed included."""
    before = [line["valid"]["minutes"] for line in train.metrics(folder) if "valid" in line]
    begin = time.monotonic() - 60 * max(before, default=0.0)
    return lambda family, state, step: {"minutes": np.float32((time.monotonic() - begin) / 60)}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both, bounds the test digits, measures samples, draws."""
    training, held, test = _pictures.three(setup.data, setup.training, 1237)
    setup = _pictures.adopt(setup, SCALES, training.info, classes=True)
    setup.dit.check(setup.model.shape)
    pixels, label = test.resident[0]["image"], test.resident[0]["label"]
    x_0 = np.asarray(ddpm.preprocess(setup.model, {"image": pixels}))
    found, by_step, by_minute, shown = _cli.kept(), {}, {}, []
    for net, form in zip(NETS, (setup.model.net, setup.dit), strict=True):
        cfg = replace(setup.model, net=form)
        run = replace(setup.run, folder=str(folder / form.kind))
        result = train.fit(ddpm.make, cfg, run, training, valid=held, on_eval=clock(run.folder))
        lines = [
            (line["step"], line["valid"])
            for line in train.metrics(result.folder)
            if "valid" in line
        ]
        step, minutes, bound = np.array(
            [(s, v["minutes"], v["nll_bits_per_dim"]) for s, v in lines]
        ).T
        by_step[net], by_minute[net] = (step, bound), (minutes, bound)
        count = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
        k_bound, k_draw = jax.random.split(jax.random.key(setup.run.seed))
        found += [
            Row(f"{net}: parameters", count),
            Row(
                f"{net}: minutes of training, compiling and evaluating included", float(minutes[-1])
            ),
            Row(bits(net), float(ddpm_digits.bound(result, x_0, label, k_bound).sum())),
        ]
        fake = train.sample(result, k_draw, n=len(label), label=label)
        shown.append(_pictures.by_class(fake, label, 10))
        seen = training.resident[0]["image"] / (setup.model.levels - 1)
        measured = _pictures.distances(setup.data.name, fake, _pictures.pixels(test), seen, label)
        found += [row._replace(quantity=f"{net}: {row.quantity}") for row in measured]
    with _cli.costs("unet_or_dit.png"):
        fig, (axes,) = figures.figure(1, 4, size=(16, 4.2))
        for ax, curves, xlabel in (
            (axes[0], by_step, "updates"),
            (axes[1], by_minute, "minutes of two cores"),
        ):
            figures.curves(
                ax, curves, xlabel=xlabel, ylabel="bound, held-out images (bits per dim)"
            )
        for ax, net, pictures in zip(axes[2:], NETS, shown, strict=True):
            figures.images(ax, pictures, 10, title=f"{net}: samples, not chosen")
        caption = f"T = {setup.model.T}, {setup.run.steps} updates of {setup.run.batch_size} images, equal rates"
        figures.save(fig, folder / "unet_or_dit.png", caption)
    return found


if __name__ == "__main__":
    _cli.main("unet_or_dit")
