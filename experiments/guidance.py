"""Guidance trades diversity for certainty: Ho & Salimans 2022 (classifier-free guidance), figures 1, 2 and 4, table 1

    python -m experiments.guidance    about 30 minutes on 2 cores, 5 more for its model; downloads nothing

Three normals in the plane, one per class. Their centres lie on a circle of radius 1, their standard
deviation is 0.5 (the paper gives neither). The grey density is the motivation of guidance, p(x|c)
p(c|x)^w, normalised on a grid. Over it lie samples that are guided by the exact scores. They have
another distribution: the tilted score of a noise level is not the score of the tilted density under
noise.

Then the digits model of `ddpm_digits` (given its --run.folder it is not trained again). w is the
paper's: 0 is conditional sampling, and other libraries' "guidance scale" is 1 + w. Expect the
classifier score to rise from 9.90 of 10 at w = 0 to 9.995 at w = 2 and no further: the digits are
easy, so little is left to gain. The Frechet distance is least at w = 0, and 13 times as large at w
= 4. On ImageNet, the paper's is least at 0.1, and at 4 it is 15 times that of w = 0.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import ddpm, figures, metrics, train
from aigc_jax.data import points
from aigc_jax.train import Run
from experiments import _cli, _ddpm_digits, _diffusion, _pictures
from experiments._cli import Row, Scale, Source

CENTRES, STD = points.ring_modes(3, 1.0), 0.5
# ImageNet 64x64, 400,000 updates, p_uncond 0.1 (table 1).
FID = {0.0: 1.8, 0.1: 1.55, 0.3: 3.03, 0.5: 5.74, 1.0: 12.6, 2.0: 21.03, 4.0: 26.22}
IS = {0.0: 53.71, 0.1: 66.11, 0.3: 92.8, 0.5: 119.3, 1.0: 170.1, 2.0: 225.5, 4.0: 260.2}


@dataclass(frozen=True)
class Setup:
    """Flags of guidance."""

    model: ddpm.Config = _ddpm_digits.MODEL
    run: Run = _ddpm_digits.run("runs/guidance")
    data: Source = Source("digits")
    training: int = 1237
    w: tuple[float, ...] = tuple(FID)  # of the digits
    samples: int = 5000  # digits for each w; points for each w and class
    steps: int = 100  # of DDIM on the points
    digit_steps: int = 50  # of DDIM with eta 1 on the digits

    def __post_init__(self):
        _pictures.check(self, "guidance", conditional=True)
        _diffusion.check_guidance(self)
        if self.w != tuple(sorted({0.0, *self.w})) or self.w[0] < 0 or len(self.w) < 2:
            raise ValueError(f"w must grow from 0, and hold another, got {self.w}")
        _cli.at_least(self, samples=100)
        if not 1 <= self.digit_steps <= self.model.T or not 1 <= self.steps <= 1000:
            raise ValueError("digit_steps must lie in 1..model.T, steps in 1..1000")


SMOKE_RUN, TWO = _ddpm_digits.smoke_run("runs/guidance-smoke"), (0.0, 4.0)
SMOKE = Setup(_ddpm_digits.SMOKE, SMOKE_RUN, w=TWO, samples=200, steps=50, digit_steps=25)
DIFFERS = "8x8 digits measured by our classifier (ImageNet by Inception)"
SCALES = {
    "smoke": Scale(SMOKE, "a tiny digits model, two values of w, 200 samples"),
    "cpu": Scale(Setup(), f"normals with exact scores, and {DIFFERS}"),
}
TOY_W, SHOWN_W = (0.0, 0.5, 1.0, 2.0, 4.0), (0.0, 1.0, 4.0)  # of the normals
AWAY = "normals: least rise of the samples' distance from the middle of all centres, from w to the next w"
ENTROPY = "normals: least fall of the class entropy of the samples, from w to the next w (nats)"
OTHER = "normals: total variation, samples against the normalised tilted density, w = {w:g}"
SCORE = "digits: classifier score at w = 1 less that at w = 0"
LEAST = "digits: w of the least fid_digits"
FAR = "digits: fid_digits at w = 4 over that at w = 0"
CRITERIA = {AWAY: "> 0", ENTROPY: "> 0", SCORE: "> 0", LEAST: "<= 0.5", FAR: "> 1"}
INVARIANTS = {AWAY: CRITERIA[AWAY], ENTROPY: CRITERIA[ENTROPY]}
SIDE = np.linspace(-2.5, 3.5, 121)  # of the grid, in x_1; x_2 is centred on 0


def tilted(w: float) -> np.ndarray:
    """Returns p(x|c) p(c|x)^w for the first class on cells of the grid [x_2, x_1], summing to 1."""
    x = np.stack(np.meshgrid(SIDE, SIDE - SIDE.mean()), -1)
    log_p = -((x[..., None, :] - CENTRES) ** 2).sum(-1) / (2 * STD**2)
    log_class = log_p[..., 0] - np.log(np.exp(log_p).sum(-1))
    density = np.exp(log_p[..., 0] + w * log_class)
    return density / density.sum()


def measure_normals(setup: Setup) -> tuple[list[Row], dict[float, np.ndarray]]:
    """Samples the first class by guided exact scores; compares with the tilted density."""
    schedule = ddpm.cosine_schedule(1000)
    conditional = _diffusion.exact_eps(schedule, CENTRES[:1], STD)
    unconditional = _diffusion.exact_eps(schedule, CENTRES, STD)
    x_T = jax.random.normal(jax.random.key(setup.run.seed), (setup.samples, 2))

    @jax.jit
    def sample(w):
        def eps_fn(x, t):
            return ddpm.guide(conditional(x, t), unconditional(x, t), w)

        return ddpm.sample_ddim(schedule, eps_fn, x_T, jax.random.key(0), steps=setup.steps)

    samples = {w: np.asarray(sample(w)) for w in TOY_W}
    away, entropy = [], []
    for x in samples.values():
        log_p = -((x[:, None] - CENTRES) ** 2).sum(-1) / (2 * STD**2)
        p = np.exp(log_p - log_p.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        away.append(np.linalg.norm(x - CENTRES.mean(0), axis=-1).mean())
        entropy.append(-(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean())
    found = [Row(AWAY, float(np.diff(away).min())), Row(ENTROPY, float(-np.diff(entropy).max()))]
    for w in SHOWN_W:  # in cells of eight by eight, where 5,000 samples are enough
        sides = (SIDE - SIDE.mean(), SIDE)
        edges = [np.append(side - 0.025, side[-1] + 0.025)[::8] for side in sides]
        counts, _, _ = np.histogram2d(samples[w][:, 1], samples[w][:, 0], bins=edges)
        cells = tilted(w)[:120, :120].reshape(15, 8, 15, 8).sum((1, 3))
        apart = 0.5 * np.abs(counts / len(samples[w]) - cells).sum()
        found.append(Row(OTHER.format(w=w), float(apart)))
    return found, samples


def measure_digits(setup: Setup, result: train.Result) -> tuple[dict, np.ndarray]:
    """Returns {w: (Frechet distance to training, classifier score, accuracy in %)}, and samples."""
    _, net, real = _ddpm_digits.judged_by(setup)
    label, found, shown = np.arange(setup.samples) % 10, {}, []
    key = jax.random.key(setup.run.seed)
    ddim = {"sampler": "ddim", "eta": 1.0, "steps": setup.digit_steps}
    for w in setup.w:
        x = train.sample(result, key, n=setup.samples, label=label, w=float(w), **ddim)
        logits, features = net.apply(x)
        score = metrics.classifier_score(np.asarray(jax.nn.softmax(jnp.asarray(logits), -1)))
        accuracy = 100 * float((np.asarray(logits).argmax(-1) == label).mean())
        found[w] = (metrics.frechet_distance(real, features), score, accuracy)
        shown.append(x[:20])
    return found, np.concatenate(shown)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, measures the normals, then the digits."""
    result = _ddpm_digits.fitted(setup)
    found = _cli.kept()
    rows, samples = measure_normals(setup)
    found += rows
    measured, shown = measure_digits(setup, result)
    fid, score = ({w: values[i] for w, values in measured.items()} for i in (0, 1))
    found.append(Row(LEAST, min(fid, key=fid.get), 0.1))
    if 1.0 in score:
        found.append(Row(SCORE, score[1.0] - score[0.0], IS[1.0] - IS[0.0]))
    if 4.0 in fid:
        found.append(Row(FAR, fid[4.0] / fid[0.0], FID[4.0] / FID[0.0]))
    for w, (distance, inception, accuracy) in measured.items():
        what = f"digits, w = {w:g}: fid_digits to training (paper: FID, ImageNet 64)"
        found += [
            Row(what, distance, FID.get(w)),
            Row(f"digits, w = {w:g}: classifier score (paper: IS)", inception, IS.get(w)),
            Row(f"digits, w = {w:g}: class accuracy (%)", accuracy),
        ]
    plot(setup, folder, samples, measured, shown)
    return found


@_cli.costs("guidance.png")
def plot(setup: Setup, folder: Path, samples: dict, measured: dict, shown: np.ndarray) -> None:
    """Draws density and samples of the normals, the trade on digits, digits by w."""
    fig, (normals, (fids, scores, digits)) = figures.figure(2, 3)
    for ax, w in zip(normals, SHOWN_W, strict=True):
        ax.contourf(SIDE, SIDE - SIDE.mean(), tilted(w), levels=12, cmap="Greys")
        ax.scatter(*samples[w][:700].T, s=2, color=figures.COLOURS[1], linewidths=0)
        ax.plot(*CENTRES.T, "k+", markersize=8)
        ax.set(title=f"normals, guidance w = {w:g}", xlabel="x_1", ylabel="x_2")
        ax.set(xlim=(-2.5, 3.5), ylim=(-3, 3))
    w = np.array(list(measured))
    for ax, i, name, paper in (
        (fids, 0, "Frechet distance", FID),
        (scores, 1, "classifier score", IS),
    ):
        values = np.array([each[i] for each in measured.values()])
        theirs = np.array(list(paper)), np.array(list(paper.values())) / paper[0.0]
        curves = {"digits, ours": (w, values / values[0]), "ImageNet 64, paper": theirs}
        title = f"{name}, over that at w = 0"
        figures.curves(ax, curves, xlabel="guidance w", ylabel="ratio", title=title)
        ax.set_xscale("symlog", linthresh=0.1)
    fids.set_yscale("log")
    three = sorted({0, len(w) // 2, len(w) - 1})
    pictures = np.concatenate([shown[20 * i : 20 * i + 20] for i in three])
    title = f"two rows each of w = {', '.join(f'{w[i]:g}' for i in three)}; not chosen"
    figures.images(digits, pictures, 10, title=title)
    caption = f"Normals: tilted density in grey, samples by {setup.steps} steps of DDIM. Digits: "
    caption += f"{setup.samples:,} samples per w, by {setup.digit_steps} steps with eta = 1."
    figures.save(fig, folder / "guidance.png", caption)


if __name__ == "__main__":
    _cli.main("guidance")
