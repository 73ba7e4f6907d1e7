"""Own pictures: a VAE, a GAN or a diffusion model of a folder of them

    python -m experiments.own_pictures --family ddpm --data.name images:FOLDER --data.size 32
    python -m experiments.own_pictures --family vae     8x8 digits: downloads nothing

--family is vae (the default), gan or ddpm. The nets are chosen by the size of the pictures.
Pictures of all sizes are resized and cropped by --data.size. Sub-folders are classes;
--model.classes N gives them to the model. train/, validation/ and test/ are splits. Without them,
one tenth of the pictures is watched while training and another tenth is measured.

What to expect: 1,529 emoji of 32x32 in colour train for about 7 minutes (VAE), 16 minutes (GAN) and
20 minutes (diffusion) on 2 cores. The VAE's samples are soft. The GAN and the diffusion model draw
clean outlines and colours, discs, signs and flags, but no faces and no letters. For these, train
longer: --run.steps 20000 --model.optim.decay 20000.

The samples stand beside what training images score (oracle) and beside their nearest training
images. The measures are of pixels: they need no classifier. Compare them only with numbers of the
same pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, ddpm, figures, gan, metrics, train, vae
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _pictures
from experiments._cli import DataError, Row, Scale, Source

FIRST = {"family": ("vae", "gan", "ddpm")}


def halvings(shape: tuple[int, ...]) -> int:
    """Returns how often both sides can be halved before one is below 3."""
    count, (height, width, _) = 0, shape
    while height % 2 == width % 2 == 0 and min(height, width) >= 6:
        count, height, width = count + 1, height // 2, width // 2
    return count


def channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the channels of the VAE's convolutions, each of which halves the sides."""
    return (32, 64, 128, *[128] * 5)[: halvings(shape)]


def generator(shape: tuple[int, ...]) -> gan.NetConfig:
    """Returns residual blocks, or dense layers if the sides cannot be halved."""
    if not halvings(shape):
        return gan.NetConfig(widths=(256, 256), norm="batch")
    widths = (24,) * (halvings(shape) - 2) + (48, 96)[-halvings(shape) :]
    return gan.NetConfig("resnet", widths, norm="batch")


def discriminator(shape: tuple[int, ...]) -> gan.NetConfig:
    """Returns DCGAN's net with spectral normalisation, or dense layers."""
    widths = (32, 64, 128, *[128] * 5)[: halvings(shape)]
    kind, widths = ("dcgan", widths) if widths else ("mlp", (256, 256))
    return gan.NetConfig(kind, widths, activation="leaky_relu", norm="spectral")


def unet(shape: tuple[int, ...]) -> ddpm.NetConfig:
    """Returns a U-Net that attends where at most 8 rows are left."""
    widths = (24, 48, 96, *[128] * 5)[: 1 + halvings(shape)]
    return ddpm.NetConfig(widths=widths, blocks=1, attention=(4, 5, 6, 7, 8), groups=8, dropout=0.1)


DIGIT = (8, 8, 1)
SHAPE = {"shape": DIGIT, "levels": 17, "ema": 0.99}
VAE = vae.Config(
    **SHAPE,
    latent_dim=32,
    channels=channels(DIGIT),
    hidden=(256,),
    activation="relu",
    optim=Optim(lr=1e-3, clip=100.0, warmup=100, decay=2900, floor=0.05),
)
GAN = gan.Config(
    **SHAPE,
    latent_dim=64,
    gen=generator(DIGIT),
    disc=discriminator(DIGIT),
    loss="hinge",
    optim=Optim(lr=4e-4, b1=0.0, b2=0.9),
    disc_optim=Optim(lr=8e-4, b1=0.0, b2=0.9),
)
LEARNED = {"variance": "learned", "objective": "hybrid", "terms": 8}
DDPM = ddpm.Config(
    **SHAPE,
    T=100,
    schedule="cosine",
    prediction="v",
    **LEARNED,
    net=unet(DIGIT),
    optim=Optim(lr=2e-3, clip=1.0, warmup=100, decay=1900, floor=0.05),
)
RUN = Run(steps=3000, batch_size=64, eval_every=250, save_every=500, log_every=50, keep=1)


@dataclass(frozen=True)
class VAESetup:
    """Flags of own_pictures --family vae."""

    model: vae.Config = VAE
    # The best checkpoint: it overfits few pictures.
    run: Run = replace(RUN, folder="runs/own_pictures-vae", best="nll_nats")
    data: Source = Source("digits")
    samples: int = 400  # at most as many as pictures are held out


@dataclass(frozen=True)
class GANSetup:
    """Flags of own_pictures --family gan."""

    model: gan.Config = GAN
    run: Run = replace(RUN, folder="runs/own_pictures-gan", batch_size=32)
    data: Source = Source("digits")
    samples: int = 400  # at most as many as pictures are held out


@dataclass(frozen=True)
class DDPMSetup:
    """Flags of own_pictures --family ddpm."""

    model: ddpm.Config = DDPM
    run: Run = replace(RUN, folder="runs/own_pictures-ddpm", steps=2000, batch_size=32)
    data: Source = Source("digits")
    samples: int = 400  # at most as many as pictures are held out


MAKES = {"vae": vae.make, "gan": gan.make, "ddpm": ddpm.make}
SETUPS = {"vae": VAESetup(), "gan": GANSetup(), "ddpm": DDPMSetup()}


def scales(family: str) -> dict[str, Scale]:
    """{scale: Scale} of a family."""
    cpu = SETUPS[family]
    run = replace(cpu.run, folder=f"{cpu.run.folder}-smoke", steps=200, eval_every=100)
    small = {"T": 25} if family == "ddpm" else {}
    smoke = replace(cpu, model=replace(cpu.model, ema=0.9, **small), run=run, samples=100)
    return {
        "smoke": Scale(smoke, "200 updates"),
        "cpu": Scale(cpu, "no paper: nets and lengths of our own"),
    }


SCALES = scales("vae")
NEAR = "median distance of a sample to its nearest training image, over that of held-out images"
COPIES = "smallest distance of a sample to a training image (pixels in [0, 1])"
SPREAD = "variance of the samples' pixels over that of held-out images"
CRITERIA = {NEAR: "within 0.5 .. 2", COPIES: "> 0", SPREAD: "within 0.3 .. 3"}
INVARIANTS = {COPIES: CRITERIA[COPIES], SPREAD: "within 0.02 .. 20"}
SCORES = {
    "vae": ("nll_nats", "negative bound, held-out images (nats, -ELBO)"),
    "ddpm": ("nll_bits_per_dim", "bound, held-out images (bits per dim)"),
}
# What the figure shows of a training: the label of its axis, and {line: value of the validations}.
LOGIT = {"training images": "seen_real_logit", "held-out images": "real_logit"}
WATCHED = {
    "vae": ("negative bound (nats)", {"held-out images": "nll_nats"}),
    "gan": ("D's logit", {**LOGIT, "samples": "fake_logit"}),
    "ddpm": ("bound (bits per dim)", {"held-out images": "nll_bits_per_dim"}),
}


def family_of(setup) -> str:
    """vae, gan or ddpm."""
    return next(family for family, usual in SETUPS.items() if type(setup) is type(usual))


def sized(setup, info: data.Info):
    """The Setup with nets for pictures of this size, where the user named no others."""
    family, model, shape = family_of(setup), setup.model, info.shape
    if info.kind != "image":
        model.check(info)
    nets = {
        "vae": {"channels": channels},
        "gan": {"gen": generator, "disc": discriminator},
        "ddpm": {"net": unet},
    }[family]
    if tuple(model.shape) != DIGIT:
        return setup
    usual = {name: net for name, net in nets.items() if getattr(model, name) == net(DIGIT)}
    fitting = {name: net(shape) for name, net in usual.items()}
    return replace(setup, model=replace(model, shape=shape, **fitting))


def run(setup, folder: Path) -> list[Row]:
    """Trains, draws samples beside training images, measures them in pixels."""
    family = family_of(setup)
    if setup.samples < _pictures.LEAST:
        raise DataError(f"samples must be at least {_pictures.LEAST}, got {setup.samples}")
    training, held, test = _pictures.parts(setup.data, "train[:90%]", "train[90%:]", "test")
    setup = _pictures.adopt(sized(setup, training.info), scales(family), training.info)
    seen, real = _pictures.pixels(training), _pictures.pixels(test)
    watch = _pictures.health(training) if family == "gan" else None
    result = train.fit(MAKES[family], setup.model, setup.run, training, valid=held, on_eval=watch)
    if setup.run.best:
        result = train.load(setup.run.folder)

    found = _cli.kept()
    found.append(Row("parameters", _cli.parameters(result)))
    if family in SCORES:
        name, words = SCORES[family]
        with _cli.costs(words):
            found.append(Row(words, train.evaluate(result, test)[name]))
    count = min(setup.samples, len(real))
    n = max(64, count)  # the figure shows 64
    label = {"label": np.arange(n) % setup.model.classes} if setup.model.classes else {}
    drawn = train.sample(result, jax.random.key(setup.run.seed), n=n, **label)
    fake = drawn[:count]
    with _cli.costs(NEAR, COPIES):
        near, copies = _pictures.neighbours(fake, seen, real)
        found += [Row(NEAR, near), Row(COPIES, copies)]
    with _cli.costs(SPREAD):
        found.append(Row(SPREAD, float(fake.var(0).mean() / real.var(0).mean())))
    with _cli.costs("distances of pixels"):
        found += _pictures.in_pixels(fake, real, seen)
    plot(setup, folder, result, drawn, seen, found)
    return found


@_cli.costs("own_pictures.png")
def plot(setup, folder: Path, result, fake: np.ndarray, seen: np.ndarray, found: list) -> None:
    """Draws samples beside training images, samples above their nearest ones, and the training."""
    fig, ((a, b), (c, d)) = figures.figure(2, 2)
    figures.images(a, fake[:64], 8, title="samples, not chosen")
    some = np.random.default_rng(0).permutation(len(seen))[:64]
    figures.images(b, seen[some], 8, title="training images")
    few = fake[:32].reshape(4, 8, *fake.shape[1:])
    nearest = seen[metrics.nearest(fake[:32], seen)[1]].reshape(few.shape)
    pairs = np.stack([few, nearest], 1).reshape(-1, *fake.shape[1:])
    figures.images(c, pairs, 8, title="samples, below each its nearest training image")
    family = family_of(setup)
    ylabel, names = WATCHED[family]
    curves = {words: _cli.history(result.folder, name) for words, name in names.items()}
    figures.curves(d, curves, xlabel="updates", ylabel=ylabel, title="while training")
    size = " x ".join(map(str, setup.model.shape))
    length = f"update {int(result.state.step)} of {setup.run.steps}, {setup.run.batch_size} each"
    caption = f"{family}, {size}; {length}; {len(seen)} training images; {_pictures.caption(found)}"
    figures.save(fig, folder / "own_pictures.png", caption)


if __name__ == "__main__":
    _cli.main("own_pictures")
