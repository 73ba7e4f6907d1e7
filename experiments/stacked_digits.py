"""1,000 modes that can be counted: three digits as the channels of one image, and packing. Lin et al. 2018 (PacGAN), table 3

    python -m experiments.stacked_digits    scale cpu was not run to its end yet; downloads nothing

An image has three digits, drawn at random, in its three channels. So there are 1,000 kinds. Our
classifier reads each channel, which gives the kind of a sample. The paper's table 3 stacks MNIST
(28x28). Where D has a quarter of G's channels, the authors' plain DCGAN has 78.5 modes and a
reverse KL of 5.21 nats. Packs of two have 484.5 and 2.61, packs of four 667.4 and 1.81. Where D has
half of them, plain has 487.7 and 2.24, and packs of two have 840.7 and 1.00. Here digits of 8x8 are
stacked, and the nets are small. Expect the same direction for a quarter. With half, our plain GAN
keeps about 800 modes (one seed), and packs of two gain little.

A batch has as many packs in every arm, as in the paper, so Pac2 sees twice as many images per
update. A plain GAN with batches of as many images shows what they do without packing.

A classifier gives noise a kind too. So a sample counts only if its three digits are read with a
probability of at least 0.9 each. The paper counts all samples. As many real stacks of held-out
digits are the oracle. As many images of noise, whose pixels have the digits' values, are the floor.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import scipy.special

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.train import Run
from experiments import _cli, _gan
from experiments._cli import Row, Scale

MODEL = _gan.dcgan((32, 64), (8, 16), shape=(8, 8, 3), levels=17)
ARMS = {  # how much wider D is, images per pack, images per update over run.batch_size
    "plain": (1, 1, 1),
    "plain, batch 2x": (1, 1, 2),
    "Pac2": (1, 2, 2),
    "Pac4": (1, 4, 4),
    "plain, D 2x": (2, 1, 1),
    "Pac2, D 2x": (2, 2, 2),
}
MEASURES = {
    "modes": "modes of 1,000",
    "kl": "reverse KL (nats)",
    "sure": "samples that count (%)",
}
PUBLISHED = {  # PacGAN, table 3, the authors' own runs: D a quarter of G, and half of it
    "plain": (78.5, 5.21, None),
    "Pac2": (484.5, 2.61, None),
    "Pac4": (667.4, 1.81, None),
    "plain, D 2x": (487.7, 2.24, None),
    "Pac2, D 2x": (840.7, 1.00, None),
}


@dataclass(frozen=True)
class Setup:
    """Flags of stacked_digits. Each arm sets model.packing; widths and batches are plain's."""

    model: gan.Config = MODEL
    run: Run = Run("runs/stacked_digits", 5000, 64, eval_every=500, save_every=500, keep=1)
    seeds: int = 3
    stacks: int = 25_600  # images of training
    samples: int = 26_000

    def __post_init__(self):
        _cli.at_least(self, seeds=1, stacks=1, samples=1)


SMOKE = {"run.folder": "runs/stacked_digits-smoke", "run.steps": 60, "run.eval_every": 30}
SMOKE |= {"seeds": 1, "samples": 2600, "model.gen.widths": (8, 16), "model.disc.widths": (4, 8)}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "60 updates of small nets"),
    "cpu": Scale(
        Setup(),
        "digits 8x8 for MNIST, nets of two layers, 25,600 stacks of 1,237 digits for fresh ones of "
        "60,000, batches of 64 for 128, Adam as DCGAN's, 5,000 updates for 500,000, three seeds for "
        "50, latents of 100 for 256, 26,000 samples for 25,600, no BatchNorm in D's first layer, "
        "kernels of 4x4 for 3x3",
    ),
}
ROW = "{}: {}; mean over seeds"
MORE = "Pac2 minus {}: modes, mean over seeds"
LESS = "Pac2 minus {}: reverse KL (nats), mean over seeds"
Z_SCORE = "Pac2 minus {}: reverse KL, in standard errors of the mean over seeds"
OTHERS = ("plain", "plain, batch 2x")
WIDER = "plain: modes with D 2x minus D, mean over seeds"
FLOOR, REAL = "noise: {}", "real stacks: {}"
CRITERIA = {MORE.format("plain"): "> 0"}
CRITERIA |= {Z_SCORE.format(other): "< -2" for other in OTHERS}
CRITERIA |= {ROW.format("Pac4", MEASURES["modes"]): ">= 600", WIDER: "> 0"}
INVARIANTS = {REAL.format(MEASURES["modes"]): ">= 800"}


def stacked(digits: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Returns n images [n, 8, 8, 3] whose channels are digits [N, 8, 8, 1], drawn at random."""
    rows = np.random.default_rng(seed).integers(0, len(digits), (n, 3))
    return np.moveaxis(digits[rows, :, :, 0], 1, -1)


def noise(digits: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Returns n images whose pixels are independent, each with the values of that pixel in digits."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(digits), (n, *digits.shape[1:3], 3))
    return digits[
        rows, np.arange(digits.shape[1])[:, None, None], np.arange(digits.shape[2])[:, None], 0
    ]


def kinds(images: np.ndarray, classifier: metrics.Pretrained) -> np.ndarray:
    """Returns the kind 0..999 of each image [n, 8, 8, 3] in [0, 1], or -1 where it is not sure.

    It is sure if the classifier gives each channel's digit a probability of at least 0.9.
    """
    channels = np.moveaxis(images, -1, 1).reshape(-1, *images.shape[1:3], 1)
    p = scipy.special.softmax(classifier.apply(channels)[0], -1)
    kind = p.argmax(-1).reshape(-1, 3) @ np.array([100, 10, 1])
    return np.where((p.max(-1).reshape(-1, 3) >= 0.9).all(-1), kind, -1)


def scores(images: np.ndarray, classifier: metrics.Pretrained) -> dict[str, float]:
    """Returns how many kinds the images have, the reverse KL to equal shares, and how many count.

    Where none counts, the KL is that of a single kind.
    """
    found = kinds(images, classifier)
    counts = np.bincount(found[found >= 0], minlength=1000)
    kl = metrics.reverse_kl(counts) if counts.any() else float(np.log(1000))
    return {"modes": int((counts > 0).sum()), "kl": kl, "sure": 100 * float((found >= 0).mean())}


def trained(setup: Setup, arm: str, training: data.Data, classifier, folder: Path) -> list:
    """Trains an arm with each seed. The scores are measured while it trains."""
    wider, packing, times = ARMS[arm]
    disc = replace(setup.model.disc, widths=tuple(wider * n for n in setup.model.disc.widths))
    cfg = replace(setup.model, packing=packing, disc=disc)
    draw = _gan.drawing(cfg, setup.samples)

    def on_eval(family, state, step):
        return scores(draw(state, jax.random.key(step)), classifier)

    name = arm.replace(", ", "-").replace(" ", "")
    run = replace(setup.run, folder=str(folder / name), batch_size=times * setup.run.batch_size)
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
    floor = scores(noise(digits, setup.samples, 2) / 16, classifier)
    rows, results, ends = _cli.kept(), {}, {}
    for words, each in ((REAL, oracle), (FLOOR, floor)):
        rows += [Row(words.format(MEASURES[name]), value) for name, value in each.items()]
    for arm in ARMS:
        results[arm] = trained(setup, arm, training, classifier, folder)
        for (measure, words), paper in zip(
            MEASURES.items(), PUBLISHED.get(arm, (None,) * 3), strict=True
        ):
            values = [_cli.history(r.folder, measure)[1][-1] for r in results[arm]]
            ends[arm, measure] = np.array(values)
            mean, error = _cli.mean_and_error(values)
            rows.append(Row(ROW.format(arm, words), mean, paper, error, oracle[measure]))
    for other in OTHERS:
        for words, measure in ((MORE, "modes"), (LESS, "kl")):
            mean, error = _cli.mean_and_error(ends["Pac2", measure] - ends[other, measure])
            rows.append(Row(words.format(other), mean, error=error))
            if measure == "kl" and error:
                rows.append(Row(Z_SCORE.format(other), mean / error))
    mean, error = _cli.mean_and_error(ends["plain, D 2x", "modes"] - ends["plain", "modes"])
    rows.append(Row(WIDER, mean, error=error))
    plot(setup, folder, results, images)
    return rows


@_cli.costs("stacked_digits.png")
def plot(setup: Setup, folder: Path, results: dict, images: np.ndarray) -> None:
    """Draws the scores against updates, and stacks: real ones and samples of each arm."""
    fig, axes = figures.figure(2, 3)
    for ax, measure, words in zip(
        axes[0], ("modes", "kl"), ("modes", "reverse KL (nats)"), strict=False
    ):
        curves = {arm: _cli.history(results[arm][0].folder, measure) for arm in ARMS}
        figures.curves(ax, curves, xlabel="updates", ylabel=words)
    pictures = {"training stacks": images[:49] / 16}
    for arm in ("plain", "Pac2", "Pac4"):
        pictures[f"{arm}, samples, not chosen"] = train.sample(
            results[arm][0], jax.random.key(0), n=49
        )
    for ax, (title, shown) in zip([axes[0, 2], *axes[1]], pictures.items(), strict=True):
        figures.images(ax, shown, 7, title=title)
    caption = f"{setup.run.steps:,} updates; curves and samples of the first seed."
    figures.save(fig, folder / "stacked_digits.png", caption)


if __name__ == "__main__":
    _cli.main("stacked_digits")
