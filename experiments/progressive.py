"""Where the bits go: progressive coding, generation and interpolation, Ho et al. 2020 (DDPM), figures 5 to 9, table 4

    python -m experiments.progressive    about 4 minutes on 2 cores, 5 more for its model; downloads nothing

The digits model of `ddpm_digits` (given its --run.folder it is not trained again). Read the bound
as a lossy code. Its terms from T down to t are the bits that have been sent at step t. The x_0 that
the net predicts from x_t shows how far the picture is still off. Most bits pay for detail that no
eye sees. Interpolating at step t mixes what x_t keeps of two digits: at 0 their pixels, at T
nothing. Expect 69 % of the bits in the last tenth of the steps, where the paper has 93 %: digits of
64 pixels and 17 levels have less detail than CIFAR-10.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import ddpm, figures, train
from aigc_jax.train import Run
from experiments import _cli, _ddpm_digits, _diffusion, _pictures
from experiments._cli import Row, Scale, Source

# Table 4, at 100, 200, ... of 1000 steps: rate in bits per dim, RMSE on pixels 0..255.
RATE = [0.0, 0.00013, 0.00081, 0.00282, 0.00716, 0.01507, 0.02866, 0.05415, 0.11994, 1.77581]
RMSE = [67.60125, 60.9717, 54.18826, 46.12765, 38.03236, 30.80948, 24.43656, 18.47482, 12.02277]
TABLE = np.array([np.arange(100, 1001, 100), RATE, [*RMSE, 0.95136]]).T


@dataclass(frozen=True)
class Setup:
    """Flags of progressive."""

    model: ddpm.Config = _ddpm_digits.MODEL
    run: Run = _ddpm_digits.run("runs/progressive")
    data: Source = Source("digits")
    training: int = 1237
    pairs: int = 100  # of test digits that are interpolated

    def __post_init__(self):
        _pictures.check(self, "progressive", conditional=True)
        if not 10 <= self.pairs <= 180:
            raise ValueError(f"pairs must lie in 10..180, half of the test set, got {self.pairs}")
        if self.model.T < 20:
            raise ValueError(f"model.T must be at least 20, got {self.model.T}")


SMOKE = Setup(_ddpm_digits.SMOKE, _ddpm_digits.smoke_run("runs/progressive-smoke"), pairs=20)
DIFFERS = "T = 100, the label given except for interpolation (CIFAR-10, 1000)"
SCALES = {
    "smoke": Scale(SMOKE, "a tiny digits model"),
    "cpu": Scale(Setup(), f"8x8 digits of 17 levels, {DIFFERS}"),
}
LATE = "share of the bits that the last tenth of the steps takes (%)"
CONVEX = (
    "distortion (mean squared error) falls with the rate, and convexly: tenths at which it does not"
)
START = "root mean squared error after the first step, over that of the mean picture of each class"
BLEND = "interpolants at t = 0: largest difference from the blend of pixels"
FREE = "interpolants at t = T: distance to the nearer source, over that to the next pair's (means)"
SPREAD = "variance of ten decodings of one x_t: least rise from a t to the next larger t"
INVARIANTS = {BLEND: "< 1e-5", LATE: "> 50"}
CRITERIA = {CONVEX: "= 0", START: "within 0.9 .. 1.1", FREE: "within 0.95 .. 1.05", SPREAD: "> 0"}
CRITERIA |= INVARIANTS


def coding(result: train.Result, x_0, label, key) -> tuple[np.ndarray, float, np.ndarray]:
    """Returns the bits per dim sent after steps T, ... 1 [T], the decoder's, and errors [T].

    Errors are those of x_0_hat: mean squares over pixels in [0, 1].
    """
    cfg, T = result.config, result.config.T
    k_terms, k_errors = jax.random.split(key)
    bits = _diffusion.bound(result, x_0, label, k_terms)
    rate = np.cumsum(bits[::-1])[:T]  # L_T, then L_{T-1}, ..., L_1

    @_diffusion.compiled
    def errors(params, x_0, label, key):
        schedule = ddpm.schedule_of(cfg, params)

        def one(_, i):
            t = jnp.full(len(x_0), i)
            eps = jax.random.normal(jax.random.fold_in(key, i), x_0.shape)
            x_t = ddpm.q_sample(schedule, x_0, t, eps)
            value, _ = ddpm.predict(cfg, params, x_t, t, label)
            x_0_hat = ddpm.convert(schedule, value, x_t, t, given=cfg.prediction, wanted="x_0")
            return None, ((jnp.clip(x_0_hat, -1, 1) - x_0) ** 2).mean() / 4

        return jax.lax.scan(one, None, jnp.arange(T - 1, -1, -1))[1]

    found = errors(_cli.weights(result), jnp.asarray(x_0), jnp.asarray(label), k_errors)
    return rate, float(bits[0]), np.asarray(found)


def interpolants(result: train.Result, a, b, key, *, t: int, shares: np.ndarray) -> np.ndarray:
    """Returns [K, B, H, W, C] in [-1, 1] between a and b [B, H, W, C], no label given."""
    cfg, given = result.config, jnp.asarray(shares, jnp.float32)

    @_diffusion.compiled
    def sample(params, a, b, key):
        schedule, eps_fn = ddpm.schedule_of(cfg, params), ddpm.eps_fn_of(cfg, params)
        options = {"t": t, "shares": given, "sigma2": cfg.variance, "clip": 1.0}
        return ddpm.interpolate(schedule, eps_fn, a, b, key, **options)

    return np.asarray(sample(_cli.weights(result), jnp.asarray(a), jnp.asarray(b), key))


def decodings(result: train.Result, x_0, label, key, *, t: int, times: int = 10) -> np.ndarray:
    """Returns [times, B, H, W, C]: one x_t of each x_0, denoised `times` times (figure 7)."""
    cfg, many = result.config, jnp.tile(jnp.asarray(label), times)

    @_diffusion.compiled
    def sample(params, x_0, many, key):
        k_eps, k_back = jax.random.split(key)
        schedule, eps_fn = ddpm.schedule_of(cfg, params), ddpm.eps_fn_of(cfg, params, many)
        eps = jax.random.normal(k_eps, x_0.shape)
        x_t = ddpm.q_sample(schedule, x_0, jnp.full(len(x_0), t - 1), eps)
        options = {"sigma2": cfg.variance, "clip": 1.0, "start": t}
        return ddpm.sample_ddpm(
            schedule, eps_fn, jnp.tile(x_t, (times, 1, 1, 1)), k_back, **options
        )

    found = sample(_cli.weights(result), jnp.asarray(x_0), many, key)
    return np.asarray(found).reshape(times, *x_0.shape)


def coding_rows(rate: np.ndarray, decoder: float, error: np.ndarray) -> list[Row]:
    """Returns rate and distortion in tenths of the steps, as in the paper's table."""
    T, bits = len(rate), rate[-1]
    steps = [round(tenth * T / 10) for tenth in range(1, 11)]
    rates, errors = (x[[s - 1 for s in steps]] for x in (rate, error))
    slope = np.diff(errors) / np.maximum(np.diff(rates), 1e-12)
    bad = int((np.diff(errors) >= 0).sum() + (np.diff(slope) < 0).sum())
    late = float(100 * (1 - rate[steps[8] - 1] / bits))
    paper_late = float(100 * (1 - TABLE[-2, 1] / TABLE[-1, 1]))
    found = [
        Row("rate (bits per dim)", float(bits), 1.78),
        Row("distortion (bits per dim)", decoder, 1.97),
        Row(LATE, late, paper_late),
        Row(CONVEX, bad),
    ]
    for s, r, paper in zip(steps, rates, TABLE[:, 1].tolist(), strict=True):
        what = f"after {s} of {T} steps: rate (bits per dim; paper: CIFAR-10)"
        found.append(Row(what, float(r), paper))
    for s, e, paper in zip(steps, errors, TABLE[:, 2].tolist(), strict=True):
        what = f"after {s} of {T} steps: RMSE (of 255; paper: CIFAR-10)"
        found.append(Row(what, float(255 * e**0.5), paper))
    return found


def distance_to_nearer(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean distance of interpolants [K, B, ...] to the nearer of a and b [B, ...]."""
    each = (np.linalg.norm((x - end[None]).reshape(*x.shape[:2], -1), axis=-1) for end in (a, b))
    return np.minimum(*each).mean()


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, then measures coding, interpolation and shared x_t on the test digits."""
    result, T = _ddpm_digits.fitted(setup), setup.model.T
    test = _cli.arrays(setup.data.load("test"))
    x_0, label = np.asarray(ddpm.preprocess(setup.model, {"image": test["image"]})), test["label"]
    k_code, k_between, k_shared, k_way = jax.random.split(jax.random.key(setup.run.seed), 4)
    rate, decoder, error = coding(result, x_0, label, k_code)
    found = _cli.kept()
    found += coding_rows(rate, decoder, error)
    seen = _cli.arrays(setup.data.load(f"train[:{setup.training}]"))
    means = np.stack([seen["image"][seen["label"] == c].mean(0) for c in range(10)])
    around = np.sqrt((((x_0 + 1) / 2 - means[label] / (setup.model.levels - 1)) ** 2).mean())
    found.append(Row(START, float(np.sqrt(error[0]) / around)))

    a, b = x_0[: setup.pairs], x_0[setup.pairs : 2 * setup.pairs]
    shares, times = np.linspace(0, 1, 11), [0, T // 4, T // 2, 3 * T // 4, T]
    between = {t: interpolants(result, a, b, k_between, t=t, shares=shares) for t in times}
    blend = np.stack([(1 - s) * a + s * b for s in shares])
    own = distance_to_nearer(between[T], a, b)
    other = distance_to_nearer(between[T], np.roll(a, 1, 0), np.roll(b, 1, 0))
    found.append(Row(BLEND, float(np.abs(between[0] - blend).max())))
    found.append(Row(FREE, float(own / other)))
    shared = {t: decodings(result, x_0[:10], label[:10], k_shared, t=t) for t in times[1:]}
    spread = [float(x.var(0).mean()) for x in shared.values()]
    found.append(Row(SPREAD, float(np.diff(spread).min())))
    plot(setup, folder, result, k_way, (rate, error), between, shared)
    return found


@_cli.costs("progressive.png")
def plot(setup: Setup, folder: Path, result, key, code: tuple, between: dict, shared: dict) -> None:
    """Draws rate and distortion, x_0_hat on the way, interpolations by t, decodings of one x_t."""
    fig, (plots, (predicted, mixed, decoded)) = figures.figure(2, 3)
    T, (rate, error) = setup.model.T, code
    ours = {"share": np.arange(1, T + 1) / T, "rate": rate, "error": 255 * np.sqrt(error)}
    theirs = {"share": TABLE[:, 0] / 1000, "rate": TABLE[:, 1], "error": TABLE[:, 2]}
    labels = {"share": "share of the steps taken", "rate": "rate (bits per dim)"}
    labels["error"] = "root mean squared error (of 255)"
    titles = ("distortion on the way", "rate on the way", "distortion against rate")
    pairs = (("share", "error"), ("share", "rate"), ("rate", "error"))
    for ax, title, (x, y) in zip(plots, titles, pairs, strict=True):
        curves = {"digits, ours": (ours[x], ours[y]), "CIFAR-10, paper": (theirs[x], theirs[y])}
        figures.curves(ax, curves, xlabel=labels[x], ylabel=labels[y], title=title)
    _, x_0_hat = _diffusion.way(result, key, n=10, label=np.arange(10))
    shown = [round(s * (T - 1)) for s in (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)]
    title = f"predicted x_0 after these steps: {', '.join(str(i + 1) for i in shown)}"
    figures.images(predicted, np.concatenate([x_0_hat[i] for i in shown]), 10, title=title)
    pictures = _diffusion.unit(np.concatenate([x[:, 3] for x in between.values()]))
    title = f"between two digits, mixed at t = {', '.join(map(str, between))}"
    figures.images(mixed, pictures, 11, title=title)
    pictures = _diffusion.unit(np.concatenate([x[:, 0] for x in shared.values()]))
    title = f"ten decodings of one x_t, t = {', '.join(map(str, shared))}"
    figures.images(decoded, pictures, 10, title=title)
    figures.save(fig, folder / "progressive.png", f"{_diffusion.about(setup)} Nothing is chosen.")


if __name__ == "__main__":
    _cli.main("progressive")
