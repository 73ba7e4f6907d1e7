"""Pictures from words: CLIP, an autoencoder, and diffusion in its latents: Rombach et al. 2022 (latent diffusion)

    python -m experiments.text_to_image     about 2 hours on 2 cores; downloads nothing

Trains three models from nothing on 2,748 emoji with captions. CLIP gives a vector per word of a
caption. The autoencoder turns a picture of 32x32x3 into 8x8x4 latents of unit variance. A diffusion
model in these latents attends to the vectors of the words. The 308 test pictures show an emoji in a
skin tone that training has not; it has the emoji in other tones. The weight w of guidance is chosen
on captions of train. Expect the right skin tone in most samples, and the right emoji far more often
than chance. The paper has no numbers for this set: the criteria are ours.

Skin tones are judged by a classifier of colours, trained on true pictures: it sees how often each
colour occurs, and nothing else. Which emoji a sample shows is judged by the image half of the CLIP
whose text half conditions the model. Samples may therefore please it more than another judge.
Distances in pixels stand beside its rows.

The runs lie in the folders clip, autoencoder and diffusion. A run that was stopped goes on where it
was. The folder of another script's run can be given instead (--clip, --autoencoder).
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from aigc_jax import contrastive, data, ddpm, figures, metrics, train, vae
from aigc_jax.core import Optim
from aigc_jax.data import captions, emoji
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
    """Flags of text_to_image.

    model.w is replaced by the weight that was chosen. run is that of the diffusion model; CLIP and
    the autoencoder take its seed, but have their own steps and batches.
    """

    model: TextToImage = TextToImage()
    run: Run = Run("runs/text_to_image", STEPS, 64, eval_every=2000, save_every=500)
    data: Source = Source("emoji")
    clip: str = ""  # folder of a trained CLIP; "": it is trained here
    autoencoder: str = ""  # folder of a trained autoencoder; "": it is trained here
    clip_steps: int = _emoji.CLIP_STEPS
    autoencoder_steps: int = _emoji.AUTOENCODER_STEPS
    w: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0)  # guidance weights to choose from
    examples: int = 308  # captions of train on which w is chosen; at most as many of test
    ship: str = ""  # a .safetensors file to write the whole model to; "": none

    def __post_init__(self):
        _cli.at_least(self, clip_steps=1, autoencoder_steps=1, examples=70)
        if not self.w or self.w != tuple(sorted(set(self.w))) or self.w[0] < 0:
            raise ValueError(f"w must hold rising numbers from 0 on, got {self.w}")
        if self.data.name != "emoji":
            raise ValueError(f"data.name must be emoji, which has skin tones, got {self.data.name}")


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
        "2,748 emoji of 32x32 and their names (the paper: 400 million pictures of 256x256), a text "
        "net of our own CLIP",
    ),
}
TONE = "skin tone of samples for test captions (%; oracle: true test pictures)"
RANK = "R@1 of samples for test captions among all true pictures (%; oracle: chance)"
CHANCE = "R@1 of samples for test captions over chance"
BASE = "emoji of the nearest picture is right, any tone (%)"
LESS = "skin tone: samples minus true pictures (points)"
ONE_OFF = "skin tone of samples is one step lighter or darker than asked (%)"
KEPT = "skin tone of the autoencoder's reconstructions of test pictures (%)"
FRECHET = (
    "Frechet distance of samples to test pictures (CLIP's features; oracle: train pictures with "
    "a skin tone)"
)
NEAREST = "median distance of a sample to its nearest training picture, over that of test pictures"
ASKED = (
    "share of samples nearer (pixels) to the asked test picture than to any training picture (%)"
)
TEST_ROWS = (TONE, LESS, ONE_OFF, KEPT, RANK, CHANCE, BASE, FRECHET, NEAREST, ASKED)
VARIANCE = "scaled latents of train: largest |variance - 1| of a channel"
CHOSEN = "guidance weight w, chosen on captions of train"
SHIPPED = "the whole model as a file (--ship)"
CRITERIA = {TONE: ">= 90", RANK: ">= 20"}
INVARIANTS = {VARIANCE: "<= 1e-3"}


def part(setup: Setup, name: str, folder: Path, **changes) -> Run:
    """Returns the run of one of the three models."""
    return replace(setup.run, folder=str(folder / name), **changes)


def given(setup: Setup, info: data.Info):
    """Returns the setup with the configs of given models, and these: CLIP, autoencoder, or None.

    Raises ValueError, before any training, for models and flags that do not fit together.
    """
    clip = train.load(setup.clip) if setup.clip else None
    codec = train.load(setup.autoencoder) if setup.autoencoder else None
    configs = {"text": clip and clip.config, "autoencoder": codec and codec.config}
    configs = {name: config for name, config in configs.items() if config is not None}
    cfg = replace(setup.model, **configs)
    cfg.check(info)
    if clip and clip.info.tokenizer != info.tokenizer:
        raise ValueError(f"{setup.clip} was trained on other words than emoji's: train CLIP again")
    if setup.ship and not (parent := Path(setup.ship).absolute().parent).is_dir():
        raise ValueError(f"ship: there is no folder {parent}; make it first (--ship)")
    return replace(setup, model=cfg), clip, codec


def trained_clip(setup: Setup, folder: Path, training: data.Data) -> train.Result:
    """Trains CLIP, or continues its run."""
    run = part(setup, "clip", folder, steps=setup.clip_steps, batch_size=256)
    return train.fit(contrastive.make, setup.model.text, run, training)


def trained_autoencoder(setup: Setup, folder: Path, training: data.Data) -> train.Result:
    """Trains the autoencoder, or continues its run."""
    run = part(setup, "autoencoder", folder, steps=setup.autoencoder_steps, batch_size=32)
    return train.fit(vae.make_autoencoder, setup.model.autoencoder, run, training)


def latent_data(cfg: TextToImage, text, codec, params, pictures: data.Data) -> data.Data:
    """Returns the set that the diffusion model trains on: latents and contexts.

    Their last bits depend on the machine. So the set is identified by what they are made from: the
    pictures, CLIP's text net and the trained autoencoder.

    text: parameters of CLIP's text net. codec: parameters of the autoencoder as trained. params:
    the same with the moments of the latents.
    """
    arrays, source = _cli.arrays(pictures), pictures.info.source
    images = arrays["image"] / np.float32(255)
    z = _emoji.in_chunks(partial(autoencoder.latents, cfg.autoencoder, params), images)
    context = _emoji.in_chunks(partial(contexts, cfg, text), arrays["tokens"])
    digest = hashlib.sha256(pictures.info.fingerprint.encode())
    for leaf in jax.tree.leaves((text, codec)):
        digest.update(np.ascontiguousarray(leaf))
    return data.from_arrays(
        {"points": z, "context": context},
        fingerprint=digest.hexdigest(),
        source={"name": "latents of emoji", "split": source["split"]},
    )


def colours(images: np.ndarray) -> np.ndarray:
    """Returns the root of the share of pixels in each of 512 colours, [N, 512]; images in [0, 1]."""
    level = np.minimum((np.asarray(images) * 8).astype(int), 7)
    code = (level @ [64, 8, 1]).reshape(len(images), -1)
    return np.sqrt([np.bincount(row, minlength=512) / len(row) for row in code])


class Judge:
    """Measures pictures: skin tones by their colours, and emoji by the image net of CLIP.

    The text-to-image model does not have this net. Its text net is CLIP's other half.
    """

    def __init__(self, cfg: contrastive.Config, params, sets: dict[str, dict]):
        """sets: the arrays of train, test and unseen."""
        self.encode = partial(contrastive.encode_image, cfg, params)
        self.known = {name: self.features(part["image"] / 255) for name, part in sets.items()}
        order = ("test", "train", "unseen")
        self.everything = np.concatenate([self.known[name] for name in order])
        self.base = np.array([one.base for name in order for one in emoji.examples(name)])
        toned = (sets["train"]["tone"] >= 1) & (sets["train"]["tone"] <= 5)
        self.classifier = LogisticRegression(max_iter=2000, C=10.0).fit(
            colours(sets["train"]["image"][toned] / 255), sets["train"]["tone"][toned]
        )

    def features(self, images: np.ndarray) -> np.ndarray:
        """Returns features [N, dim] of images in [0, 1]."""
        return _emoji.in_chunks(self.encode, np.asarray(images, np.float32))

    def tone(self, images: np.ndarray, tone: np.ndarray) -> float:
        """Returns how many of the images with a tone are classified as theirs (%)."""
        return 100 * float((self.steps_off(images, tone) == 0).mean())

    def steps_off(self, images: np.ndarray, tone: np.ndarray) -> np.ndarray:
        """Returns how many steps lighter or darker each image with a tone is classified."""
        one = (tone >= 1) & (tone <= 5)
        return np.abs(self.classifier.predict(colours(images[one])) - tone[one])

    def rank(self, features: np.ndarray, targets: np.ndarray) -> float:
        """Returns how often (%) a sample's nearest true picture is the one it was asked for.

        targets: the rows of `everything` that the samples were asked for.
        """
        return 100 * metrics.recall_at_k(features @ self.everything.T, targets, 1)

    def rank_of_base(self, features: np.ndarray, targets: np.ndarray) -> float:
        """Returns how often (%) a sample's nearest true picture is the asked emoji, any tone."""
        nearest = (features @ self.everything.T).argmax(1)
        return 100 * float((self.base[nearest] == self.base[targets]).mean())


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the three models one after another, then draws and measures."""
    sets = {name: setup.data.load(name) for name in ("train", "test", "unseen")}
    setup, clip, codec = given(setup, sets["train"].info)
    arrays = {n: {**_cli.arrays(each), "tone": emoji.tones(n)} for n, each in sets.items()}
    pictures = {name: each["image"] / np.float32(255) for name, each in arrays.items()}
    clip = clip or trained_clip(setup, folder, sets["train"])
    codec = codec or trained_autoencoder(setup, folder, sets["train"])
    cfg, text, trained = setup.model, _cli.weights(clip)["text"], _cli.weights(codec)
    params = autoencoder.measure(cfg.autoencoder, trained, jnp.asarray(pictures["train"]))
    latents = {
        name: latent_data(cfg, text, trained, params, sets[name]) for name in ("train", "test")
    }
    place = part(setup, "diffusion", folder)
    valid = latents["test"]
    diffusion = train.fit(ddpm.make, cfg.diffusion, place, latents["train"], valid=valid)
    found = _cli.kept()
    z = _cli.arrays(latents["train"])["points"].astype(np.float64)
    found.append(Row(VARIANCE, float(np.abs(z.var((0, 1, 2)) - 1).max())))
    system = assembled(cfg, clip, params, diffusion)
    found.append(Row("parameters of the whole model", _cli.parameters(system)))
    judge = Judge(clip.config, _cli.weights(clip), arrays)
    by_w, w = choose_w(setup, system, judge, arrays["train"])
    found += [Row(f"w = {w:g}: {name}", value) for w, pair in by_w.items() for name, value in pair]
    found.append(Row(CHOSEN, w))
    system = assembled(replace(cfg, w=w), clip, params, diffusion)
    x = drawn(setup, system, arrays["test"]["tokens"], 1)
    with _cli.costs(*TEST_ROWS):
        z = jnp.asarray(_cli.arrays(latents["test"])["points"])
        again = np.asarray(autoencoder.images(cfg.autoencoder, params, z))
        found += rows_of_test(judge, x, again, arrays, pictures)
    with _cli.costs(SHIPPED):
        if setup.ship:
            flags = {"clip": setup.clip, "autoencoder": setup.autoencoder, "ship": setup.ship}
            given_flags = [f" --{flag} {value}" for flag, value in flags.items() if value]
            command = "python -m experiments.text_to_image" + "".join(given_flags)
            train.ship(system, make_text_to_image, setup.ship, command=command)
    plot_samples(folder, x, pictures["test"])
    plot(setup, folder, system, x, arrays, _cli.arrays(latents["test"]), by_w)
    return found


def drawn(setup: Setup, system: train.Result, tokens: np.ndarray, seed: int, w=None):
    """Returns one sample per caption. w: guidance weights, one for all or one per caption."""
    key, n = jax.random.fold_in(jax.random.key(setup.run.seed), seed), len(tokens)
    w = np.full(n, system.config.w if w is None else w, np.float32)
    return train.sample(system, key, n=n, chunk=32, prompt=tokens, w=w)


TRAIN_TONE = "skin tone of samples for train captions (%)"
TRAIN_RANK = "R@1 of samples for train captions among all true pictures (%)"


def choose_w(setup: Setup, system: train.Result, judge: Judge, training: dict):
    """Returns {w: its two rows on captions of train}, and the w of the highest R@1."""
    toned = np.flatnonzero((training["tone"] >= 1) & (training["tone"] <= 5))[: setup.examples]
    targets = len(judge.known["test"]) + toned  # rows of judge.everything
    found = {}
    for w in setup.w:
        x = drawn(setup, system, training["tokens"][toned], 2, w=w)
        rank = judge.rank(judge.features(x), targets)
        tone = judge.tone(x, training["tone"][toned])
        found[w] = ((TRAIN_TONE, tone), (TRAIN_RANK, rank))
    return found, max(found, key=lambda w: found[w][1][1])


def rows_of_test(judge: Judge, x, again, arrays: dict, pictures: dict) -> list[Row]:
    """Returns the rows of samples x for the captions of test; again: its pictures, reconstructed."""
    features, true = judge.features(x), judge.known["test"]
    tone, targets = arrays["test"]["tone"], np.arange(len(x))
    rank, n = judge.rank(features, targets), len(judge.everything)
    right, oracle = judge.tone(x, tone), judge.tone(pictures["test"], tone)
    toned = np.random.default_rng(0).permutation(np.flatnonzero(arrays["train"]["tone"] > 0))
    others = judge.known["train"][toned[: len(true)]]  # as many: the distance depends on it
    to_train = {
        name: metrics.nearest(images, pictures["train"])[0]
        for name, images in (("samples", x), ("test", pictures["test"]))
    }
    to_asked = np.sqrt(((x - pictures["test"]) ** 2).sum((1, 2, 3)))
    distance = {name: float(np.median(each)) for name, each in to_train.items()}
    frechet = partial(metrics.frechet_distance, true)
    return [
        Row(TONE, right, oracle=oracle),
        Row(LESS, right - oracle),
        Row(ONE_OFF, 100 * float((judge.steps_off(x, tone) == 1).mean())),
        Row(KEPT, judge.tone(again, tone)),
        Row(RANK, rank, oracle=100 / n),
        Row(CHANCE, rank * n / 100),
        Row(BASE, judge.rank_of_base(features, targets)),
        Row(FRECHET, frechet(features), oracle=frechet(others)),
        Row(NEAREST, distance["samples"] / distance["test"]),
        Row(ASKED, 100 * float((to_asked < to_train["samples"]).mean())),
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
    ("cat face", "fox face"),
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
    """Returns six pictures per pair of captions: mixed contexts, the same noise."""
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


@_cli.costs("text_to_image_samples.png")
def plot_samples(folder: Path, x: np.ndarray, true: np.ndarray) -> None:
    """Draws one sample for each of 24 captions of test, under the true pictures."""
    some = np.arange(0, 240, 10).reshape(2, 12)
    grid = np.concatenate([each[row] for row in some for each in (true, x)])
    fig, [[ax]] = figures.figure(1, 1, size=(12, 4.2))
    figures.images(ax, grid, 12)
    caption = "every tenth caption of test: true pictures above, samples below; none was chosen"
    figures.save(fig, folder / "text_to_image_samples.png", caption)


@_cli.costs("text_to_image.png")
def plot(setup: Setup, folder: Path, system, x, arrays: dict, latents: dict, by_w: dict) -> None:
    """Draws samples beside true pictures, the sweep of w, and captions never seen."""
    fig, axes = figures.figure(3, 3, size=(12, 12))
    truth, guided, sweep, between, never, halves = axes[:2].ravel()
    some = np.arange(0, 60, 5)
    images, tokens = arrays["test"]["image"][some] / 255, arrays["test"]["tokens"][some]
    again = drawn(setup, system, tokens, 3)
    rows = [each[part] for part in (slice(6), slice(6, 12)) for each in (images, x[some], again)]
    figures.images(truth, np.concatenate(rows), 6, title="test: a true row, two rows of samples")

    swept = np.concatenate([drawn(setup, system, tokens[:6], 4, w=w) for w in setup.w])
    weights = ", ".join(f"{w:g}" for w in setup.w)
    figures.images(guided, swept, 6, title=f"captions 1-6, rows: w = {weights}")
    curves = {
        name: (np.array(setup.w), np.array([by_w[w][i][1] for w in setup.w]))
        for i, name in enumerate(("skin tone right", "R@1"))
    }
    figures.curves(sweep, curves, xlabel="guidance w", ylabel="%", title="captions of train")
    figures.images(between, interpolated(setup, system), 6, title="between two captions")
    new = drawn(setup, system, encoded(system, NEVER_SEEN), 5)
    figures.images(never, new, 3, title="captions that no picture has")
    filled = inpainted(setup, system, latents["points"][some[:6]], tokens[6:])
    title = "true pictures; lower half drawn anew to other captions (7-12)"
    figures.images(halves, np.concatenate([images[:6], filled]), 6, title=title)
    asked = [emoji.examples("test")[i].caption for i in some]
    lines = {
        "captions of test": [f"{i}. {caption}" for i, caption in enumerate(asked, 1)],
        "between two captions, by row": [f"{first} -> {last}" for first, last in PAIRS],
        "captions that no picture has": [f"{i}. {each}" for i, each in enumerate(NEVER_SEEN, 1)],
    }
    for ax, (title, texts) in zip(axes[2], lines.items(), strict=True):
        figures.page(ax, "\n".join(texts), title=title, columns=38, size=8)
    caption = f"{setup.run.steps} updates of the diffusion model; guidance w = {system.config.w:g}"
    figures.save(fig, folder / "text_to_image.png", caption)


if __name__ == "__main__":
    _cli.main("text_to_image")
