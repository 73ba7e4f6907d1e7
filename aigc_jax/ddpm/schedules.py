"""The levels of the noising process q: schedules, their tables, schedules of fewer steps.

    x_t = signal_t x_0 + noise_t eps,   eps ~ N(0, I)

The processes of Ho et al. 2020 ("DDPM") and its successors preserve variance: signal^2 + noise^2 =
1. Flow matching (Lipman et al. 2022; Liu et al. 2022) has straight paths: signal + noise = 1.

Steps are numbered 0 .. T-1: `alpha_bar[t]` is the paper's with index t + 1. Before step 0 it is 1.

The tables of a schedule are NumPy arrays in float64. `extract` casts them to the precision of x, at
least float32. A traced schedule, such as a learned one, keeps its own dtype. In float32,
1 - alpha_bar has no digits left at small t. So `noise_variance` sums it up from the betas, unless
`variance` is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Images [B, H, W, C], in [-1, 1] where nothing else is said; points [B, d]; latents [B, h, w, c].
Sample = Float[Array | np.ndarray, "B ..."]
Steps = Int[Array | np.ndarray, "B"]


class Schedule(NamedTuple):
    """The levels of x_t = signal x_0 + noise eps, the least noisy first.

    Other papers write alpha_t for signal and sigma_t for noise. DDPM's alpha_t is another number,
    1 - beta_t: see `step_signal_squared`.

    It has S levels: T of them in training, fewer after `respace`.

    Without `variance`, the process preserves variance: signal^2 + noise^2 = 1. With it, the path is
    free as long as noise / signal increases; `from_levels` finds its betas. The last signal may be
    0. There eps cannot give x_0, so samplers and bounds refuse the prediction eps.

    Samplers and bounds count on x_T ~ N(0, I): a path should end with little signal and noise 1.
    """

    beta: Any  # [S], variance of the noise that each step adds
    alpha_bar: Any  # [S], signal^2
    t: Any  # [S], steps of the training schedule, which the network is given; see `respace`
    variance: Any = None  # [S], noise^2; None: 1 - alpha_bar

    @property
    def signal(self):
        """The factor of x_0 in x_t, sqrt(alpha_bar) [S]."""
        return arrays(self)[2] ** 0.5

    @property
    def noise(self):
        """The factor of eps in x_t [S], sqrt(1 - alpha_bar) if variance is preserved."""
        return noise_variance(self) ** 0.5

    @property
    def preserves_variance(self) -> bool:
        """Whether signal^2 + noise^2 = 1."""
        return self.variance is None


# --------------------------------------------------------------------------- tables and look-ups


def array_namespace(x):
    """Returns jax.numpy for an array of JAX, which may be traced, else numpy."""
    return jnp if isinstance(x, jax.Array) else np


def at_least_float32(x) -> Array:
    """Returns x as a JAX array in its own precision, but at least float32."""
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))


def extract(table, t: Steps, x: Sample) -> Array:
    """Returns table[t], shaped to broadcast against x, in the precision of x (at least float32)."""
    return jnp.asarray(table, jnp.result_type(x, jnp.float32))[t].reshape(-1, *[1] * (x.ndim - 1))


def signal_and_noise(schedule: Schedule, t: Steps, x: Sample) -> tuple[Array, Array]:
    """Returns signal and noise of step t, shaped to broadcast against x."""
    signal, noise = schedule.signal, schedule.noise
    return extract(signal, t, x), extract(noise, t, x)


def arrays(schedule: Schedule):
    """Returns (xp, beta, alpha_bar): NumPy in float64, or jax.numpy for a traced schedule."""
    beta, alpha_bar, _, variance = schedule
    if any(isinstance(table, jax.core.Tracer) for table in (beta, alpha_bar, variance)):
        return jnp, jnp.asarray(beta), jnp.asarray(alpha_bar)
    return np, np.asarray(beta, np.float64), np.asarray(alpha_bar, np.float64)


def ratio(a, b, *, if_zero: float):
    """Returns a / b, and `if_zero` where b is 0.

    alpha_bar and the noise are 0 at levels that float32 cannot represent.
    """
    xp = array_namespace(b)
    return xp.where(b > 0, a / xp.where(b > 0, b, 1.0), if_zero)


def noise_variance(schedule: Schedule):
    """Returns noise^2 [S], the variance of the noise in x_t.

    If variance is preserved, this is 1 - alpha_bar, as precise as beta.
    """
    xp, beta, alpha_bar = arrays(schedule)
    if not schedule.preserves_variance:
        return xp.asarray(schedule.variance, beta.dtype)
    return xp.cumsum(beta * xp.append(1.0, alpha_bar[:-1]))


def previous(schedule: Schedule):
    """Returns alpha_bar and `noise_variance` of the step before; before step 0 they are 1 and 0."""
    xp, _, alpha_bar = arrays(schedule)
    return xp.append(1.0, alpha_bar[:-1]), xp.append(0.0, noise_variance(schedule)[:-1])


def step_signal_squared(schedule: Schedule):
    """Returns r^2 [S], r the factor of x_{t-1} in x_t; 1 - beta if variance is preserved.

    Computed as alpha_bar over the previous alpha_bar, because float32 loses 1 - beta near beta = 1.
    """
    return ratio(arrays(schedule)[2], previous(schedule)[0], if_zero=1.0)


def beta_tilde(schedule: Schedule):
    """Returns the variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7), 0 at step 0."""
    product = arrays(schedule)[1] * previous(schedule)[1]
    return ratio(product, noise_variance(schedule), if_zero=0.0)


def beta_tilde_clipped(schedule: Schedule):
    """Like `beta_tilde`, except that step 0, where it is 0, has the value of step 1.

    (Nichol & Dhariwal 2021, section 3.1.) A schedule of one step has beta there.
    """
    xp, beta, _ = arrays(schedule)
    tilde = beta_tilde(schedule)
    return xp.append(tilde[1:2] if len(tilde) > 1 else beta[:1], tilde[1:])


def log_sigma(schedule: Schedule):
    """Returns log(noise / signal) [S], which is minus half the log signal-to-noise ratio.

    It is finite where signal or noise is 0.
    """
    xp, _, alpha_bar = arrays(schedule)
    tiny = np.finfo(alpha_bar.dtype).tiny
    variance = xp.maximum(noise_variance(schedule), tiny)
    return 0.5 * (xp.log(variance) - xp.log(xp.maximum(alpha_bar, tiny)))


def angle(schedule: Schedule):
    """Returns phi [S] in 0 .. pi / 2, with signal = cos phi and noise = sin phi.

    (Salimans & Ho 2022, appendix D.)
    """
    signal, noise = schedule.signal, schedule.noise
    return arrays(schedule)[0].arctan2(noise, signal)


def flow_time(schedule: Schedule):
    """Returns the time [S] of the probability flow: `angle`, or on other paths u in 0 .. 1.

    u = noise / (signal + noise). On a straight path it is the noise itself.
    """
    if schedule.preserves_variance:
        return angle(schedule)
    signal, noise = schedule.signal, schedule.noise
    return noise / (signal + noise)


def to_flow_units(schedule: Schedule, x_t: Sample, t: Steps) -> Sample:
    """Returns x_t as it is, or on other paths x_t / (signal + noise) = (1 - u) x_0 + u eps.

    In these units every path is straight, and its flow by u is eps_hat - x_0_hat.
    """
    if schedule.preserves_variance:
        return x_t
    signal, noise = signal_and_noise(schedule, t, x_t)
    return x_t / (signal + noise)


def from_flow_units(schedule: Schedule, x: Sample, t: Steps) -> Sample:
    """Returns the x_t of which x is `to_flow_units`."""
    if schedule.preserves_variance:
        return x
    signal, noise = signal_and_noise(schedule, t, x)
    return x * (signal + noise)


# -------------------------------------------------------------------------------------- schedules


def check(schedule: Schedule) -> Schedule:
    """Returns the schedule. Raises ValueError for a beta outside (0, 1), which cannot be reversed.

    A beta that is 1 only by rounding, with alpha_bar above 0, is accepted. Traced schedules are not
    checked, because their values are not known. Other paths: see `_check_path`.
    """
    xp, beta, alpha_bar = arrays(schedule)
    if xp is np and not schedule.preserves_variance:
        _check_path(alpha_bar, noise_variance(schedule), beta)
    elif xp is np:
        wrong = np.flatnonzero(~((beta > 0) & (beta <= 1) & (alpha_bar > 0)))
        if wrong.size:
            i = int(wrong[0])
            rule = "the betas of a schedule must lie between 0 and 1"
            raise ValueError(f"{rule}: at step {i} it is {beta[i]:.4g}")
    return schedule


def _check_path(alpha_bar, variance, beta) -> None:
    """Raises ValueError for a path that cannot be reversed, or whose betas are of another path."""
    if wrong := np.flatnonzero(~(alpha_bar[:-1] > 0)).tolist():
        rule = "only the last signal of a schedule may be 0, and none negative"
        raise ValueError(f"{rule}: at step {wrong[0]} alpha_bar is {alpha_bar[wrong[0]]:.4g}")
    expected = _path_beta(alpha_bar, variance)
    valid = (variance > 0) & (alpha_bar >= 0) & (expected > 0) & np.isfinite(expected)
    if wrong := np.flatnonzero(~valid).tolist():
        i = wrong[0]
        levels = f"{alpha_bar[i]:.4g} and {variance[i]:.4g}"
        rule = "noise / signal of a schedule must increase from step to step"
        raise ValueError(f"{rule}: at step {i} it does not, signal^2 and noise^2 are {levels}")
    if wrong := np.flatnonzero(~np.isclose(beta, expected, rtol=1e-2, atol=0)).tolist():
        i = wrong[0]
        due = f"its levels give {expected[i]:.4g}: use schedules.from_levels"
        raise ValueError(f"beta at step {i} of the schedule is {beta[i]:.4g}, {due}")


def _path_beta(alpha_bar, variance):
    """Returns beta_t = noise_t^2 - r^2 noise_{t-1}^2 [S] of any path."""
    xp = array_namespace(alpha_bar)
    signal, noise = alpha_bar**0.5, variance**0.5
    signal_prev, noise_prev = xp.append(1.0, signal[:-1]), xp.append(0.0, noise[:-1])
    # In factors, because a difference of squares loses twice the digits.
    left, right = noise * signal_prev, signal * noise_prev
    return ratio((left - right) * (left + right), signal_prev**2, if_zero=0.0)


def from_levels(alpha_bar, variance, t=None) -> Schedule:
    """Returns the schedule of any path, with signal^2 = alpha_bar and noise^2 = variance, each [S].

    t: steps of training, by default 0 .. S-1. Raises ValueError where noise / signal does not
    increase, or the signal is 0 before the last level.
    """
    alpha_bar, variance = (
        x if isinstance(x, jax.Array) else np.asarray(x, float) for x in (alpha_bar, variance)
    )
    for name, x in (("alpha_bar", alpha_bar), ("variance", variance)):
        if isinstance(x, np.ndarray) and (x < 0).any():
            raise ValueError(f"{name} must not be negative, got {x.min():.4g}")
    t = np.arange(len(alpha_bar)) if t is None else t
    return check(Schedule(_path_beta(alpha_bar, variance), alpha_bar, t, variance))


def _from_beta(beta) -> Schedule:
    return Schedule(beta, np.cumprod(1 - beta), np.arange(len(beta)))


def _from_alpha_bar(alpha_bar, variance, t) -> Schedule:
    """Returns the schedule with these alpha_bar; variance is 1 - alpha_bar with all its digits."""
    xp = array_namespace(alpha_bar)
    alpha_bar_prev = xp.append(1.0, alpha_bar[:-1])
    variance_prev = xp.append(0.0, variance[:-1])
    # beta alpha_bar_prev is the change of the variance, and of alpha_bar. The smaller of the two
    # numbers is stored with more digits.
    small = variance < 0.5
    difference = xp.where(small, variance - variance_prev, alpha_bar_prev - alpha_bar)
    return Schedule(ratio(difference, alpha_bar_prev, if_zero=0.0), alpha_bar, t)


def linear_schedule(T: int) -> Schedule:
    """Returns betas from 1e-4 to 0.02 for T = 1000 (DDPM, section 4), times 1000 / T for another T.

    Raises ValueError for T <= 20, where a beta reaches 1.
    """
    if T <= 20:
        rule = "linear_schedule needs T >= 21, where beta stays below 1"
        raise ValueError(f"{rule}, got {T}: use cosine_schedule")
    return _from_beta(np.linspace(1e-4, 0.02, T) * 1000 / T)


def cosine_schedule(T: int) -> Schedule:
    """Returns alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2), beta <= 0.999.

    (Nichol & Dhariwal 2021, eq. 17.)
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return _from_beta(np.minimum(1 - f[1:] / f[:-1], 0.999))


def straight_schedule(T: int) -> Schedule:
    """Returns the straight path of flow matching, x_t = (1 - u) x_0 + u eps, at u = 1/T, ..., 1.

    (Lipman et al. 2022, eq. 20 to 23 without their smallest sigma; Liu et al. 2022. Both count time
    the other way, from noise to data.) A net learns it by the prediction "velocity" = eps - x_0.
    DDIM with eta = 0 is then Euler's method.

    The last level is noise alone. There eps = x_t says nothing about x_0, so the prediction eps is
    refused. Every other prediction holds at all levels.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    u = np.arange(1, T + 1) / T
    return from_levels((1 - u) ** 2, u**2)


def discretise(gamma: Callable, T: int) -> Schedule:
    """Returns T levels of a continuous schedule, from u = 0 to u = 1, both included.

    gamma(u) is minus the log signal-to-noise ratio, increasing: alpha_bar = sigmoid(-gamma(u))
    (Kingma et al. 2021, "VDM", eq. 3). For T = 1 the level is that of u = 1.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    u = np.linspace(0.0, 1.0, T) if T > 1 else np.ones(1)
    g = gamma(jnp.asarray(u))
    return check(_from_alpha_bar(jax.nn.sigmoid(-g), jax.nn.sigmoid(g), np.arange(T)))


# ---------------------------------------------------------------------------------- fewer steps


def _uniform(T: int, steps: int, _):
    return np.round(np.linspace(0, T - 1, steps)).astype(int)


def _paper(T: int, steps: int, _):
    if T % steps:
        rule = f"spacing 'paper' needs steps that divide T = {T}"
        raise ValueError(f"{rule}, got {steps}: use uniform")
    return np.arange(0, T, T // steps)


def _quadratic(T: int, steps: int, _):
    return np.round(np.linspace(0, np.sqrt(T - 1), steps) ** 2).astype(int)


def _log_snr(T: int, steps: int, log_sigma):
    return _evenly_placed(log_sigma, steps)


def _karras(T: int, steps: int, log_sigma):
    return _evenly_placed(array_namespace(log_sigma).exp(log_sigma / 7), steps)


_SPACINGS = {
    "uniform": _uniform,
    "paper": _paper,
    "quadratic": _quadratic,
    "log_snr": _log_snr,
    "karras": _karras,
}
SPACINGS = tuple(_SPACINGS)


def _evenly_placed(position, steps: int):
    """Returns `steps` >= 2 of T levels, nearest to evenly spaced positions, both ends included.

    position [T]: where each level lies, increasing. A gap wider than a step counts as one step, so
    that no step is lost inside it. The last two levels of a cosine schedule of T = 1000 are such a
    gap: their sigmas are 641 and 20,000.
    """
    xp = array_namespace(position)
    T, gap = len(position), xp.diff(position)
    ascending = xp.sort(gap)
    # If k gaps take a whole step each, the other steps - 1 - k steps share what is left: length[k]
    # each. The first k counts for which the next widest gap is no longer than that.
    k = np.arange(steps - 1)
    length = xp.cumsum(ascending)[T - 2 - k] / (steps - 1 - k)
    step = length[xp.argmax(ascending[::-1][: steps - 1] <= length)]
    counted = xp.append(0.0, xp.cumsum(xp.minimum(gap / step, 1.0)))
    goal = np.arange(1, steps - 1)
    above = xp.clip(xp.searchsorted(counted, goal), 1, T - 1)
    nearest = above - (goal - counted[above - 1] < counted[above] - goal)
    return xp.concatenate([xp.zeros(1, int), nearest, xp.full(1, T - 1)])


def spaced(T: int, steps: int, spacing: str = "uniform", log_sigma=None):
    """Returns `steps` of the steps 0 .. T-1, increasing.

    All spacings but `paper` visit both ends. With steps = 1 they visit only the last.

    uniform: round(linspace(0, T-1, steps)).
    paper: 0, k, 2k, ... with k = T / steps, which must divide T (the code of DDIM).
    quadratic: round(linspace(0, sqrt(T-1), steps)^2), which has more steps at little noise. DDIM's,
        section D.2, ends at 0.8 T.
    log_snr: evenly in log sigma, sigma = noise / signal (Lu et al. 2022).
    karras: evenly in sigma^(1/7) (Karras et al. 2022, eq. 5).

    log_snr and karras take the nearest existing steps. They need log_sigma [T]; if it is traced, so
    are the steps that are returned.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T}, got {steps}")
    if spacing in ("log_snr", "karras") and log_sigma is None:
        rule = f"spacing {spacing!r} depends on the noise levels"
        raise ValueError(f"{rule}: give log_sigma, or use respace")
    if steps == 1 and spacing != "paper":
        return np.array([T - 1])
    chosen, i = _SPACINGS[spacing](T, steps, log_sigma), np.arange(steps)
    # Two goals may share a nearest step. Each step is made to exceed the one before, and to leave
    # room for those after it.
    cumulative_max = jax.lax.cummax if isinstance(chosen, jax.Array) else np.maximum.accumulate
    rising = cumulative_max(chosen - i)
    return array_namespace(rising).minimum(rising, T - steps) + i


def respace(schedule: Schedule, steps: int, spacing: str = "uniform") -> Schedule:
    """Returns the process that visits only `steps` of the steps, with the same marginals there.

    (Nichol & Dhariwal 2021, eq. 19.) spacing: see `spaced`. For a traced schedule, `log_snr` and
    `karras` choose by its values, so that t is traced too.
    """
    xp, _, alpha_bar = arrays(check(schedule))
    chosen = spaced(len(alpha_bar), steps, spacing, log_sigma(schedule))
    if xp is np and spacing == "paper":  # samplers begin with the variance of the last level
        total = alpha_bar + noise_variance(schedule)
        if abs(total[chosen[-1]] - total[-1]) > 1e-6:
            rule = f"spacing 'paper' begins at step {chosen[-1]}, where x_t has another variance"
            raise ValueError(f"{rule} than at the last one: use uniform")
    t = xp.asarray(schedule.t)[chosen]
    make = _from_alpha_bar if schedule.preserves_variance else from_levels
    return make(alpha_bar[chosen], noise_variance(schedule)[chosen], t)
