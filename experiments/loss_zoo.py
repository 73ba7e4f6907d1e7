"""Which loss survives which network: losses x penalties x norms over random networks, Gulrajani et al. 2017 (WGAN-GP), table 2

    python -m experiments.loss_zoo    an hour on 2 cores; downloads nothing

The paper draws 200 networks at random and trains each by the first GAN's loss and by WGAN-GP on
32x32 ImageNet. It counts the networks whose Inception score reaches 5. By WGAN-GP alone 147 do, by
the GAN alone none, by both 42, by neither 11. Here it is 10 random MLPs on digits of 8x8, for ten
recipes. A recipe succeeds on two conditions. Our classifier's score is at least 60 % of that of
real digits. The samples are nearer to digits than blends of two digits are. The second condition
matters: noise of black and white pixels has 62 % of the score. A run that ends in NaN fails.

On 25 Gaussians each recipe trains one network with three seeds. There it succeeds if it has at
least 23 modes and half of its samples are of high quality (HQ). None did in 6,000 updates.

Expect penalties on gradients to save half of the networks or more. Plain losses and clipping save
none or one of ten, spectral norm one or two.

A critic's loss may tell the quality of samples. The rank correlation of minus the critic's loss and
the Frechet distance shows whether it does, over the measurements of a run. WGAN-GP's fig. 5 says
that on a small set the loss on training data misleads, so held-out digits are used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import scipy.special
from scipy.stats import spearmanr

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.data import points
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale

ADAM = {"optim": Optim(lr=2e-4, b1=0.5), "disc_optim": Optim(lr=2e-4, b1=0.5)}
RMS = Optim("rmsprop", lr=5e-5, b2=0.9, eps=0.0, eps_root=1e-8)
CLIPPED = {"loss": "wasserstein", "penalty": "clip", "n_critic": 5, "optim": RMS, "disc_optim": RMS}
SLOW = Optim(lr=1e-4, b1=0.0, b2=0.9)
WGAN_GP = {"loss": "wasserstein", "penalty": "gp", "n_critic": 5, "optim": SLOW, "disc_optim": SLOW}
R1 = {"penalty_weight": 1.0, **ADAM}
# Name: (loss, penalty and optimizers; the norm of D). WGAN and WGAN-GP have the rates of their
# papers, all others DCGAN's Adam. The weight 1 of R1 is ours.
ZOO: dict[str, tuple[dict, str]] = {
    "non-saturating": ({"loss": "non_saturating", **ADAM}, "none"),
    "non-saturating, R1": ({"loss": "non_saturating", "penalty": "r1", **R1}, "none"),
    "non-saturating, spectral norm": ({"loss": "non_saturating", **ADAM}, "spectral"),
    "least squares": ({"loss": "least_squares", **ADAM}, "none"),
    "hinge, spectral norm": ({"loss": "hinge", **ADAM}, "spectral"),
    "WGAN, clipping": (CLIPPED, "none"),
    "WGAN-GP": (WGAN_GP, "none"),
    "WGAN-GP, layer norm": (WGAN_GP, "layer"),
    "relativistic": ({"loss": "relativistic", **ADAM}, "none"),
    "relativistic, R1 and R2": ({"loss": "relativistic", "penalty": "r1_r2", **R1}, "none"),
}
TOY, DIGITS = gan.Config(shape=(2,), latent_dim=2), gan.Config(shape=(8, 8, 1), levels=17)
STEP, STD = 2.0, 0.05  # of the grid of 25 Gaussians
EVERY = {"eval_every": 100, "save_every": 1000, "log_every": 500, "steps_per_call": 50}


@dataclass(frozen=True)
class Setup:
    """Flags of loss_zoo."""

    run: Run = Run("runs/loss_zoo", 2000, 64, keep=1, **EVERY)
    zoo: tuple[str, ...] = tuple(ZOO)
    networks: int = 10
    seeds: int = 3  # of the 25 Gaussians
    toy_steps: int = 6000
    width: int = 128  # of the two layers of both nets, for the Gaussians
    samples: int = 1000

    def __post_init__(self):
        _cli.at_least(self, networks=1, seeds=1, toy_steps=1, width=1, samples=100)
        if not 5 * self.run.eval_every <= self.run.steps or not self.run.eval_every:
            rule = f"run.eval_every must lie in 1..{self.run.steps // 5} (run.steps / 5)"
            raise ValueError(f"{rule}, got {self.run.eval_every}")
        if not self.zoo or not set(self.zoo) <= set(ZOO):
            raise ValueError(f"zoo must hold some of {list(ZOO)}; got {list(self.zoo)}")


SMOKE = {"run.folder": "runs/loss_zoo-smoke", "run.steps": 50, "toy_steps": 50, "networks": 1}
SMOKE |= {"seeds": 1, "run.eval_every": 10, "run.steps_per_call": 10, "width": 16}
SMOKE |= {"zoo": ("non-saturating", "WGAN-GP")}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "two recipes, one network, 50 updates"),
    "cpu": Scale(
        Setup(),
        "10 networks for 200, MLPs of 2 to 6 layers for convolutional nets, G and D of one form "
        "where the paper draws each, no BatchNorm in D, digits 8x8 for ImageNet, our classifier "
        "for Inception, 2,000 updates of G",
    ),
}
COUNT = "digits, {}: networks of {} that succeed"
ENDED = "digits, {}: networks of {} whose training ended in NaN"
SCORE = "digits, {}: classifier score, median (oracle: held-out digits)"
DISTANCE = "digits, {}: fid_digits, median (oracle: blends of two digits)"
TOYS = "25 Gaussians, {}: seeds of {} that succeed"
TELLS = "{}: rank correlation of minus the critic's loss and fid_digits, mean over networks"
JOINT = "digits: networks of {} that succeed by {}"
WAYS = {
    "the non-saturating loss alone": (True, False),
    "WGAN-GP alone": (False, True),
    "both": (True, True),
    "neither": (False, False),
}
MORE = "digits: networks that succeed by WGAN-GP alone minus by the non-saturating loss alone"
CRITERIA = {MORE: ">= 2", TELLS.format("WGAN-GP"): "> 0.7"}
CRITERIA |= {TELLS.format("non-saturating"): "< 0.3"}
INVARIANTS = {SCORE.format("non-saturating"): "within 1 .. 10"}


def networks(n: int) -> list[dict]:
    """Returns n random forms of an MLP: layers, width, activation, and the norm of G."""
    rng = np.random.default_rng(0)
    return [
        {
            "widths": (int(rng.choice([32, 64, 128, 256])),) * int(rng.choice([2, 4, 6])),
            "activation": str(rng.choice(["relu", "leaky_relu", "tanh"])),
            "norm": str(rng.choice(["none", "batch"])),
        }
        for _ in range(n)
    ]


def config(base: gan.Config, recipe: str, net: dict) -> gan.Config:
    """Returns the model of a recipe with nets of a form. D has the recipe's norm."""
    fields, norm = ZOO[recipe]
    gen, disc = gan.NetConfig(**net), gan.NetConfig(**{**net, "norm": norm})
    return replace(base, gen=gen, disc=disc, **fields)


def trained(setup: Setup, cfg: gan.Config, sets: tuple, place: Path, scores: Callable, **change):
    """Trains a model. Returns ({score: values of all measurements}, result), None if it ends in NaN.

    sets: data of training, and as a batch those on which the critic's loss is measured.
    scores: maps samples to a dict.
    """
    training, held = sets
    sample = jax.jit(partial(gan.sample, cfg, n=setup.samples))

    def on_eval(family, state, step):
        logits = jax.jit(family.evaluate)(state, held, jax.random.key(step))
        loss = gan.discriminator_loss(cfg.loss, logits["real_logit"], logits["fake_logit"])
        found = scores(np.asarray(sample(state, jax.random.key(step))))
        return {**found, "critic_loss": loss.mean()}

    size = setup.run.batch_size * cfg.n_critic
    run = replace(setup.run, folder=str(place), batch_size=size, **change)
    try:
        result = train.fit(gan.make, cfg, run, training, on_eval=on_eval)
    except train.NonFinite:
        return None
    names = [line["valid"] for line in train.metrics(place) if "valid" in line][-1]
    return {name: _cli.history(place, name)[1] for name in names}, result


def digit_scores(classify: Callable, real: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Returns the classifier score of images, and their Frechet distance to real features."""
    logits, features = classify(images)
    score = metrics.classifier_score(scipy.special.softmax(logits, -1))
    return {"score": score, "fid": metrics.frechet_distance(features, real)}


def succeeds(found: dict[str, float], digits: dict[str, float], blends: dict[str, float]) -> bool:
    """Returns whether samples have 60 % of the digits' score, and are nearer than blends are."""
    return bool(found["score"] >= 0.6 * digits["score"] and found["fid"] < blends["fid"])


def toy_scores(x: np.ndarray) -> dict[str, float]:
    """Returns how many of the 25 modes the points have, and the share of HQ ones."""
    count = metrics.mode_count(x, points.grid_modes(step=STEP), STD)
    return {"modes": count.modes, "quality": count.high_quality}


def correlation(runs: list[dict]) -> float | None:
    """Returns the mean over runs of Spearman's rank correlation of -critic_loss and fid.

    Runs in which one of the two never changes have none, and are left out.
    """
    moving = [r for r in runs if np.ptp(r["critic_loss"]) and np.ptp(r["fid"])]
    found = [spearmanr(-each["critic_loss"], each["fid"]).statistic for each in moving]
    return float(np.mean(found)) if found else None


def on_digits(setup: Setup, recipe: str, sets: tuple, scores: Callable, folder: Path) -> list:
    """Trains a recipe with every network; returns what `trained` does for each."""
    name = recipe.replace(", ", "-").replace(" ", "_")
    return [
        trained(setup, config(DIGITS, recipe, net), sets, folder / "digits" / f"{name}-{i}", scores)
        for i, net in enumerate(networks(setup.networks))
    ]


def on_gaussians(setup: Setup, recipe: str, folder: Path) -> list[tuple[float, float]]:
    """Trains a recipe on 25 Gaussians with each seed; returns (modes, share of HQ samples)."""
    name = recipe.replace(", ", "-").replace(" ", "_")
    toys = data.load("grid", "train", step=STEP, std=STD)
    held = jax.tree.map(jax.numpy.asarray, toys.batch(1, 0, setup.samples))
    cfg = config(TOY, recipe, {"widths": (setup.width,) * 2})
    place = replace(setup.run, folder=str(folder / "grid" / name))
    ends = []
    for run in _cli.seeded(place, setup.seeds):
        change = {"steps": setup.toy_steps, "eval_every": setup.toy_steps, "seed": run.seed}
        found = trained(setup, cfg, (toys, held), Path(run.folder), toy_scores, **change)
        ends.append((found[0]["modes"][-1], found[0]["quality"][-1]) if found else (0, 0.0))
    return ends


def ends_of(found: list) -> list[dict[str, float] | None]:
    """Returns the last measurement of each training, None for one that ended in NaN."""
    return [each and {name: float(v[-1]) for name, v in each[0].items()} for each in found]


def rows_of(setup: Setup, recipe: str, found: list, count: int, digits: dict, blends: dict):
    """Returns the rows of a recipe on digits, `count` of whose networks succeed."""
    runs, ends = [each[0] for each in found if each], [end for end in ends_of(found) if end]
    reason = None if ends else "every training ended in NaN"
    score, fid = (
        float(np.median([each[name] for each in ends])) if ends else None
        for name in ("score", "fid")
    )
    n = setup.networks
    tells = correlation(runs)
    return [
        Row(COUNT.format(recipe, n), count),
        Row(ENDED.format(recipe, n), n - len(ends)),
        Row(SCORE.format(recipe), score, oracle=digits["score"], reason=reason),
        Row(DISTANCE.format(recipe), fid, oracle=blends["fid"], reason=reason),
        Row(TELLS.format(recipe), tells, reason=None if tells is not None else "no run changes"),
    ]


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains every recipe with every network, and counts."""
    rows, classify = _cli.kept(), metrics.load_classifier("digits").apply
    training, held, test = (
        data.load("digits", part) for part in ("train[:1237]", "train[1237:]", "test")
    )
    seen, real = (_cli.arrays(each)["image"] / 16.0 for each in (training, test))
    scores = partial(digit_scores, classify, classify(seen)[1])
    digits = scores(real)
    blends = scores((seen + seen[np.random.default_rng(0).permutation(len(seen))]) / 2)
    watched = jax.tree.map(jax.numpy.asarray, held.batch(0, 0, held.info.examples))
    found, good, modes = {}, {}, {}
    for recipe in setup.zoo:
        found[recipe] = on_digits(setup, recipe, (training, watched), scores, folder)
        ends = ends_of(found[recipe])
        good[recipe] = [bool(end) and succeeds(end, digits, blends) for end in ends]
        rows += rows_of(setup, recipe, found[recipe], sum(good[recipe]), digits, blends)
        modes[recipe] = on_gaussians(setup, recipe, folder)
        whole = sum(bool(m >= 23 and q >= 0.5) for m, q in modes[recipe])
        rows.append(Row(TOYS.format(recipe, setup.seeds), whole))
    if {"non-saturating", "WGAN-GP"} <= set(good):
        pairs = list(zip(good["non-saturating"], good["WGAN-GP"], strict=True))
        ways = {words: pairs.count(how) for words, how in WAYS.items()}
        rows += [Row(JOINT.format(setup.networks, words), n) for words, n in ways.items()]
        rows.append(Row(MORE, ways["WGAN-GP alone"] - ways["the non-saturating loss alone"]))
    plot(setup, folder, {recipe: sum(each) for recipe, each in good.items()}, found, modes)
    return rows


@_cli.costs("loss_zoo.png")
def plot(setup: Setup, folder: Path, counts, found, modes) -> None:
    """Draws counts, modes on the Gaussians, critic's loss against distance, and samples."""
    fig, axes = figures.figure(2, 3, size=(13, 8))
    names = list(counts)
    place = np.arange(len(names))[::-1]
    axes[0, 0].barh(place, [counts[name] for name in names], color=figures.COLOURS[0])
    axes[0, 0].set(yticks=place, yticklabels=names, xlim=(0, setup.networks))
    axes[0, 0].set(title="digits", xlabel=f"networks of {setup.networks} that succeed")
    reached = [np.mean([m for m, _ in modes[name]]) for name in names]
    axes[0, 1].barh(place, reached, color=figures.COLOURS[1])
    axes[0, 1].set(yticks=place, yticklabels=[], xlim=(0, 25))
    axes[0, 1].set(title="25 Gaussians", xlabel="modes, mean over seeds")
    shown = [name for name in ("WGAN-GP", "non-saturating") if name in names]
    for ax, name in zip((axes[0, 2], axes[1, 0]), shown, strict=False):
        for each in filter(None, found[name]):
            ax.plot(-each[0]["critic_loss"], each[0]["fid"], ".-", linewidth=0.5, markersize=3)
        ax.set(title=name, xlabel="minus the critic's loss", ylabel="fid_digits", yscale="log")
    for ax, name in zip(axes[1, 1:], shown, strict=False):
        if result := next((each[1] for each in found[name] if each), None):
            images = train.sample(result, jax.random.key(0), n=25)
            figures.images(ax, images, 5, title=f"{name}: samples of a network")
    caption = f"{setup.run.steps:,} updates of G on digits, {setup.toy_steps:,} on the Gaussians."
    figures.save(fig, folder / "loss_zoo.png", caption)


if __name__ == "__main__":
    _cli.main("loss_zoo")
