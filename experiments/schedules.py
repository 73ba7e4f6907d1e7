"""How noise should come, and learned variances: Nichol & Dhariwal 2021 (improved DDPM), figures 1, 3, 5, 6, table 2

    python -m experiments.schedules             about 35 minutes on 2 cores; downloads nothing

Exact curves need no training: what the linear and the cosine schedule leave of the picture, how soon beta and
beta-tilde agree. Then 8x8 digits: linear and cosine by the simple loss, cosine with learned variances by the hybrid
loss, by the bound with uniform t, and by the bound with t drawn by importance. Expect the bound to improve from
simple to hybrid to vlb, while the linear schedule's is better than all of these here (in the paper cosine is ahead)
and the bound's pictures are the worst, a tenth of the steps to hurt the hybrid model less than the simple one, and
importance to steady the loss of the bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from aigc_jax import ddpm, figures, metrics, train
from aigc_jax.core import EMA
from aigc_jax.ddpm.process import beta_tilde
from aigc_jax.train import Run
from aigc_jax.train.progress import counted

from experiments import _cli, _diffusion, ddpm_digits, ddpm_objectives
from experiments._cli import Row, Scale, Source

MODEL = replace(ddpm_objectives.MODEL, schedule="cosine")
RUN = replace(ddpm_objectives.RUN, folder="runs/schedules")
_LEARNED = {"variance": "learned"}
ARMS = {
    "linear, simple": {"schedule": "linear"},
    "cosine, simple": {},
    "cosine, hybrid": {**_LEARNED, "objective": "hybrid"},
    "cosine, vlb": {**_LEARNED, "objective": "vlb"},
    "cosine, vlb, importance": {**_LEARNED, "objective": "vlb", "times": "importance"},
}
# CIFAR-10, 500,000 updates, T = 4000 (table 2): bits per dim and FID.
PUBLISHED = {
    "linear, simple": (3.37, 2.90),
    "cosine, hybrid": (3.17, 3.19),
    "cosine, vlb, importance": (2.94, 11.47),
}


@dataclass(frozen=True)
class Setup:
    """Flags of schedules."""

    model: ddpm.Config = MODEL
    run: Run = RUN
    data: Source = Source("digits")
    seeds: int = 1
    samples: int = 1437
    images: int = 360
    draws: int = 200  # batches over which the variance of a loss is taken

    def __post_init__(self):
        ddpm_objectives.check(self, "schedules")
        if self.draws < 2 or self.model.T < 10:
            raise ValueError("draws must be at least 2 and model.T at least 10")


_SMOKE = ddpm_objectives.SCALES["smoke"].setup
SCALES = {
    "smoke": Scale(
        Setup(
            replace(_SMOKE.model, schedule="cosine"),
            replace(_SMOKE.run, folder="runs/schedules-smoke"),
            seeds=1,
            samples=100,
            images=36,
            draws=10,
        ),
        "40 updates of one dense layer",
    ),
    "cpu": Scale(
        Setup(),
        "8x8 digits, T = 200, .7 million parameters, 2,000 updates of 64 (CIFAR-10, T = 4000, 500,000 of 128)",
    ),
}


def agree(name: str, T: int) -> str:
    return f"{name}, T = {T}: first index with beta-tilde >= .99 beta"


def half(name: str) -> str:
    return f"{name}, T = 1000: alpha_bar[499]"


ORDER = "bits per dim: least of simple less hybrid, hybrid less vlb (importance), cosine"
STEADY = "variance of the bound's loss over batches, t uniform over t by importance, same net"
STRIDED = "fid_digits at T/10 steps over that at T: simple over hybrid (ratio of ratios)"
EXACT = {
    (agree("linear", 1000)): 167,
    (agree("cosine", 1000)): 185,
    (half("cosine")): 0.4938,
    (half("linear")): 0.0786,
}
CRITERIA = {
    **{
        name: (f"= {value} to 4 decimals", lambda ours, value=value: round(ours, 4) == value)
        for name, value in EXACT.items()
    },
    ORDER: "> 0",
    STEADY: ">= 3",
    STRIDED: "> 1",
}
INVARIANTS = {name: CRITERIA[name] for name in EXACT}
MAKES = {"linear": ddpm.linear_schedule, "cosine": ddpm.cosine_schedule}


def first_agreeing(schedule: ddpm.Schedule) -> int:
    """The index at which beta-tilde first reaches .99 of beta."""
    return int(np.argmax(beta_tilde(schedule) / schedule.beta >= 0.99))


def variances(setup: Setup, result: train.Result) -> tuple[float, float]:
    """Variance over batches of the bound's loss at this net, nats, with t uniform and with t by importance.

    p_t ~ sqrt(E[L_t^2]) from a pass of its own over the training digits, as the paper's history would have it.
    """
    cfg = result.config
    params, batch = EMA(cfg.ema).read(result.state), setup.run.batch_size
    x = np.asarray(ddpm.preprocess(cfg, setup.data.load("train").resident[0]))

    def terms(params, x_0, t, key):
        eps = jax.random.normal(key, x_0.shape)
        return ddpm.losses(cfg, params, x_0, t, eps, None)

    each = _diffusion.compiled(terms)
    rng = np.random.default_rng(0)
    square, times = np.zeros(cfg.T), 20
    order = np.tile(np.arange(cfg.T), times)
    for i in counted("squared terms", range(0, len(order), batch)):
        t = np.resize(order[i : i + batch], batch)
        x_0 = jnp.asarray(x[rng.integers(len(x), size=batch)])
        value = np.asarray(
            each(params, x_0, jnp.asarray(t), jax.random.fold_in(jax.random.key(1), i))
        )
        np.add.at(square, t, value**2)
    p = np.sqrt(square)  # every t as often, but for the few that fill the last batch
    p = 0.999 * p / p.sum() + 0.001 / cfg.T
    found = {}
    for name, q in (("uniform", np.full(cfg.T, 1 / cfg.T)), ("importance", p)):
        losses = []
        for i in counted("variances", range(setup.draws)):
            t = rng.choice(cfg.T, size=batch, p=q / q.sum())
            x_0 = jnp.asarray(x[rng.integers(len(x), size=batch)])
            value = np.asarray(
                each(params, x_0, jnp.asarray(t), jax.random.fold_in(jax.random.key(2), i))
            )
            losses.append((value / (cfg.T * q[t])).mean())
        found[name] = float(np.var(losses, ddof=1))
    return found["uniform"], found["importance"]


def run(setup: Setup, folder: Path) -> list[Row]:
    """The exact curves; then every arm with every seed."""
    training, test = setup.data.load("train"), setup.data.load("test").resident[0]
    exact = [
        Row(agree(name, T), first_agreeing(make(T)))
        for T in (1000, 4000)
        for name, make in MAKES.items()
    ]
    exact += [Row(half(name), float(make(1000).alpha_bar[499])) for name, make in MAKES.items()]
    x_0 = np.asarray(ddpm.preprocess(setup.model, {"image": test["image"][: setup.images]}))
    net = metrics.load_classifier("digits")
    _, real = net.apply(training.resident[0]["image"] / (setup.model.levels - 1))
    table = _cli.kept()
    found, strided, shown, steady = {arm: [] for arm in ARMS}, {}, {}, None
    few = max(1, setup.model.T // 10)
    for arm, change in ARMS.items():
        run = replace(setup.run, folder=str(folder / arm.replace(", ", "-")))
        for seeded in _cli.seeded(run, setup.seeds):
            result = train.fit(ddpm.make, replace(setup.model, **change), seeded, training)
            k_bound, k_draw = jax.random.split(jax.random.key(seeded.seed))
            terms = ddpm_digits.bound(result, x_0, None, k_bound)
            full, part = (
                metrics.frechet_distance(
                    real, net.apply(train.sample(result, k_draw, n=setup.samples, steps=steps))[1]
                )
                for steps in (setup.model.T, few)
            )
            found[arm].append((terms.sum(), full, part))
            lines = [
                (v["step"], v["train"]["loss"])
                for v in train.metrics(result.folder)
                if "train" in v
            ]
            shown.setdefault(arm, (terms, tuple(np.array(lines).T)))
            if arm == "cosine, vlb" and steady is None:
                steady = variances(setup, result)
        each = [_cli.mean_and_error([v[i] for v in found[arm]]) for i in range(3)]
        paper = PUBLISHED.get(arm, (None, None))
        table += [
            *(exact if not table else ()),
            Row(f"{arm}: bound, test (bits per dim)", each[0][0], paper[0], each[0][1]),
            Row(
                f"{arm}: fid_digits to training, T steps (paper: FID)",
                each[1][0],
                paper[1],
                each[1][1],
            ),
            Row(f"{arm}: the same, T/10 steps", each[2][0], None, each[2][1]),
        ]
    means = {arm: np.mean(values, 0) for arm, values in found.items()}
    strided = {arm: values[2] / values[1] for arm, values in means.items()}
    best = means["cosine, vlb, importance"][0]
    hybrid, simple = means["cosine, hybrid"][0], means["cosine, simple"][0]
    table += [
        Row(ORDER, float(min(simple - hybrid, hybrid - best))),
        Row(STEADY, steady[0] / steady[1]),
        Row(STRIDED, float(strided["cosine, simple"] / strided["cosine, hybrid"])),
    ]
    plot(setup, folder, x_0, shown)
    return table


@_cli.costs("schedules.png")
def plot(setup: Setup, folder: Path, x_0: np.ndarray, shown: dict) -> None:
    """The schedules, the strips of noise, the terms of the bound and the loss while training."""
    fig, axes = figures.figure(2, 3, size=(14, 7.6))
    flat, T = axes.ravel(), 1000
    made = {name: make(T) for name, make in MAKES.items()}
    share = (np.arange(T) + 1) / T
    figures.curves(
        flat[0],
        {name: (share, s.alpha_bar) for name, s in made.items()},
        xlabel="t / T",
        ylabel="alpha_bar",
        title="figure 5",
    )
    figures.curves(
        flat[1],
        {name: (share, beta_tilde(s) / s.beta) for name, s in made.items()},
        xlabel="t / T",
        ylabel="beta-tilde / beta",
        title="figure 1",
    )
    flat[1].set_xscale("log")
    at = [0, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    eps = np.random.default_rng(0).standard_normal(x_0[:1].shape)
    strip = [
        s.alpha_bar[t] ** 0.5 * x_0[0] + ddpm.noise2(s)[t] ** 0.5 * eps[0]
        for s in made.values()
        for t in at
    ]
    figures.images(
        flat[2],
        np.clip((np.stack(strip) + 1) / 2, 0, 1),
        len(at),
        title="figure 3: t = 1, 100, ... 1000; linear above, cosine below",
    )
    steps = np.arange(1, setup.model.T + 1)
    figures.curves(
        flat[3],
        {arm: (steps, terms[:-1]) for arm, (terms, _) in shown.items()},
        xlabel="t",
        ylabel="L_{t-1} (bits per dim)",
        title="terms of the bound, test, first seed",
    )
    flat[3].set(xscale="log", yscale="log")
    trained = {arm: line for arm, (_, line) in shown.items() if "vlb" in arm}
    figures.curves(
        flat[4],
        trained,
        xlabel="updates",
        ylabel="loss of the bound (bits per dim)",
        title="figure 6",
    )
    flat[4].set_yscale("log")
    flat[5].set_axis_off()
    figures.save(
        fig,
        folder / "schedules.png",
        f"exact curves at T = 1000; trained: digits 8x8, T = {setup.model.T}, U-Net {setup.model.net.widths}, "
        f"{setup.run.steps} updates of {setup.run.batch_size}",
    )


if __name__ == "__main__":
    _cli.main("schedules")
