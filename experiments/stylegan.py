"""StyleGAN2 beside DCGAN at equal minutes; truncation and style mixing. Karras et al. 2019 and 2020, Huang et al. 2024 (R3GAN)

    python -m experiments.stylegan    scale cpu was not run to its end yet; Fashion-MNIST (31 MB)

Downloads Fashion-MNIST, or takes Debian's package of it (--data.folder names another folder). Three
GANs without labels are trained for about as many minutes each: DCGAN; StyleGAN2 with mixing, lazy
R1 and path lengths; the same nets and mixing, with R3GAN's relativistic loss and its penalties R1
and R2. All average G's weights. Their samples are compared by the Frechet distance of our own
classifier's features, at equal minutes and at equal updates. Only distances of this project compare
with it. One update of StyleGAN2 takes as long as a dozen of DCGAN's.

Truncation moves the styles towards their mean. Samples become more typical and less diverse, so
precision rises and recall falls. In the figure of mixing, a picture has the coarse styles of its
row, and those of its column at full size. StyleGAN2 then learns emoji of 32x32. There is no
classifier of emoji, so these are to be looked at. StyleGAN2's paper has photographs of 1024x1024,
and no paper has numbers for these sets. The weight of R1 is that of the authors' code for CIFAR-10
(Karras et al. 2020, "Training GANs with limited data"). The run of R3GAN uses the same.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, figures, gan, metrics, train
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _gan, _pictures
from experiments._cli import Row, Scale, Source

DCGAN = _gan.dcgan((32, 64), (32, 64), ema=0.998)
WIDTHS = (16, 32, 64)  # at 28x28, 14x14 and 7x7
STYLE_ADAM = Optim(lr=2e-3, b1=0.0, b2=0.99)
STYLE = gan.Config(
    latent_dim=64,
    gen=gan.NetConfig("style", WIDTHS),
    disc=gan.NetConfig("style", WIDTHS),
    penalty="r1",
    penalty_weight=0.01,
    lazy=16,
    mixing=0.9,
    path_length=2.0,
    optim=STYLE_ADAM,
    disc_optim=STYLE_ADAM,
    ema=0.998,
)
R3GAN = replace(STYLE, loss="relativistic", penalty="r1_r2", lazy=None, path_length=None)
EVERY = {"eval_every": 500, "save_every": 500, "log_every": 80}  # a multiple of lazy


@dataclass(frozen=True)
class Setup:
    """Flags of stylegan. The runs end after about as many minutes on 2 cores."""

    dcgan: gan.Config = DCGAN
    style: gan.Config = STYLE
    r3gan: gan.Config = R3GAN
    run: Run = Run("runs/stylegan", 2000, 32, keep=1, **EVERY)  # of StyleGAN2
    dcgan_steps: int = 24_000
    r3gan_steps: int = 3000
    emoji_steps: int = 1500  # 0: no emoji
    data: Source = Source("fashion_mnist")
    training: int = 50_000
    samples: int = 5000

    def __post_init__(self):
        _cli.at_least(self, dcgan_steps=1, r3gan_steps=1, emoji_steps=0, training=1, samples=80)
        _pictures.check_known(self.data, "stylegan")


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
FID = "{}: Frechet distance of our classifier's features at the end (oracle: training images)"
EQUAL = "DCGAN minus {} at equal minutes: Frechet distance"
UPDATES = "DCGAN minus {} at equal updates: Frechet distance"
PRECISION, RECALL = (
    "StyleGAN2, truncation {}: precision (oracle: training images)",
    "StyleGAN2, truncation {}: recall (oracle: training images)",
)
SHARPER = "StyleGAN2: precision at truncation 0.5 minus 1"
FEWER = "StyleGAN2: recall at truncation 0.5 minus 1"
TRUNCATIONS = (0.3, 0.5, 0.7, 1.0)
SELF = "StyleGAN2: largest change of a picture mixed with itself"
CRITERIA = {EQUAL.format("StyleGAN2"): "> 0", SHARPER: "> 0", FEWER: "< 0"}
INVARIANTS = {SELF: "< 1e-4"}


def shuffled(source: data.Data, n: int) -> np.ndarray:
    """Returns n images [n, H, W, C] of a set in [0, 1], drawn at random."""
    images = _pictures.pixels(source)
    return images[np.random.default_rng(0).permutation(len(images))[:n]]


def trained(setup: Setup, model: str, training: data.Data, features, held, folder: Path):
    """Trains a model. Returns it, and (updates, minutes, Frechet distances to `held`)."""
    cfg = getattr(setup, MODELS[model])
    steps = setup.run.steps if model == "StyleGAN2" else getattr(setup, f"{MODELS[model]}_steps")
    run = replace(setup.run, folder=str(folder / MODELS[model]), steps=steps)
    draw = _gan.drawing(cfg, len(held), chunk=100)

    def measure(family, state, step):
        fake = draw(state, jax.random.key(step))
        return {"fid": metrics.frechet_distance(features(fake), held)}

    watch = _cli.clock(run.folder, measure)
    result = train.fit(gan.make, cfg, run, training, on_eval=watch)
    updates, distances = _cli.history(run.folder, "fid")
    return result, (updates, _cli.history(run.folder, "minutes")[1], distances)


def truncated(result: train.Result, truncation: float, n: int, key) -> np.ndarray:
    """Returns n samples [n, H, W, C] in [0, 1]. Below 1, styles are moved towards their mean."""
    return train.sample(result, key, n=n, chunk=100, truncation=truncation)


def mixed(result: train.Result, rows: int, columns: int, key) -> np.ndarray:
    """Returns pictures [(rows + 1) * (columns + 1), H, W, C] of mixed styles, in [0, 1].

    The first row and column show the sources; the corner is empty. The two layers and the image of
    the highest resolution, and the image of the one before it, have the style of the column. All
    others have that of the row.
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


def trained_on_emoji(setup: Setup, folder: Path) -> train.Result:
    """Trains StyleGAN2 on emoji, with images changed before D sees them: the set is small."""
    training = data.load("emoji", "train")
    cfg = replace(setup.style, shape=training.info.shape, levels=256, augment="diff")
    run = replace(setup.run, folder=str(folder / "emoji"), steps=setup.emoji_steps)
    return train.fit(gan.make, cfg, run, training)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the models, compares them, and measures truncation."""
    cut = setup.training
    splits = f"train[:{cut}]", f"train[{cut}:]", "test"
    training, held, test = (setup.data.load(part) for part in splits)
    for model in MODELS.values():
        getattr(setup, model).check(training.info)
    apply, n = metrics.load_classifier(setup.data.name).apply, setup.samples

    def features(images):
        return apply(images)[1]

    real = features(shuffled(test, n))
    n = len(real)
    seen, watched = features(shuffled(training, n)), features(shuffled(held, n))
    rows, results, curves = _cli.kept(), {}, {}
    for model in MODELS:
        results[model], curves[model] = trained(setup, model, training, features, watched, folder)
        rows.append(Row(MINUTES.format(model), float(curves[model][1][-1])))
        fake = features(truncated(results[model], 1.0, n, jax.random.key(0)))
        end, floor = (metrics.frechet_distance(x, real) for x in (fake, seen))
        rows.append(Row(FID.format(model), end, oracle=floor))
    for i, words in enumerate((UPDATES, EQUAL)):
        rows += [Row(words.format(name), ahead(curves, name, i)) for name in ("StyleGAN2", "R3GAN")]
    rows += truncation_rows(results["StyleGAN2"], features, real, seen)
    rows.append(Row(SELF, changed_by_itself(results["StyleGAN2"])))
    with_emoji = None
    with _cli.costs("emoji in stylegan.png"):
        with_emoji = trained_on_emoji(setup, folder) if setup.emoji_steps else None
    plot(setup, folder, results, curves, with_emoji)
    return rows


def ahead(curves: dict, model: str, axis: int) -> float:
    """Returns DCGAN's Frechet distance minus a model's, where the shorter of the two runs ends.

    axis: 0 for equal updates, 1 for equal minutes.
    """
    end = min(curves["DCGAN"][axis][-1], curves[model][axis][-1])
    ours, others = (np.interp(end, curves[n][axis], curves[n][2]) for n in (model, "DCGAN"))
    return float(others - ours)


def truncation_rows(result: train.Result, features, real, seen) -> list[Row]:
    """Returns precision and recall by truncation. real, seen: features of test and training."""
    found, oracle = {}, metrics.precision_recall(real, seen)
    for value in TRUNCATIONS:
        fake = features(truncated(result, value, len(real), jax.random.key(0)))
        found[value] = metrics.precision_recall(real, fake)
    rows = [
        Row(words.format(value), pair[i], oracle=oracle[i])
        for value, pair in found.items()
        for i, words in enumerate((PRECISION, RECALL))
    ]
    rows.append(Row(SHARPER, found[0.5][0] - found[1.0][0]))
    return [*rows, Row(FEWER, found[0.5][1] - found[1.0][1])]


def changed_by_itself(result: train.Result) -> float:
    """Returns the largest difference of G's pictures from the sources in a 2 x 2 grid of `mixed`."""
    cfg, z = result.config, gan.noise(result.config, jax.random.key(3), 4)
    z = jnp.concatenate([z[:, : cfg.latent_dim], jnp.tile(z[:1, cfg.latent_dim :], (4, 1))], -1)
    own = (gan.generate(cfg, gan.generator_of(cfg, result.state), z) + 1) / 2
    grid = mixed(result, 2, 2, jax.random.key(3)).reshape(3, 3, *cfg.shape)
    sources = np.concatenate([grid[1:, 0], grid[0, 1:]])
    return float(np.abs(sources - np.clip(own, 0, 1)).max())


@_cli.costs("stylegan.png")
def plot(setup: Setup, folder: Path, results: dict, curves: dict, with_emoji) -> None:
    """Draws samples of all models, truncation, mixing and the distance against minutes."""
    fig, axes = figures.figure(2, 3)
    for ax, (model, result) in zip(axes[0], results.items(), strict=True):
        images = train.sample(result, jax.random.key(0), n=48, chunk=48)
        figures.images(ax, images, 8, title=f"{model}: samples, not chosen")
    style = results["StyleGAN2"]
    against = {name: curve[1:] for name, curve in curves.items()}
    figures.curves(axes[1, 0], against, xlabel="minutes", ylabel="Frechet distance")
    axes[1, 0].set_yscale("log")
    figures.images(
        axes[1, 1], mixed(style, 5, 6, jax.random.key(3)), 7, title="row: coarse, column: fine"
    )
    if with_emoji is None:
        each = [truncated(style, t, 8, jax.random.key(4)) for t in TRUNCATIONS]
        figures.images(axes[1, 2], np.concatenate(each), 8, title="truncation 0.3, 0.5, 0.7, 1")
    else:
        images = [truncated(with_emoji, t, 24, jax.random.key(5)) for t in (0.7, 1.0)]
        title = "emoji: truncation 0.7, then 1"
        figures.images(axes[1, 2], np.concatenate(images), 8, title=title)
    caption = f"{setup.data.name}. Samples of the averaged generators."
    figures.save(fig, folder / "stylegan.png", caption)


if __name__ == "__main__":
    _cli.main("stylegan")
