"""Mode collapse on 25 Gaussians in a grid and 8 on a ring: Lin et al. 2018 (PacGAN), table 1; Metz et al. 2017, fig. 2

    python -m experiments.mode_collapse    about 20 minutes on 2 cores; downloads nothing
    python -m experiments.mode_collapse --scale paper --unrolled-seeds 5    about 80 minutes: the recorded run

The nets of the unrolled GAN's demonstration on the sets of PacGAN: plain, packed by 2 and 4,
unrolled by 5 updates, and WGAN-GP. Scale paper has the demonstration's rates and its 25,000
updates. Expect the plain GAN to lose modes of the grid there (8.3 of 25 found, ten seeds), packing
to keep more (19.4 and 19.7) and unrolling as many (20.8, five seeds). But none is good. Packed GANs
have 2 % of high-quality samples, near the 1.8 % of points spread evenly; plain ones have 4 % and
unrolled ones 9 %.

Collapse depends on rates and on time. Scale cpu has D's rate 3e-4 for 1e-4, 16 latents for 256, and
10,000 updates. There plain, Pac2, Pac4 and unrolled find 12.2, 19.0, 18.4 and 24.0 modes (commit
e0c36fb, the same seeds). Two of the four criteria are not met: Pac4 less Pac2 is -0.6 +- 1.3, and
the reverse KL is 2.6 times lower. Continued to 25,000 updates, the same runs find 24.1, 19.3, 16.3
and 23.8, with 60, 2, 2 and 73 % of high quality: no criterion is met. With D's rate at 5e-4 a plain
GAN had all 25 modes after 10,000 updates (three seeds). At equal updates and points, D sees half
and a quarter as many packs. This may be why packed GANs train more slowly; we have not tested it.

**The unrolled rows are to be measured again.** In the recorded runs, after D's updates, G saw D's
loss of fake points only. In Metz et al. (eq. 3, and their demonstration) G maximises D's whole loss
there, with the term of real points. So the unrolled objective lacked a term, and the numbers above
for unrolling, at both scales, say nothing about their algorithm. `gan` has the whole loss now.
Plain and packed GANs are as they were.

A mode counts if one of 2,500 samples lies within 3 standard deviations of it. Such a sample is of
high quality (HQ). A correct model has 98.9 % of them; more means collapsed variance. Absolute
numbers do not compare across papers, whose nets differ.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.data import points
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale

NET = gan.NetConfig(widths=(128, 128), activation="tanh", init="orthogonal", init_scale=1.4)
NETS = {"shape": (2,), "latent_dim": 16, "gen": NET, "disc": NET}
D_OPTIM = Optim(lr=3e-4, b1=0.5, eps_root=1e-16)
MODEL = gan.Config(**NETS, optim=Optim(lr=1e-3, b1=0.5), disc_optim=D_OPTIM)
EVERY = {"save_every": 5000, "log_every": 100, "steps_per_call": 100}
SETS = {"grid": (points.grid_modes(), 0.05), "ring": (points.ring_modes(), 0.01)}
ARMS = {
    "plain": {},
    "Pac2": {"packing": 2},
    "Pac4": {"packing": 4},
    "unrolled": {"unrolled": 5},
    "WGAN-GP": {"loss": "wasserstein", "penalty": "gp", "n_critic": 5},
}
# PacGAN, table 1: modes, HQ (%), reverse KL; its nets.
PUBLISHED = {
    ("grid", "plain"): (17.3, 94.8, 0.70),
    ("grid", "Pac2"): (23.8, 91.3, 0.13),
    ("grid", "Pac4"): (24.8, 93.6, 0.04),
    ("ring", "plain"): (6.3, 98.2, 0.45),
    ("ring", "Pac2"): (7.9, 95.6, 0.07),
    ("ring", "Pac4"): (7.8, 95.9, 0.07),
}


@dataclass(frozen=True)
class Setup:
    """Flags of mode_collapse."""

    model: gan.Config = MODEL
    run: Run = Run("runs/mode_collapse", 10_000, 512, keep=1, **EVERY)
    seeds: int = 10  # of plain and packed on the grid
    unrolled_seeds: int = 5
    samples: int = 2500

    def __post_init__(self):
        if min(self.seeds, self.unrolled_seeds) < 1:
            raise ValueError("seeds and unrolled_seeds must be at least 1")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples} (--samples)")


SMOKE = {"run.folder": "runs/mode_collapse-smoke", "run.steps": 300}
PAPER = {"run.folder": "runs/mode_collapse-paper", "run.steps": 25_000}
RATES = {"model.latent_dim": 256, "model.disc_optim.lr": 1e-4}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), {**SMOKE, "seeds": 1, "unrolled_seeds": 1}), "300 updates"),
    "cpu": Scale(
        Setup(),
        "10,000 updates (the unrolled demonstration: 25,000) with its nets on PacGAN's sets, D's "
        "rate 3e-4 for 1e-4, 16 latents for 256; fresh points for 100,000 fixed ones; "
        "non-saturating loss; the ring has 8 modes (the demonstration's: 7)",
    ),
    "paper": Scale(
        _cli.change(Setup(), {**PAPER, **RATES, "unrolled_seeds": 10}),
        "the unrolled demonstration's nets and length on PacGAN's sets; non-saturating loss",
    ),
}


class Score(NamedTuple):
    """How good the samples of a run are."""

    modes: int
    quality: float  # percent
    kl: float  # nats
    least: float  # percent of high-quality samples in the emptiest mode


PACKED = "grid: modes of Pac2 less plain (+- s.e. over seeds)"
MORE = "grid: modes of Pac4 less Pac2 (+- s.e. over seeds)"
UNROLLED = "grid: modes of unrolled less plain, same seeds (+- s.e. over seeds)"
FALLS = "grid: reverse KL of plain over that of Pac4 (means over seeds)"
CRITERIA = {PACKED: "> 0", MORE: ">= -0.5", UNROLLED: ">= 3", FALLS: ">= 3"}
SOME = "grid: fewest modes of any run"
INVARIANTS = {SOME: "within 1 .. 25"}


def score(x: np.ndarray, modes: np.ndarray, std: float) -> Score:
    """Returns the score of samples [N, 2]."""
    count = metrics.mode_count(x, modes, std)
    least = 100 * count.histogram.min() / max(1, count.histogram.sum())
    # A run without any high-quality sample has no histogram: as bad as all in one mode.
    kl = metrics.reverse_kl(count.histogram) if count.histogram.any() else float(np.log(len(modes)))
    return Score(count.modes, 100 * count.high_quality, kl, least)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains every arm on the grid with several seeds and on the ring with one, scores samples."""
    scores, samples, found = {}, {}, _cli.kept()
    several = {"unrolled": setup.unrolled_seeds, "WGAN-GP": 1}
    for name, (modes, std) in SETS.items():
        training = data.load(name, "train")
        for arm, changes in ARMS.items():
            seeds = several.get(arm, setup.seeds) if name == "grid" else 1
            # With n_critic updates per step, each sees as many points as the one of the others.
            size = setup.run.batch_size * changes.get("n_critic", 1)
            base = replace(setup.run, folder=str(folder / f"{name}-{arm}"), batch_size=size)
            scores[name, arm] = []
            for run in _cli.seeded(base, seeds):
                result = train.fit(gan.make, replace(setup.model, **changes), run, training)
                key, n = jax.random.key(run.seed), setup.samples
                x = train.sample(result, key, n=n, chunk=n)
                scores[name, arm].append(score(x, modes, std))
                samples.setdefault((name, arm), x)
            found += table(name, arm, scores[name, arm], setup.samples)
    with _cli.costs(PACKED, MORE, UNROLLED, FALLS, SOME):
        found += comparisons({arm: np.array(scores["grid", arm]) for arm in ARMS})
    plot(setup, folder, samples, scores)
    return found


def comparisons(grid: dict[str, np.ndarray]) -> list[Row]:
    """Returns the rows that compare arms on the grid; of two arms, the runs of the same seeds."""

    def modes_less(a: str, b: str, what: str) -> Row:
        n = min(len(grid[a]), len(grid[b]))
        mean, error = _cli.mean_and_error((grid[a][:n, 0] - grid[b][:n, 0]).tolist())
        return Row(what, mean, error=error)

    return [
        modes_less("Pac2", "plain", PACKED),
        modes_less("Pac4", "Pac2", MORE),
        modes_less("unrolled", "plain", UNROLLED),
        Row(FALLS, float(grid["plain"][:, 2].mean() / grid["Pac4"][:, 2].mean())),
        Row(SOME, int(min(runs[:, 0].min() for runs in grid.values()))),
    ]


def table(name: str, arm: str, runs: list[Score], samples: int) -> list[Row]:
    """Returns four rows of means over seeds."""
    paper = PUBLISHED.get((name, arm), (None,) * 3)
    modes = len(SETS[name][0])
    who = f"{name}, {arm} ({len(runs)} seed{'s'[len(runs) == 1 :]})"
    found, hq, kl, least = (
        _cli.mean_and_error([float(v) for v in column]) for column in zip(*runs, strict=True)
    )
    share = 1 - np.exp(-4.5)
    beyond = 100 * (share + 3 * np.sqrt(share * (1 - share) / samples))
    collapsed = " (above what a correct model has: collapsed variance)" if hq[0] > beyond else ""
    return [
        Row(f"{who}: modes of {modes}", found[0], paper[0], found[1]),
        Row(f"{who}: HQ samples (%){collapsed}", hq[0], paper[1], hq[1], 100 * float(share)),
        Row(f"{who}: reverse KL (nats)", kl[0], paper[2], kl[1], (modes - 1) / (2 * samples)),
        Row(f"{who}: emptiest mode (% of HQ samples)", least[0], None, least[1]),
    ]


@_cli.costs("mode_collapse.png")
def plot(setup: Setup, folder: Path, samples: dict, scores: dict) -> None:
    """Draws samples of the first seed of every arm, over the modes."""
    fig, axes = figures.figure(len(SETS), len(ARMS))
    for line, (name, (modes, _)) in zip(axes, SETS.items(), strict=True):
        reach = 1.3 * np.abs(modes).max()
        for ax, arm in zip(line, ARMS, strict=True):
            ax.plot(*modes.T, "+", color="0.6", markersize=7, zorder=0)
            title = f"{name}, {arm}: {scores[name, arm][0].modes} of {len(modes)} modes"
            figures.points(ax, samples[name, arm], title=title)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    length = f"{setup.samples} samples of the first seed after {setup.run.steps} updates"
    figures.save(fig, folder / "mode_collapse.png", f"{length}. Crosses are the modes.")


if __name__ == "__main__":
    _cli.main("mode_collapse")
