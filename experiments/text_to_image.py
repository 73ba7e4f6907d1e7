"""Pictures from words: CLIP, an autoencoder, and diffusion in its latents: Rombach et al. 2022 (latent diffusion)

    python -m experiments.text_to_image     about 150 minutes on 2 cores; downloads nothing

Trains three models from nothing on 2,747 emoji with captions. CLIP gives a vector per word of a
caption. The autoencoder turns a picture of 32x32x3 into 8x8x4 latents of unit variance. A diffusion
model in these latents attends to the vectors of the words. The 309 test pictures show an emoji in a
skin tone that training has not; it has the emoji in other tones. The weight w of guidance is chosen
on captions of train. Expect the right skin tone in most samples, and the right emoji far more often
than chance. The paper has no numbers for this set: the criteria are ours.

The runs lie in the folders clip, autoencoder and diffusion. A run that was stopped goes on where it
was. The folder of another script's run can be given instead (--clip, --autoencoder).
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from aigc_jax import contrastive, data, ddpm, figures, metrics, train, vae
from aigc_jax.core import Optim
from aigc_jax.data import captions
from aigc_jax.train import Run
from aigc_jax.vae import autoencoder
from experiments import _cli, _diffusion, _emoji
from experiments._cli import Row, Scale, Source
from experiments._text_to_image import (
    DIFFUSION,
    STEPS,
    TextToImage,
    assembled,
    contexts,
    make_text_to_image,
)

# ---------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Setup:
    """Flags of text_to_image."""

    model: TextToImage = TextToImage()
    run: Run = Run("runs/text_to_image", STEPS, 128, eval_every=2000, save_every=500)
    data: Source = Source("emoji")
    clip: str = ""  # folder of a trained CLIP; "": it is trained here
    autoencoder: str = ""  # folder of a trained autoencoder; "": it is trained here
    clip_steps: int = _emoji.CLIP_STEPS
    autoencoder_steps: int = _emoji.AUTOENCODER_STEPS
    w: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0)  # guidance weights to choose from
    examples: int = 309  # captions of train on which w is chosen; at most as many of test
    ship: str = ""  # a .safetensors file to write the whole model to; "": none

    def __post_init__(self):
        _cli.at_least(self, clip_steps=1, autoencoder_steps=1, examples=70)
        if not self.w or self.w != tuple(sorted(set(self.w))) or self.w[0] < 0:
            raise ValueError(f"w must hold rising numbers from 0 on, got {self.w}")


TINY = replace(
    _emoji.CLIP,
    dim=16,
    text=replace(_emoji.CLIP.text, width=32, layers=1),
    image=contrastive.ImageConfig((8, 16, 32), shift=1),
    optim=replace(_emoji.CLIP.optim, lr=3e-3, warmup=5, decay=0),
)
SMOKE = Setup(
    TextToImage(
        TINY,
        replace(_emoji.AUTOENCODER, widths=(8, 16), blocks=1, ema=0.9),
        replace(
            DIFFUSION,
            context=(17, 32),
            T=50,
            net=ddpm.NetConfig("unet", (16,), 1, (8,), heads=2, groups=8, dropout=0.0),
            ema=0.9,
            optim=Optim(lr=3e-3),
        ),
        steps=5,
    ),
    Run("runs/text_to_image-smoke", 60, 64, save_every=30),
    clip_steps=40,
    autoencoder_steps=40,
    w=(0.0, 2.0),
    examples=70,
)
SCALES = {
    "smoke": Scale(SMOKE, "tiny nets, 60 updates"),
    "cpu": Scale(
        Setup(),
        "2,747 emoji of 32x32 and their names (the paper: 400 million pictures of 256x256), a text "
        "net of our own CLIP",
    ),
}
TONE = "skin tone of samples for test captions (%; oracle: true test pictures)"
RANK = "R@1 of samples for test captions among all 3,786 pictures (%; oracle: chance)"
CHANCE = "R@1 of samples for test captions over chance"
FRECHET = "Frechet distance of samples to test pictures (our features; oracle: pictures of train)"
NEAREST = "median distance of a sample to its nearest training picture, over that of test pictures"
VARIANCE = "scaled latents of train: largest |variance - 1| of a channel"
CRITERIA = {TONE: ">= 90", CHANCE: ">= 10", VARIANCE: "<= 1e-3"}
INVARIANTS = {VARIANCE: "<= 1e-3"}


def part(setup: Setup, name: str, folder: Path, **changes) -> Run:
    """Returns the run of one of the three models."""
    return replace(setup.run, folder=str(folder / name), **changes)


def trained_clip(setup: Setup, folder: Path, training: data.Data) -> train.Result:
    """Returns the CLIP model: loaded, or trained here."""
    if setup.clip:
        return train.load(setup.clip)
    run = part(setup, "clip", folder, steps=setup.clip_steps, batch_size=256)
    return train.fit(contrastive.make, setup.model.text, run, training)


def trained_autoencoder(setup: Setup, folder: Path, training: data.Data) -> train.Result:
    """Returns the autoencoder: loaded, or trained here."""
    if setup.autoencoder:
        return train.load(setup.autoencoder)
    run = part(setup, "autoencoder", folder, steps=setup.autoencoder_steps, batch_size=32)
    return train.fit(vae.make_autoencoder, setup.model.autoencoder, run, training)


def latent_data(setup: Setup, text, params, pictures: np.ndarray, tokens: np.ndarray) -> data.Data:
    """Returns the set that the diffusion model trains on: latents and contexts."""
    cfg = setup.model
    z = _emoji.in_chunks(partial(autoencoder.latents, cfg.autoencoder, params), pictures)
    context = _emoji.in_chunks(partial(contexts, cfg, text), tokens)
    return data.from_arrays({"points": z, "context": context})


class Judge:
    """Measures pictures by the image net of CLIP, which the text-to-image model does not have."""

    def __init__(self, cfg: contrastive.Config, params, sets: dict[str, dict]):
        """sets: the arrays of train, test and unseen."""
        self.encode = partial(contrastive.encode_image, cfg, params)
        self.known = {name: self.features(part["image"] / 255) for name, part in sets.items()}
        self.everything = np.concatenate([self.known[n] for n in ("test", "train", "unseen")])
        toned = (sets["train"]["tone"] >= 1) & (sets["train"]["tone"] <= 5)
        self.classifier = LogisticRegression(max_iter=2000, C=100.0).fit(
            self.known["train"][toned], sets["train"]["tone"][toned]
        )

    def features(self, images: np.ndarray) -> np.ndarray:
        """Returns features [N, dim] of images in [0, 1]."""
        return _emoji.in_chunks(self.encode, np.asarray(images, np.float32))

    def tone(self, features: np.ndarray, tone: np.ndarray) -> float:
        """Returns the share of pictures (%) that are classified as their tone, of those with one."""
        one = (tone >= 1) & (tone <= 5)
        return 100 * float((self.classifier.predict(features[one]) == tone[one]).mean())

    def rank(self, features: np.ndarray, first: int) -> float:
        """Returns how often (%) a sample's nearest true picture is the one it was asked for.

        first: the row of `everything` that the first sample was asked for.
        """
        target = first + np.arange(len(features))
        return 100 * metrics.recall_at_k(features @ self.everything.T, target, 1)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the three models one after another, then draws and measures."""
    sets = {name: setup.data.load(name) for name in ("train", "test", "unseen")}
    arrays = {name: _cli.arrays(each) for name, each in sets.items()}
    pictures = {name: each["image"] / np.float32(255) for name, each in arrays.items()}
    clip = trained_clip(setup, folder, sets["train"])
    codec = trained_autoencoder(setup, folder, sets["train"])
    cfg = replace(setup.model, text=clip.config, autoencoder=codec.config)
    setup = replace(setup, model=cfg)
    params = autoencoder.measure(codec.config, _cli.weights(codec), jnp.asarray(pictures["train"]))
    text = _cli.weights(clip)["text"]
    latents = {
        name: latent_data(setup, text, params, pictures[name], arrays[name]["tokens"])
        for name in ("train", "test")
    }
    diffusion = train.fit(
        ddpm.make,
        cfg.diffusion,
        part(setup, "diffusion", folder),
        latents["train"],
        valid=latents["test"],
    )
    found = _cli.kept()
    z = _cli.arrays(latents["train"])["points"].astype(np.float64)
    found.append(Row(VARIANCE, float(np.abs(z.var((0, 1, 2)) - 1).max())))
    system = assembled(cfg, clip, params, diffusion)
    found.append(Row("parameters of the whole model", _cli.parameters(system)))
    judge = Judge(clip.config, _cli.weights(clip), arrays)
    by_w, w = choose_w(setup, system, judge, arrays["train"])
    found += [Row(f"w = {w:g}: {name}", value) for w, pair in by_w.items() for name, value in pair]
    system = assembled(replace(cfg, w=w), clip, params, diffusion)
    if setup.ship:
        about = {"command": "python -m experiments.text_to_image --ship FILE"}
        train.ship(system, make_text_to_image, setup.ship, **about)
    x = drawn(setup, system, arrays["test"]["tokens"], 1)
    found += test_rows(judge, x, arrays, pictures)
    plot(setup, folder, system, x, arrays, _cli.arrays(latents["test"]), by_w)
    return found


def drawn(setup: Setup, system: train.Result, tokens: np.ndarray, seed: int, w=None):
    """Returns one sample per caption. w: guidance weights, one for all or one per caption."""
    key, n = jax.random.fold_in(jax.random.key(setup.run.seed), seed), len(tokens)
    w = np.full(n, system.config.w if w is None else w, np.float32)
    return train.sample(system, key, n=n, chunk=32, prompt=tokens, w=w)


TRAIN_TONE, TRAIN_RANK = "skin tone of samples for train captions (%)", "their R@1 (%)"


def choose_w(setup: Setup, system: train.Result, judge: Judge, training: dict):
    """Returns {w: its two rows on captions of train}, and the w of the highest R@1."""
    toned = np.flatnonzero((training["tone"] >= 1) & (training["tone"] <= 5))[: setup.examples]
    targets = len(judge.known["test"]) + toned  # rows of judge.everything
    found = {}
    for w in setup.w:
        features = judge.features(drawn(setup, system, training["tokens"][toned], 2, w=w))
        rank = 100 * metrics.recall_at_k(features @ judge.everything.T, targets, 1)
        tone = judge.tone(features, training["tone"][toned])
        found[w] = ((TRAIN_TONE, tone), (TRAIN_RANK, rank))
    return found, max(found, key=lambda w: found[w][1][1])


def test_rows(judge: Judge, x: np.ndarray, arrays: dict, pictures: dict) -> list[Row]:
    """Returns the rows of samples for the captions of test."""
    features, true = judge.features(x), judge.known["test"]
    tone, n = arrays["test"]["tone"], len(judge.everything)
    rank = judge.rank(features, 0)
    other = np.random.default_rng(0).permutation(len(judge.known["train"]))[: len(true)]
    distance = {
        name: np.median(metrics.nearest(images, pictures["train"])[0])
        for name, images in (("samples", x), ("test", pictures["test"]))
    }
    return [
        Row(TONE, judge.tone(features, tone), oracle=judge.tone(true, tone)),
        Row(RANK, rank, oracle=100 / n),
        Row(CHANCE, rank * n / 100),
        Row(
            FRECHET,
            metrics.frechet_distance(features, true),
            oracle=metrics.frechet_distance(judge.known["train"][other], true),
        ),
        Row(NEAREST, float(distance["samples"] / distance["test"])),
    ]


# ----------------------------------------------------------------------------------------- figures

NEVER_SEEN = (
    "blue heart, dark skin tone",
    "cat face with red hair",
    "snowman, medium skin tone",
    "green cat face",
    "black heart with arrow",
    "red apple, light skin tone",
)

PAIRS = (
    ("thumbs up, light skin tone", "thumbs up, dark skin tone"),
    ("red heart", "blue heart"),
    ("cat face", "dog face"),
)


def encoded(system: train.Result, texts) -> np.ndarray:
    """Returns captions as tokens; words that the model does not know are left out."""
    length = system.config.text.text.context
    return captions.encode(system.info.tokenizer, list(texts), length, skip_unknown=True)


def denoiser(system: train.Result, context):
    """Returns (schedule, fn, prediction) of the diffusion model under contexts, guided."""
    cfg, params = system.config, system.state.params["diffusion"]
    fn, prediction = ddpm.predict_fn_of(cfg.diffusion, params, w=cfg.w, context=context)
    return ddpm.schedule_of(cfg.diffusion, params), fn, prediction


def interpolated(setup: Setup, system: train.Result) -> np.ndarray:
    """Returns six pictures per pair of captions: contexts are mixed linearly, the noise is shared."""
    cfg, params = system.config, system.state.params
    share = jnp.linspace(0, 1, 6)[:, None, None]
    ends = [contexts(cfg, params["text"], encoded(system, pair)) for pair in PAIRS]
    mixed = jnp.concatenate([(1 - share) * a[None] + share * b[None] for a, b in ends])

    @_diffusion.compiled
    def draw(key):
        schedule, fn, prediction = denoiser(system, mixed)
        x_T = jax.random.normal(key, (len(PAIRS), *cfg.diffusion.shape)).repeat(6, 0)
        options = {"steps": cfg.steps, "spacing": "log_snr", "prediction": prediction}
        z = ddpm.sample_dpm_solver(schedule, fn, x_T, **options)
        return autoencoder.images(cfg.autoencoder, params["autoencoder"], z)

    return np.asarray(draw(jax.random.key(setup.run.seed)))


def inpainted(setup: Setup, system: train.Result, z: np.ndarray, tokens) -> np.ndarray:
    """Returns pictures whose lower half is drawn anew, to captions; z: latents of the pictures."""
    cfg, params = system.config, system.state.params
    context = contexts(cfg, params["text"], tokens)
    upper = np.zeros((1, *cfg.diffusion.shape), bool)
    upper[:, : cfg.diffusion.shape[0] // 2] = True

    @_diffusion.compiled
    def draw(key):
        schedule, fn, prediction = denoiser(system, context)
        k_start, k_steps = jax.random.split(key)
        x_T = jax.random.normal(k_start, z.shape)
        options = {"known": z, "mask": upper, "repeats": 5, "prediction": prediction}
        new = ddpm.inpaint(schedule, fn, x_T, k_steps, steps=min(50, cfg.diffusion.T), **options)
        return autoencoder.images(cfg.autoencoder, params["autoencoder"], new)

    return np.asarray(draw(jax.random.key(setup.run.seed)))


@_cli.costs("text_to_image.png")
def plot(setup: Setup, folder: Path, system, x, arrays: dict, latents: dict, by_w: dict) -> None:
    """Draws samples beside true pictures, the sweep of w, and captions never seen."""
    fig, axes = figures.figure(2, 3, size=(15, 10))
    truth, guided, sweep, between, never, small = axes.ravel()
    some = np.arange(0, 60, 5)
    true = arrays["test"]["image"][some] / 255
    again = drawn(setup, system, arrays["test"]["tokens"][some], 3)
    rows = np.concatenate([true[:6], x[some][:6], again[:6], true[6:], x[some][6:], again[6:]])
    figures.images(truth, rows, 6, title="true pictures of test, two samples below each")

    tokens = arrays["test"]["tokens"][some[:6]]
    swept = np.concatenate([drawn(setup, system, tokens, 4, w=w) for w in setup.w])
    figures.images(guided, swept, 6, title=f"w = {', '.join(f'{w:g}' for w in setup.w)} by row")
    curves = {
        name: (np.array(setup.w), np.array([by_w[w][i][1] for w in setup.w]))
        for i, name in enumerate(("skin tone right", "R@1"))
    }
    figures.curves(sweep, curves, xlabel="guidance w", ylabel="%", title="on captions of train")
    figures.images(between, interpolated(setup, system), 6, title="from one caption to another")
    figures.images(never, drawn(setup, system, encoded(system, NEVER_SEEN), 5), 6, title="new")
    z, asked = latents["points"][some[:6]], arrays["test"]["tokens"][some[6:12]]
    filled = inpainted(setup, system, z, asked)
    title = "upper half of true pictures; lower half to the caption of another"
    figures.images(small, np.concatenate([true[:6], filled]), 6, title=title)
    figures.save(fig, folder / "text_to_image.png", f"{setup.run.steps} updates of the diffusion")


if __name__ == "__main__":
    _cli.main("text_to_image")
