"""The bound while training, against wake-sleep, for five latent sizes: AEVB (Kingma & Welling 2014), fig. 2

    python -m experiments.vae_elbo_curves    about 25 minutes on 2 cores; MNIST (12 MB)
    python -m experiments.vae_elbo_curves --scale paper    1e8 images per arm: about 10 hours on 2 cores

Downloads MNIST or takes its files as vae_manifold does. Both algorithms train the same nets from
the same initialisation on the same batches. Wake-sleep (Hinton et al. 1995) fits the encoder to
samples of the model itself. Expect AEVB ahead at every size, and no overfitting of 200 latents. The
paper prints curves and no numbers: the criteria are ours.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from aigc_jax import figures, train, vae
from aigc_jax.core import EMA, Family, Optim, make_step
from aigc_jax.train import Run
from experiments import _cli, _pictures
from experiments._cli import DataError, Row, Scale, Source
from experiments._vae import ADAGRAD, check_latents

ADAM = Optim(lr=1e-3)
EVERY = {"eval_every": 1000, "save_every": 5000, "log_every": 10, "steps_per_call": 100}


@dataclass(frozen=True)
class Setup:
    """Flags of vae_elbo_curves."""

    model: vae.Config = vae.Config(
        hidden=(500,), activation="tanh", binarisation="dynamic", optim=ADAM
    )
    run: Run = Run("runs/vae_elbo_curves", 20_000, 100, keep=1, **EVERY)
    data: Source = Source("mnist")
    latents: tuple[int, ...] = (3, 5, 10, 20, 200)  # N_z
    seeds: int = 2  # run.seed is the first

    def __post_init__(self):
        _cli.at_least(self, seeds=1)
        check_latents(self.latents)


SMALL = {"model.shape": (8, 8, 1), "model.levels": 17, "model.hidden": (32,), "latents": (2, 8)}
SHORT = {"run.steps": 1000, "run.eval_every": 250, "run.save_every": 1000, "seeds": 1}
PLACE = {"run.folder": "runs/vae_elbo_curves-smoke", "data.name": "digits"}
LONG = {"run.folder": "runs/vae_elbo_curves-paper", "run.steps": 1_000_000}
PAPER = {**LONG, "run.eval_every": 20_000, "model.optim": ADAGRAD}
UNSAID = "dynamic binarisation (the paper does not say)"
SCALES = {
    "smoke": Scale(_cli.change(Setup(), {**SMALL, **SHORT, **PLACE}), "digits 8x8, 1,000 updates"),
    "cpu": Scale(
        Setup(),
        "2e6 images per arm (paper: 1e8), Adam for Adagrad, no prior on the weights, Flax's "
        f"initialisation; {UNSAID}",
    ),
    "paper": Scale(
        _cli.change(Setup(), PAPER),
        "no prior on the weights, one step size where the paper chooses from three, Flax's "
        f"initialisation; {UNSAID}",
    ),
}
AHEAD = "AEVB ahead of wake-sleep, smallest lead over the sizes (nats, test)"
ORDER = "smallest gain from one size to the next up to 20 latents (nats, test)"
SUPERFLUOUS = "|bound of 200 latents - bound of 20| (nats, test)"
OVERFIT = "train - test gap of 200 latents less that of 20 (nats)"
CRITERIA = {AHEAD: "> 0", ORDER: ">= 0", SUPERFLUOUS: "<= 3", OVERFIT: "<= 1"}
INVARIANTS = {ORDER: CRITERIA[ORDER]}  # not AHEAD: so early, wake-sleep is ahead


def make_wake_sleep(cfg: vae.Config, *, axis_name: str | None = None) -> Family:
    """Returns the VAE's nets trained by wake-sleep (Hinton et al. 1995).

    Wake trains the decoder on z ~ q(z|x). Sleep trains the encoder on (z, x) ~ p(x|z) p(z). Neither
    differentiates through a draw. So each loss trains one net, and their sum trains both.
    """
    family = vae.make(cfg)

    def loss(params, state, batch, key):
        k_x, k_wake, k_z, k_dream = jax.random.split(key, 4)
        x = vae.preprocess(cfg, batch, k_x)
        held = jax.lax.stop_gradient(params)
        z = vae.sample_posterior(cfg, held, x, k_wake, k=1)[0][0]
        wake = vae.log_likelihood(cfg, x, vae.decode(cfg, params, z))

        dreamt = jax.random.normal(k_z, z.shape)
        p = vae.mean_image(cfg, vae.decode(cfg, held, dreamt))
        dream = jax.random.bernoulli(k_dream, p).astype(x.dtype)
        sleep = vae.log_normal(dreamt, *vae.encode(cfg, params, dream))
        bound = wake - vae.gaussian_kl(*vae.encode(cfg, held, x))
        return -(wake + sleep).mean(), (state.extra, {"elbo_nats": bound.mean()})

    step = make_step(loss, cfg.optim, ema=EMA(cfg.ema), micro=cfg.micro, axis_name=axis_name)
    return family._replace(step=step)


MAKES = {"AEVB": vae.make, "wake-sleep": make_wake_sleep}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both algorithms at every size, measures bounds on test and train."""
    plain = {"likelihood": "bernoulli", "upper_dim": 0, "classes": 0, "objective": "elbo"}
    if wrong := [name for name, value in plain.items() if getattr(setup.model, name) != value]:
        raise DataError(f"wake-sleep is for model.{wrong[0]} {plain[wrong[0]]} only")
    training, test = _pictures.parts(setup.data, "train", "test")
    seen = setup.data.load(f"train[:{min(test.info.examples, training.info.examples)}]")
    setup = _pictures.adopt(setup, SCALES, training.info)
    bounds, gaps, curves, found = {}, {}, {}, _cli.kept()
    for algorithm, n in ((a, n) for n in setup.latents for a in MAKES):
        model, ends = replace(setup.model, latent_dim=n), []
        base = replace(setup.run, folder=str(folder / f"{algorithm}-{n}"))
        for run in _cli.seeded(base, setup.seeds):
            result = train.fit(MAKES[algorithm], model, run, training, valid=test)
            ends.append([-train.evaluate(result, part)["nll_nats"] for part in (test, seen)])
            curves.setdefault((algorithm, n), curve(run))
        bounds[algorithm, n], error = _cli.mean_and_error([end[0] for end in ends])
        gaps[algorithm, n] = float(np.mean([end[1] - end[0] for end in ends]))
        what = f"{algorithm}, {n} latents: bound, test (nats, ELBO; +- s.e. over seeds)"
        found.append(Row(what, bounds[algorithm, n], error=error))
    lead = min(bounds["AEVB", n] - bounds["wake-sleep", n] for n in setup.latents)
    small = [bounds["AEVB", n] for n in setup.latents if n <= 20]
    found += [Row(AHEAD, lead), Row(ORDER, float(min(np.diff(small), default=np.nan)))]
    if {20, 200} <= set(setup.latents):
        found.append(Row(SUPERFLUOUS, abs(bounds["AEVB", 200] - bounds["AEVB", 20])))
        found.append(Row(OVERFIT, gaps["AEVB", 200] - gaps["AEVB", 20]))
    plot(setup, folder, curves)
    return found


def curve(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images seen, the bound on test, and that on training batches since the last one."""
    steps, nats = _cli.history(run.folder, "nll_nats")
    at, batches = _cli.history(run.folder, "elbo_nats", "train")
    means = [batches[(step - run.eval_every < at) & (at <= step)].mean() for step in steps]
    return steps * run.batch_size, -nats, np.array(means)


@_cli.costs("vae_elbo_curves.png")
def plot(setup: Setup, folder: Path, curves: dict) -> None:
    """Draws one panel per size, as in the paper: images seen against the bound."""
    fig, (axes,) = figures.figure(1, len(setup.latents))
    low = min(test[len(test) // 10] for _, test, _ in curves.values())
    high = max(batches.max() for _, _, batches in curves.values())
    for ax, latents in zip(axes, setup.latents, strict=True):
        lines = {}
        for algorithm in MAKES:
            seen, test, batches = curves[algorithm, latents]
            lines |= {f"{algorithm}, test": (seen, test), f"{algorithm}, train": (seen, batches)}
        names = {"ylabel": "ELBO (nats per image)", "title": f"{latents} latents"}
        figures.curves(ax, lines, xlabel="images seen", **names)
        ax.set(xscale="log", ylim=(low, high + 0.05 * (high - low)))
        ax.xaxis.set_minor_formatter("")  # labels between the decades would overlap
    figures.share_legend(fig)
    caption = (
        f"{setup.data.name}. Hidden layers {setup.model.hidden}, dynamic binarisation. "
        f"First of {setup.seeds} seeds. Train: mean over batches of {setup.run.batch_size}."
    )
    figures.save(fig, folder / "vae_elbo_curves.png", caption)


if __name__ == "__main__":
    _cli.main("vae_elbo_curves")
