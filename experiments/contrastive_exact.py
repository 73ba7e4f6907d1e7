"""InfoNCE between correlated Gaussians, whose mutual information is known: van den Oord et al. 2018 (CPC), section 2.3

    python -m experiments.contrastive_exact     about 4 minutes on 2 cores; downloads nothing

x and y have 20 dimensions. Each pair of coordinates has the correlation that gives the mutual
information I (Poole et al. 2019). ln K minus the InfoNCE loss is a lower bound of I for a
batch of K. The best critic is log p(y|x) / p(y), which is known here. Expect its bound to lie below
both I and ln K: 2.31 / 3.06 / 3.53 nats at I = 4 for K = 16 / 64 / 256, and 2.74 / 4.02 / 5.19 at
I = 8. A critic g(x).h(y) of two MLPs, trained by InfoNCE alone, comes close to it. Neither paper
has these numbers: they are exact up to the error of their sampling.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import contrastive, data, figures, train
from aigc_jax.core import Family, Optim, make_step, start
from aigc_jax.nn import MLP
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale


@dataclass(frozen=True)
class Critic:
    """The critic g(x).h(y), and how it is trained."""

    dim: int = 20  # of x and of y; the exact bounds and criteria are those of 20
    width: int = 128  # of the two hidden layers of g and h
    features: int = 32  # of g(x) and h(y)
    optim: Optim = Optim(lr=1e-3, decay=8000)


RUN = Run("runs/contrastive_exact", steps=8000, steps_per_call=100)


@dataclass(frozen=True)
class Setup:
    """Flags of contrastive_exact."""

    model: Critic = Critic()
    run: Run = RUN  # of one critic; its batch size is one of `batches`
    information: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0)  # nats
    batches: tuple[int, ...] = (16, 64, 256)
    examples: int = 256_000  # on which a bound is taken; rounded down to whole batches

    def __post_init__(self):
        _cli.at_least(self, examples=1000)
        if min(self.information, default=0) <= 0:
            raise ValueError(f"information must hold positive numbers, got {self.information}")
        if not 2 <= min(self.batches, default=0) <= max(self.batches) <= self.examples // 4:
            most = self.examples // 4
            raise ValueError(f"batches must hold sizes in 2..{most}, got {self.batches}")


SMOKE = Setup(
    Critic(width=32),
    replace(RUN, folder="runs/contrastive_exact-smoke", steps=300),
    information=(4.0,),
    batches=(16, 64),
    examples=32_000,
)
SCALES = {
    "smoke": Scale(SMOKE, "one mutual information, two batch sizes, narrow critics, 300 updates"),
    "cpu": Scale(Setup(), "our own critics and numbers of examples"),
}

EXACT = {  # bounds of the best critic in nats, by (I, K), from another simulation, good to 0.01
    (4.0, 16): 2.308,
    (4.0, 64): 3.057,
    (4.0, 256): 3.534,
    (8.0, 16): 2.740,
    (8.0, 64): 4.022,
    (8.0, 256): 5.188,
}


def best(information: float, K: int, dim: int = 20) -> str:
    """Returns the name of the row of the best critic. EXACT and its criteria name 20 dimensions."""
    cell = f"I = {information:g}, K = {K}" + f", {dim} dimensions" * (dim != 20)
    return f"best critic, {cell}: bound (nats; +- s.e. over batches)"


def trained(information: float, K: int) -> str:
    """Returns the name of the row of the trained critic."""
    return f"trained critic, I = {information:g}, K = {K}: bound (nats)"


ABOVE = "best critic: largest bound minus min(I, ln K) (nats)"
TRAINED_ABOVE = "trained critics: largest bound minus that of the best critic (nats)"
SHARE = "trained critics: smallest share of the best critic's bound (%)"
CRITERIA = {
    **{best(*cell): f"within 0.02 of {bound}" for cell, bound in EXACT.items()},
    ABOVE: "< 0",
    TRAINED_ABOVE: "< 0.02",
    SHARE: ">= 90",
}
INVARIANTS = {
    **{best(*cell): f"within 0.06 of {EXACT[cell]}" for cell in ((4.0, 16), (4.0, 64))},
    ABOVE: "< 0",
    TRAINED_ABOVE: "< 0.1",
    SHARE: ">= 10",
}

# ------------------------------------------------------------------------------------- the Gaussians


def correlation(information: float, dim: int) -> float:
    """Returns rho of each coordinate: I = -dim/2 ln(1 - rho^2)."""
    return float(np.sqrt(-np.expm1(-2 * information / dim)))


def draw(rng: np.random.Generator, size: int, *, information: float, dim: int) -> np.ndarray:
    """Draws pairs (x, y) as points [size, 2 dim]."""
    rho = correlation(information, dim)
    x, noise = rng.standard_normal((2, size, dim))
    return np.concatenate([x, rho * x + np.sqrt(1 - rho**2) * noise], 1)


def best_critic(points, information: float):
    """Returns log p(y|x) / p(y) in nats for all pairs of K points [K, 2 dim]: [K, K]."""
    x, y = jnp.split(points, 2, -1)
    rho = correlation(information, x.shape[-1])
    squares = (x**2).sum(-1)[:, None] + (y**2).sum(-1)[None]
    return (rho * x @ y.T - rho**2 * squares / 2) / (1 - rho**2) + information


def bound_of_best(setup: Setup, information: float, K: int) -> tuple[float, float]:
    """Returns the best critic's bound in nats, and its standard error over batches."""
    rng = np.random.default_rng(setup.run.seed)

    @jax.jit
    def bounds(points):
        critics = jax.vmap(partial(best_critic, information=information))(points)
        return log(K) - jax.vmap(contrastive.nce)(critics).mean(-1)

    found = []
    batches, at_once = setup.examples // K, max(1, 4096 // K)
    for _ in range(-(-batches // at_once)):
        x = draw(rng, at_once * K, information=information, dim=setup.model.dim)
        found.append(bounds(x.reshape(at_once, K, -1).astype(np.float32)))
    found = np.concatenate(found)[:batches].astype(np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(batches))


# ------------------------------------------------------------------------------------ the trained one


def make(cfg: Critic, *, axis_name: str | None = None) -> Family:
    """Returns the critic as a Family. evaluate: `bound_nats` is ln K - InfoNCE, per pair."""
    net = MLP((cfg.width, cfg.width), out=cfg.features)

    def init(key):
        x = jnp.zeros((1, cfg.dim), jnp.float32)
        keys = zip(("g", "h"), jax.random.split(key), strict=True)
        return start({name: net.init(k, x) for name, k in keys}, cfg.optim)

    def nats(params, batch):
        x, y = jnp.split(jnp.asarray(batch["points"]), 2, -1)
        return contrastive.nce(net.apply(params["g"], x) @ net.apply(params["h"], y).T)

    def loss(params, state, batch, key):
        return nats(params, batch).mean(), (state.extra, {})

    def evaluate(state, batch, key):
        return {"bound_nats": log(len(batch["points"])) - nats(state.params, batch)}

    return Family(init, make_step(loss, cfg.optim, axis_name=axis_name), evaluate, None)


def bound_of_trained(setup: Setup, information: float, K: int, folder: Path) -> float:
    """Trains a critic, and returns its bound in nats on other points."""
    options = {"information": information, "dim": setup.model.dim}
    source = {"name": "correlated Gaussians", "split": "train", **options}
    training = data.endless(partial(draw, **options), (2 * setup.model.dim,), source)
    run = replace(setup.run, folder=str(folder / f"I{information:g}-K{K}"), batch_size=K)
    result = train.fit(make, setup.model, run, training)
    rng = np.random.default_rng(setup.run.seed + 1)
    points = draw(rng, setup.examples // K * K, **options).astype(np.float32)
    return train.evaluate(result, data.from_arrays({"points": points}), batch_size=K)["bound_nats"]


def run(setup: Setup, folder: Path) -> list[Row]:
    """Takes the bound of the best critic and of trained ones, for each I and K."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, cells = _cli.kept(), [(i, K) for i in setup.information for K in setup.batches]
    bounds = {cell: bound_of_best(setup, *cell) for cell in cells}
    dim = setup.model.dim
    for cell, (bound, error) in bounds.items():
        oracle = EXACT.get(cell) if dim == 20 else None
        rows.append(Row(best(*cell, dim), bound, error=error, oracle=oracle))
    rows.append(Row(ABOVE, max(bounds[i, K][0] - min(i, log(K)) for i, K in cells)))
    learned = {}
    for cell in cells:
        learned[cell] = bound_of_trained(setup, *cell, folder)
        rows.append(Row(trained(*cell), learned[cell], oracle=bounds[cell][0]))
    rows.append(Row(TRAINED_ABOVE, max(learned[c] - bounds[c][0] for c in cells)))
    rows.append(Row(SHARE, 100 * min(learned[c] / bounds[c][0] for c in cells)))
    plot(setup, folder, bounds, learned)
    return rows


@_cli.costs("contrastive_exact.png")
def plot(setup: Setup, folder: Path, bounds: dict, learned: dict) -> None:
    """Draws the bounds by mutual information, one axis per batch size."""
    sizes = setup.batches
    fig, [axes] = figures.figure(1, len(sizes), size=(3.2 * len(sizes) + 0.8, 3.4))
    for ax, K in zip(axes, sizes, strict=True):
        information = list(setup.information)
        curves = {
            "mutual information": (information, information),
            "ln K": (information, [log(K)] * len(information)),
            "best critic": (information, [bounds[i, K][0] for i in information]),
            "trained critic": (information, [learned[i, K] for i in information]),
        }
        labels = {"xlabel": "mutual information (nats)", "ylabel": "bound (nats)"}
        figures.curves(ax, curves, **labels, title=f"batch K = {K}")
    figures.share_legend(fig)
    nets = f"MLPs {setup.model.width} x 2, {setup.run.steps} updates"
    caption = f"InfoNCE, Gaussians of {setup.model.dim} + {setup.model.dim} dimensions; {nets}"
    figures.save(fig, folder / "contrastive_exact.png", caption)


if __name__ == "__main__":
    _cli.main("contrastive_exact")
