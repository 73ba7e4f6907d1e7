"""Does packing keep the modes that a GAN loses? Lin et al. 2018 (PacGAN), table 1

    python -m experiments.mode_collapse                   9 minutes on a GPU, 3 hours on 2 cores (estimate); downloads nothing
    python -m experiments.mode_collapse --scale paper     the authors' protocol: an hour on a GPU, four days on 2 cores (estimates)

25 Gaussians in a grid and 8 on a ring, with the nets, rates and batches of the authors' code. A
batch has 100 packs: D of Pac4 judges four points together, so that it sees 400 points. The training
points are 100,000 fixed ones. The authors train for 400 epochs, which are 400,000 updates. In the
paper the plain GAN loses modes of the grid, Pac2 fewer, and Pac4 almost none. Our one seed reaches
21, 19 and 23 of 25 modes after 100,000 updates.

Rows without "full length" compare all arms after the same updates. The paper's numbers stand
beside them, and beside those of the full length.

A mode counts if one of 2,500 samples lies within 3 standard deviations of it. Such a sample is of
high quality (HQ). A correct model has 98.9 % of them. More means that the variance has collapsed.
The reverse KL compares the numbers of HQ samples per mode with equal ones.

All seeds of an arm train in one program (vmap). On an H100 ten seeds of the plain GAN take 2.7
times as long as one. On 2 cores they take ten times as long.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Family, Optim, State
from aigc_jax.data import points
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale

NORMAL = {"init": "normal", "init_scale": 0.02}
# Blocks' beta1 is the decay of the first moment since its PR 1176 (2017). Before, 0.8 meant 0.2.
ADAM = Optim(lr=1e-4, b1=0.8)
MODEL = gan.Config(
    shape=(2,),
    latent_dim=2,
    gen=gan.NetConfig(widths=(400,) * 4, norm="batch", **NORMAL),
    disc=gan.NetConfig(widths=(200,) * 3, activation="maxout", pieces=5, **NORMAL),
    optim=ADAM,
    disc_optim=ADAM,
    simultaneous=True,
)
EVERY = {"eval_every": 10_000, "save_every": 10_000, "log_every": 1000, "steps_per_call": 100}
SETS = {"grid": (points.grid_modes(), 0.05), "ring": (points.ring_modes(), 0.01)}
ARMS = {"plain": 1, "Pac2": 2, "Pac4": 4}  # points that D judges together
PUBLISHED = {  # modes, HQ (%), reverse KL: means over ten runs
    ("grid", "plain"): (17.3, 94.8, 0.70),
    ("grid", "Pac2"): (23.8, 91.3, 0.13),
    ("grid", "Pac4"): (24.8, 93.6, 0.04),
    ("ring", "plain"): (6.3, 98.2, 0.45),
    ("ring", "Pac2"): (7.9, 95.6, 0.07),
    ("ring", "Pac4"): (7.8, 95.9, 0.07),
}


AXES = State(None, 0, 0, 0, 0)  # the seeds of a State lie along the first axes, all but the step's


@dataclass(frozen=True)
class Seeds:
    """GANs that differ in their seeds only."""

    model: gan.Config
    seeds: int

    def check(self, info: data.Info) -> None:
        """Raises ValueError for data that the model cannot take."""
        self.model.check(info)


def make_seeds(cfg: Seeds, *, axis_name: str | None = None) -> Family:
    """Returns a Family that trains all seeds at once, each on its own part of a batch.

    Its state has a leading axis of seeds. Its metrics and scores are means over seeds, so one seed
    that diverges stops all.
    """
    family = gan.make(cfg.model, axis_name=axis_name)

    def init(key) -> State:
        state = jax.vmap(family.init)(jax.random.split(key, cfg.seeds))
        return state._replace(step=state.step[0])

    def step(state: State, batch: dict, key) -> tuple[State, dict]:
        parts = jax.tree.map(lambda x: x.reshape(cfg.seeds, -1, *x.shape[1:]), batch)
        update = jax.vmap(family.step, in_axes=(AXES, 0, 0), out_axes=(AXES, 0))
        state, values = update(state, parts, jax.random.split(key, cfg.seeds))
        return state, jax.tree.map(jnp.mean, values)

    def evaluate(state: State, batch: dict, key) -> dict:
        values = jax.vmap(family.evaluate, in_axes=(AXES, None, None))(state, batch, key)
        return jax.tree.map(lambda x: x.mean(0), values)

    return family._replace(init=init, step=step, evaluate=evaluate, sample=None)


@dataclass(frozen=True)
class Setup:
    """Flags of mode_collapse."""

    model: gan.Config = MODEL
    run: Run = Run("runs/mode_collapse", 100_000, 100, keep=1, **EVERY)  # steps: of the comparison
    last: tuple[int, int, int] = (400_000, 400_000, 100_000)  # updates of each arm on the grid
    ring: int = 25_000  # updates on the ring
    seeds: int = 1
    examples: int = 100_000  # fixed points
    samples: int = 2500

    def __post_init__(self):
        _cli.at_least(self, seeds=1, samples=2, examples=400, ring=1)
        if min(self.last) < self.run.steps:
            raise ValueError(f"last must be at least run.steps = {self.run.steps}, got {self.last}")
        if self.run.eval_every < 1 or self.run.steps % self.run.eval_every:
            got = f"{self.run.steps} and {self.run.eval_every}"
            raise ValueError(f"run.steps must be a multiple of run.eval_every, got {got}")


SMOKE = {"run.folder": "runs/mode_collapse-smoke", "run.steps": 200, "run.eval_every": 100}
SMOKE |= {"run.save_every": 100, "last": (300, 200, 200), "ring": 200, "samples": 200}
SMOKE |= {"model.gen.widths": (64, 64), "model.disc.widths": (64,)}
PAPER = {"run.folder": "runs/mode_collapse-paper", "run.steps": 400_000, "ring": 400_000}
PAPER |= {"last": (400_000,) * 3, "seeds": 10}
DIFFERENCE = (
    "points are packed anew in every epoch (the authors: 100,000 packs, drawn once), all seeds share "
    "the points, each of an epoch goes to one seed, D and G see different noise, the running "
    "averages of BatchNorm are of variances with momentum 0.9 (of standard deviations with 0.95), "
    "its epsilon is 1e-5 (1e-4)"
)
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "narrow nets, 200 updates"),
    "cpu": Scale(
        Setup(),
        "one seed, compared after 100,000 updates (25,000 on the ring) of 400,000; plain and Pac2 "
        f"go on to 400,000 on the grid; {DIFFERENCE}",
    ),
    "paper": Scale(_cli.change(Setup(), PAPER), DIFFERENCE),
}
MEASURES = {"modes": "modes of {}", "quality": "HQ samples (%)", "kl": "reverse KL (nats)"}
ROW = "{set}, {arm}{stage}: {measure}"
FULL = ", full length"  # stage of arms that train on after the comparison
WHAT = "grid, {} minus {}: {}"
CRITERIA = {
    "grid, plain: modes of 25": "within 15.3 .. 19.3",
    "grid, plain: HQ samples (%)": ">= 75",
    "grid, Pac4: modes of 25": ">= 24",
    "grid, Pac4: HQ samples (%)": ">= 70",
    WHAT.format("Pac2", "plain", "modes"): "> 0",
    WHAT.format("Pac4", "Pac2", "modes"): ">= 0",
    WHAT.format("Pac2", "plain", "reverse KL"): "< 0",
    WHAT.format("Pac4", "Pac2", "reverse KL"): "< 0",
}
INVARIANTS = {"grid, plain: modes of 25": ">= 1"}


def scores(x: np.ndarray, modes: np.ndarray, std: float) -> dict[str, float]:
    """Returns how many modes samples [N, 2] reach, the share of HQ samples (%), the reverse KL."""
    count = metrics.mode_count(x, modes, std)
    # Without any HQ sample the histogram is empty. This is as bad as all samples in one mode.
    kl = metrics.reverse_kl(count.histogram) if count.modes else float(np.log(len(modes)))
    return {"modes": count.modes, "quality": 100 * count.high_quality, "kl": kl}


def trained(setup: Setup, name: str, arm: str, folder: Path) -> train.Result:
    """Trains all seeds of an arm on a set. The scores are measured while they train."""
    (modes, std), seeds = SETS[name], setup.seeds
    training = data.load(name, "train", examples=setup.examples)
    cfg = replace(setup.model, packing=ARMS[arm])
    sample = partial(gan.sample, cfg, n=setup.samples)
    draw = jax.jit(jax.vmap(sample, in_axes=(AXES, 0)))

    def on_eval(family, state, step):
        samples = draw(state, jax.random.split(jax.random.key(step), seeds))
        found = [scores(x, modes, std) for x in np.asarray(samples)]
        return {f"{m}-{i}": each[m] for i, each in enumerate(found) for m in MEASURES}

    steps = setup.last[list(ARMS).index(arm)] if name == "grid" else setup.ring
    size = setup.run.batch_size * cfg.packing * seeds
    run = replace(setup.run, folder=str(folder / f"{name}-{arm}"), steps=steps, batch_size=size)
    return train.fit(make_seeds, Seeds(cfg, seeds), run, training, on_eval=on_eval)


def table(name: str, arm: str, result: train.Result, updates: int, stage: str) -> list[Row]:
    """Returns the rows of an arm after a number of updates: means over seeds."""
    modes = len(SETS[name][0])
    oracles = {"modes": modes, "quality": 100 * (1 - np.exp(-4.5)), "kl": None}
    rows = []
    for (measure, words), paper in zip(MEASURES.items(), PUBLISHED[name, arm], strict=True):
        what = ROW.format(set=name, arm=arm, stage=stage, measure=words.format(modes))
        mean, error = _cli.mean_and_error(values_at(result, measure, updates))
        rows.append(Row(what, mean, paper, error, oracles[measure]))
    return rows


def values_at(result: train.Result, measure: str, updates: int) -> list[float]:
    """Returns a score of each seed that was measured after a number of updates."""
    found = []
    for seed in range(result.config.seeds):
        steps, values = _cli.history(result.folder, f"{measure}-{seed}")
        found.append(float(values[np.flatnonzero(steps == updates)[-1]]))
    return found


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains every arm on both sets, and compares them."""
    rows, results = _cli.kept(), {}
    for name in SETS:
        for arm in ARMS:
            found = results[name, arm] = trained(setup, name, arm, folder)
            compared = setup.run.steps if name == "grid" else setup.ring
            rows += table(name, arm, found, compared, "")
            if (last := int(found.state.step)) > compared:
                rows += table(name, arm, found, last, FULL)
    for better, worse in (("Pac2", "plain"), ("Pac4", "Pac2")):
        for measure, words in (("modes", "modes"), ("kl", "reverse KL")):
            ends = [
                np.mean(values_at(results["grid", arm], measure, setup.run.steps))
                for arm in (better, worse)
            ]
            rows.append(Row(WHAT.format(better, worse, words), float(ends[0] - ends[1])))
    plot(setup, folder, results)
    return rows


@_cli.costs("mode_collapse.png")
def plot(setup: Setup, folder: Path, results: dict) -> None:
    """Draws the scores against updates, and samples of the first seed over the modes."""
    fig, axes = figures.figure(3, 3)
    for ax, (measure, words) in zip(axes[0], MEASURES.items(), strict=True):
        curves = {arm: _cli.history(results["grid", arm].folder, f"{measure}-0") for arm in ARMS}
        figures.curves(ax, curves, xlabel="updates", ylabel=words.format(25), title="grid")
    for line, (name, (modes, _)) in zip(axes[1:], SETS.items(), strict=True):
        reach = 1.3 * np.abs(modes).max()
        for ax, arm in zip(line, ARMS, strict=True):
            result = results[name, arm]
            first = jax.tree.map(lambda x: x[0], result.state._replace(step=np.zeros(1)))
            x = gan.sample(result.config.model, first, jax.random.key(0), n=setup.samples)
            ax.plot(*modes.T, "+", color="0.6", markersize=7, zorder=0)
            figures.points(ax, x, title=f"{name}, {arm}: {int(result.state.step):,} updates")
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    caption = f"{setup.samples:,} samples of the first seed. Crosses are the modes."
    figures.save(fig, folder / "mode_collapse.png", caption)


if __name__ == "__main__":
    _cli.main("mode_collapse")
