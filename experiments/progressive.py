"""Where the bits go: progressive coding, generation and interpolation, Ho et al. 2020 (DDPM), figures 5 to 9, table 4

    python -m experiments.progressive           about 4 minutes on 2 cores, 5 more for its model; downloads nothing

The digits model of `ddpm_digits` (given its --run.folder it is not trained again). Read as a lossy code, the bound says
how many bits have been sent once step t is reached (its terms from T down to t), and the x_0 seen in x_t how far the
picture is off: most bits buy what no eye sees. Interpolating at step t mixes what is left of two digits: at 0 their
pixels, at T nothing of either. Expect 69 % of the bits in the last tenth of the steps, where the paper has 93 %: digits
of 64 pixels and 17 levels have less detail than CIFAR-10.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from aigc_jax import ddpm, figures, train
from aigc_jax.core import EMA
from aigc_jax.train import Run

from experiments import _cli, _diffusion, _pictures, ddpm_digits
from experiments._cli import Row, Scale, Source

# Table 4: steps taken of 1000, rate in bits per dim, root mean squared error on pixels 0..255.
TABLE = (
    (1000, 1.77581, 0.95136),
    (900, 0.11994, 12.02277),
    (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656),
    (600, 0.01507, 30.80948),
    (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765),
    (300, 0.00081, 54.18826),
    (200, 0.00013, 60.97170),
    (100, 0.0, 67.60125),
)


@dataclass(frozen=True)
class Setup:
    """Flags of progressive."""

    model: ddpm.Config = ddpm_digits.MODEL
    run: Run = replace(ddpm_digits.RUN, folder="runs/progressive")
    data: Source = Source("digits")
    training: int = 1237
    pairs: int = 100  # of test digits that are interpolated

    def __post_init__(self):
        _pictures.check(self, "progressive", conditional=True)
        if not 10 <= self.pairs <= 180:
            raise ValueError(
                f"pairs must lie in 10..180, half of the test digits, got {self.pairs}"
            )
        if self.model.T < 20:
            raise ValueError(f"model.T must be at least 20, got {self.model.T}")


SCALES = {
    "smoke": Scale(
        Setup(
            ddpm_digits.SMOKE,
            replace(ddpm_digits.SCALES["smoke"].setup.run, folder="runs/progressive-smoke"),
            pairs=20,
        ),
        "a tiny digits model",
    ),
    "cpu": Scale(
        Setup(),
        "8x8 digits of 17 levels, T = 100, the label given but for interpolation (CIFAR-10, 1000)",
    ),
}
RATE = "rate (bits per dim)"
DISTORTION = "distortion (bits per dim)"
LATE = "share of the bits that the last tenth of the steps takes (%)"
CONVEX = (
    "distortion (mean squared error) falls with the rate, and convexly: tenths at which it does not"
)
START = "root mean squared error after the first step, over that of the mean picture of each class"
BLEND = "interpolants at t = 0: largest difference from the blend of pixels"
FREE = "interpolants at t = T: distance to the nearer source, over that to the next pair's (means)"
SPREAD = "variance of ten decodings of one x_t: least rise from a t to the next larger t"
CRITERIA = {
    LATE: "> 50",
    CONVEX: "= 0",
    START: "within 0.9 .. 1.1",
    BLEND: "< 1e-5",
    FREE: "within 0.95 .. 1.05",
    SPREAD: "> 0",
}
INVARIANTS = {BLEND: CRITERIA[BLEND], LATE: CRITERIA[LATE]}


def coding(
    result: train.Result, x_0: np.ndarray, label: np.ndarray, key
) -> tuple[np.ndarray, float, np.ndarray]:
    """After step T, ... 1: bits per dim sent so far [T]; those of the decoder; squared errors of the x_0 seen [T].

    Errors are means over pixels in [0, 1].
    """
    cfg, T = result.config, result.config.T
    k_terms, k_seen = jax.random.split(key)
    bits = ddpm_digits.bound(result, x_0, label, k_terms)
    rate = np.cumsum(bits[::-1])[:T]  # L_T, then L_{T-1}, ..., L_1

    def seen(params, x_0, label, key):
        schedule = ddpm.schedule_of(cfg, params)

        def one(_, i):
            t = jnp.full(len(x_0), i)
            x_t = ddpm.q_sample(
                schedule, x_0, t, jax.random.normal(jax.random.fold_in(key, i), x_0.shape)
            )
            value, _ = ddpm.predict(cfg, params, x_t, t, label)
            x_0_hat = ddpm.convert(schedule, value, x_t, t, given=cfg.prediction, wanted="x_0")
            return None, ((jnp.clip(x_0_hat, -1, 1) - x_0) ** 2).mean() / 4

        return jax.lax.scan(one, None, jnp.arange(T - 1, -1, -1))[1]

    params = EMA(cfg.ema).read(result.state)
    return (
        rate,
        float(bits[0]),
        np.asarray(_diffusion.compiled(seen)(params, jnp.asarray(x_0), jnp.asarray(label), k_seen)),
    )


def interpolants(result: train.Result, a, b, key, *, t: int, shares: np.ndarray) -> np.ndarray:
    """[K, B, H, W, C] in [-1, 1] between a and b [B, H, W, C], no label given."""
    cfg = result.config

    def draw(params, a, b, key):
        schedule = ddpm.schedule_of(cfg, params)
        given = jnp.asarray(shares, jnp.float32)
        return ddpm.interpolate(
            schedule,
            ddpm.eps_fn_of(cfg, params),
            a,
            b,
            key,
            t=t,
            shares=given,
            sigma2=cfg.variance,
            clip=1.0,
        )

    params = EMA(cfg.ema).read(result.state)
    return np.asarray(_diffusion.compiled(draw)(params, jnp.asarray(a), jnp.asarray(b), key))


def decodings(result: train.Result, x_0, label, key, *, t: int, times: int = 10) -> np.ndarray:
    """[times, B, H, W, C]: the same x_t of each x_0 brought back `times` times (figure 7)."""
    cfg = result.config
    params = EMA(cfg.ema).read(result.state)
    many = jnp.tile(jnp.asarray(label), times)

    def draw(params, x_0, many, key):
        k_eps, k_back = jax.random.split(key)
        schedule = ddpm.schedule_of(cfg, params)
        eps_fn = ddpm.eps_fn_of(cfg, params, many)
        x_t = ddpm.q_sample(
            schedule, x_0, jnp.full(len(x_0), t - 1), jax.random.normal(k_eps, x_0.shape)
        )
        x_t = jnp.tile(x_t, (times, 1, 1, 1))
        return ddpm.sample_ddpm(
            schedule, eps_fn, x_t, k_back, sigma2=cfg.variance, clip=1.0, start=t
        )

    out = _diffusion.compiled(draw)(params, jnp.asarray(x_0), many, key)
    return np.asarray(out).reshape(times, *x_0.shape)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Coding, interpolation and shared x_t of the test digits."""
    result, T = ddpm_digits.fitted(setup), setup.model.T
    test = setup.data.load("test").resident[0]
    x_0, label = np.asarray(ddpm.preprocess(setup.model, {"image": test["image"]})), test["label"]
    k_code, k_between, k_shared, k_way = jax.random.split(jax.random.key(setup.run.seed), 4)
    rate, decoder, error = coding(result, x_0, label, k_code)
    # In tenths of the steps, as the paper's table.
    taken = [round(tenth * T / 10) for tenth in range(1, 11)]
    at, error_at = rate[[s - 1 for s in taken]], error[[s - 1 for s in taken]]
    slope = np.diff(error_at) / np.maximum(np.diff(at), 1e-12)
    bad = int((np.diff(error_at) >= 0).sum() + (np.diff(slope) < 0).sum())
    bits, fraction, found = rate[-1], np.array([row[1] for row in TABLE]), _cli.kept()
    found += [
        Row(RATE, float(bits), 1.78),
        Row(DISTORTION, decoder, 1.97),
        Row(
            LATE,
            float(100 * (1 - rate[taken[8] - 1] / bits)),
            float(100 * (1 - fraction[1] / fraction[0])),
        ),
        Row(CONVEX, bad),
        *(
            Row(f"after {s} of {T} steps: rate (bits per dim; paper: CIFAR-10)", float(r), paper[1])
            for s, r, paper in zip(taken, at, reversed(TABLE), strict=True)
        ),
        *(
            Row(
                f"after {s} of {T} steps: RMSE (of 255; paper: CIFAR-10)",
                float(255 * e**0.5),
                paper[2],
            )
            for s, e, paper in zip(taken, error_at, reversed(TABLE), strict=True)
        ),
    ]

    seen = setup.data.load(f"train[:{setup.training}]").resident[0]
    mean = np.stack([seen["image"][seen["label"] == c].mean(0) for c in range(10)])[label] / (
        setup.model.levels - 1
    )
    around = np.sqrt((((x_0 + 1) / 2 - mean) ** 2).mean())
    found.append(Row(START, float(np.sqrt(error[0]) / around)))

    n = setup.pairs
    a, b = x_0[:n], x_0[n : 2 * n]
    shares, times = np.linspace(0, 1, 11), [0, T // 4, T // 2, 3 * T // 4, T]
    between = {t: interpolants(result, a, b, k_between, t=t, shares=shares) for t in times}
    blend = np.stack([(1 - s) * a + s * b for s in shares])
    own, other = (
        np.minimum(
            *(
                np.linalg.norm(
                    (between[T] - np.roll(x, shift, 0)[None]).reshape(11, n, -1), axis=-1
                )
                for x in (a, b)
            )
        )
        for shift in (0, 1)
    )
    found.append(Row(BLEND, float(np.abs(between[0] - blend).max())))
    found.append(Row(FREE, float(own.mean() / other.mean())))
    shared = {t: decodings(result, x_0[:10], label[:10], k_shared, t=t) for t in times[1:]}
    spread = [float(x.var(0).mean()) for x in shared.values()]
    found.append(Row(SPREAD, min(b - a for a, b in zip(spread, spread[1:], strict=False))))
    with _cli.costs("progressive.png"):
        way = _diffusion.way(result, k_way, n=10, label=np.arange(10))
        plot(setup, folder, (rate, error), between, shared, way)
    return found


def plot(setup: Setup, folder: Path, code: tuple, between: dict, shared: dict, way: tuple) -> None:
    """Rate and distortion; the x_0 seen on the way; interpolations by t; decodings of one x_t."""
    fig, axes = figures.figure(2, 3, size=(14, 8))
    flat, T, (rate, error) = axes.ravel(), setup.model.T, code
    steps, root = np.arange(1, T + 1), 255 * np.sqrt(error)
    rates = np.array([row[1] for row in reversed(TABLE)])
    roots = np.array([row[2] for row in reversed(TABLE)])
    share = np.array([row[0] for row in reversed(TABLE)]) / 1000
    for ax, ours, paper, what in (
        (flat[0], root, roots, "root mean squared error (of 255)"),
        (flat[1], rate, rates, "rate (bits per dim)"),
    ):
        figures.curves(
            ax,
            {"digits, ours": (steps / T, ours), "CIFAR-10, paper": (share, paper)},
            xlabel="share of the steps taken",
            ylabel=what,
        )
    figures.curves(
        flat[2],
        {"digits, ours": (rate, root), "CIFAR-10, paper": (rates, roots)},
        xlabel="rate (bits per dim)",
        ylabel="root mean squared error (of 255)",
    )
    _, x_0_hat = way
    shown = [round(s * (T - 1)) for s in (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)]
    figures.images(
        flat[3],
        np.concatenate([x_0_hat[i] for i in shown]),
        10,
        title=f"figure 6: the x_0 seen after {', '.join(str(i + 1) for i in shown)} steps",
    )
    pictures = [(x[:, 3] + 1) / 2 for x in between.values()]
    figures.images(
        flat[4],
        np.clip(np.concatenate(pictures), 0, 1),
        11,
        title=f"figure 9: between two digits at t = {', '.join(map(str, between))}",
    )
    pictures = [(x[:, 0] + 1) / 2 for x in shared.values()]
    figures.images(
        flat[5],
        np.clip(np.concatenate(pictures), 0, 1),
        10,
        title=f"figure 7: ten ways back from one x_t, t = {', '.join(map(str, shared))}",
    )
    figures.save(
        fig,
        folder / "progressive.png",
        f"digits 8x8, U-Net {setup.model.net.widths}, T = {T}, {setup.run.steps} updates; nothing chosen",
    )


if __name__ == "__main__":
    _cli.main("progressive")
