"""CLIP on emoji: pictures and captions find each other, also for skin tones never seen: Radford et al. 2021, Zhai et al. 2023

    python -m experiments.emoji_clip        about 25 minutes on 2 cores; downloads nothing

Trains a text and an image net from nothing on 2,748 emoji and their captions, by InfoNCE (CLIP) and
by SigLIP's loss. The 308 test pictures show an emoji in a skin tone that training has not; it has
the emoji in other tones. R@k is the share of them whose partner is among the k most similar of the
308. Expect R@1 far above chance (0.3 %). Then zero-shot: skin tone and category by words alone. A
class is the mean of the text features of captions of that class. The 730 unseen pictures show emoji
that training has in no tone at all. The papers have no numbers for this set: the criteria are ours.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import contrastive, data, figures, metrics, train
from aigc_jax.contrastive import ImageConfig
from aigc_jax.data import captions, emoji
from aigc_jax.train import Run
from experiments import _cli, _emoji
from experiments._cli import Row, Scale, Source

LOSSES = ("info_nce", "sigmoid")
MODEL = _emoji.CLIP
RUN = Run("runs/emoji_clip", steps=_emoji.CLIP_STEPS, batch_size=256, eval_every=50, save_every=250)


@dataclass(frozen=True)
class Setup:
    """Flags of emoji_clip."""

    model: contrastive.Config = MODEL
    run: Run = RUN
    data: Source = Source("emoji")
    losses: tuple[str, ...] = LOSSES  # each trains a model of its own

    def __post_init__(self):
        known = set(self.losses) <= set(LOSSES)
        if not self.losses or not known or len(set(self.losses)) < len(self.losses):
            names = ", ".join(LOSSES)
            raise ValueError(
                f"losses must hold one or more of {names}, each once, got {self.losses}"
            )


SMOKE = Setup(
    replace(
        MODEL,
        dim=16,
        text=replace(MODEL.text, width=32, layers=1),
        image=ImageConfig((8, 16, 32), shift=1),
        optim=replace(MODEL.optim, lr=3e-3, warmup=5, decay=0),
    ),
    replace(RUN, folder="runs/emoji_clip-smoke", steps=30, batch_size=64, eval_every=15),
    losses=("info_nce",),
)
SCALES = {
    "smoke": Scale(SMOKE, "30 updates of narrow nets, one loss"),
    "cpu": Scale(Setup(), "2,748 emoji (400 million pictures, a ResNet or ViT)"),
}


def recall(loss: str, direction: str, k: int) -> str:
    """Returns the name of a row; its oracle column holds chance."""
    return f"{loss}: R@{k} {direction}, test (%; oracle: chance)"


TO_TEXT, TO_IMAGE = "of captions by picture", "of pictures by caption"
CHANCE = "{}: R@1 of captions by picture over chance"
TONE = "{}: zero-shot skin tone, test (%; oracle: chance)"
CATEGORY = "{}: zero-shot category, unseen emoji (%; oracle: the most frequent one)"
BALANCED = "{}: zero-shot category, unseen emoji, mean over categories (%; oracle: chance)"
CRITERIA = {
    recall("info_nce", TO_TEXT, 1): ">= 50",
    recall("info_nce", TO_IMAGE, 1): ">= 50",
    TONE.format("info_nce"): ">= 60",
}
INVARIANTS = {CHANCE.format("info_nce"): "> 3"}


@partial(jax.jit, static_argnums=0)
def encoded(cfg: contrastive.Config, params, image, tokens):
    """Returns the features of pictures 0..255 and captions; compiled once per config."""
    x = contrastive.preprocess(cfg, {"image": image})
    return contrastive.encode_image(cfg, params, x), contrastive.encode_text(cfg, params, tokens)


def features(cfg: contrastive.Config, params, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of pictures and captions of a whole split."""
    return jax.tree.map(np.asarray, encoded(cfg, params, batch["image"], batch["tokens"]))


def recalls(images: np.ndarray, texts: np.ndarray) -> dict[tuple[str, int], float]:
    """Returns R@1 and R@5 in both directions (%)."""
    both = {TO_TEXT: images @ texts.T, TO_IMAGE: texts @ images.T}
    return {
        (direction, k): 100 * metrics.recall_at_k(similarity, None, k)
        for direction, similarity in both.items()
        for k in (1, 5)
    }


def watch(cfg: contrastive.Config, test: data.Data):
    """Returns an `on_eval`: R@1 on test. Nothing is chosen by it."""
    batch = _cli.arrays(test)

    def on_eval(family, state, step):
        found = recalls(*features(cfg, state.params, batch))
        names = {TO_TEXT: "recall_of_captions", TO_IMAGE: "recall_of_pictures"}
        return {names[direction]: r for (direction, k), r in found.items() if k == 1}

    return on_eval


# ---------------------------------------------------------------------------------------- zero-shot


def class_texts(cfg: contrastive.Config, params, tokenizer: str, classes: list[list[str]]):
    """Returns one vector per class: the mean of the features of its captions."""
    texts = [text for members in classes for text in members]
    tokens = captions.encode(tokenizer, texts, cfg.text.context)
    found = jax.jit(partial(contrastive.encode_text, cfg))(params, tokens)
    ends = np.cumsum([len(members) for members in classes])[:-1]
    return contrastive.unit(np.stack([part.mean(0) for part in np.split(np.asarray(found), ends)]))


def tone_captions() -> list[list[str]]:
    """Returns for each of the five tones all names of train that have a tone, with this tone."""
    toned = [one.caption for one in emoji.examples("train") if 1 <= one.tone <= 5]
    names = sorted({caption.rpartition(", ")[0] for caption in toned})
    return [[f"{name}, {tone} skin tone" for name in names] for tone in emoji.TONES]


def category_captions() -> list[list[str]]:
    """Returns for each category the captions of train that belong to it."""
    found = emoji.examples("train")
    return [[one.caption for one in found if one.category == c] for c in emoji.class_names()]


def zero_shot_rows(loss: str, cfg, params, tokenizer: str, splits: dict) -> list[Row]:
    """Returns the accuracy of skin tones and categories by words."""
    unseen = splits["unseen"]
    tones = class_texts(cfg, params, tokenizer, tone_captions())
    categories = class_texts(cfg, params, tokenizer, category_captions())
    images = {name: features(cfg, params, batch)[0] for name, batch in splits.items()}
    tone = emoji.tones("test")
    one = (tone >= 1) & (tone <= 5)
    right = np.asarray(contrastive.zero_shot(images["test"][one], tones)) + 1 == tone[one]
    rows = [Row(TONE.format(loss), 100 * float(right.mean()), oracle=20.0)]
    label = unseen["label"]
    right = np.asarray(contrastive.zero_shot(images["unseen"], categories)) == label
    present = np.unique(label)
    most, chance = np.bincount(label).max() / len(label), 1 / len(categories)
    each = [right[label == category].mean() for category in present]
    rows.append(Row(CATEGORY.format(loss), 100 * float(right.mean()), oracle=100 * float(most)))
    rows.append(Row(BALANCED.format(loss), 100 * float(np.mean(each)), oracle=100 * chance))
    return rows


# ---------------------------------------------------------------------------------------------- run


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains a model per loss; measures recall and zero-shot classification."""
    sets = {name: setup.data.load(name) for name in ("train", "test", "unseen")}
    splits = {name: _cli.arrays(sets[name]) for name in ("test", "unseen")}
    rows, models = _cli.kept(), {}
    for loss in setup.losses:
        place = replace(setup.run, folder=str(folder / loss))
        cfg = replace(setup.model, loss=loss)
        watched = watch(cfg, sets["test"])
        result = train.fit(contrastive.make, cfg, place, sets["train"], on_eval=watched)
        params = models[loss] = _cli.weights(result)
        found = recalls(*features(cfg, params, splits["test"]))
        n = len(splits["test"]["image"])
        for (direction, k), r in found.items():
            rows.append(Row(recall(loss, direction, k), r, oracle=100 * k / n))
        rows.append(Row(CHANCE.format(loss), found[TO_TEXT, 1] * n / 100))
        rows += zero_shot_rows(loss, cfg, params, sets["train"].info.tokenizer, splits)
    plot(setup, folder)
    plot_captions(setup, folder, models[setup.losses[0]], splits["test"])
    return rows


@_cli.costs("emoji_clip_recall.png")
def plot(setup: Setup, folder: Path) -> None:
    """Draws R@1 on test while training."""
    fig, [axes] = figures.figure(1, 2, size=(9, 3.6))
    names = (("recall_of_captions", TO_TEXT), ("recall_of_pictures", TO_IMAGE))
    for ax, (name, direction) in zip(axes, names, strict=True):
        curves = {loss: _cli.history(folder / loss, name) for loss in setup.losses}
        figures.curves(ax, curves, xlabel="updates", ylabel="R@1 (%)", title=f"R@1 {direction}")
    caption = f"308 emoji in skin tones that training has not; batches of {setup.run.batch_size}"
    figures.save(fig, folder / "emoji_clip_recall.png", caption)


@_cli.costs("emoji_clip.png")
def plot_captions(setup: Setup, folder: Path, params, test: dict) -> None:
    """Draws held-out pictures beside the three captions that are most similar."""
    cfg = replace(setup.model, loss=setup.losses[0])
    texts = [one.caption for one in emoji.examples("test")]
    images, words = features(cfg, params, test)
    some = range(0, 60, 10)
    best = np.argsort(-images @ words.T, 1)[:, :3]
    fig, [[ax, beside]] = figures.figure(1, 2, size=(11, 6))
    figures.images(ax, test["image"][some] / 255, 2, title="held-out pictures, by row")
    lines = [
        f"{number}. " if not rank else "   "
        for number in range(1, len(some) + 1)
        for rank in range(3)
    ]
    names = [f"{'*' if j == i else ' '} {texts[j]}" for i in some for j in best[i]]
    words = "\n".join(head + name for head, name in zip(lines, names, strict=True))
    figures.page(beside, words, columns=58, title="the three most similar captions")
    caption = "the 3 of 308 captions that are most similar; * is the right one"
    figures.save(fig, folder / "emoji_clip.png", caption)


if __name__ == "__main__":
    _cli.main("emoji_clip")
