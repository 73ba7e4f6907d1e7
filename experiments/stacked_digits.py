"""1,000 modes that can be counted: three digits as the channels of one image, and packing. Lin et al. 2018 (PacGAN), table 2

    python -m experiments.stacked_digits    scale cpu was not run to its end yet; downloads nothing

An image has three digits, drawn at random, in its three channels. So there are 1,000 kinds. Our
classifier reads each channel, which gives the kind of a sample. The paper stacks MNIST (28x28) and
draws 26,000 samples. A plain DCGAN has 78.9 modes and a reverse KL of 4.50 nats there, and a packed
one all 1,000 and 0.06. VEEGAN (Srivastava et al. 2017) has 99 modes for the plain one. Here digits
of 8x8 are stacked, and the nets are small. Expect the same direction. As many real stacks of
held-out digits are the oracle. The classifier's errors alone fill modes: of samples of a single
kind it would report a few others.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale

ADAM = Optim(lr=2e-4, b1=0.5)
INIT = {"kind": "dcgan", "init": "normal", "init_scale": 0.02}
MODEL = gan.Config(
    shape=(8, 8, 3),
    levels=17,
    gen=gan.NetConfig(widths=(32, 64), norm="batch", **INIT),
    disc=gan.NetConfig(widths=(16, 32), activation="leaky_relu", norm="batch", **INIT),
    optim=ADAM,
    disc_optim=ADAM,
)
ARMS = {"plain": 1, "Pac2": 2, "Pac4": 4}
MEASURES = {"modes": "modes of 1,000", "kl": "reverse KL (nats)"}
# PacGAN, table 2; it has Pac3 too, but the last row here is its Pac4.
PUBLISHED = {"plain": (78.9, 4.50), "Pac2": (1000.0, 0.06), "Pac4": (1000.0, 0.07)}


@dataclass(frozen=True)
class Setup:
    """Flags of stacked_digits. model.packing is set to each arm's."""

    model: gan.Config = MODEL
    run: Run = Run("runs/stacked_digits", 10_000, 64, eval_every=1000, save_every=1000, keep=1)
    seeds: int = 3
    stacks: int = 25_600  # images of training
    samples: int = 26_000

    def __post_init__(self):
        _cli.at_least(self, seeds=1, stacks=1, samples=1)


SMOKE = {"run.folder": "runs/stacked_digits-smoke", "run.steps": 60, "run.eval_every": 30}
SMOKE |= {"seeds": 1, "samples": 2600, "model.gen.widths": (8, 16), "model.disc.widths": (8, 16)}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "60 updates of small nets"),
    "cpu": Scale(
        Setup(),
        "digits 8x8 for MNIST, nets of two layers for four, 25,600 stacks for 128,000, 10,000 "
        "updates for 100,000, three seeds for ten, batches of 64 packs",
    ),
}
ROW = "{}: {}"
MORE = "Pac2 over plain: modes"
LESS = "Pac2 minus plain: reverse KL (nats)"
CRITERIA = {MORE: ">= 1.2", LESS: "< 0", ROW.format("Pac4", MEASURES["modes"]): ">= 950"}
INVARIANTS = {ROW.format("plain", MEASURES["modes"]): ">= 1"}


def stacked(digits: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Returns n images [n, 8, 8, 3] whose channels are digits [N, 8, 8, 1], drawn at random."""
    rows = np.random.default_rng(seed).integers(0, len(digits), (n, 3))
    return np.moveaxis(digits[rows, :, :, 0], 1, -1)


def kinds(images: np.ndarray, classifier: metrics.Pretrained) -> np.ndarray:
    """Returns the kind 0..999 of each image [n, 8, 8, 3] in [0, 1], as the classifier reads it."""
    channels = np.moveaxis(images, -1, 1).reshape(-1, *images.shape[1:3], 1)
    logits, _ = classifier.apply(channels)
    return logits.argmax(-1).reshape(-1, 3) @ np.array([100, 10, 1])


def scores(images: np.ndarray, classifier: metrics.Pretrained) -> dict[str, float]:
    """Returns how many kinds the images have, and the reverse KL of the kinds to equal shares."""
    counts = np.bincount(kinds(images, classifier), minlength=1000)
    return {"modes": int((counts > 0).sum()), "kl": metrics.reverse_kl(counts)}


def trained(setup: Setup, arm: str, training: data.Data, classifier, folder: Path) -> list:
    """Trains an arm with each seed. The scores are measured while it trains."""
    cfg = replace(setup.model, packing=ARMS[arm])
    draw = jax.jit(partial(gan.sample, cfg, n=min(500, setup.samples)))

    def on_eval(family, state, step):
        keys = jax.random.split(jax.random.key(step), -(-setup.samples // 500))
        images = np.concatenate([draw(state, key) for key in keys])
        return scores(images[: setup.samples], classifier)

    size = setup.run.batch_size * cfg.packing
    run = replace(setup.run, folder=str(folder / arm), batch_size=size)
    runs = _cli.seeded(run, setup.seeds)
    return [train.fit(gan.make, cfg, each, training, on_eval=on_eval) for each in runs]


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains every arm, and counts the kinds of its samples."""
    classifier = metrics.load_classifier("digits")
    seen, held = (data.load("digits", part) for part in ("train[:1237]", "test"))
    digits, fresh = (_cli.arrays(each)["image"] for each in (seen, held))
    images = stacked(digits, setup.stacks, 0)
    source = {"name": "stacked digits", "stacks": setup.stacks}
    training = data.from_arrays({"image": images}, levels=17, source=source)
    oracle = scores(stacked(fresh, setup.samples, 1) / 16, classifier)
    rows, results, means = _cli.kept(), {}, {}
    for arm in ARMS:
        results[arm] = trained(setup, arm, training, classifier, folder)
        for (measure, words), paper in zip(MEASURES.items(), PUBLISHED[arm], strict=True):
            ends = [_cli.history(r.folder, measure)[1][-1] for r in results[arm]]
            mean, error = means[arm, measure] = _cli.mean_and_error(ends)
            rows.append(Row(ROW.format(arm, words), mean, paper, error, oracle[measure]))
    rows.append(Row(MORE, means["Pac2", "modes"][0] / means["plain", "modes"][0]))
    rows.append(Row(LESS, means["Pac2", "kl"][0] - means["plain", "kl"][0]))
    plot(setup, folder, results, images)
    return rows


@_cli.costs("stacked_digits.png")
def plot(setup: Setup, folder: Path, results: dict, images: np.ndarray) -> None:
    """Draws the scores against updates, and stacks: real ones and samples of each arm."""
    fig, axes = figures.figure(2, 3)
    for ax, (measure, words) in zip(axes[0], MEASURES.items(), strict=False):
        curves = {arm: _cli.history(results[arm][0].folder, measure) for arm in ARMS}
        figures.curves(ax, curves, xlabel="updates", ylabel=words)
    pictures = {"training stacks": images[:49] / 16}
    for arm in ARMS:
        pictures[f"{arm}, samples, not chosen"] = train.sample(
            results[arm][0], jax.random.key(0), n=49
        )
    for ax, (title, shown) in zip([axes[0, 2], *axes[1]], pictures.items(), strict=True):
        figures.images(ax, shown, 7, title=title)
    caption = f"{setup.run.steps:,} updates; curves and samples of the first seed."
    figures.save(fig, folder / "stacked_digits.png", caption)


if __name__ == "__main__":
    _cli.main("stacked_digits")
