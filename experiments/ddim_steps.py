"""Few steps and much noise do not go together: samplers from 10 to 1000 steps, Song, Meng & Ermon 2021 (DDIM), table 1

    python -m experiments.ddim_steps            about 7 minutes on 2 cores, 5 more for its model; downloads nothing

The exact denoiser of a grid of 25 normals takes training out of the question: what parts a share from the 98.9 % of
samples within three standard deviations of a mode is the sampler's (many steps without noise in the last end up to a
point above it: a little too narrow). Then the digits model of `ddpm_digits`, by the Frechet distance in our
classifier's features (given ddpm_digits' --run.folder it is not trained again). Expect the paper's order: noise of
the larger sigma-hat is worst, on the grid at every S up to 100, on digits up to 20, and at S = 1000, with no noise in
the last step, all agree. Table 2's encoding and decoding comes back the closer the more steps. The paper's numbers
are its FIDs and squared errors on CIFAR-10: read orders, not values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from aigc_jax import ddpm, figures, metrics, train
from aigc_jax.core import EMA
from aigc_jax.data import points
from aigc_jax.train import Run

from experiments import _cli, _diffusion, _pictures, ddpm_digits
from experiments._cli import Row, Scale, Source

CENTRES, STD = (
    points.grid_modes() / 8**0.5,
    0.05 / 8**0.5,
)  # to unit variance, as WGAN-GP's code scales it
TRUTH = 100 * (1 - np.exp(-4.5))  # of a normal in the plane, within three standard deviations
ETAS = {
    "eta 0": {"eta": 0.0},
    "eta .2": {"eta": 0.2},
    "eta .5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "sigma-hat": {"sigma_hat": True},
}
# FID on CIFAR-10 at S = 10, 20, 50, 100, 1000 (table 1), and mean squared error on the way there and back (table 2).
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

    model: ddpm.Config = ddpm_digits.MODEL
    run: Run = replace(ddpm_digits.RUN, folder="runs/ddim_steps")
    data: Source = Source("digits")
    training: int = 1237
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)  # of the mixture's 1000
    samples: int = 2500  # a cell
    many: int = 40_000  # where eta 0 and 1 are compared at S = 10
    digit_steps: tuple[int, ...] = (5, 10, 20, 50, 100)  # of the digits model's
    digits: int = 1237

    def __post_init__(self):
        _pictures.check(self, "ddim_steps", conditional=True)
        for field, T in (("steps", 1000), ("digit_steps", self.model.T)):
            if not getattr(self, field) or not all(
                1 <= S <= T and T % S == 0 for S in getattr(self, field)
            ):
                raise ValueError(
                    f"{field} must divide the model's {T} steps, got {getattr(self, field)}"
                )
        if min(self.steps) > 100 or min(self.digit_steps) > 20:
            raise ValueError(
                "sigma-hat is compared at few steps: steps must hold one up to 100, digit_steps up to 20"
            )
        if min(self.samples, self.many, self.digits) < 100:
            raise ValueError("samples, many and digits must be at least 100")


SCALES = {
    "smoke": Scale(
        Setup(
            ddpm_digits.SMOKE,
            replace(ddpm_digits.SCALES["smoke"].setup.run, folder="runs/ddim_steps-smoke"),
            steps=(10, 50),
            samples=1000,
            many=4000,
            digit_steps=(5, 50),
            digits=200,
        ),
        "two columns, a tiny digits model",
    ),
    "cpu": Scale(
        Setup(),
        "a grid of normals with its exact denoiser, and 8x8 digits with T = 100 (CIFAR-10 and CelebA, T = 1000)",
    ),
}


def within(name: str, S: int) -> str:
    return f"grid, {name}, S = {S}: within 3 sigma (%)"


FAR = "grid, S = 1000: furthest from the truth of all eta and sigma-hat (points)"
WORST = "grid: least lead of any eta over sigma-hat, S <= 100 (points)"
FIFTY = "grid: least lead of any eta over sigma-hat, S = 50 (points)"
TEN = "grid, S = 10: eta 0 less eta 1 (points, the larger sample)"
FALLS = "grid: there and back, least ratio of an error to that of the next S"
SAME = "grid: distance of ends of one x_T at S = 20 and 1000, over that of two x_T (medians)"
DIGITS_WORST = "digits: least fid_digits of sigma-hat over any eta's, S <= 20 (ratio)"
CRITERIA = {
    FAR: "<= 1.5",
    WORST: "> 0",
    FIFTY: "> 20",
    TEN: "> 0",
    FALLS: "> 1",
    SAME: "< 0.2",
    DIGITS_WORST: "> 1",
}
INVARIANTS = {WORST: CRITERIA[WORST]}


def grid(setup: Setup) -> tuple[dict, dict, list[Row]]:
    """{(name, S): % within three sigma}, {S: squared error there and back}, and the other rows, without training."""
    schedule = ddpm.linear_schedule(1000)
    eps_fn = _diffusion.exact_eps(schedule, CENTRES, STD)
    key = jax.random.key(setup.run.seed)

    @partial(jax.jit, static_argnames=("S", "name", "n"))
    def draw(S, name, n):
        k_start, k_way = jax.random.split(key)
        x_T = jax.random.normal(k_start, (n, 2))
        return ddpm.sample_ddim(
            schedule, eps_fn, x_T, k_way, steps=S, spacing="paper", **ETAS[name]
        )

    def share(S, name, n):
        return 100 * metrics.mode_count(np.asarray(draw(S, name, n)), CENTRES, STD).high_quality

    cells = {(name, S): share(S, name, setup.samples) for name in ETAS for S in setup.steps}
    lead = {
        S: min(cells[name, S] for name in ETAS if name != "sigma-hat") - cells["sigma-hat", S]
        for S in setup.steps
    }
    rows = [Row(WORST, min(lead[S] for S in setup.steps if S <= 100))]
    if 50 in lead:
        rows.append(Row(FIFTY, lead[50]))
    if 1000 in lead:
        rows.append(Row(FAR, max(abs(cells[name, 1000] - TRUTH) for name in ETAS)))
    if 10 in lead:
        rows.append(Row(TEN, share(10, "eta 0", setup.many) - share(10, "eta 1", setup.many)))

    x_0 = CENTRES[np.arange(setup.samples) % 25] + STD * np.random.default_rng(0).standard_normal(
        (setup.samples, 2)
    )
    back = {}
    for S in BACK:

        @jax.jit
        def there_and_back(x_0, S=S):
            x_T = ddpm.ddim_invert(schedule, eps_fn, x_0, steps=S, spacing="paper")
            return ddpm.sample_ddim(schedule, eps_fn, x_T, key, steps=S, spacing="paper")

        back[S] = float(((there_and_back(jnp.asarray(x_0, jnp.float32)) - x_0) ** 2).mean())
    errors = list(back.values())
    rows.append(Row(FALLS, min(a / b for a, b in zip(errors, errors[1:], strict=False))))
    few, many = (np.asarray(draw(S, "eta 0", setup.samples)) for S in (20, 1000))
    apart = np.linalg.norm(many - np.roll(many, 1, 0), axis=-1)
    rows.append(Row(SAME, float(np.median(np.linalg.norm(few - many, axis=-1)) / np.median(apart))))
    return cells, back, rows


def digits(setup: Setup, result: train.Result) -> tuple[dict, np.ndarray]:
    """{(name, S): Frechet distance of the digits to the training set}, and samples of one x_T a column, S a row."""
    cfg, seen = result.config, setup.data.load(f"train[:{setup.training}]").resident[0]
    n, params = min(setup.digits, len(seen["label"])), EMA(cfg.ema).read(result.state)
    schedule, label = ddpm.schedule_of(cfg, params), jnp.asarray(seen["label"][:n])
    net = metrics.load_classifier(setup.data.name)
    _, real = net.apply(seen["image"] / (cfg.levels - 1))
    k_start, k_way = jax.random.split(jax.random.key(setup.run.seed))
    x_T = jax.random.normal(k_start, (n, *cfg.shape))
    cells, shown = {}, []
    for S in setup.digit_steps:
        for name, how in ETAS.items():

            def draw(params, x_T, label, key, S=S, how=how):
                eps_fn = ddpm.eps_fn_of(cfg, params, label)
                return ddpm.sample_ddim(
                    schedule, eps_fn, x_T, key, steps=S, spacing="paper", clip=1.0, **how
                )

            x = np.clip(
                (np.asarray(_diffusion.compiled(draw)(params, x_T, label, k_way)) + 1) / 2, 0, 1
            )
            cells[name, S] = metrics.frechet_distance(real, net.apply(x)[1])
            if name in ("eta 0", "sigma-hat"):
                shown.append(x[:10])
    return cells, np.concatenate(shown)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures the grid, then the digits, draws both."""
    result = ddpm_digits.fitted(setup)
    found = _cli.kept()
    cells, back, of_grid = grid(setup)
    found += of_grid
    found += [Row(within(name, S), value, oracle=TRUTH) for (name, S), value in cells.items()]
    found += [
        Row(
            f"grid, there and back, S = {S}: mean squared error (paper: CIFAR-10 in [0, 1])",
            error,
            BACK[S],
        )
        for S, error in back.items()
    ]
    of_digits, shown = digits(setup, result)
    ratio = min(
        of_digits["sigma-hat", S] / of_digits[name, S]
        for name in ETAS
        if name != "sigma-hat"
        for S in setup.digit_steps
        if S <= 20
    )
    found += [
        Row(
            DIGITS_WORST,
            ratio,
            min(PUBLISHED["sigma-hat"][i] / PUBLISHED["eta 1"][i] for i in range(2)),
        ),  # S <= 20
        *(
            Row(f"digits, {name}, S = {S}: fid_digits to training", value)
            for (name, S), value in of_digits.items()
        ),
        *(
            Row(
                f"paper, CIFAR-10, {name}, S = 10, 20, 50, 100, 1000: FID",
                "-",
                ", ".join(f"{v:g}" for v in values),
            )
            for name, values in PUBLISHED.items()
        ),
    ]
    plot(setup, folder, cells, back, of_digits, shown)
    return found


@_cli.costs("ddim_steps.png")
def plot(
    setup: Setup, folder: Path, cells: dict, back: dict, of_digits: dict, shown: np.ndarray
) -> None:
    """Quality against steps on both sets, the way there and back, and digits of few and many steps."""
    fig, (axes,) = figures.figure(1, 4, size=(17, 4.4))
    for ax, found, steps in (
        (axes[0], cells, setup.steps),
        (axes[1], of_digits, setup.digit_steps),
    ):
        figures.curves(
            ax,
            {name: (np.array(steps), np.array([found[name, S] for S in steps])) for name in ETAS},
            xlabel="steps S",
            ylabel="",
            title="",
        )
        ax.set_xscale("log")
        ax.set_xticks(steps, [str(S) for S in steps], minor=False)
        ax.xaxis.minorticks_off()
    axes[0].axhline(TRUTH, color="0.5", linewidth=0.8)
    axes[0].set(
        ylabel="samples within 3 sigma of a mode (%)",
        title="25 normals, exact denoiser (line: the truth)",
    )
    axes[1].set(ylabel="fid_digits to the training set", title="digits 8x8, trained", yscale="log")
    lines = {"grid, ours (data units)": back, "CIFAR-10, paper (in [0, 1])": BACK}
    figures.curves(
        axes[2],
        {name: (np.array(list(v)), np.array(list(v.values()))) for name, v in lines.items()},
        xlabel="steps S",
        ylabel="mean squared error",
        title="x_0 to x_T and back",
    )
    axes[2].set(xscale="log", yscale="log")
    told = ", ".join(str(S) for S in setup.digit_steps)
    figures.images(axes[3], shown, 10, title=f"rows in pairs, eta 0 and sigma-hat: S = {told}")
    figures.save(
        fig,
        folder / "ddim_steps.png",
        f"{setup.samples} samples a cell of the grid, {setup.digits} of the digits; the paper's spacing; no "
        "noise in the last step",
    )


if __name__ == "__main__":
    _cli.main("ddim_steps")
