"""Two data sets whose truth is known: Sohl-Dickstein et al. 2015, table 1 (the swiss roll and the heartbeat), figure 1

    python -m experiments.heartbeat_and_swiss_roll    about 4 minutes on 2 cores; downloads nothing

A heartbeat is a one in every fifth of 20 bins at a random phase: five sequences. So log2 p = -2.322
bits is the best that any model can have, and a bound K above it would prove an error. The binomial
process keeps bits or draws them anew, here in 200 steps (scale paper: the paper's 2000, and 100,000
updates; not run here). The swiss roll has unit variance, with noise of 0.01 across it. The paper
does not give its width, and K depends on it. The roll's density is known by quadrature. It takes 40
steps as in the paper, at levels evenly spaced in log noise (the paper learns them). The variance of
each coordinate is learned, ours between beta and beta-tilde.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, ddpm, figures, train
from aigc_jax.core import EMA, Family, Optim, make_step, start
from aigc_jax.ddpm.bounds import low_discrepancy, vlb_term
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale

LN2 = float(np.log(2))
BEAT_NET = ddpm.NetConfig("mlp", (50, 50, 50), dropout=0.0)
BEAT_OPTIM = Optim(lr=2e-3, clip=1.0, decay=30_000, floor=0.02)
BEAT = ddpm.DiscreteConfig(T=200, net=BEAT_NET, ema=0.999, optim=BEAT_OPTIM)


@dataclass(frozen=True)
class RollConfig:
    """Points by T normal steps, with learned mean and variance; the levels reach to `width`."""

    dim: int = 2
    T: int = 40
    width: float = 0.01  # of the data where they are thinnest: the first level's noise
    net: ddpm.NetConfig = ddpm.NetConfig("mlp", (128, 128, 128), dropout=0.0)
    ema: float = 0.999
    micro: int = 1
    optim: Optim = Optim(lr=1e-3, clip=1.0, decay=20_000, floor=0.02)

    def __post_init__(self):
        if self.dim != 2:
            raise ValueError(f"the roll lies in the plane: roll.dim must be 2, got {self.dim}")
        if not 0 < self.width < 1:
            raise ValueError(f"width must lie in (0, 1), got {self.width}")
        _cli.at_least(self, prefix="roll.", T=2)
        if self.net.kind != "mlp" or self.net.dropout:
            raise ValueError("net must be an mlp without dropout")


ROLL = RollConfig()
EVERY = dict(eval_every=2000, save_every=10_000, log_every=200, keep=1, steps_per_call=200)
RUN = Run("runs/heartbeat_and_swiss_roll", 30_000, 200, **EVERY)


@dataclass(frozen=True)
class Setup:
    """Flags of heartbeat_and_swiss_roll."""

    beat: ddpm.DiscreteConfig = BEAT
    roll: RollConfig = ROLL
    run: Run = RUN
    roll_run: Run = replace(RUN, steps=20_000, batch_size=512)  # folder and seed are run's
    sequences: int = 10_000  # on which K is measured
    points: int = 10_000
    samples: int = 1000

    def __post_init__(self):
        if self.beat.dim % 5:
            raise ValueError(f"beat.dim must be a multiple of 5, got {self.beat.dim}")
        _cli.at_least(self, sequences=10, points=10, samples=10)


SMOKE = Setup(
    replace(BEAT, T=20, ema=0.99, optim=Optim(lr=5e-3, clip=1.0)),
    replace(ROLL, width=0.1, ema=0.99, net=ddpm.NetConfig("mlp", (32, 32), dropout=0.0)),
    replace(RUN, folder=f"{RUN.folder}-smoke", steps=1500, eval_every=500, steps_per_call=100),
    replace(RUN, steps=600, eval_every=300, steps_per_call=100),
    sequences=500,
    points=500,
    samples=500,
)
PAPER = Setup(
    replace(BEAT, T=2000, optim=replace(BEAT_OPTIM, decay=100_000)),
    run=replace(RUN, folder=f"{RUN.folder}-paper", steps=100_000),
)
DIFFERS = (
    "its net predicts x_0, given the time (x_{t-1}, one readout per step), with SiLU, by Adam "
    "(sigmoids, SFO), over cosine levels (1 / (T - t + 1)); the roll by an MLP of 128s (a net of "
    "16 radial units), its width and its levels ours"
)
SCALES = {
    "smoke": Scale(SMOKE, "short runs of small nets"),
    "cpu": Scale(Setup(), f"200 steps for the heartbeat (2000), {DIFFERS}"),
    "paper": Scale(PAPER, f"the heartbeat: {DIFFERS}"),
}
TRUE = -np.log2(5)
K_BEAT = "heartbeat: K, a lower bound on log2 p (bits a sequence; +- s.e.)"
OVER = "heartbeat: K above the truth (s.e.)"
VALID = "heartbeat: samples that are one of the five (%)"
PHASES = "heartbeat: rarest and most frequent phase among them, furthest from a fifth (relative, %)"
NULL_BEAT = "heartbeat: K less L_null, bits drawn alone (bits)"
K_ROLL = "swiss roll: K, a lower bound on log2 p (bits a point; +- s.e.)"
OVER_ROLL = "swiss roll: K above the truth (s.e.)"
LESS = "swiss roll: truth less K (bits)"
NULL_ROLL = "swiss roll: K less L_null, a normal (bits)"
BOUNDS = {OVER: "<= 3", OVER_ROLL: "<= 3"}
CRITERIA = {K_BEAT: ">= -2.60", VALID: ">= 95", PHASES: "<= 20", LESS: "< 0.5", **BOUNDS}
INVARIANTS = {K_BEAT: "> -14.4", **BOUNDS}


def beats(dim: int) -> np.ndarray:
    """Returns the five heartbeats [5, dim]."""
    return (np.arange(dim)[None] % 5 == np.arange(5)[:, None]).astype(np.float32)


def heartbeats(n: int, dim: int, seed: int) -> data.Data:
    """Returns n heartbeats whose phases are as equally frequent as n allows."""
    order = np.random.default_rng(seed).permutation(np.arange(n) % 5)
    about = {"name": "heartbeat", "n": n, "seed": seed}
    return data.from_arrays({"points": beats(dim)[order]}, source=about)


def spiral(u: np.ndarray) -> np.ndarray:
    """Returns the middle of the roll at u in [0, 1], scaled to a mean variance of 1."""
    middle = _spiral(np.linspace(0, 1, 100_001))
    return (_spiral(u) - middle.mean(0)) / np.sqrt(middle.var(0).mean())


def _spiral(u):
    t = 1.5 * np.pi * (1 + 2 * u)
    return np.stack([t * np.cos(t), t * np.sin(t)], -1)


def rolls(n: int, noise: float, seed: int) -> data.Data:
    """Returns n points of the roll."""
    rng = np.random.default_rng(seed)
    x = spiral(rng.random(n)) + noise * rng.standard_normal((n, 2))
    about = {"name": "swiss_roll of variance 1", "n": n, "noise": noise, "seed": seed}
    return data.from_arrays({"points": x.astype(np.float32)}, source=about)


def roll_log2(x: np.ndarray, noise: float, cells: int = 50_000) -> np.ndarray:
    """Returns log2 p(x) [N] of the roll, by the midpoint rule along it."""
    centres, out = spiral((np.arange(cells) + 0.5) / cells), []
    for part in np.array_split(x.astype(np.float64), -(-len(x) // 100)):
        squared = ((part[:, None] - centres[None]) ** 2).sum(-1) / (2 * noise**2)
        least = squared.min(-1)
        inside = np.log(np.exp(least[:, None] - squared).mean(-1)) - least
        out.append(inside - np.log(2 * np.pi * noise**2))
    return np.concatenate(out) / LN2


def bits(family: Family, state, x: np.ndarray, key) -> np.ndarray:
    """Returns K [N], the bound on log2 p of each point."""
    nats = jax.jit(family.evaluate)(state, {"points": jnp.asarray(x)}, key)["nll_nats"]
    return -np.asarray(nats, np.float64) / LN2


def heartbeat_rows(setup: Setup) -> tuple[list[Row], np.ndarray]:
    """Trains on heartbeats; returns the rows and the first 40 samples."""
    cfg, run = setup.beat, replace(setup.run, folder=str(Path(setup.run.folder) / "heartbeat"))
    held = heartbeats(1000, cfg.dim, 2)
    result = train.fit(ddpm.make_discrete, cfg, run, heartbeats(10_000, cfg.dim, 1), valid=held)
    test = _cli.arrays(heartbeats(setup.sequences, cfg.dim, 3))["points"]
    K = bits(ddpm.make_discrete(replace(cfg, terms=0)), result.state, test, jax.random.key(4))
    mean, error = K.mean(), K.std(ddof=1) / len(K) ** 0.5
    x = train.sample(result, jax.random.key(setup.run.seed), n=setup.samples, chunk=setup.samples)
    counts = np.array([(x == one).all(-1).sum() for one in beats(cfg.dim)])
    null = -cfg.dim * (0.2 * np.log2(5) + 0.8 * np.log2(1.25))
    share = counts / max(1, counts.sum())
    return [
        Row(K_BEAT, float(mean), -2.414, float(error), TRUE),
        Row(OVER, float((mean - TRUE) / error)),
        Row(NULL_BEAT, float(mean - null), 12.024, oracle=float(TRUE - null)),
        Row(VALID, 100 * float(counts.sum() / len(x))),
        Row(PHASES, 500 * float(np.abs(share - 0.2).max())),
    ], x[:40]


def levels(cfg: RollConfig) -> ddpm.Schedule:
    """Returns T levels, evenly in log noise-to-signal ratio from the width to e^5, almost noise."""
    low = 2 * np.log(cfg.width)
    return ddpm.discretise(lambda u: low + (5 - low) * u, cfg.T)


def predicted(cfg: RollConfig, params, x_t, t):
    """Returns what the net predicts from x_t at step t: v, and the raw variance."""
    net = ddpm.MLP(cfg.net, 2 * cfg.dim)
    return jnp.split(net.apply({"params": params}, x_t, 1000.0 * t / cfg.T), 2, -1)


def model(cfg: RollConfig, params):
    """Returns the net as samplers and bounds take it with sigma2 = "learned"."""
    schedule = levels(cfg)

    def eps_fn(x_t, t):
        v, raw = predicted(cfg, params, x_t, t)
        return ddpm.convert(schedule, v, x_t, t, given="v", wanted="eps"), raw

    return eps_fn


def make_roll(cfg: RollConfig, *, axis_name: str | None = None) -> Family:
    """Returns the family, on batches `points` [B, d], trained on the bound at evenly spread t."""
    ema, schedule = EMA(cfg.ema), levels(cfg)

    def init(key):
        net = ddpm.MLP(cfg.net, 2 * cfg.dim)
        params = net.init(key, jnp.zeros((1, cfg.dim)), jnp.zeros(1))["params"]
        return start(params, cfg.optim, ema=ema)

    def loss(params, state, batch, key):
        k_t, k_eps = jax.random.split(key)
        x_0 = batch["points"]
        t = (low_discrepancy(k_t, len(x_0)) * cfg.T).astype(int)
        eps = jax.random.normal(k_eps, x_0.shape)
        nats = vlb_term(schedule, model(cfg, params), x_0, t, eps, sigma2="learned")
        return cfg.T * nats.mean(), (state.extra, {})

    def evaluate(state, batch, key):
        eps_fn = model(cfg, ema.read(state))
        return {"nll_nats": ddpm.vlb(schedule, eps_fn, batch["points"], key, sigma2="learned")}

    def sample(state, key, *, n):
        k_start, k_way = jax.random.split(key)
        x_T = jax.random.normal(k_start, (n, cfg.dim))
        return ddpm.sample_ddpm(schedule, model(cfg, ema.read(state)), x_T, k_way, sigma2="learned")

    step = make_step(loss, cfg.optim, ema=ema, micro=cfg.micro, axis_name=axis_name)
    return Family(init, step, evaluate, sample)


def roll_rows(setup: Setup) -> tuple[list[Row], dict, train.Result]:
    """Trains on the roll; returns the rows, data and samples as {title: points}, and the model."""
    cfg, folder = setup.roll, str(Path(setup.run.folder) / "roll")
    run = replace(setup.roll_run, folder=folder, seed=setup.run.seed)
    training, held = rolls(200_000, cfg.width, 1), rolls(1000, cfg.width, 2)
    result = train.fit(make_roll, cfg, run, training, valid=held)
    x = _cli.arrays(rolls(setup.points, cfg.width, 3))["points"]
    truth, K = roll_log2(x, cfg.width), bits(result.family, result.state, x, jax.random.key(5))
    (mean, gap), exact = (float(a.mean()) for a in (K, K - truth)), float(truth.mean())
    error, error_of_gap = (float(a.std(ddof=1) / len(x) ** 0.5) for a in (K, K - truth))
    n, null = 2 * setup.samples, float(-np.log2(2 * np.pi * np.e))
    drawn = train.sample(result, jax.random.key(setup.run.seed), n=n, chunk=n)
    found = [
        Row(K_ROLL, mean, 2.35, error, exact),
        Row(OVER_ROLL, gap / error_of_gap),
        Row(LESS, -gap),
        Row(NULL_ROLL, mean - null, 6.45, oracle=exact - null),
    ]
    return found, {"data": x[: len(drawn)], "samples, not chosen": drawn}, result


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains on both sets, takes K and samples."""
    found = _cli.kept()
    rows, sequences = heartbeat_rows(setup)
    found += rows
    rows, clouds, result = roll_rows(setup)
    found += rows
    plot(setup, folder, sequences, clouds, result, {row.quantity: row.ours for row in found})
    return found


@_cli.costs("heartbeat_and_swiss_roll.png")
def plot(setup: Setup, folder: Path, sequences, clouds: dict, result, K: dict) -> None:
    """Draws samples of both sets, and which way the net moves points, as the paper's figure 1."""
    fig, axes = figures.figure(2, 2)
    beat, *both, field = axes.ravel()
    beat.imshow(1 - sequences, cmap="gray", aspect="auto", interpolation="nearest")
    beat.set_xticks(range(0, setup.beat.dim, 5))
    beat.grid(False)
    beat.set(title="heartbeats: samples, not chosen", xlabel="bin", ylabel="sample")
    for ax, (name, x) in zip(both, clouds.items(), strict=True):
        figures.points(ax, x, title=f"swiss roll: {name}")
    cfg, step = result.config, 3 * setup.roll.T // 5

    @jax.jit
    def drift(params, x):
        t = jnp.full(len(x), step - 1)
        v, _ = predicted(cfg, params, x, t)
        return ddpm.convert(levels(cfg), v, x, t, given="v", wanted="x_0") - x

    plane = np.stack(np.meshgrid(*[np.linspace(-2, 2, 20)] * 2), -1).reshape(-1, 2)
    arrows = np.asarray(drift(_cli.weights(result), jnp.asarray(plane, jnp.float32)))
    field.quiver(*plane.T, *arrows.T, color=figures.COLOURS[0])
    title = f"swiss roll: predicted x_0 less x_t, step {step} of {cfg.T}"
    field.set(title=title, xlabel="x_1", ylabel="x_2")
    truth = K[K_ROLL] + K[LESS]
    beat, roll = f"T = {setup.beat.T}, K = {K[K_BEAT]:.2f}", f"T = {cfg.T}, K = {K[K_ROLL]:.2f}"
    caption = f"Heartbeat: {beat} bits, the truth is {TRUE:.2f}. Roll: {roll} bits, the truth is "
    caption += f"{truth:.2f}, noise {cfg.width}."
    figures.save(fig, folder / "heartbeat_and_swiss_roll.png", caption)


if __name__ == "__main__":
    _cli.main("heartbeat_and_swiss_roll")
