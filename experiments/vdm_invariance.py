"""In continuous time the bound depends on the schedule by its ends alone: Kingma et al. 2021 (VDM), section 5, eq. 18

    python -m experiments.vdm_invariance        about 15 minutes on 2 cores; downloads nothing

A grid of 25 normals has a denoiser in closed form and a known entropy. With this denoiser the
continuous bound is the entropy plus the terms of the ends, whatever the schedule between equal
ends. The bound of T steps comes down to it as T grows. What the schedule does change is the
variance of the bound's estimate. VDM's monotone net, trained for that alone, lowers it. A straight
gamma has 197 squared nats; no gamma has less than 108 here, so the paper's factor of two cannot be
reached. Then 8x8 digits with a learned schedule. The net and the number of updates are
those of `ddpm_objectives`, so the bits can be compared.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aigc_jax import ddpm, figures, train
from aigc_jax.data import points
from aigc_jax.ddpm.process import beta_tilde, extract
from aigc_jax.train import Run
from aigc_jax.train.progress import counted
from experiments import _cli, _ddpm_arms, _diffusion, _pictures
from experiments._cli import Row, Scale, Source

CENTRES, STD = points.grid_modes() / 8**0.5, 0.05 / 8**0.5
LOW, HIGH = -13.3, 5.0  # VDM's, section 6
VDM = dict(schedule="learned", variance="beta_tilde", objective="vlb", times="low_discrepancy")


@dataclass(frozen=True)
class Setup:
    """Flags of vdm_invariance."""

    model: ddpm.Config = replace(_ddpm_arms.MODEL, T=1000, **VDM)
    run: Run = _ddpm_arms.run("runs/vdm_invariance")
    data: Source = Source("digits")
    samples: int = 40_000_000  # on which a bound of the grid is taken
    gamma_steps: int = 3000  # updates of the learned schedule of the grid
    steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)

    def __post_init__(self):
        if self.model.schedule != "learned":
            raise ValueError(f"model.schedule must be learned, got {self.model.schedule}")
        rising = list(self.steps) == sorted(set(self.steps))
        if len(self.steps) < 2 or min(self.steps) < 2 or not rising:
            raise ValueError(f"steps must be two or more rising numbers above 1, got {self.steps}")
        _cli.at_least(self, samples=40_000, gamma_steps=1)  # two batches: the error needs them


SMOKE_RUN = _ddpm_arms.smoke_run("runs/vdm_invariance-smoke")
SMALL = dict(samples=100_000, gamma_steps=200, steps=(8, 64))
SMOKE = Setup(replace(_ddpm_arms.SMOKE, T=50, **VDM), SMOKE_RUN, **SMALL)
DIFFERS = "8x8 digits (CIFAR-10, 31 residual blocks of 128)"
SCALES = {
    "smoke": Scale(SMOKE, "few samples, 40 updates of one dense layer on digits"),
    "cpu": Scale(Setup(), f"a grid of normals with its exact denoiser, and {DIFFERS}"),
}
SPREAD = "grid: largest difference of a bound from the entropy and end terms (nats)"
TWO = "grid: largest difference between two schedules (nats)"
FALLS = "grid: least fall of the T-step bound from a T to the next (nats)"
QUIETER = (
    "grid: variance of the bound's estimate, linear over learned (oracle: over the least possible)"
)
DIGITS = "digits: continuous bound, learned gamma, test (bits per dim; paper: CIFAR-10)"
CRITERIA = {SPREAD: "< 0.01", TWO: "< 0.01", FALLS: "> 0", QUIETER: "> 1.3"}
INVARIANTS = {SPREAD: "< 0.3", FALLS: CRITERIA[FALLS]}


def stretched(f):
    """Returns gamma with VDM's ends and the form of f on [0, 1]."""
    low, high = f(jnp.zeros(1)), f(jnp.ones(1))
    return lambda u: LOW + (HIGH - LOW) * (f(u) - low) / (high - low)


SCHEDULES = {
    "linear": stretched(lambda u: u),
    # -log SNR of alpha = cos, from nearly no noise to nearly no signal
    "cosine": stretched(lambda u: 2 * jnp.log(jnp.tan(jnp.pi / 2 * (0.01 + 0.98 * u)))),
    "bent": stretched(lambda u: u**3 + 0.1 * u),
}


def sample_grid(k_mode, k_x, n: int):
    """Samples n points [n, 2] of the grid."""
    centres = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(k_mode, (n,), 0, 25)]
    return centres + STD * jax.random.normal(k_x, (n, 2))


def levels(gamma_u):
    """Returns the signal and noise levels [B, 1] at minus log signal-to-noise ratios [B]."""
    return tuple(jnp.sqrt(jax.nn.sigmoid(sign * gamma_u))[:, None] for sign in (-1, 1))


def exact(x_t, gamma_u):
    """Returns the grid's E[eps | x_t] at minus log signal-to-noise ratios [B]."""
    return _diffusion.denoise(x_t, *levels(gamma_u), CENTRES, STD)


def squared_error(gamma_u, key):
    """Returns |eps - E[eps | x_t]|^2 [n] at random points, at minus log-SNR gamma_u [n]."""
    k_mode, k_x, k_eps = jax.random.split(key, 3)
    x_0 = sample_grid(k_mode, k_x, len(gamma_u))
    eps = jax.random.normal(k_eps, x_0.shape)
    signal, noise = levels(gamma_u)
    return ((eps - exact(signal * x_0 + noise * eps, gamma_u)) ** 2).sum(-1)


def continuous_bound(gamma, key, n: int):
    """Returns the continuous bound at n random points, one u for each: [n], nats."""
    k_mode, k_x, k_bound = jax.random.split(key, 3)
    x_0 = sample_grid(k_mode, k_x, n)
    return ddpm.continuous_vlb(gamma, lambda x, u: exact(x, gamma(u)), x_0, k_bound)


def entropy_and_ends() -> tuple[float, float]:
    """Returns the grid's entropy in nats (its modes do not overlap), and what the ends add to it.

    At u = 0 the decoder N(x_0; x_u / alpha, s2) takes the place of the posterior of x_0, a normal
    of variance 1 / (1 / std^2 + 1 / s2). That adds log(1 + s2 / std^2) nats in two dimensions. At u
    = 1 it is KL(q(x_1) || N(0, I)), by quadrature: q(x_1) is the shrunken grid under noise.
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
    """Returns the continuous bound at many points: [batches, batch], nats."""
    one = jax.jit(lambda key: continuous_bound(gamma, key, batch))
    keys = jax.random.split(jax.random.key(seed), setup.samples // batch)
    return np.stack([np.asarray(one(key), np.float64) for key in counted("bound", keys)])


def learn_gamma(setup: Setup):
    """Trains VDM's net, its ends fixed, to make the squared estimate small (VDM, appendix I.2)."""
    params = ddpm.init_gamma(jax.random.key(setup.run.seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, setup.gamma_steps))

    def gamma_of(params):
        fixed = {**params, "ends": jnp.array([LOW, HIGH])}
        return lambda u: ddpm.gamma(fixed, u)

    def loss(params, key):
        return (continuous_bound(gamma_of(params), key, 512) ** 2).mean()

    def one(carry, key):
        params, state = carry
        update, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, update), state), None

    keys = jax.random.split(jax.random.key(setup.run.seed + 1), setup.gamma_steps)
    train_all = jax.jit(lambda carry, keys: jax.lax.scan(one, carry, keys))
    (params, _), _ = train_all((params, optimizer.init(params)), keys)
    return gamma_of(params)


def least_variance() -> tuple[float, float]:
    """Returns the variance of the diffusion term's estimate: of linear gamma, and the least of any.

    At gamma the estimate is X = gamma' D / 2 with D the squared error of eps. E X^2 = int gamma'
    E[D^2] / 4 dgamma is least where gamma' ~ E[D^2]^-1/2, by Cauchy and Schwarz: (int E[D^2]^1/2 /
    2 dgamma)^2.
    """
    g = np.linspace(LOW, HIGH, 367)

    @jax.jit
    def moments(g, key):
        D = squared_error(jnp.full(20_000, g), key)
        return D.mean(), (D**2).mean()

    each = [moments(x, jax.random.key(i)) for i, x in enumerate(g.astype(np.float32))]
    first, second = np.array(each).T
    mean = np.trapezoid(first, g) / 2
    straight = (HIGH - LOW) * np.trapezoid(second, g) / 4 - mean**2
    return float(straight), float(np.trapezoid(np.sqrt(second) / 2, g) ** 2 - mean**2)


def in_steps(setup: Setup, T: int, key) -> float:
    """Returns the T-step bound of the grid under linear gamma, posterior variances, nats."""
    gamma = SCHEDULES["linear"]
    schedule = ddpm.discretise(gamma, T)
    # VDM's variance of the decoder, then the posterior's.
    variance = jnp.append(ddpm.noise_variance(schedule)[0], beta_tilde(schedule)[1:])
    n = max(2000, min(100_000, setup.samples // T))

    @jax.jit
    def one(key):
        k_mode, k_x, k_bound = jax.random.split(key, 3)
        x_0 = sample_grid(k_mode, k_x, n)

        def eps_fn(x, t):
            return exact(x, gamma(t / (T - 1)))

        nats = ddpm.vlb(schedule, eps_fn, x_0, k_bound, sigma2=lambda x, t: extract(variance, t, x))
        return nats.mean()

    return float(one(key))


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains on the digits; takes the bounds of the grid under every schedule and in T steps."""
    training, test = _pictures.parts(setup.data, "train", "test")
    setup = _pictures.adopt(setup, SCALES, training.info)
    place = replace(setup.run, folder=str(folder / "digits"))
    result = train.fit(ddpm.make, setup.model, place, training)
    found = _cli.kept()
    bits = [train.evaluate(result, test, seed=seed)["nll_bits_per_dim"] for seed in range(8)]
    found.append(Row(DIGITS.replace("digits", setup.data.name), float(np.mean(bits)), 2.65))
    entropy, ends = entropy_and_ends()
    truth = entropy + ends
    found.append(Row("grid: its entropy (nats)", "-", oracle=entropy))
    found.append(Row("grid: what the ends add (nats)", "-", oracle=ends))
    gammas = {**SCHEDULES, "learned": learn_gamma(setup)}
    values, variance, finite = [], {}, {}
    for i, (name, gamma) in enumerate(gammas.items()):
        each = estimates(gamma, setup, seed=10 + i)
        means = each.mean(1)  # u is spread over a batch: only batches are independent
        values.append(float(means.mean()))
        variance[name] = float(each.var())
        what, error = f"grid, {name} gamma:", float(means.std(ddof=1) / len(means) ** 0.5)
        value = Row(f"{what} continuous bound (nats; +- s.e.)", values[-1], None, error, truth)
        found += [value, Row(f"{what} variance of the estimate (squared nats)", variance[name])]
    found.append(Row(SPREAD, max(abs(value - truth) for value in values)))
    found.append(Row(TWO, max(values) - min(values)))
    for T in setup.steps:
        finite[T] = in_steps(setup, T, jax.random.key(setup.run.seed))
        found.append(Row(f"grid, linear gamma: bound of {T} steps (nats)", finite[T], oracle=truth))
    found.append(Row(FALLS, float(-np.diff(list(finite.values())).max())))
    straight, least = least_variance()
    found.append(Row(QUIETER, variance["linear"] / variance["learned"], oracle=straight / least))
    plot(setup, folder, gammas, finite, truth, variance)
    return found


@_cli.costs("vdm_invariance.png")
def plot(setup: Setup, folder: Path, gammas: dict, finite: dict, truth: float, variance) -> None:
    """Draws the schedules, the loss of each at every u, and the bound of T steps."""
    fig, ((schedules, losses, steps),) = figures.figure(1, 3)
    u, curves, each = np.linspace(0, 1, 201, dtype=np.float32), {}, {}
    for name, gamma in gammas.items():
        curves[f"{name}: variance {variance[name]:.0f}"] = u, np.asarray(gamma(jnp.asarray(u)))
    ylabel, title = "gamma, log noise-to-signal ratio", "schedules with equal ends"
    figures.curves(schedules, curves, xlabel="u", ylabel=ylabel, title=title)
    schedules.set_ylim(LOW - 1, HIGH + 14)  # room for the legend

    @partial(jax.jit, static_argnames="gamma")
    def loss(u, key, gamma):
        g, rate = jax.jvp(gamma, (jnp.full(2000, u),), (jnp.ones(2000),))
        return (0.5 * rate * squared_error(g, key)).mean()

    coarse, key = u[::4], jax.random.key(0)
    for name, gamma in gammas.items():
        each[name] = coarse, [float(loss(x, key, gamma)) for x in coarse]
    title = "loss of each by u; all areas are equal (cosine leaves the panel)"
    figures.curves(losses, each, xlabel="u", ylabel="loss at u (nats)", title=title)
    losses.set_ylim(-1, 60)  # under cosine it begins far above
    curve = list(finite), np.array(list(finite.values())) - truth
    title = "linear gamma in T steps"
    ylabel = "bound less the continuous one (nats)"
    figures.curves(steps, {"": curve}, xlabel="steps T", ylabel=ylabel, title=title)
    steps.set(xscale="log", yscale="log")
    steps.set_xticks(list(finite), list(map(str, finite)), rotation=45)
    steps.xaxis.minorticks_off()
    count = setup.samples // 20_000 * 20_000  # whole batches
    caption = f"25 normals, exact denoiser, gamma from {LOW} to {HIGH}, {count:,} points per "
    caption += "bound. The variance of its estimate is in squared nats."
    figures.save(fig, folder / "vdm_invariance.png", caption)


if __name__ == "__main__":
    _cli.main("vdm_invariance")
