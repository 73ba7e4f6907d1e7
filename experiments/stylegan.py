"""StyleGAN2 beside DCGAN at equal minutes; truncation and style mixing. Karras et al. 2019 and 2020, Huang et al. 2024 (R3GAN)

    python -m experiments.stylegan    scale cpu was not run to its end yet; Fashion-MNIST (31 MB)

Downloads Fashion-MNIST, or takes Debian's package of it (--data.folder names another folder). Three
GANs without labels are trained for about as many minutes each: DCGAN; StyleGAN2 with mixing, lazy R1
and path lengths; the same nets with R3GAN's relativistic loss and its penalties R1 and R2. All
average G's weights. Their samples are compared by the Frechet distance of our own classifier's
features, against minutes. Only distances of this project compare with it.

Truncation moves the styles towards their mean: samples become more typical and less diverse, so
precision rises and recall falls. In the figure of mixing, each picture has the styles of its row at
7x7 and 14x14, and those of its column at 28x28, or the other way round. StyleGAN2 then learns emoji
of 32x32. There is no classifier of emoji, so these are to be looked at. The papers have photographs
of 1024x1024 and no number for these sets.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _pictures
from experiments._cli import Row, Scale, Source

INIT = {"kind": "dcgan", "init": "normal", "init_scale": 0.02}
ADAM = Optim(lr=2e-4, b1=0.5)
DCGAN = gan.Config(
    gen=gan.NetConfig(widths=(32, 64), norm="batch", **INIT),
    disc=gan.NetConfig(widths=(32, 64), activation="leaky_relu", norm="batch", **INIT),
    optim=ADAM,
    disc_optim=ADAM,
    ema=0.998,
)
WIDTHS = (16, 32, 64)  # at 28x28, 14x14 and 7x7
STYLE_ADAM = Optim(lr=2e-3, b1=0.0, b2=0.99)
STYLE = gan.Config(
    latent_dim=64,
    gen=gan.NetConfig("style", WIDTHS),
    disc=gan.NetConfig("style", WIDTHS),
    penalty="r1",
    penalty_weight=1.0,
    lazy=16,
    mixing=0.9,
    path_length=2.0,
    optim=STYLE_ADAM,
    disc_optim=STYLE_ADAM,
    ema=0.998,
)
R3GAN = replace(STYLE, loss="relativistic", penalty="r1_r2", lazy=None, path_length=None)
EVERY = {"eval_every": 500, "save_every": 500, "log_every": 100}


@dataclass(frozen=True)
class Setup:
    """Flags of stylegan. The runs end after about as many minutes on 2 cores."""

    dcgan: gan.Config = DCGAN
    style: gan.Config = STYLE
    r3gan: gan.Config = R3GAN
    run: Run = Run("runs/stylegan", 6000, 32, keep=1, **EVERY)  # of StyleGAN2
    dcgan_steps: int = 12_000
    r3gan_steps: int = 4000
    emoji_steps: int = 4000  # 0: no emoji
    data: Source = Source("fashion_mnist")
    training: int = 50_000
    samples: int = 5000

    def __post_init__(self):
        _cli.at_least(self, dcgan_steps=1, r3gan_steps=1, emoji_steps=0, training=1, samples=80)
        if self.data.pictures:
            raise ValueError("stylegan needs our classifiers: fashion_mnist, mnist or digits")


SMOKE = {f"{model}.{net}.widths": (8, 8) for model in ("style", "r3gan") for net in ("gen", "disc")}
SMOKE |= {f"{model}.shape": (8, 8, 1) for model in ("dcgan", "style", "r3gan")}
SMOKE |= {f"{model}.levels": 17 for model in ("dcgan", "style", "r3gan")}
SMOKE |= {"run.folder": "runs/stylegan-smoke", "run.steps": 20, "run.eval_every": 10}
SMOKE |= {"dcgan_steps": 20, "r3gan_steps": 20, "emoji_steps": 2, "data.name": "digits"}
SMOKE |= {"training": 1237, "samples": 360}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "digits 8x8, small nets, 20 updates"),
    "cpu": Scale(
        Setup(),
        "Fashion-MNIST of 28x28 and emoji of 32x32 for photographs of 1024x1024, small nets",
    ),
}
MODELS = {"DCGAN": "dcgan", "StyleGAN2": "style", "R3GAN": "r3gan"}
MINUTES = "{}: minutes of training"
FID = "{}: Frechet distance at the end (oracle: training images)"
EQUAL = "DCGAN minus {} at equal minutes: Frechet distance"
PRECISION, RECALL = "StyleGAN2, truncation {}: precision", "StyleGAN2, truncation {}: recall"
SHARPER = "StyleGAN2: precision at truncation 0.5 minus 1"
FEWER = "StyleGAN2: recall at truncation 0.5 minus 1"
TRUNCATIONS = (0.3, 0.5, 0.7, 1.0)
CRITERIA = {EQUAL.format("StyleGAN2"): "> 0", SHARPER: "> 0", FEWER: "< 0"}
INVARIANTS = {MINUTES.format("StyleGAN2"): "> 0"}


def trained(setup: Setup, model: str, training: data.Data, features, real, folder: Path):
    """Trains a model. Returns it, and (minutes, Frechet distances) of its measurements."""
    cfg = getattr(setup, MODELS[model])
    steps = setup.run.steps if model == "StyleGAN2" else getattr(setup, f"{MODELS[model]}_steps")
    run = replace(setup.run, folder=str(folder / MODELS[model]), steps=steps)
    watch, draw = _cli.clock(run.folder), jax.jit(partial(gan.sample, cfg, n=100))

    def on_eval(family, state, step):
        time = watch(family, state, step)  # before the samples, which are not training
        keys = jax.random.split(jax.random.key(step), -(-setup.samples // 100))
        fake = np.concatenate([draw(state, key) for key in keys])[: setup.samples]
        return {**time, "fid": metrics.frechet_distance(features(fake), real)}

    result = train.fit(gan.make, cfg, run, training, on_eval=on_eval)
    return result, tuple(_cli.history(run.folder, name)[1] for name in ("minutes", "fid"))


def truncated(result: train.Result, truncation: float, n: int, key) -> np.ndarray:
    """Returns n samples [n, H, W, C] in [0, 1], whose styles are moved towards their mean."""
    cfg = result.config
    draw = jax.jit(partial(gan.sample, cfg, n=100, truncation=truncation))
    keys = jax.random.split(key, -(-n // 100))
    return np.concatenate([draw(result.state, k) for k in keys])[:n]


def mixed(result: train.Result, rows: int, columns: int, key) -> np.ndarray:
    """Returns pictures [(rows + 1) * (columns + 1), H, W, C] of mixed styles, in [0, 1].

    The first row and column show the sources; the corner is empty. A picture has the coarse styles
    of its row, and those of its column at the highest resolution.
    """
    cfg, variables = result.config, gan.generator_of(result.config, result.state)
    net = gan.Generator(cfg.gen, tuple(cfg.shape), latents=cfg.latent_dim)
    z = gan.noise(cfg, key, rows + columns)
    w = net.apply(variables, z, method="styles")
    inputs = z[:1, cfg.latent_dim :]  # one draw of the noise inputs for all pictures
    coarse = jnp.arange(net.layers) < net.layers - 3  # two layers and the image are at full size

    def picture(low, high):
        ws = jnp.where(coarse[:, None], low[None], high[None])[None]
        return net.apply(variables, ws, inputs, method="images")[0]

    lows, highs = w[:rows], w[rows:]
    empty = -jnp.ones(cfg.shape)
    grid = [jnp.stack([empty, *(picture(high, high) for high in highs)])]
    for low in lows:
        grid.append(jnp.stack([picture(low, low), *(picture(low, high) for high in highs)]))
    return np.clip((np.concatenate(grid) + 1) / 2, 0, 1)


def emoji(setup: Setup, folder: Path) -> train.Result:
    """Trains StyleGAN2 on emoji, with images changed before D sees them: the set is small."""
    training = data.load("emoji", "train")
    cfg = replace(setup.style, shape=training.info.shape, levels=256, augment="diff")
    run = replace(setup.run, folder=str(folder / "emoji"), steps=setup.emoji_steps)
    return train.fit(gan.make, cfg, run, training)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the models, compares them, and measures truncation."""
    training, test = (setup.data.load(part) for part in (f"train[:{setup.training}]", "test"))
    apply = metrics.load_classifier(setup.data.name).apply
    n = min(setup.samples, test.info.examples)
    pixels = _pictures.pixels(test, n)
    real, seen = apply(pixels)[1], apply(_pictures.pixels(training, n))[1]
    rows, results, curves = _cli.kept(), {}, {}
    for model in MODELS:
        results[model], curves[model] = trained(
            setup, model, training, lambda x: apply(x)[1], real, folder
        )
        minutes, fid = curves[model]
        rows.append(Row(MINUTES.format(model), float(minutes[-1])))
        rows.append(
            Row(FID.format(model), float(fid[-1]), oracle=metrics.frechet_distance(seen, real))
        )
    for model in ("StyleGAN2", "R3GAN"):
        end = min(curves["DCGAN"][0][-1], curves[model][0][-1])
        ours, others = (np.interp(end, *curves[name]) for name in (model, "DCGAN"))
        rows.append(Row(EQUAL.format(model), float(others - ours)))
    found = {}
    for value in TRUNCATIONS:
        fake = truncated(results["StyleGAN2"], value, n, jax.random.key(0))
        found[value] = metrics.precision_recall(real, apply(fake)[1])
        rows.append(Row(PRECISION.format(value), found[value][0]))
        rows.append(Row(RECALL.format(value), found[value][1]))
    rows.append(Row(SHARPER, found[0.5][0] - found[1.0][0]))
    rows.append(Row(FEWER, found[0.5][1] - found[1.0][1]))
    drawn = emoji(setup, folder) if setup.emoji_steps else None
    plot(setup, folder, results, curves, drawn)
    return rows


@_cli.costs("stylegan.png")
def plot(setup: Setup, folder: Path, results: dict, curves: dict, emoji) -> None:
    """Draws samples of all models, truncation, mixing and the distance against minutes."""
    fig, axes = figures.figure(2, 3)
    for ax, (model, result) in zip(axes[0], results.items(), strict=True):
        images = train.sample(result, jax.random.key(0), n=48, chunk=48)
        figures.images(ax, images, 8, title=f"{model}: samples, not chosen")
    style = results["StyleGAN2"]
    figures.curves(axes[1, 0], curves, xlabel="minutes", ylabel="Frechet distance")
    axes[1, 0].set_yscale("log")
    figures.images(
        axes[1, 1], mixed(style, 5, 6, jax.random.key(3)), 7, title="row: coarse, column: fine"
    )
    if emoji is None:
        each = [truncated(style, t, 8, jax.random.key(4)) for t in TRUNCATIONS]
        figures.images(axes[1, 2], np.concatenate(each), 8, title="truncation 0.3, 0.5, 0.7, 1")
    else:
        images = [truncated(emoji, t, 24, jax.random.key(5)) for t in (0.7, 1.0)]
        title = "emoji: truncation 0.7, then 1"
        figures.images(axes[1, 2], np.concatenate(images), 8, title=title)
    caption = f"{setup.data.name}. Samples of the averaged generators."
    figures.save(fig, folder / "stylegan.png", caption)


if __name__ == "__main__":
    _cli.main("stylegan")
