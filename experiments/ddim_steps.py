"""Few steps and much noise do not go together: samplers from 10 to 1000 steps, Song, Meng & Ermon 2021 (DDIM), table 1

    python -m experiments.ddim_steps    about 7 minutes on 2 cores, 5 more for its model; downloads nothing

On a grid of 25 normals the denoiser is exact. There, 98.9 % of true samples lie within three
standard deviations of a mode, and any deviation from 98.9 % is caused by the sampler. Many steps
with no noise in the last one end up to a point above it: a little too narrow. Then the digits model
of `ddpm_digits`, by the Frechet distance in our classifier's features (given ddpm_digits'
--run.folder it is not trained again). Expect the paper's order: noise of the larger sigma-hat is
worst, on the grid at every S up to 100, on digits up to 20. At S = 1000, with no noise in the last
step, all agree. Encoding and decoding (table 2) comes back closer with more steps. The paper's
numbers are FIDs and squared errors on CIFAR-10: compare orders, not values.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import ddpm, figures, metrics, train
from aigc_jax.data import points
from aigc_jax.train import Run
from experiments import _cli, _ddpm_digits, _diffusion, _pictures
from experiments._cli import Row, Scale, Source

CENTRES, STD = points.grid_modes() / 8**0.5, 0.05 / 8**0.5  # of unit variance, as in WGAN-GP's code
TRUTH = 100 * (1 - np.exp(-4.5))  # % of a normal in the plane within three standard deviations
SAMPLERS = {
    "eta 0": {"eta": 0.0},
    "eta .2": {"eta": 0.2},
    "eta .5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "sigma-hat": {"sigma_hat": True},
}
ETAS = [name for name in SAMPLERS if name != "sigma-hat"]
# FID on CIFAR-10 at S = 10, 20, 50, 100, 1000 (table 1); squared error there and back (table 2).
PUBLISHED = {
    "eta 0": (13.36, 6.84, 4.67, 4.16, 4.04),
    "eta .2": (14.04, 7.11, 4.77, 4.25, 4.09),
    "eta .5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "eta 1": (41.07, 18.36, 8.01, 5.78, 4.73),
    "sigma-hat": (367.43, 133.37, 32.72, 9.99, 3.17),
}
BACK = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


@dataclass(frozen=True)
class Setup:
    """Flags of ddim_steps."""

    model: ddpm.Config = _ddpm_digits.MODEL
    run: Run = _ddpm_digits.run("runs/ddim_steps")
    data: Source = Source("digits")
    training: int = 1237
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)  # of the mixture's 1000
    samples: int = 2500  # per cell
    many: int = 40_000  # where eta 0 and 1 are compared at S = 10
    digit_steps: tuple[int, ...] = (5, 10, 20, 50, 100)  # of the digits model's
    digits: int = 1237

    def __post_init__(self):
        _pictures.check(self, "ddim_steps", conditional=True)
        columns = (("steps", 1000, 100), ("digit_steps", self.model.T, 20))
        for field, T, few in columns:
            steps = getattr(self, field)
            if not steps or not all(1 <= S <= T and T % S == 0 for S in steps):
                raise ValueError(f"{field} must divide the model's {T} steps, got {steps}")
            if min(steps) > few:
                raise ValueError(f"{field} must hold one up to {few}, where sigma-hat is compared")
        _cli.at_least(self, samples=100, many=100, digits=100)


SMOKE_RUN = _ddpm_digits.smoke_run("runs/ddim_steps-smoke", steps=200)
FEW = dict(steps=(10, 50), samples=1000, many=4000, digit_steps=(5, 50), digits=200)
SMOKE = Setup(_ddpm_digits.SMOKE, SMOKE_RUN, **FEW)
DIFFERS = "8x8 digits with T = 100 (CIFAR-10 and CelebA, T = 1000)"
SCALES = {
    "smoke": Scale(SMOKE, "two columns, a tiny digits model"),
    "cpu": Scale(Setup(), f"a grid of normals with its exact denoiser, and {DIFFERS}"),
}
FAR = "grid, S = 1000: furthest from the truth of all eta and sigma-hat (points)"
WORST = "grid: least lead of any eta over sigma-hat, S <= 100 (points)"
FIFTY = "grid: least lead of any eta over sigma-hat, S = 50 (points)"
TEN = "grid, S = 10: eta 0 less eta 1 (points, the larger sample)"
FALLS = "grid: there and back, least ratio of an error to that of the next S"
SAME = "grid: distance of ends of one x_T at S = 20 and 1000, over that of two x_T (medians)"
DIGITS_WORST = "digits: least fid_digits of sigma-hat over any eta's, S <= 20 (ratio)"
CRITERIA = {FAR: "<= 1.5", WORST: "> 0", FIFTY: "> 20", TEN: "> 0", FALLS: "> 1", SAME: "< 0.2"}
CRITERIA |= {DIGITS_WORST: "> 1"}
INVARIANTS = {WORST: CRITERIA[WORST]}


def measure_grid(setup: Setup) -> tuple[dict, dict, list[Row]]:
    """Returns {(name, S): % within 3 sigma}, {S: squared error there and back}, the other rows."""
    schedule = ddpm.linear_schedule(1000)
    eps_fn = _diffusion.exact_eps(schedule, CENTRES, STD)
    key, paper = jax.random.key(setup.run.seed), {"spacing": "paper"}

    @partial(jax.jit, static_argnames=("S", "name", "n"))
    def sample(S, name, n):
        k_start, k_way = jax.random.split(key)
        x_T = jax.random.normal(k_start, (n, 2))
        return ddpm.sample_ddim(schedule, eps_fn, x_T, k_way, steps=S, **paper, **SAMPLERS[name])

    @partial(jax.jit, static_argnames="S")
    def there_and_back(x_0, S):
        x_T = ddpm.ddim_invert(schedule, eps_fn, x_0, steps=S, **paper)
        return ddpm.sample_ddim(schedule, eps_fn, x_T, key, steps=S, **paper)

    def share(S, name, n):
        return 100 * metrics.mode_count(np.asarray(sample(S, name, n)), CENTRES, STD).high_quality

    cells = {(name, S): share(S, name, setup.samples) for name in SAMPLERS for S in setup.steps}
    lead = {S: min(cells[name, S] for name in ETAS) - cells["sigma-hat", S] for S in setup.steps}
    rows = [Row(WORST, min(lead[S] for S in setup.steps if S <= 100))]
    if 50 in lead:
        rows.append(Row(FIFTY, lead[50]))
    if 1000 in lead:
        rows.append(Row(FAR, max(abs(cells[name, 1000] - TRUTH) for name in SAMPLERS)))
    if 10 in lead:
        rows.append(Row(TEN, share(10, "eta 0", setup.many) - share(10, "eta 1", setup.many)))

    noise = np.random.default_rng(0).standard_normal((setup.samples, 2))
    x_0 = CENTRES[np.arange(setup.samples) % 25] + STD * noise
    start = jnp.asarray(x_0, jnp.float32)
    back = {S: float(((there_and_back(start, S) - x_0) ** 2).mean()) for S in BACK}
    errors = list(back.values())
    rows.append(Row(FALLS, min(a / b for a, b in itertools.pairwise(errors))))
    few, many = (np.asarray(sample(S, "eta 0", setup.samples)) for S in (20, 1000))
    apart = np.median(np.linalg.norm(many - np.roll(many, 1, 0), axis=-1))
    rows.append(Row(SAME, float(np.median(np.linalg.norm(few - many, axis=-1)) / apart)))
    return cells, back, rows


def measure_digits(setup: Setup, result: train.Result) -> tuple[dict, np.ndarray]:
    """Returns {(name, S): Frechet distance to training}, and samples: an x_T per column."""
    seen, net, real = _ddpm_digits.judged_by(setup)
    cfg, n, params = result.config, min(setup.digits, len(real)), _cli.weights(result)
    schedule, label = ddpm.schedule_of(cfg, params), jnp.asarray(seen["label"][:n])
    k_start, k_way = jax.random.split(jax.random.key(setup.run.seed))
    x_T = jax.random.normal(k_start, (n, *cfg.shape))
    cells, shown = {}, []
    for S in setup.digit_steps:
        for name, how in SAMPLERS.items():

            def sample(params, x_T, label, key, S=S, how=how):
                eps_fn = ddpm.eps_fn_of(cfg, params, label)
                return ddpm.sample_ddim(
                    schedule, eps_fn, x_T, key, steps=S, spacing="paper", clip=1.0, **how
                )

            x = _diffusion.unit(_diffusion.compiled(sample)(params, x_T, label, k_way))
            cells[name, S] = metrics.frechet_distance(real, net.apply(x)[1])
            if name in ("eta 0", "sigma-hat"):
                shown.append(x[:10])
    return cells, np.concatenate(shown)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures the grid, then the digits."""
    result = _ddpm_digits.fitted(setup)
    found = _cli.kept()
    cells, back, rows = measure_grid(setup)
    found += rows
    for (name, S), value in cells.items():
        found.append(Row(f"grid, {name}, S = {S}: within 3 sigma (%)", value, oracle=TRUTH))
    for S, error in back.items():
        what = f"grid, there and back, S = {S}: mean squared error (paper: CIFAR-10 in [0, 1])"
        found.append(Row(what, error, BACK[S]))
    of_digits, shown = measure_digits(setup, result)
    few = [S for S in setup.digit_steps if S <= 20]
    ratio = min(of_digits["sigma-hat", S] / of_digits[name, S] for name in ETAS for S in few)
    paper = min(PUBLISHED["sigma-hat"][i] / PUBLISHED["eta 1"][i] for i in range(2))  # S = 10, 20
    found.append(Row(DIGITS_WORST, ratio, paper))
    for (name, S), value in of_digits.items():
        found.append(Row(f"digits, {name}, S = {S}: fid_digits to training", value))
    for name, values in PUBLISHED.items():
        what = f"paper, CIFAR-10, {name}, S = 10, 20, 50, 100, 1000: FID"
        found.append(Row(what, "-", ", ".join(f"{v:g}" for v in values)))
    plot(setup, folder, cells, back, of_digits, shown)
    return found


@_cli.costs("ddim_steps.png")
def plot(setup: Setup, folder: Path, cells: dict, back: dict, of_digits: dict, shown) -> None:
    """Draws quality against steps on both sets, the way there and back, digits by steps."""
    fig, ((grid, digits), (inverse, samples)) = figures.figure(2, 2)
    names = ("samples within 3 sigma of a mode (%)", "25 normals, exact denoiser")
    each = [(grid, cells, setup.steps, *names)]
    names = ("fid_digits to training", "8x8 digits, trained")
    each += [(digits, of_digits, setup.digit_steps, *names)]
    for ax, found, steps, ylabel, title in each:
        curves = {name: (np.array(steps), [found[name, S] for S in steps]) for name in SAMPLERS}
        figures.curves(ax, curves, xlabel="steps S", ylabel=ylabel, title=title)
        ax.set_xscale("log")
        ax.set_xticks(steps, [str(S) for S in steps], minor=False)
        ax.xaxis.minorticks_off()
    figures.level(grid, TRUTH, "the truth", at=0.3)
    digits.set_yscale("log")
    lines = {"grid, ours (data units)": back, "CIFAR-10, paper (in [0, 1])": BACK}
    curves = {name: (np.array(list(v)), np.array(list(v.values()))) for name, v in lines.items()}
    title = "from x_0 to x_T and back"
    figures.curves(inverse, curves, xlabel="steps S", ylabel="mean squared error", title=title)
    inverse.set(xscale="log", yscale="log")
    steps = ", ".join(str(S) for S in setup.digit_steps)
    figures.images(samples, shown, 10, title=f"rows in pairs, eta 0 and sigma-hat: S = {steps}")
    caption = f"{setup.samples:,} samples per point of the grid, {setup.digits:,} digits."
    figures.save(fig, folder / "ddim_steps.png", f"{caption} No noise in the last step.")


if __name__ == "__main__":
    _cli.main("ddim_steps")
