"""Emoji of one vendor in the style of another, learned without pairs: Zhu et al. 2017 (CycleGAN), Isola et al. 2017 (pix2pix)

    python -m experiments.cycle_emoji       7 minutes on a GPU, two hours on 2 cores (estimate); downloads nothing

646 emoji by Google and 645 others by Twitter. 150 emoji by both, which training has not, tell how
good a translation is. R@1 is the share of translations whose nearest true picture, in squared
pixels, shows the same emoji. The picture itself, not translated, has 34.7 % and 44.7 %. An affine
map of colours, which gives one set the mean and covariance of the other, is a second bar. A domain
classifier says how many translations look like the other vendor's. Three models: with the identity
term, without it, and on true pairs (the L1 term of pix2pix) for comparison. The paper has other
sets: the criteria are ours.

    python -m experiments.cycle_emoji --data.name images:A --data.other images:B --data.size 32

translates between your own two folders. It trains with the identity term, and shows no verdicts. A
folder without test/ or validation/ gives a tenth of its pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.gan import cycle
from aigc_jax.train import Run
from experiments import _classifier, _cli, _emoji, _pictures
from experiments._cli import Row, Scale, Source

ADAM = Optim(lr=2e-4, b1=0.5)  # `schedule` adds the decay
MODEL = gan.CycleConfig(
    shape=(32, 32, 3),
    gen_widths=(32, 64, 128),
    blocks=4,
    disc_widths=(64, 128),
    optim=ADAM,
    disc_optim=ADAM,
)
PAIRS = {"cycle_weight": 0.0, "identity_weight": 0.0, "paired_weight": 100.0}
ARMS = {"identity": {}, "no identity": {"identity_weight": 0.0}, "true pairs": PAIRS}
EVERY = {"eval_every": 1000, "save_every": 1000, "log_every": 100, "steps_per_call": 1}


@dataclass(frozen=True)
class TwoSets(Source):
    """The emoji, or two folders of pictures."""

    name: str = "emoji_google"
    other: str = "emoji_twitter"

    def __post_init__(self):
        sets = (self.name, self.other)
        folders = all(name.startswith("images:") for name in sets)
        if sets != ("emoji_google", "emoji_twitter") and not folders:
            raise ValueError(
                "data.name and data.other must be two folders, images:A and images:B, or left out; "
                f"got {self.name} and {self.other}"
            )
        if self.folder or self.tokenizer or (self.size and not folders):
            rule = "data.size needs two folders; data.folder and data.tokenizer have no use here"
            got = f"{self.size}, {self.folder} and {self.tokenizer!r}"
            raise ValueError(f"{rule}; got {got}")

    def parts(self) -> tuple[data.Data, data.Data]:
        """Returns a training set and a held-out one. Folders are cut as for other scripts."""
        if not self.pictures:
            return data.load("emoji_pair"), data.load("emoji_pair", "validation")
        sides = [
            _pictures.parts(Source(name, size=self.size), "train", "test")
            for name in (self.name, self.other)
        ]
        try:
            training, held_out = (data.pair(a, b) for a, b in zip(*sides, strict=True))
        except ValueError as e:
            raise _cli.DataError(str(e)) from e
        return training, held_out


@dataclass(frozen=True)
class Setup:
    """Flags of cycle_emoji."""

    model: gan.CycleConfig = MODEL
    run: Run = Run("runs/cycle_emoji", 10_000, 4, keep=1, **EVERY)
    data: TwoSets = TwoSets()
    arms: tuple[str, ...] = tuple(ARMS)
    classifier_steps: int = 600

    def __post_init__(self):
        _cli.at_least(self, classifier_steps=1)
        if not self.arms or not set(self.arms) <= set(ARMS):
            raise ValueError(f"arms must hold some of {', '.join(ARMS)}, got {self.arms}")


SMOKE = {"run.folder": "runs/cycle_emoji-smoke", "run.steps": 6, "run.eval_every": 3}
SMOKE |= {"model.gen_widths": (8, 16), "model.blocks": 1, "model.disc_widths": (8, 16)}
SMOKE |= {"arms": ("identity",), "classifier_steps": 10}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "6 updates of narrow nets"),
    "cpu": Scale(
        Setup(),
        "emoji of 32 x 32 for photographs of 256 x 256, narrower nets, 4 blocks for 9, patches of "
        "16 x 16 for 70 x 70, batches of 4 for 1",
    ),
}
TO = {"b": "to Twitter", "a": "to Google"}
RECALL = "{}, {}: R@1 among the 150 true pictures (%; oracle: not translated)"
DOMAIN = "{}, {}: the domain classifier is satisfied (%; oracle: true pictures)"
FAR = "{}, {}: mean |translation - true picture| (0..255; oracle: not translated)"
BACK = "{}, {}: mean |picture after a cycle - picture| (0..255)"
GAIN = "{}, {}: R@1 minus that of the pictures, not translated (%)"
CRITERIA = {
    **{RECALL.format("identity", way): ">= 50" for way in TO.values()},
    **{GAIN.format("identity", way): "> 5" for way in TO.values()},
    **{DOMAIN.format("identity", way): ">= 90" for way in TO.values()},
}
INVARIANTS = {BACK.format("identity", "to Twitter"): "< 120"}


def classifier(setup: Setup, both: data.Data, folder: Path):
    """Trains a classifier of the two sets; returns f(images in [0, 1]) -> share of set b (%)."""
    sets = [both.resident[0][name] for name in ("image", "other")]
    label = np.repeat([0, 1], [len(x) for x in sets])
    training = data.from_arrays({"image": np.concatenate(sets), "label": label})
    steps = setup.classifier_steps
    cfg = _classifier.Config(
        shape=setup.model.shape,
        classes=2,
        shift=0,  # it would move black bars into the white pictures
        mirror=True,
        ema=0.99,
        optim=Optim(lr=2e-3, weight_decay=0.01, warmup=steps // 10, decay=steps - steps // 10),
    )
    place = Run(str(folder / "classifier"), steps, 64, save_every=100, seed=setup.run.seed, keep=1)
    result = train.fit(_classifier.make, cfg, place, training)
    net, weights = metrics.Classifier(cfg.channels, cfg.width, 2), _cli.weights(result)

    def share_of_b(images: np.ndarray) -> float:
        logits = _emoji.in_chunks(lambda x: net.apply(weights, x)[0], images)
        return 100 * float(logits.argmax(-1).mean())

    return share_of_b


def translated(result: train.Result, images: np.ndarray, to: str) -> np.ndarray:
    """Returns translations of images in [0, 1]: images in [0, 1]."""
    weights = cycle.generators_of(result.config, result.state)
    moved = partial(cycle.translate, result.config, weights, to=to)
    return (_emoji.in_chunks(lambda x: moved(2 * x - 1), images) + 1) / 2


def recall(found: np.ndarray, true: np.ndarray) -> float:
    """Returns for how many (%) of the images the nearest true picture is their own."""
    nearest = metrics.nearest(found.reshape(len(found), -1), true.reshape(len(true), -1))[1]
    return 100 * float(np.mean(nearest == np.arange(len(true))))


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the mean |x - y| of images in [0, 1], in units of 0..255."""
    return 255 * float(np.abs(x - y).mean())


def schedule(setup: Setup) -> gan.CycleConfig:
    """Returns the model with the paper's rates: constant for half of the updates, then to 0."""
    hold = setup.run.steps // 2
    rates = {"hold": hold, "decay": setup.run.steps - hold, "curve": "linear"}
    optims = (setup.model.optim, setup.model.disc_optim)
    optim, disc_optim = (replace(each, **rates) for each in optims)
    return replace(setup.model, optim=optim, disc_optim=disc_optim)


def recoloured(sets: dict[str, np.ndarray], images: np.ndarray, to: str) -> np.ndarray:
    """Returns images by the affine map of colours that gives one set the moments of the set `to`.

    Mean and covariance are those of pixels, and the matrix is symmetric. Values are clipped to
    [0, 1], so the moments are met only nearly. sets: {"a": images, "b": images}, all in [0, 1].
    """

    def moments(x):
        pixels = x.reshape(-1, x.shape[-1]).astype(np.float64)
        return pixels.mean(0), np.atleast_2d(np.cov(pixels.T))

    def root(c, power):
        values, vectors = np.linalg.eigh(c)
        return (vectors * np.maximum(values, 1e-12) ** power) @ vectors.T

    (mean, c), (wanted, target) = moments(sets["a" if to == "b" else "b"]), moments(sets[to])
    r = root(c, 0.5)
    matrix = root(c, -0.5) @ root(r @ target @ r, 0.5) @ root(c, -0.5)
    return np.clip((images - mean) @ matrix + wanted, 0, 1).astype(np.float32)


def rows_of(arm: str, move: Callable, true: dict, share_of_b, back: bool = True) -> list[Row]:
    """Returns the rows of a way to translate; true: pictures of the same emoji by both vendors.

    move: `move(images, to=...)` returns translations. back: a row of the way there and back too.
    """
    rows = []
    for to, way in TO.items():
        origin = "a" if to == "b" else "b"
        given, target = true[origin], true[to]
        moved = move(given, to=to)
        shares = [share_of_b(x) for x in (moved, target)]
        if to == "a":
            shares = [100 - share for share in shares]
        found, before = recall(moved, target), recall(given, target)
        rows += [
            Row(DOMAIN.format(arm, way), shares[0], oracle=shares[1]),
            Row(RECALL.format(arm, way), found, oracle=before),
            Row(GAIN.format(arm, way), found - before),
            Row(FAR.format(arm, way), distance(moved, target), oracle=distance(given, target)),
        ]
        if back:
            again = move(moved, to=origin)
            rows.append(Row(BACK.format(arm, way), distance(again, given)))
    return rows


def cycles(result: train.Result, true: dict) -> list[Row]:
    """Returns the rows of two folders: no picture of one belongs to one of the other."""
    rows = []
    for to, back, way in (("b", "a", "to the other set"), ("a", "b", "to the first set")):
        again = translated(result, translated(result, true[back], to), back)
        rows.append(Row(BACK.format("identity", way), distance(again, true[back])))
    return rows


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains each model, and measures its translations of held-out pictures."""
    own, rows, results = setup.data.pictures, _cli.kept(), {}
    training, held_out = setup.data.parts()
    setup = replace(setup, model=replace(setup.model, shape=training.info.shape))
    model = schedule(setup)
    model.check(training.info)
    arrays = _cli.arrays(held_out)
    true = {of: (arrays[x] / 255).astype(np.float32) for of, x in (("a", "image"), ("b", "other"))}
    if not own:
        share_of_b = classifier(setup, training, folder)
        sets = dict(
            zip("ab", (_cli.arrays(training)[x] / 255 for x in ("image", "other")), strict=True)
        )
        colours = partial(recoloured, sets)
        rows += rows_of("affine colours", colours, true, share_of_b, back=False)
    for arm in ("identity",) if own else setup.arms:
        pairs = data.load("emoji_pair", aligned=True) if arm == "true pairs" else training
        place = replace(setup.run, folder=str(folder / arm.replace(" ", "_")))
        cfg = replace(model, **ARMS[arm])
        result = results[arm] = train.fit(gan.make_cycle, cfg, place, pairs, valid=held_out)
        move = partial(translated, result)
        rows += cycles(result, true) if own else rows_of(arm, move, true, share_of_b)
    plot(setup, folder, results, true)
    return rows


@_cli.costs("cycle_emoji.png")
def plot(setup: Setup, folder: Path, results: dict, true: dict) -> None:
    """Draws held-out pictures, their translations by each model, and the true pictures."""
    fig, axes = figures.figure(1, 2, size=(13, 0.55 * (len(results) + 2) + 0.7))
    titles = {"b": "Google to Twitter", "a": "Twitter to Google"}
    if setup.data.pictures:
        titles = {"b": f"{setup.data.name} to {setup.data.other}", "a": "and back"}
    for ax, (to, title) in zip(axes[0], titles.items(), strict=True):
        given = true["a" if to == "b" else "b"][:12]
        lines = [given, *(translated(result, given, to) for result in results.values())]
        names = ["given", *results]
        if not setup.data.pictures:
            lines, names = [*lines, true[to][:12]], [*names, "true"]
        figures.images(ax, np.concatenate(lines), len(given), title=title)
        ax.set_axis_on()
        ax.set(xticks=[])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        bottom, top = ax.get_ylim()
        places = top + (bottom - top) * (np.arange(len(lines)) + 0.5) / len(lines)
        ax.set_yticks(places, names)
    caption = f"{setup.run.steps:,} updates of {setup.run.batch_size} + {setup.run.batch_size}"
    figures.save(fig, folder / "cycle_emoji.png", f"{caption} pictures; held-out pictures.")


if __name__ == "__main__":
    _cli.main("cycle_emoji")
