"""Importance weighted autoencoders, for iwae_table and iwae_longer: arms, their training, and what is compared."""

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from aigc_jax import data, figures, train, vae
from aigc_jax.core import Optim
from aigc_jax.train import Run
from aigc_jax.train.folder import write_json
from aigc_jax.train.progress import counted
from experiments import _cli, _pictures
from experiments._cli import DataError, Row, Source

ONE = vae.Config(latent_dim=50, hidden=(200, 200), activation="tanh", binarisation="dynamic")
TWO = replace(ONE, latent_dim=100, upper_dim=50, upper_hidden=(100, 100))


@dataclass(frozen=True)
class Setup:
    """Flags of iwae_table."""

    folder: str = "runs/iwae_table"
    data: Source = Source("mnist")
    epochs: int = 25  # of every arm of table 1
    longer: tuple[int, ...] = (400, 200)  # epochs for k = 1, 5 in the largest k's time (2 cores)
    further: int = 10  # epochs with the other objective (table 2); 0: no table 2
    stages: int = 0  # the paper's: stage i has 3^i times `epochs` at lr 10^(-i/7); 0: one cosine
    ks: tuple[int, ...] = (1, 5, 50)  # of the IWAE; k = 1 is the VAE
    vae_ks: tuple[int, ...] = (1, 5)  # of the VAE, which more draws hardly improve
    two_layers: tuple[int, ...] = (5,)  # the k with two stochastic layers
    batch_size: int = 100
    lr: float = 3e-3  # its peak, after 600 updates of warm-up
    kl_warmup: int = 6000  # updates in which the KL's weight rises; not in table 2
    seeds: int = 3  # of VAE k = 1 and IWAE k <= 5 at `epochs`; all else has one
    seed: int = 0  # the first
    test: int = 1000  # how many test images, from the first
    draws: int = 5000  # k of the reported bound

    def __post_init__(self):
        if len(self.ks) < 2 or self.ks[0] != 1 or list(self.ks) != sorted(set(self.ks)):
            raise ValueError(f"ks must rise from 1 and hold two numbers or more, got {self.ks}")
        if min((1, *self.vae_ks, *self.two_layers)) < 1:
            raise ValueError(
                f"vae_ks and two_layers must hold numbers from 1 on, got {self.vae_ks}, "
                f"{self.two_layers}"
            )
        if len(self.longer) >= len(self.ks) or any(more <= self.epochs for more in self.longer):
            raise ValueError(
                f"longer is for all ks but the largest, above {self.epochs} epochs each, got "
                f"{self.longer}"
            )
        _cli.at_least(
            self, epochs=1, further=0, stages=0, kl_warmup=0, batch_size=1, seeds=1, test=2, draws=1
        )


PAPER = {  # (layers, objective, k): (NLL, active units)
    (1, "VAE", 1): (86.76, "19"),
    (1, "VAE", 5): (86.47, "20"),
    (1, "VAE", 50): (86.35, "20"),
    (1, "IWAE", 5): (85.54, "22"),
    (1, "IWAE", 50): (84.78, "25"),
    (2, "VAE", 1): (85.33, "16+5"),
    (2, "VAE", 5): (85.01, "17+5"),
    (2, "VAE", 50): (84.78, "17+5"),
    (2, "IWAE", 5): (83.89, "21+5"),
    (2, "IWAE", 50): (82.90, "26+7"),
}
TABLE_2 = {("VAE", "IWAE"): (84.88, "22"), ("IWAE", "VAE"): (86.02, "23")}


class Arm(NamedTuple):
    """One model to train; VAE and IWAE are the same at k = 1."""

    layers: int
    objective: str  # VAE | IWAE
    k: int
    epochs: int
    after: str = ""  # table 2: the objective that trained the model before

    @property
    def name(self) -> str:
        before = f"{self.after}-" if self.after else ""
        return f"{self.layers}-{before}{self.objective}-k{self.k}-{self.epochs}epochs"

    def words(self, stages: int) -> str:
        epochs = self.epochs * (3**stages - 1) // 2 if stages and not self.after else self.epochs
        before, plus = (f"{self.after} -> ", "+") if self.after else ("", "")
        layers = f"{self.layers} layer{'s'[self.layers == 1 :]}"
        return f"{layers}, {before}{self.objective} k={self.k}, {plus}{epochs} epochs"


def arms(setup: Setup) -> dict[Arm, int]:
    """Returns {arm: seeds} in the order of training.

    Table 1 at equal epochs, then at equal time; two layers; table 2.
    """
    e, ks = setup.epochs, setup.ks
    found = {Arm(1, "VAE", k, e): setup.seeds if k == 1 else 1 for k in sorted({1, *setup.vae_ks})}
    found |= {Arm(1, "IWAE", k, e): setup.seeds if k <= 5 else 1 for k in ks if k > 1}
    found |= {
        Arm(1, "IWAE" if k > 1 else "VAE", k, more): 1
        for k, more in zip(ks, setup.longer, strict=False)
    }
    found |= {
        Arm(2, objective, k, e): 1
        for k in setup.two_layers
        for objective in ("VAE", "IWAE")[: 1 + (k > 1)]
    }
    if setup.further:
        pairs = (("VAE", "VAE"), ("VAE", "IWAE"), ("IWAE", "IWAE"), ("IWAE", "VAE"))
        found |= {
            Arm(1, to, 1 if to == "VAE" else max(ks), setup.further, after): 1
            for after, to in pairs
        }
    return found


def config(setup: Setup, arm: Arm, info: data.Info, lr: float, steps: int) -> vae.Config:
    """Returns the model of an arm. VAE: the ELBO, averaged over k draws."""
    rises = 0 if arm.after or setup.stages else min(600, steps // 10)
    optim = Optim(
        "adam",
        lr=lr,
        eps=1e-4,
        warmup=rises,
        decay=0 if setup.stages else steps - rises,
        floor=0.02,
    )
    return replace(
        ONE if arm.layers == 1 else TWO,
        shape=info.shape,
        levels=info.levels,
        objective="elbo" if arm.objective == "VAE" else "iwae",
        k=arm.k,
        kl_warmup=0 if arm.after or setup.stages else min(setup.kl_warmup, 2 * steps // 5),
        optim=optim,
    )


def place(setup: Setup, folder: Path, arm: Arm, seed: int, stage: int = -1) -> Path:
    """Returns the run folder of an arm's stage; -1 is the last."""
    at = folder / arm.name / f"seed{seed}"
    return at / f"stage{stage % setup.stages}" if setup.stages and not arm.after else at


def fit(
    setup: Setup, folder: Path, arm: Arm, seed: int, training: data.Data
) -> tuple[train.Result, float | None]:
    """Trains an arm and returns its minutes, or None where an earlier start did part of the work."""
    stages, init = [(arm.epochs, setup.lr)], ""
    if arm.after:
        before = Arm(1, arm.after, 1 if arm.after == "VAE" else max(setup.ks), setup.epochs)
        stages, init = [(arm.epochs, 0.1 * setup.lr)], str(place(setup, folder, before, seed))
    elif setup.stages:
        stages = [(arm.epochs * 3**i, setup.lr * 10 ** (-i / 7)) for i in range(setup.stages)]
    clock, begin = folder / arm.name / f"seed{seed}-minutes.json", time.monotonic()
    fresh = not place(setup, folder, arm, seed, 0).exists()
    for i, (epochs, lr) in enumerate(stages):
        steps = -(-epochs * training.info.examples // setup.batch_size)
        run = Run(
            folder=str(place(setup, folder, arm, seed, i)),
            steps=steps,
            seed=seed,
            batch_size=setup.batch_size,
            steps_per_call=min(100, steps),
            save_every=-(-steps // 4),
            keep=1,
            log_every=max(1, steps // 200),
            init=init,
        )
        result = train.fit(vae.make, config(setup, arm, training.info, lr, steps), run, training)
        init = run.folder
    if fresh:
        write_json(clock, (time.monotonic() - begin) / 60)
    return result, json.loads(clock.read_text()) if clock.exists() else None


def nll(result: train.Result, x: np.ndarray, *, draws: int, params=None) -> np.ndarray:
    """Returns -L_k of each image in nats, [N], with the same noise for every model."""
    bound = jax.jit(partial(vae.iwae_bound, result.config, k=draws, chunk=min(50, draws)))
    params, key, pieces = result.state.params if params is None else params, jax.random.key(0), []
    for i in counted("NLL", range(0, len(x), 100)):
        pieces.append(-np.asarray(bound(params, x[i : i + 100], jax.random.fold_in(key, i))))
    return np.concatenate(pieces)


def active(result: train.Result, x: np.ndarray) -> list[np.ndarray]:
    """Returns which units of each layer are active, [Z] booleans."""
    measured = jax.jit(partial(vae.activity, result.config))(
        result.state.params, x, jax.random.key(1)
    )
    return [np.asarray(a > 1e-2) for a in measured]


def pruned(params, kept: np.ndarray):
    """Returns the parameters with N(0, I) as posterior of the units of z_1 that are not kept."""
    [*_, name] = sorted(params["encoder"]["params"]["Gaussian_0"])
    head = jax.tree.map(
        lambda x: np.asarray(x) * np.concatenate([kept, kept]),
        params["encoder"]["params"]["Gaussian_0"][name],
    )
    gaussian = {**params["encoder"]["params"]["Gaussian_0"], name: head}
    return {
        **params,
        "encoder": {"params": {**params["encoder"]["params"], "Gaussian_0": gaussian}},
    }


EQUAL_1 = "equal epochs: NLL of k=1 less that of k=5 (nats; +- s.e. over images)"
EQUAL_2 = "equal epochs: NLL of k=1 less that of the largest k (nats; +- s.e. over images)"
TURNED = "equal time: NLL of the largest k less that of k=1 (nats; +- s.e. over images)"
TWO_LAYERS = "two layers, k=5: NLL of the VAE less that of the IWAE (nats; +- s.e. over images)"
BETTER = "table 2: VAE -> VAE less VAE -> IWAE (nats; +- s.e. over images)"
WORSE = "table 2: IWAE -> VAE less IWAE -> IWAE (nats; +- s.e. over images)"
RISES = "active units: largest k less k=1 (one layer, equal epochs)"
MONOTONE = (
    "one layer, largest k: smallest rise of L_1, L_5, L_50, L_5000 on the same weights (nats)"
)
PRUNED = "one layer, largest k: |change of the NLL| without the inactive units (nats)"


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains every arm, measures L_k and active units."""
    training, test = _pictures.parts(setup.data, "train", f"test[:{setup.test}]")
    if training.info.kind != "image":
        raise DataError(f"iwae_table takes images, {setup.data.name} holds {training.info.kind}")
    batch = test.batch(0, 0, min(setup.test, test.info.examples))
    x = np.asarray(vae.preprocess(replace(ONE, levels=test.info.levels), batch, jax.random.key(9)))
    nlls, units, minutes, found = {}, {}, {}, _cli.kept()
    for arm, seeds in arms(setup).items():
        runs = []
        for seed in range(setup.seed, setup.seed + seeds):
            result, taken = fit(setup, folder, arm, seed, training)
            runs.append((nll(result, x, draws=setup.draws), active(result, x), taken))
        nlls[arm], units[arm] = (
            np.mean([r[0] for r in runs], 0),
            np.mean([[a.sum() for a in r[1]] for r in runs], 0),
        )
        minutes[arm] = (
            None if None in [r[2] for r in runs] else float(np.mean([r[2] for r in runs]))
        )
        known = TABLE_2.get((arm.after, arm.objective)) if arm.after else PAPER.get(arm[:3])
        paper = known if known and setup.data.name == "mnist" else (None, None)
        words = arm.words(setup.stages)
        mean, error = _cli.mean_and_error([float(r[0].mean()) for r in runs])
        found += [
            Row(f"{words}: NLL (nats)", mean, paper[0], error),
            Row(f"{words}: active units", "+".join(f"{u:.3g}" for u in units[arm]), paper[1]),
        ]
        if minutes[arm] is not None:
            found.append(Row(f"{words}: minutes of training", minutes[arm]))
    with _cli.costs(EQUAL_2, RISES, MONOTONE, PRUNED):
        found += comparisons(setup, folder, training, x, nlls, units)
    plot(setup, folder, nlls, minutes)
    return found


def comparisons(setup: Setup, folder: Path, training, x, nlls: dict, units: dict) -> list[Row]:
    """Returns the rows that compare two arms, on the same images with the same noise."""

    def arm(k: int, epochs: int = setup.epochs) -> Arm:
        return Arm(1, "IWAE" if k > 1 else "VAE", k, epochs)

    def gap(name: str, a: Arm, b: Arm) -> Row:
        difference = nlls[a] - nlls[b]
        return Row(
            name, float(difference.mean()), error=float(difference.std() / len(difference) ** 0.5)
        )

    low, high = min(setup.ks), max(setup.ks)
    made = [gap(EQUAL_1, arm(low), arm(5))] if 5 in setup.ks else []
    made.append(gap(EQUAL_2, arm(low), arm(high)))
    if setup.longer:
        made.append(gap(TURNED, arm(high), arm(low, setup.longer[0])))
    if 5 in setup.two_layers:
        made.append(
            gap(TWO_LAYERS, Arm(2, "VAE", 5, setup.epochs), Arm(2, "IWAE", 5, setup.epochs))
        )
    if setup.further:
        went = {(a.after, a.objective): a for a in nlls if a.after}
        made += [
            gap(BETTER, went["VAE", "VAE"], went["VAE", "IWAE"]),
            gap(WORSE, went["IWAE", "VAE"], went["IWAE", "IWAE"]),
        ]
    made.append(Row(RISES, float(units[arm(high)][0] - units[arm(low)][0])))

    best, _ = fit(setup, folder, arm(high), setup.seed, training)
    bounds = [-nll(best, x, draws=k).mean() for k in (1, 5, 50, setup.draws)]
    kept = active(best, x)[0]
    change = (
        nll(best, x, draws=setup.draws, params=pruned(best.state.params, kept)).mean() + bounds[-1]
    )
    return [*made, Row(MONOTONE, float(min(np.diff(bounds)))), Row(PRUNED, float(abs(change)))]


@_cli.costs("iwae_table.png")
def plot(setup: Setup, folder: Path, nlls: dict, minutes: dict) -> None:
    """Draws table 1 at equal epochs and at equal time, and samples of the arm with the lowest NLL."""
    fig, ((by_epochs, by_minutes, samples),) = figures.figure(1, 3, size=(3, 1.3))
    one_layer = [arm for arm in nlls if arm.layers == 1 and not arm.after]
    chosen = [arm for arm in one_layer if arm.objective == "IWAE" or arm.k == 1]
    epochs = {arm: arm.epochs for arm in chosen}
    for ax, taken, words in ((by_epochs, epochs, "epochs"), (by_minutes, minutes, "minutes")):
        curves = {}
        for k in setup.ks:
            same = [arm for arm in chosen if arm.k == k and taken[arm] is not None]
            values = ([taken[arm] for arm in same], [nlls[arm].mean() for arm in same])
            curves[f"k = {k}"] = tuple(map(np.array, values))
        names = {"ylabel": f"-L_{setup.draws} (nats per image)", "title": f"one layer, by {words}"}
        figures.curves(ax, curves, xlabel=f"{words} of training (log scale)", **names)
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")  # labels between the decades would overlap
        for i, k in enumerate(setup.ks if setup.data.name == "mnist" else ()):
            value = PAPER[1, "IWAE" if k > 1 else "VAE", k][0]
            figures.level(ax, value, f"paper, k = {k}: {value}", at=(0.02, 0.98)[i % 2])
    best = min(nlls, key=lambda arm: nlls[arm].mean())
    result = train.load(place(setup, folder, best, setup.seed))
    drawn = train.sample(result, jax.random.key(0), n=100)
    figures.images(samples, drawn, 10, title=f"means of p(x|z), z ~ p(z), of the best: {best.name}")
    caption = (
        f"{setup.data.name}, dynamic binarisation, batches of {setup.batch_size}, "
        f"at most {setup.test} test images. "
        "Every point is a training of its own, with its own decay."
    )
    figures.save(fig, folder / "iwae_table.png", caption)
