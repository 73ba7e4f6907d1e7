"""Noise schedules and learned variances: Nichol & Dhariwal 2021 (improved DDPM), figures 1, 3, 5, 6, table 2

    python -m experiments.schedules             about 35 minutes on 2 cores; downloads nothing

Exact curves need no training: what the linear and the cosine schedule leave of the picture, and how
soon beta and beta-tilde agree. Then 8x8 digits: linear and cosine by the simple loss, cosine with
learned variances by the hybrid loss, by the bound with uniform t, and by the bound with t drawn by
importance. Expect the bound to improve from simple to hybrid to vlb. The linear schedule has the
best bound here, while in the paper cosine is ahead. Training on the bound gives the worst pictures.
A tenth of the steps hurts the hybrid model less than the simple one. Importance sampling steadies
the loss of the bound.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import ddpm, figures, train
from aigc_jax.ddpm.process import beta_tilde
from aigc_jax.train import Run
from aigc_jax.train.progress import counted
from experiments import _cli, _ddpm_arms, _diffusion
from experiments._cli import Row, Scale, Source

LEARNED = {"variance": "learned"}
BOUND = {**LEARNED, "objective": "vlb"}
# name: (what changes; the paper's bits per dim and FID of CIFAR-10, 500,000 updates, T = 4000)
ARMS = {
    "linear, simple": ({"schedule": "linear"}, (3.37, 2.90, None)),
    "cosine, simple": ({}, (None, None, None)),
    "cosine, hybrid": ({**LEARNED, "objective": "hybrid"}, (3.17, 3.19, None)),
    "cosine, vlb": (BOUND, (None, None, None)),
    "cosine, vlb, importance": ({**BOUND, "times": "importance"}, (2.94, 11.47, None)),
}
QUANTITIES = (
    "bound, test (bits per dim)",
    "fid_digits to training, T steps (paper: FID)",
    "the same, T/10 steps",
)
MAKES = {"linear": ddpm.linear_schedule, "cosine": ddpm.cosine_schedule}


@dataclass(frozen=True)
class Setup:
    """Flags of schedules."""

    model: ddpm.Config = replace(_ddpm_arms.MODEL, schedule="cosine")
    run: Run = _ddpm_arms.run("runs/schedules")
    data: Source = Source("digits")
    seeds: int = 1
    samples: int = 1437
    images: int = 360
    draws: int = 200  # batches over which the variance of a loss is taken

    def __post_init__(self):
        _ddpm_arms.check(self, "schedules")
        if self.draws < 2 or self.model.T < 10:
            raise ValueError("draws must be at least 2 and model.T at least 10")


SMOKE_MODEL = replace(_ddpm_arms.SMOKE, schedule="cosine")
SMOKE_RUN = _ddpm_arms.smoke_run("runs/schedules-smoke")
SMOKE = Setup(SMOKE_MODEL, SMOKE_RUN, seeds=1, samples=100, images=36, draws=10)
DIFFERS = f"{_ddpm_arms.DIFFERS} (CIFAR-10, T = 4000, 500,000 of 128)"
SCALES = {"smoke": Scale(SMOKE, "40 updates of one dense layer"), "cpu": Scale(Setup(), DIFFERS)}


def agree(name: str, T: int) -> str:
    return f"{name}, T = {T}: first index with beta-tilde >= .99 beta"


def half(name: str) -> str:
    return f"{name}, T = 1000: alpha_bar[499]"


ORDER = "bits per dim: least of simple less hybrid, hybrid less vlb (importance), cosine"
STEADY = "variance of the bound's loss over batches, t uniform over t by importance, same net"
STRIDED = "fid_digits at T/10 steps over that at T: simple over hybrid (ratio of ratios)"
EXACT = {"linear": (167, 0.0786), "cosine": (185, 0.4938)}  # of the two functions above


def rounds_to(value: float):
    return f"= {value} to 4 decimals", lambda ours: round(ours, 4) == value


INVARIANTS = {agree(name, 1000): rounds_to(index) for name, (index, _) in EXACT.items()}
INVARIANTS |= {half(name): rounds_to(left) for name, (_, left) in EXACT.items()}
CRITERIA = {**INVARIANTS, ORDER: "> 0", STEADY: ">= 3", STRIDED: "> 1"}


def first_agreeing(schedule: ddpm.Schedule) -> int:
    """Returns the index at which beta-tilde first reaches 0.99 of beta."""
    return int(np.argmax(beta_tilde(schedule) / schedule.beta >= 0.99))


def exact_rows() -> list[Row]:
    """Returns the rows that need no training."""
    found = []
    for T in (1000, 4000):
        found += [Row(agree(name, T), first_agreeing(make(T))) for name, make in MAKES.items()]
    left = {name: float(make(1000).alpha_bar[499]) for name, make in MAKES.items()}
    return found + [Row(half(name), value) for name, value in left.items()]


def variances(setup: Setup, result: train.Result) -> tuple[float, float]:
    """Returns the variance over batches of the bound's loss: t uniform, and t by importance.

    p_t ~ sqrt(E[L_t^2]) comes from a pass over the training digits. The paper keeps a history.
    """
    cfg, params, batch = result.config, _cli.weights(result), setup.run.batch_size
    x = np.asarray(ddpm.preprocess(cfg, _cli.arrays(setup.data.load("train"))))
    rng = np.random.default_rng(0)

    @_diffusion.compiled
    def terms(params, x_0, t, key):
        return ddpm.losses(cfg, params, x_0, t, jax.random.normal(key, x_0.shape), None)

    def measure(t, key, i):
        x_0 = jnp.asarray(x[rng.integers(len(x), size=batch)])
        return np.asarray(terms(params, x_0, jnp.asarray(t), jax.random.fold_in(key, i)))

    square, order = np.zeros(cfg.T), np.tile(np.arange(cfg.T), 20)
    for i in counted("squared terms", range(0, len(order), batch)):
        t = np.resize(order[i : i + batch], batch)
        np.add.at(square, t, measure(t, jax.random.key(1), i) ** 2)
    p = np.sqrt(square)  # every t counts as often, but for the few that fill the last batch
    p = 0.999 * p / p.sum() + 0.001 / cfg.T
    found = []
    for q in (np.full(cfg.T, 1 / cfg.T), p):
        losses = []
        for i in counted("variances", range(setup.draws)):
            t = rng.choice(cfg.T, size=batch, p=q / q.sum())
            losses.append((measure(t, jax.random.key(2), i) / (cfg.T * q[t])).mean())
        found.append(float(np.var(losses, ddof=1)))
    return found[0], found[1]


def run(setup: Setup, folder: Path) -> list[Row]:
    """Computes the exact rows, then trains every arm with every seed."""
    digits = _ddpm_arms.Digits(setup)
    found, values, shown, steady = _cli.kept(), {arm: [] for arm in ARMS}, {}, None
    for arm, (change, papers) in ARMS.items():
        for run, result in digits.fit(setup, arm, change, folder):
            k_bound, k_samples = jax.random.split(jax.random.key(run.seed))
            terms = _diffusion.bound(result, digits.x_0, None, k_bound)
            all_steps, tenth = (
                digits.fid(train.sample(result, k_samples, n=setup.samples, steps=steps))
                for steps in (setup.model.T, max(1, setup.model.T // 10))
            )
            values[arm].append((terms.sum(), all_steps, tenth))
            shown.setdefault(arm, (terms, _cli.history(run.folder, "loss", "train")))
            if arm == "cosine, vlb" and steady is None:
                steady = variances(setup, result)
        found += [] if found else exact_rows()
        found += _ddpm_arms.rows(arm, QUANTITIES, papers, values[arm])
    means = {arm: np.mean(each, 0) for arm, each in values.items()}
    strided = {arm: tenth / all_steps for arm, (_, all_steps, tenth) in means.items()}
    arms = ("cosine, simple", "cosine, hybrid", "cosine, vlb, importance")
    simple, hybrid, best = (means[arm][0] for arm in arms)
    found += [
        Row(ORDER, float(min(simple - hybrid, hybrid - best))),
        Row(STEADY, steady[0] / steady[1]),
        Row(STRIDED, float(strided["cosine, simple"] / strided["cosine, hybrid"])),
    ]
    plot(setup, folder, digits.x_0, shown)
    return found


@_cli.costs("schedules.png")
def plot(setup: Setup, folder: Path, x_0: np.ndarray, shown: dict) -> None:
    """Draws both schedules, a digit under their noise, the terms of the bound, its loss."""
    fig, axes = figures.figure(2, 3)
    (left, ratio, noisy), (terms, names, loss) = axes
    T = 1000
    made, share = {name: make(T) for name, make in MAKES.items()}, (np.arange(T) + 1) / T
    curves, title = {n: (share, s.alpha_bar) for n, s in made.items()}, "what is left of a picture"
    figures.curves(left, curves, xlabel="t / T", ylabel="alpha_bar", title=title)
    curves = {name: (share, beta_tilde(s) / s.beta) for name, s in made.items()}
    title = "posterior over forward variance"
    figures.curves(ratio, curves, xlabel="t / T", ylabel="beta-tilde / beta", title=title)
    ratio.set_xscale("log")
    steps = [0, 199, 399, 599, 799, 999]
    eps = np.random.default_rng(0).standard_normal(x_0[:1].shape)[0]
    levels = [(s.alpha_bar[t], ddpm.noise_variance(s)[t]) for s in made.values() for t in steps]
    pictures = np.stack([a**0.5 * x_0[0] + v**0.5 * eps for a, v in levels])
    title = "a digit at t = 1, 200, ... 1000: linear above, cosine below"
    figures.images(noisy, _diffusion.unit(pictures), len(steps), title=title)
    _diffusion.draw_terms(terms, {arm: each for arm, (each, _) in shown.items()})
    # The others are empty, so that an arm has one colour in both panels.
    curves = {arm: line if "vlb" in arm else ([], []) for arm, (_, line) in shown.items()}
    ylabel, title = "loss of the bound (bits per dim)", "training on the bound, by how t is drawn"
    figures.curves(loss, curves, xlabel="updates", ylabel=ylabel, title=title)
    names.legend(*terms.get_legend_handles_labels(), loc="center left", frameon=False)
    names.set_axis_off()
    for ax in (terms, loss):
        ax.get_legend().remove()
    loss.set_yscale("log")
    caption = f"The upper row is exact, at T = 1000. {_diffusion.about(setup)}"
    figures.save(fig, folder / "schedules.png", f"{caption} The lower row is of the first seed.")


if __name__ == "__main__":
    _cli.main("schedules")
