"""The bound in continuous time knows the schedule by its ends alone: Kingma et al. 2021 (VDM), section 5, equation 18

    python -m experiments.vdm_invariance        about 15 minutes on 2 cores; downloads nothing

A grid of 25 normals has a denoiser in closed form and an entropy: with it the continuous bound is that entropy and the
terms of the ends, whatever the schedule between equal ends, and T steps come down to it as T grows. What the schedule
does change is the variance of the bound's estimate: one learned for that alone, VDM's monotone net, lessens it (197
squared nats for a straight gamma; no gamma has less than 108 here, so twice as quiet, as the paper has it, cannot be
asked for). Then 8x8 digits with a learned schedule, by the net and the updates of `ddpm_objectives`, whose arms' bits
stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from aigc_jax import ddpm, figures, train
from aigc_jax.data import points
from aigc_jax.ddpm.process import at, beta_tilde
from aigc_jax.train import Run
from aigc_jax.train.progress import counted

from experiments import _cli, _diffusion, _pictures, ddpm_objectives
from experiments._cli import Row, Scale, Source

CENTRES, STD = points.grid_modes() / 8**0.5, 0.05 / 8**0.5
LOW, HIGH = -13.3, 5.0  # VDM's, section 6
MODEL = replace(
    ddpm_objectives.MODEL,
    schedule="learned",
    variance="beta_tilde",
    objective="vlb",
    times="low_discrepancy",
    T=1000,
)
RUN = replace(ddpm_objectives.RUN, folder="runs/vdm_invariance")


@dataclass(frozen=True)
class Setup:
    """Flags of vdm_invariance."""

    model: ddpm.Config = MODEL
    run: Run = RUN
    data: Source = Source("digits")
    samples: int = 40_000_000  # on which a bound of the grid is taken
    gamma_steps: int = 3000  # updates of the learned schedule of the grid
    steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)

    def __post_init__(self):
        if self.model.schedule != "learned":
            raise ValueError(f"model.schedule must be learned, got {self.model.schedule}")
        if (
            self.samples < 20_000
            or self.gamma_steps < 1
            or len(self.steps) < 2
            or min(self.steps) < 2
        ):
            raise ValueError(
                "samples must be at least 20,000, gamma_steps positive, and steps two numbers above 1"
            )


SCALES = {
    "smoke": Scale(
        Setup(
            replace(MODEL, net=ddpm.Net("mlp", (32,), dropout=0.0), ema=0.9, T=50),
            replace(RUN, folder="runs/vdm_invariance-smoke", steps=40, eval_every=0, save_every=0),
            samples=100_000,
            gamma_steps=200,
            steps=(8, 64),
        ),
        "few samples, 40 updates of one dense layer on digits",
    ),
    "cpu": Scale(
        Setup(),
        "a grid of normals with its exact denoiser, and 8x8 digits (CIFAR-10, 31 residual blocks of 128)",
    ),
}


def bound_of(name: str) -> str:
    return f"grid, {name} gamma: continuous bound (nats; +- s.e.)"


SPREAD = "grid: largest difference of a bound from the entropy and end terms (nats)"
TWO = "grid: largest difference between two schedules (nats)"
FALLS = "grid: least fall of the T-step bound from a T to the next (nats)"
QUIETER = (
    "grid: variance of the bound's estimate, linear over learned (oracle: over the least possible)"
)
DIGITS = "digits: continuous bound, learned gamma, test (bits per dim; paper: CIFAR-10)"
CRITERIA = {
    SPREAD: "< 0.01",
    TWO: "< 0.01",
    FALLS: "> 0",
    QUIETER: "> 1.3",
}
INVARIANTS = {SPREAD: "< 0.3", FALLS: CRITERIA[FALLS]}


def _stretched(f):
    """gamma with VDM's ends and the form of f on [0, 1]."""
    low, high = f(jnp.zeros(1)), f(jnp.ones(1))
    return lambda u: LOW + (HIGH - LOW) * (f(u) - low) / (high - low)


SCHEDULES = {
    "linear": _stretched(lambda u: u),
    # minus the log signal-to-noise ratio of alpha = cos, from where it is nearly 0 noise to nearly 0 signal
    "cosine": _stretched(lambda u: 2 * jnp.log(jnp.tan(jnp.pi / 2 * (0.01 + 0.98 * u)))),
    "bent": _stretched(lambda u: u**3 + 0.1 * u),
}


def exact(x_t, gamma_u):
    """The grid's denoiser at minus log signal-to-noise ratios [B]."""
    signal, noise = (jnp.sqrt(jax.nn.sigmoid(sign * gamma_u))[:, None] for sign in (-1, 1))
    return _diffusion.denoise(x_t, signal, noise, CENTRES, STD)


def entropy_and_ends() -> tuple[float, float]:
    """The grid's entropy in nats, its modes being far apart; and what the two ends add to the bound.

    At u = 0 the decoder N(x_0; x_u / alpha, s2) is scored in place of the posterior of x_0, a normal of variance
    1 / (1 / std^2 + 1 / s2): log(1 + s2 / std^2) nats in two dimensions. At u = 1 it is KL(q(x_1) || N(0, I)), by
    quadrature: q(x_1) is the grid, shrunken and under noise.
    """
    entropy = float(np.log(25) + np.log(2 * np.pi * np.e * STD**2))
    first = float(np.log1p(np.exp(LOW) / STD**2))
    a = 1 / (1 + np.exp(HIGH))
    side = np.linspace(-7, 7, 701)
    x = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    log_q = -_diffusion.mixture_nll(x, a**0.5 * CENTRES, float(np.sqrt(a * STD**2 + 1 - a)))
    log_p = -np.log(2 * np.pi) - 0.5 * (x**2).sum(-1)
    last = float((np.exp(log_q) * (log_q - log_p)).sum() * (side[1] - side[0]) ** 2)
    return entropy, first + last


def estimates(gamma, setup: Setup, seed: int, batch: int = 20_000) -> np.ndarray:
    """The continuous bound at many points, one u each: [samples], nats."""

    @jax.jit
    def one(key):
        k_mode, k_x, k_bound = jax.random.split(key, 3)
        x_0 = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(k_mode, (batch,), 0, 25)]
        x_0 = x_0 + STD * jax.random.normal(k_x, (batch, 2))
        return ddpm.continuous_vlb(gamma, lambda x, u: exact(x, gamma(u)), x_0, k_bound)

    keys = jax.random.split(jax.random.key(seed), setup.samples // batch)
    return np.stack([np.asarray(one(key), np.float64) for key in counted("bound", keys)])


def learn_gamma(setup: Setup):
    """VDM's net, its ends held, trained to make the squared estimate small (VDM, appendix I.2)."""
    params = ddpm.init_gamma(jax.random.key(setup.run.seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, setup.gamma_steps))

    def loss(params, key):
        fixed = {**params, "ends": jnp.array([LOW, HIGH])}

        def gamma(u):
            return ddpm.gamma(fixed, u)

        k_mode, k_x, k_bound = jax.random.split(key, 3)
        x_0 = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(k_mode, (512,), 0, 25)]
        x_0 = x_0 + STD * jax.random.normal(k_x, (512, 2))
        return (
            ddpm.continuous_vlb(gamma, lambda x, u: exact(x, gamma(u)), x_0, k_bound) ** 2
        ).mean()

    def one(carry, key):
        params, state = carry
        grad = jax.grad(loss)(params, key)
        update, state = optimizer.update(grad, state)
        return (optax.apply_updates(params, update), state), None

    keys = jax.random.split(jax.random.key(setup.run.seed + 1), setup.gamma_steps)
    (params, _), _ = jax.jit(lambda carry, keys: jax.lax.scan(one, carry, keys))(
        (params, optimizer.init(params)), keys
    )
    fixed = {**params, "ends": jnp.array([LOW, HIGH])}
    return lambda u: ddpm.gamma(fixed, u)


def least_variance() -> tuple[float, float]:
    """Variance of the diffusion term's estimate under linear gamma, and the least that any gamma could have.

    At gamma the estimate is X = gamma' D / 2 with D the squared error of eps. E X^2 = int gamma' E[D^2] / 4 dgamma is
    least where gamma' ~ E[D^2]^-1/2, by Cauchy and Schwarz: (int E[D^2]^1/2 / 2 dgamma)^2.
    """
    g = np.linspace(LOW, HIGH, 367)

    @jax.jit
    def moments(g, key):
        k_mode, k_x, k_eps = jax.random.split(key, 3)
        n = 20_000
        x_0 = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(k_mode, (n,), 0, 25)]
        x_0, eps = x_0 + STD * jax.random.normal(k_x, (n, 2)), jax.random.normal(k_eps, (n, 2))
        all_g = jnp.full(n, g)
        signal, noise = (jnp.sqrt(jax.nn.sigmoid(sign * all_g))[:, None] for sign in (-1, 1))
        D = ((eps - exact(signal * x_0 + noise * eps, all_g)) ** 2).sum(-1)
        return D.mean(), (D**2).mean()

    first, second = np.array(
        [moments(x, jax.random.key(i)) for i, x in enumerate(g.astype(np.float32))]
    ).T
    mean = np.trapezoid(first, g) / 2
    straight = (HIGH - LOW) * np.trapezoid(second, g) / 4 - mean**2
    return float(straight), float(np.trapezoid(np.sqrt(second) / 2, g) ** 2 - mean**2)


def in_steps(setup: Setup, T: int, key) -> float:
    """The T-step bound of the grid under linear gamma, posterior variances, nats."""
    gamma = SCHEDULES["linear"]
    schedule = ddpm.discretise(gamma, T)
    variance = jnp.append(
        ddpm.noise2(schedule)[0], beta_tilde(schedule)[1:]
    )  # of the decoder: VDM's
    n = max(2000, min(100_000, setup.samples // T))

    @jax.jit
    def one(key):
        k_mode, k_x, k_bound = jax.random.split(key, 3)
        x_0 = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(k_mode, (n,), 0, 25)]
        x_0 = x_0 + STD * jax.random.normal(k_x, (n, 2))

        def eps_fn(x, t):
            return exact(x, gamma(t / (T - 1)))

        return ddpm.vlb(
            schedule, eps_fn, x_0, k_bound, sigma2=lambda x, t: at(variance, t, x)
        ).mean()

    return float(one(key))


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains on the digits; then the grid under every schedule and number of steps."""
    training, test = _pictures.parts(setup.data, "train", "test")
    setup = _pictures.adopt(setup, SCALES, training.info)
    result = train.fit(
        ddpm.make, setup.model, replace(setup.run, folder=str(folder / "digits")), training
    )
    found = _cli.kept()
    bits = [train.evaluate(result, test, seed=seed)["nll_bits_per_dim"] for seed in range(8)]
    found.append(Row(DIGITS.replace("digits", setup.data.name), float(np.mean(bits)), 2.65))
    entropy, ends = entropy_and_ends()
    truth = entropy + ends
    found += [
        Row("grid: its entropy (nats)", "-", oracle=entropy),
        Row("grid: what the ends add (nats)", "-", oracle=ends),
    ]
    gammas = {**SCHEDULES, "learned": learn_gamma(setup)}
    values, variance, finite = [], {}, {}
    for i, (name, gamma) in enumerate(gammas.items()):
        each = estimates(gamma, setup, seed=10 + i)
        means = each.mean(
            1
        )  # u is spread over a batch: batches are independent, points in one are not
        error = float(means.std(ddof=1) / len(means) ** 0.5)
        values.append(float(means.mean()))
        variance[name] = float(each.var())
        found += [
            Row(bound_of(name), values[-1], error=error, oracle=truth),
            Row(f"grid, {name} gamma: variance of the estimate (squared nats)", variance[name]),
        ]
    found += [
        Row(SPREAD, max(abs(value - truth) for value in values)),
        Row(TWO, max(values) - min(values)),
    ]
    for T in setup.steps:
        finite[T] = in_steps(setup, T, jax.random.key(setup.run.seed))
        found.append(Row(f"grid, linear gamma: bound of {T} steps (nats)", finite[T], oracle=truth))
    falls = list(finite.values())
    found.append(Row(FALLS, min(a - b for a, b in zip(falls, falls[1:], strict=False))))
    straight, least = least_variance()
    found.append(Row(QUIETER, variance["linear"] / variance["learned"], oracle=straight / least))
    plot(setup, folder, gammas, finite, truth, variance)
    return found


@_cli.costs("vdm_invariance.png")
def plot(
    setup: Setup, folder: Path, gammas: dict, finite: dict, truth: float, variance: dict
) -> None:
    """The schedules, what each loses where, and the bound of T steps."""
    fig, (axes,) = figures.figure(1, 3, size=(14, 4.4))
    u = np.linspace(0, 1, 201, dtype=np.float32)
    shapes = {
        f"{name}: variance {variance[name]:.0f}": (u, np.asarray(gamma(jnp.asarray(u))))
        for name, gamma in gammas.items()
    }
    figures.curves(
        axes[0],
        shapes,
        xlabel="u",
        ylabel="gamma, log noise-to-signal ratio",
        title="equal ends; variance in squared nats",
    )

    @partial(jax.jit, static_argnames="gamma")
    def lost(u, key, gamma):
        k_mode, k_x, k_eps = jax.random.split(key, 3)
        n = 2000
        x_0 = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(k_mode, (n,), 0, 25)]
        x_0, eps = x_0 + STD * jax.random.normal(k_x, (n, 2)), jax.random.normal(k_eps, (n, 2))
        g, rate = jax.jvp(gamma, (jnp.full(n, u),), (jnp.ones(n),))
        signal, noise = (jnp.sqrt(jax.nn.sigmoid(sign * g))[:, None] for sign in (-1, 1))
        return (0.5 * rate * ((eps - exact(signal * x_0 + noise * eps, g)) ** 2).sum(-1)).mean()

    few = u[::4]
    figures.curves(
        axes[1],
        {
            name: (few, np.array([float(lost(x, jax.random.key(0), gamma)) for x in few]))
            for name, gamma in gammas.items()
        },
        xlabel="u",
        ylabel="loss at u (nats)",
        title="areas are equal: the bound",
    )
    T = np.array(list(finite))
    figures.curves(
        axes[2],
        {"linear gamma, posterior variances": (T, np.array(list(finite.values())) - truth)},
        xlabel="steps T",
        ylabel="bound less the continuous one (nats)",
        title="the bound of T steps comes down",
    )
    axes[2].set(xscale="log", yscale="log")
    caption = (
        f"25 normals, exact denoiser, gamma from {LOW} to {HIGH}; {setup.samples:,} points a bound"
    )
    figures.save(fig, folder / "vdm_invariance.png", caption)


if __name__ == "__main__":
    _cli.main("vdm_invariance")
