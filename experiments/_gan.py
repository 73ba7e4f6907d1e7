"""What the GAN scripts share: models, samples while training, distances to training images, and figures of D."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from aigc_jax import figures, gan, train
from aigc_jax.core import Optim
from experiments import _cli, _pictures
from experiments._cli import Row

COVERAGE = f"{_pictures.COVERAGE}; oracle: training images"
NEAR = "median distance of a sample to its nearest training image, over that of test images"
# mnist.yaml of the code of GAN: 0.1 / 1.000004 per update down to 1e-6, momentum 0.5 to 0.7 over
# 250 epochs of 500.
CURVE = {"decay": 2_878_237, "curve": "exponential", "floor": 1e-5}
MOMENTUM = {"momentum": 0.5, "momentum_end": 0.7, "momentum_steps": 125_000}
RECIPE = Optim("sgd", lr=0.1, **MOMENTUM, **CURVE)
WHO = {"training images": "seen_real", "held-out images": "real", "samples": "fake"}
COPIES = "smallest distance of a sample to a training image (pixels in [0, 1])"

ADAM = Optim(lr=2e-4, b1=0.5)  # DCGAN's


def dcgan(gen: tuple[int, ...], disc: tuple[int, ...], **fields) -> gan.Config:
    """Returns a DCGAN with nets of these widths, with the paper's first weights and rates."""
    net = partial(gan.NetConfig, "dcgan", norm="batch", init="normal", init_scale=0.02)
    nets = {"gen": net(gen), "disc": net(disc, "leaky_relu")}
    return gan.Config(**nets, optim=ADAM, disc_optim=ADAM, **fields)


def drawing(cfg: gan.Config, n: int, chunk: int = 500) -> Callable:
    """Returns draw(state, key) -> n samples, for an `on_eval`: `train.sample` needs a Result."""
    draw = jax.jit(partial(gan.sample, cfg, n=chunk))

    def draw_all(state, key) -> np.ndarray:
        keys = jax.random.split(key, -(-n // chunk))
        return np.concatenate([draw(state, k) for k in keys])[:n]

    return draw_all


def small(model: gan.Config) -> gan.Config:
    """Returns the model with small nets for 8x8 digits, for scale smoke."""
    gen, disc = replace(model.gen, widths=(64, 64)), replace(model.disc, widths=(32, 32))
    return replace(model, shape=(8, 8, 1), levels=17, latent_dim=10, gen=gen, disc=disc)


def by_the_paper(cfg: gan.Config, training: np.ndarray, biases: bool) -> gan.Config:
    """Returns the model with the authors' SGD and first biases.

    Their discriminator's loss is half the sum of two terms, so its rate is halved here.
    """
    mean = np.clip(training.mean(0).reshape(-1).astype(np.float64), 1e-7, 1 - 1e-7)
    bias = tuple(float(b) for b in np.round(np.log(mean / (1 - mean)), 4)) if biases else ()
    half = replace(RECIPE, lr=RECIPE.lr / 2)
    return replace(cfg, optim=RECIPE, disc_optim=half, output_bias=bias)


def nearest_rows(fake: np.ndarray, seen: np.ndarray, real: np.ndarray) -> list[Row]:
    """Returns two rows on the distance to the nearest training image, near 0 for copies."""
    near, copies = _pictures.neighbours(fake, seen, real)
    return [Row(NEAR, near), Row(COPIES, copies)]


def draw_levels(ax, result: train.Result, reach: float, **options) -> None:
    """Draws level sets of a critic of points in the square of -reach .. reach."""
    side = np.linspace(-reach, reach, 128, dtype=np.float32)
    plane = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    critic = {"params": result.state.params["disc"]}
    value = np.asarray(gan.discriminate(result.config, critic, plane)).reshape(128, 128)
    ax.contour(side, side, value, 12, cmap="viridis", **options)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def draw_discriminator(ax, result: train.Result, title: str) -> None:
    """Draws D's accuracy, or its logit where it has none, on training images, held-out images and
    samples.
    """
    steps, _ = _cli.history(result.folder, "real_accuracy")
    kind = "accuracy" if len(steps) else "logit"
    curves = {words: _cli.history(result.folder, f"{name}_{kind}") for words, name in WHO.items()}
    figures.curves(ax, curves, xlabel="updates", ylabel=f"D's {kind}", title=title)
