"""Which loss survives which network: losses x penalties x norms over random networks, Gulrajani et al. 2017 (WGAN-GP), table 2

    python -m experiments.loss_zoo    scale cpu was not run to its end yet; downloads nothing

The paper draws 200 networks at random and trains each by the first GAN's loss and by WGAN-GP on
32x32 ImageNet. It counts how many reach an Inception score: of 5, no network by the GAN alone, 147
by WGAN-GP alone, 42 by both. Here it is 10 random MLPs on digits of 8x8, for ten
recipes. A recipe succeeds if the score of our classifier is at least 60 % of that of real digits.
On 25 Gaussians each recipe trains one network with three seeds. There it succeeds if it has 23
modes and half of its samples are of high quality (HQ).

WGAN-GP's fig. 5 says that the critic's loss tells the quality of samples, which that of a GAN does
not. The rank correlation between minus the critic's loss and the Frechet distance of the samples
shows it, over the measurements of a run.
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
# Name: the loss with its optimizers and penalty, and the norm of D. Rates are those of the papers.
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
EVERY = {"eval_every": 250, "save_every": 1000, "log_every": 250, "steps_per_call": 50}


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
        if not self.zoo or not set(self.zoo) <= set(ZOO):
            raise ValueError(f"zoo must hold some of {', '.join(ZOO)}; got {self.zoo}")


SMOKE = {"run.folder": "runs/loss_zoo-smoke", "run.steps": 50, "toy_steps": 50, "networks": 1}
SMOKE |= {"seeds": 1, "run.eval_every": 10, "run.steps_per_call": 10, "width": 16}
SMOKE |= {"zoo": ("non-saturating", "WGAN-GP")}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "two recipes, one network, 50 updates"),
    "cpu": Scale(
        Setup(),
        "10 networks for 200, MLPs of 2 to 6 layers for convolutional nets, digits 8x8 for "
        "ImageNet, our classifier for Inception, 2,000 updates of G",
    ),
}
COUNT = "digits, {}: networks of {} that succeed"
SCORE = "digits, {}: classifier score, median (oracle: held-out digits)"
TOYS = "25 Gaussians, {}: seeds of {} that succeed"
TELLS = "{}: rank correlation of minus the critic's loss and fid_digits, mean over networks"
AHEAD = "digits: networks that succeed by WGAN-GP minus by the best without a penalty or norm"
FREE = ("non-saturating", "least squares", "relativistic")  # recipes without penalty and norm
CRITERIA = {AHEAD: ">= 2", TELLS.format("WGAN-GP"): "> 0.7"}
CRITERIA |= {TELLS.format("non-saturating"): "< 0.3"}
INVARIANTS = {COUNT.format("WGAN-GP", 1): ">= 0"}


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


def fit(setup: Setup, cfg: gan.Config, training: data.Data, place: Path, scores: Callable, **run):
    """Trains a model. Returns {score: values of all measurements}, the first one first.

    scores: maps samples to a dict. The critic's loss is added, on as many real examples.
    """
    real = jax.tree.map(jax.numpy.asarray, training.batch(1, 0, setup.samples))

    sample = jax.jit(partial(gan.sample, cfg, n=setup.samples))

    def on_eval(family, state, step):
        logits = jax.jit(family.evaluate)(state, real, jax.random.key(step))
        loss = gan.discriminator_loss(cfg.loss, logits["real_logit"], logits["fake_logit"])
        found = scores(np.asarray(sample(state, jax.random.key(step))))
        return {**found, "critic_loss": loss.mean()}

    size = setup.run.batch_size * cfg.n_critic
    run = replace(setup.run, folder=str(place), batch_size=size, **run)
    result = train.fit(gan.make, cfg, run, training, on_eval=on_eval)
    names = train.metrics(place)[-1]["valid"]
    return {name: _cli.history(place, name)[1] for name in names}, result


def digit_scores(classify: Callable, real: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Returns the classifier score of images, and their Frechet distance to real features."""
    logits, features = classify(images)
    score = metrics.classifier_score(scipy.special.softmax(logits, -1))
    return {"score": score, "fid": metrics.frechet_distance(features, real)}


def toy_scores(x: np.ndarray) -> dict[str, float]:
    """Returns how many of the 25 modes the points have, and the share of HQ ones."""
    count = metrics.mode_count(x, points.grid_modes(step=STEP), STD)
    return {"modes": count.modes, "quality": count.high_quality}


def correlation(runs: list[dict]) -> float:
    """Returns the mean over runs of Spearman's rank correlation of -critic_loss and fid."""
    found = [spearmanr(-each["critic_loss"], each["fid"]).statistic for each in runs]
    return float(np.mean(found))


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains every recipe with every network, and counts."""
    rows, classify = _cli.kept(), metrics.load_classifier("digits").apply
    training, test = (data.load("digits", part) for part in ("train[:1237]", "test"))
    seen, held = (_cli.arrays(each)["image"] / 16.0 for each in (training, test))
    scores = partial(digit_scores, classify, classify(seen)[1])
    real = scores(held)["score"]
    toys = data.load("grid", "train", step=STEP, std=STD)
    counts, runs, pictures, modes = {}, {}, {}, {}
    for recipe in setup.zoo:
        name = recipe.replace(", ", "-").replace(" ", "_")
        runs[recipe], modes[recipe] = [], []
        for i, net in enumerate(networks(setup.networks)):
            cfg = config(DIGITS, recipe, net)
            found, result = fit(setup, cfg, training, folder / "digits" / f"{name}-{i}", scores)
            runs[recipe].append(found)
            if i == 0:
                pictures[recipe] = train.sample(result, jax.random.key(0), n=25)
        ends = np.array([each["score"][-1] for each in runs[recipe]])
        counts[recipe] = int((ends >= 0.6 * real).sum())
        rows.append(Row(COUNT.format(recipe, setup.networks), counts[recipe]))
        rows.append(Row(SCORE.format(recipe), float(np.median(ends)), oracle=real))
        rows.append(Row(TELLS.format(recipe), correlation(runs[recipe])))
        cfg = config(TOY, recipe, {"widths": (setup.width,) * 2})
        for seed in range(setup.seeds):
            place, seeded = folder / "grid" / f"{name}-{seed}", {"steps": setup.toy_steps}
            found, _ = fit(setup, cfg, toys, place, toy_scores, seed=seed, **seeded)
            modes[recipe].append((found["modes"][-1], found["quality"][-1]))
        good = sum(bool(m >= 23 and q >= 0.5) for m, q in modes[recipe])
        rows.append(Row(TOYS.format(recipe, setup.seeds), good))
    free = [counts[recipe] for recipe in FREE if recipe in counts]
    if "WGAN-GP" in counts and free:
        rows.append(Row(AHEAD, counts["WGAN-GP"] - max(free)))
    plot(setup, folder, counts, runs, modes, pictures)
    return rows


@_cli.costs("loss_zoo.png")
def plot(setup: Setup, folder: Path, counts, runs, modes, pictures) -> None:
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
    for i, name in enumerate(name for name in ("WGAN-GP", "non-saturating") if name in runs):
        ax = (axes[0, 2], axes[1, 0])[i]
        for each in runs[name]:
            ax.plot(-each["critic_loss"], each["fid"], ".-", linewidth=0.5, markersize=3)
        ax.set(title=name, xlabel="minus the critic's loss", ylabel="fid_digits", yscale="log")
    for ax, name in zip(axes[1, 1:], ("WGAN-GP", "non-saturating"), strict=True):
        if name in pictures:
            figures.images(ax, pictures[name], 5, title=f"{name}: samples of the first network")
    caption = f"{setup.run.steps:,} updates of G on digits, {setup.toy_steps:,} on the Gaussians."
    figures.save(fig, folder / "loss_zoo.png", caption)


if __name__ == "__main__":
    _cli.main("loss_zoo")
