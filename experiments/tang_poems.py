"""Tang poems from their titles: an autoregressive and a masked model, judged by the rules of regulated verse

    python -m experiments.tang_poems        6 minutes on a GPU, two hours on 2 cores; downloads nothing

36,430 poems of 4 or 8 lines of 5 or 7 characters come with the package. Training has 29,047 of
them. Samples are written on the titles of the first 256 of 3,710 test poems. Both models see the
title and learn the body, character by character. The masked model has D3PM's absorbing process
(Austin et al. 2021). It is trained without the bound's weight, as MaskGIT (Chang et al. 2022). Its
bits per character are the upper bound of MD4 (Shi et al. 2024). It writes in two orders: at random,
as it was trained, and the token first that it is most confident of.

A sample is well formed if it is exactly such a poem: nobody tells the models the length or the
place of the marks. Rhyme and tone pattern are checked with the Tang readings of Unicode's kTang
(Stimson). A character of several readings, or of none, is taken in the poem's favour. Test poems
stand beside the samples as oracle. For rhyme and tones they are weighted to the samples' mixture
of forms. Many are older in style and break the tone pattern. No paper has these numbers: the
criteria are ours.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import jax
import numpy as np

from aigc_jax import ddpm, figures, train, transformer
from aigc_jax.core import Optim
from aigc_jax.data import tang
from aigc_jax.data.text import Tokenizer
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale, Source

STEPS, VOCAB = 6000, 6882
# The kernels of a net this narrow need a larger std than GPT-2's 0.02: here 1 / sqrt(width).
NET = {"layers": 4, "heads": 4, "width": 128, "positions": "rotary", "std": 0.088, "ema": 0.995}
OPTIM = Optim(lr=3e-3, b2=0.98, weight_decay=0.1, clip=1.0, warmup=100, decay=STEPS - 100)
MODELS = ("autoregressive", "masked")
CONFIDENT = "masked, most confident first"  # the masked model, in another order of revealing


@dataclass(frozen=True)
class Setup:
    """Flags of tang_poems."""

    autoregressive: transformer.Config = transformer.Config(
        vocab=VOCAB, context=79, **NET, tied=False, optim=OPTIM
    )
    masked: ddpm.TokenConfig = ddpm.TokenConfig(
        vocab=VOCAB, context=80, **NET, terms=4, weighting="flat", optim=OPTIM
    )
    run: Run = Run("runs/tang_poems", STEPS, 32, eval_every=1000, save_every=500, keep=1)
    data: Source = Source("tang_poems")
    form: str = "all"  # 5x4, 7x4, 5x8, 7x8 or all
    samples: int = 256  # titles of held-out poems that are written on
    first_line: str = "床前明月光，"
    acrostic: str = "春夏秋冬"  # the first characters of four lines of seven

    def __post_init__(self):
        _cli.at_least(self, samples=4)
        if self.data.name != "tang_poems":
            raise ValueError(f"data.name must be tang_poems, got {self.data.name}")
        if self.form != "all" and self.form not in tang.FORMS:
            forms = ", ".join(tang.FORMS)
            raise ValueError(f"form must be one of {forms} and all, got {self.form!r}")
        if not 1 <= len(self.acrostic) <= 4 or not 1 <= len(self.first_line) <= 24:
            rule = "acrostic must have 1 to 4 characters, first_line 1 to 24"
            raise ValueError(f"{rule}; got {self.acrostic!r} and {self.first_line!r}")


TINY = {"layers": 1, "heads": 2, "width": 32, "optim.warmup": 5, "optim.decay": 0, "ema": 0.9}
SMOKE = {f"{model}.{name}": value for model in MODELS for name, value in TINY.items()}
SMOKE |= {"run.folder": "runs/tang_poems-smoke", "run.steps": 30, "run.eval_every": 30}
SMOKE |= {"samples": 4, "form": "5x4"}
SMOKE |= {"autoregressive.context": 39, "masked.context": 40}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "tiny models on one form, 30 updates"),
    "cpu": Scale(Setup(), "our own set: no paper has numbers for it"),
}
BITS = "{}: held-out bodies (bits per character)"
FORMED = "{}: well-formed samples (%)"
RHYME = "{}: rhyme holds in well-formed samples (%; oracle: test poems of the same forms)"
TONES = "{}: tone pattern holds in well-formed samples (%; oracle: test poems of the same forms)"
REPEATED = "{}: characters that a sample repeats (%; oracle: test poems)"
SHARED = "{}: 4-character phrases of samples that train has (%; oracle: test poems)"
NEAREST = "{}: largest share of a sample's phrases in one poem of train (%)"
COPIES = "{}: samples that have half of their phrases from one poem of train"
CRITERIA = {
    FORMED.format("autoregressive"): ">= 95",
    FORMED.format("masked"): ">= 90",
    **{COPIES.format(model): "= 0" for model in MODELS},
}
INVARIANTS = {BITS.format(model): "< 12" for model in MODELS}


def share(holds: Callable[[str], bool | None], bodies: list[str]) -> float | None:
    """Returns for how many (%) of the bodies, of those that can be judged, a rule holds."""
    found = [rule for body in bodies if (rule := holds(body)) is not None]
    return 100 * float(np.mean(found)) if found else None


def share_in_forms(holds, poems: list[str], forms: Counter) -> float | None:
    """Returns `share` (%) per form, averaged with the counts in `forms`; None if a form has none."""
    by_form = {form: share(holds, [p for p in poems if tang.form_of(p) == form]) for form in forms}
    if not forms or None in by_form.values():
        return None
    return sum(by_form[form] * count for form, count in forms.items()) / forms.total()


def from_one_poem(bodies: list[str], training: list[str]) -> list[float]:
    """Returns for each body the largest share (%) of its phrases that one poem of training has."""
    having, found = defaultdict(set), []
    for i, body in enumerate(training):
        for phrase in tang.phrases(body):
            having[phrase].add(i)
    for own in (set(tang.phrases(body)) for body in bodies):
        shared = Counter(i for phrase in own for i in having.get(phrase, ()))
        found.append(100 * max(shared.values(), default=0) / max(1, len(own)))
    return found


def repeated(bodies: list[str]) -> float:
    """Returns how many (%) of a body's characters occurred in it before; the mean over bodies."""
    texts = ["".join(tang.lines_of(body)) for body in bodies]
    return 100 * float(np.mean([1 - len(set(text)) / max(1, len(text)) for text in texts]))


def bodies_of(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """Returns the bodies of rows of tokens, without title and padding."""
    return [tokenizer.decode(row[tang.TITLE :]).rstrip(tang.PAD) for row in tokens]


def written(setup: Setup, writer: str, result: train.Result, titles: np.ndarray) -> np.ndarray:
    """Returns rows of tokens: titles, and the bodies that a model writes on them, token by token."""
    key, n, length = jax.random.key(setup.run.seed), len(titles), result.info.shape[0]
    if writer == "autoregressive":
        new = train.sample(
            result, key, n=n, chunk=64, prompt=titles, max_new_tokens=length - tang.TITLE
        )
        return np.concatenate([titles, new], 1)
    known = np.full((n, length), -1, np.int32)
    known[:, : tang.TITLE] = titles
    order = "confidence" if writer == CONFIDENT else "random"
    return train.sample(
        result, key, n=n, chunk=64, known=known, steps=length - tang.TITLE, order=order
    )


def rows_of(model: str, bodies: list[str], poems: list[str], training: list[str]) -> list[Row]:
    """Returns the rows of samples; poems: held-out bodies."""
    formed = [body for body in bodies if tang.form_of(body)]
    forms, known = Counter(map(tang.form_of, formed)), set(all_phrases(training))
    rows = [Row(FORMED.format(model), 100 * len(formed) / len(bodies))]
    for name, holds in ((RHYME, tang.rhyme_holds), (TONES, tang.tones_hold)):
        found, reason = share(holds, formed), None if formed else "no sample is well formed"
        oracle = share_in_forms(holds, poems, forms)
        rows.append(Row(name.format(model), found, oracle=oracle, reason=reason))
    rows.append(Row(REPEATED.format(model), repeated(bodies), oracle=repeated(poems)))
    in_train = [
        100 * float(np.mean([p in known for p in found])) if found else 0.0
        for found in map(all_phrases, (bodies, poems))
    ]
    rows.append(Row(SHARED.format(model), in_train[0], oracle=in_train[1]))
    nearest = from_one_poem(bodies, training)
    rows.append(Row(NEAREST.format(model), max(nearest)))
    rows.append(Row(COPIES.format(model), sum(share >= 50 for share in nearest)))
    return rows


def all_phrases(bodies: list[str]) -> list[str]:
    """Returns the phrases of all bodies, one after another."""
    return [phrase for body in bodies for phrase in tang.phrases(body)]


def completed(setup: Setup, result: train.Result) -> dict[str, str]:
    """Returns poems of the masked model with some characters fixed. It chooses their form itself.

    With the padding of a short form fixed too, it writes padding only: in training, a text whose
    padding is all visible has few masked characters.
    """
    tokenizer, length = Tokenizer(result.info.tokenizer), result.info.shape[0]

    def poem(title: str, fixed: dict[int, str]) -> str:
        known = np.full((1, length), -1, np.int32)
        known[0, : tang.TITLE] = tokenizer.encode(tang.place(title, tang.TITLE))
        for i, char in fixed.items():
            known[0, tang.TITLE + i] = tokenizer.encode(char)[0]
        options = {"n": 1, "known": known, "steps": length}
        return bodies_of(tokenizer, train.sample(result, jax.random.key(3), **options))[0]

    line = dict(enumerate(setup.first_line))
    heads = {8 * i: char for i, char in enumerate(setup.acrostic)}
    poems = {"first line given": ("静夜思", line), "first characters given": ("四时", heads)}
    room = length - tang.TITLE
    return {name: poem(*how) for name, how in poems.items() if max(how[1]) < room}


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both models, and judges what they write on titles of held-out poems."""
    parts = {
        split: setup.data.load(split, form=setup.form) for split in ("train", "validation", "test")
    }
    poems = tang.poems("test", form=setup.form)
    training = [poem.body for poem in tang.poems("train", form=setup.form)]
    held_out = [poem.body for poem in poems]
    tokens = _cli.arrays(parts["test"])["tokens"]
    titles, tokenizer = (
        tokens[: setup.samples, : tang.TITLE],
        Tokenizer(parts["test"].info.tokenizer),
    )
    for model in MODELS:
        getattr(setup, model).check(parts["train"].info)
    tokenizer.encode(setup.first_line + setup.acrostic)  # names unknown characters, before training
    # Nats per token of padded bodies, as nats per character of the bodies themselves.
    tokens_per_character = (tokens.shape[1] - tang.TITLE) / np.mean(
        [len(body) for body in held_out]
    )
    rows, shown = _cli.kept(), {}
    for model in MODELS:
        make = transformer.make if model == "autoregressive" else ddpm.make_tokens
        place = replace(setup.run, folder=str(folder / model))
        cfg = getattr(setup, model)
        result = train.fit(make, cfg, place, parts["train"], valid=parts["validation"])
        nats = train.evaluate(result, parts["test"])["nll_nats_per_token"]
        rows.append(Row(BITS.format(model), nats * tokens_per_character / log(2)))
        for writer in (model, CONFIDENT) if model == "masked" else (model,):
            bodies = bodies_of(tokenizer, written(setup, writer, result, titles))
            rows += rows_of(writer, bodies, held_out, training)
            shown[writer] = bodies
    filled = completed(setup, result)  # the masked model is the last
    plot(setup, folder, [poem.title for poem in poems], shown, filled)
    return rows


@_cli.costs("tang_poems.png")
def plot(setup: Setup, folder: Path, titles: list[str], shown: dict, filled: dict) -> None:
    """Draws learning curves and poems."""
    fig, axes = figures.figure(2, 2, size=(12, 10))
    curves = {model: _cli.history(folder / model, "nll_nats_per_token") for model in MODELS}
    labels = {"xlabel": "updates", "ylabel": "nats per token"}
    figures.curves(axes[0, 0], curves, **labels, title="held-out bodies, padding included")
    pages = {
        f"{model}: poems on held-out titles": "\n\n".join(
            f"《{title}》\n{verse(body)}"
            for title, body in zip(titles[:3], bodies[:3], strict=False)
        )
        for model, bodies in shown.items()
        if model in MODELS
    }
    pages["masked, with fixed characters"] = "\n\n".join(
        f"{name}:\n{verse(body)}" for name, body in filled.items()
    )
    for ax, (title, text) in zip(axes.flat[1:], pages.items(), strict=True):
        figures.page(ax, text, title=title, columns=44, rows=22, size=9)
    caption = (
        f"{setup.run.steps:,} updates of {setup.run.batch_size} poems; the samples were not chosen"
    )
    figures.save(fig, folder / "tang_poems.png", caption)


def verse(body: str) -> str:
    """Returns a body with two of its lines per row."""
    parts = [part + mark for part, mark in zip(tang.lines_of(body), marks(body), strict=False)]
    return "\n".join("".join(parts[i : i + 2]) for i in range(0, len(parts), 2)) or body


def marks(body: str) -> list[str]:
    """Returns the marks of a body."""
    return [char for char in body if char in tang.MARKS]


if __name__ == "__main__":
    _cli.main("tang_poems")
