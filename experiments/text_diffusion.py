"""Text by diffusion beside an autoregressive model, in the same bits: Austin et al. 2021 (D3PM), Shi et al. 2024 (MD4)

    python -m experiments.text_diffusion    scale cpu was not run to its end yet; Tiny Shakespeare (1 MB)

Downloads Tiny Shakespeare (--data.folder takes its file). Three models with equal nets and equally
many updates: autoregressive, absorbing and uniform diffusion. The bound of a diffusion model is an
upper bound on the bits that the autoregressive model has exactly. Every held-out character is
scored once, after the same characters. The papers have text8 with nets a hundred times larger:
1.23 bits per character autoregressive, 1.37 absorbing (MD4), 1.61 uniform (D3PM). Expect the same
order here. Fewer steps per sample make worse texts, as the autoregressive model judges them. A gap
is filled from both sides, which the autoregressive model cannot do.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, ddpm, figures, train, transformer
from aigc_jax.core import Optim
from aigc_jax.data.text import Tokenizer
from aigc_jax.ddpm.token_model import token_logits_fn
from aigc_jax.train import Run
from experiments import _cli, _text
from experiments._cli import Row, Scale, Source

STEPS = 3000
NET = {"layers": 4, "heads": 4, "width": 128, "positions": "rotary"}
OPTIM = Optim(lr=2e-3, b2=0.99, weight_decay=0.03, clip=1.0, warmup=100, decay=STEPS - 100)
AUTOREGRESSIVE = transformer.Config(vocab=65, context=128, **NET, tied=False, optim=OPTIM)
DIFFUSION = ddpm.TokenConfig(vocab=65, context=129, **NET, terms=4, ema=0.999, optim=OPTIM)
MODELS = ("autoregressive", "absorbing", "uniform")


@dataclass(frozen=True)
class Setup:
    """Flags of text_diffusion. diffusion.process is set to each process in turn."""

    autoregressive: transformer.Config = replace(AUTOREGRESSIVE, ema=0.999)
    diffusion: ddpm.TokenConfig = DIFFUSION
    run: Run = Run("runs/text_diffusion", STEPS, 32, **_text.EVERY)
    data: Source = Source("tiny_shakespeare")
    length: int = 128  # of crops; a model sees one token more
    seeds: int = 3
    steps: tuple[int, ...] = (4, 8, 16, 32, 64, 128)  # T of the bound, and steps of the samples
    samples: int = 64  # texts per number of steps
    gap: int = 16  # characters of a gap, in the middle of a text

    def __post_init__(self):
        _cli.at_least(self, seeds=1, samples=1, gap=1, length=4)
        if not self.steps or min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must hold rising numbers from 1 on, got {self.steps}")
        if max(self.steps) > self.length or self.gap > self.length // 2:
            most = f"steps {max(self.steps)} and gap {self.gap}"
            raise ValueError(f"steps must be at most length = {self.length}, gap half; got {most}")


TINY = {"layers": 1, "width": 32, "optim.decay": 0}
SMOKE = {f"{net}.{name}": x for net in ("autoregressive", "diffusion") for name, x in TINY.items()}
SMOKE |= {"run.folder": "runs/text_diffusion-smoke", "run.steps": 100, "run.eval_every": 50}
SMOKE |= {"autoregressive.context": 32, "diffusion.context": 33, "length": 32, "seeds": 1}
SMOKE |= {"steps": (4, 32), "samples": 8, "gap": 4, "data.name": "python_source"}
SMOKE |= {"autoregressive.ema": 0.9, "diffusion.ema": 0.9}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "tiny nets on Python's source, 100 updates"),
    "cpu": Scale(
        Setup(), "Tiny Shakespeare for text8, nets of 0.8 million parameters, 3,000 updates"
    ),
}
BITS = "{}: held-out text (bits per character; +- s.e. over seeds)"
GAP = "absorbing less autoregressive (bits per character)"
ORDER = "uniform less absorbing (bits per character)"
IN_STEPS = "absorbing: bound in T = {} steps less continuous time (bits per character)"
QUALITY = "{} steps per sample: bits per character under the autoregressive model"
VARIETY = "{} steps per sample: entropy of a text's characters (bits)"
SIDES = "absorbing: a gap, {} (bits per character)"
BOTH, LEFT = SIDES.format("both sides given"), SIDES.format("left side given")
GAIN = "absorbing: a gap, left side given less both sides given (bits per character)"
CRITERIA = {
    GAP: "within 0 .. 0.35",
    ORDER: "> 0",
    IN_STEPS.format(32): "within -0.005 .. 0.05",
    GAIN: "> 0",
}
INVARIANTS = {BITS.format("absorbing"): "< 7"}


def split(setup: Setup) -> tuple[data.Data, data.Data]:
    """Returns crops of the training part, and windows of the held-out one."""
    if setup.data.name != "python_source":
        return _text.strided(setup.data, setup.length)
    return _text.strided(setup.data, setup.length, "validation[:20000]")


def config(setup: Setup, model: str, vocab: int):
    """Returns the config of a model, and its make."""
    if model == "autoregressive":
        return replace(setup.autoregressive, vocab=vocab), transformer.make
    return replace(setup.diffusion, vocab=vocab, process=model), ddpm.make_tokens


def bits_in_steps(result: train.Result, valid: data.Data, steps: int) -> float:
    """Returns the bound in T steps minus that in continuous time, bits per token.

    Both are taken at the same texts and nearly the same times.
    """
    found = []
    for T in (steps, None):
        cfg = replace(result.config, steps=T, terms=16)
        again = result._replace(config=cfg, family=ddpm.make_tokens(cfg))
        found.append(train.evaluate(again, valid)["nll_nats_per_token"] / log(2))
    return found[0] - found[1]


def entropy_of_characters(texts: np.ndarray) -> float:
    """Returns the mean over texts of the entropy of their characters, bits."""
    found = []
    for text in texts:
        p = np.unique(text, return_counts=True)[1] / len(text)
        found.append(-(p * np.log2(p)).sum())
    return float(np.mean(found))


def judged(judge: train.Result, texts: np.ndarray) -> float:
    """Returns bits per character of texts under the autoregressive model."""
    found = jax.jit(judge.family.evaluate)(judge.state, {"tokens": texts}, jax.random.key(0))
    return float(found["nll_nats"].sum() / found["tokens"].sum()) / log(2)


def gap_bits(setup: Setup, result: train.Result, texts: np.ndarray, right: bool) -> float:
    """Returns the bound on a gap in the middle of texts, bits per character.

    right: whether the characters after the gap are given. If not, these follow as a second gap, and
    the model sees masks there.
    """
    cfg, params = result.config, _cli.weights(result)
    begin = (texts.shape[1] - setup.gap) // 2
    mask = np.zeros(texts.shape, np.float32)
    mask[:, begin : begin + setup.gap] = 1
    hidden = np.arange(texts.shape[1]) >= begin + setup.gap
    logits_fn = token_logits_fn(cfg, params)

    def half_blind(x_t, t):
        return logits_fn(x_t if right else jnp.where(hidden[None], cfg.vocab, x_t), t)

    bound = partial(ddpm.token_vlb, "absorbing", half_blind, schedule=cfg.schedule, terms=16)
    nats = jax.jit(lambda x, key: bound(x, key, mask=mask))(texts, jax.random.key(0))
    return float(nats.mean()) / setup.gap / log(2)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the three models, and measures the diffusion models beside the first."""
    training, valid = split(setup)
    each = _text.tokens_per_character(valid, folder=setup.data.folder)
    rows, first, bits, curves = _cli.kept(), {}, {}, {}
    for model in MODELS:
        cfg, make = config(setup, model, training.info.levels)
        runs = _cli.seeded(replace(setup.run, folder=str(folder / model)), setup.seeds)
        results = [train.fit(make, cfg, place, training, valid=valid) for place in runs]
        first[model] = results[0]
        name = "nll_nats_per_token"
        ends = [_text.validations(place.folder)[-1][name] * each / log(2) for place in runs]
        bits[model], error = _cli.mean_and_error(ends)
        rows.append(Row(BITS.format(model), bits[model], error=error))
        curves[model] = _text.curve(runs[0].folder, name, each / log(2))
    rows.append(Row(GAP, bits["absorbing"] - bits["autoregressive"]))
    rows.append(Row(ORDER, bits["uniform"] - bits["absorbing"]))
    excess = {T: bits_in_steps(first["absorbing"], valid, T) * each for T in setup.steps}
    rows += [Row(IN_STEPS.format(T), value) for T, value in excess.items()]

    held_out = valid.batch(0, 0, 256)["tokens"]
    rows.append(
        Row(
            "held-out text: bits per character under the autoregressive model",
            judged(first["autoregressive"], held_out),
        )
    )
    rows.append(
        Row("held-out text: entropy of a text's characters (bits)", entropy_of_characters(held_out))
    )
    quality, texts = {}, {}
    for steps in setup.steps:
        texts[steps] = train.sample(
            first["absorbing"], jax.random.key(1), n=setup.samples, steps=steps
        )
        quality[steps] = judged(first["autoregressive"], texts[steps])
        rows.append(Row(QUALITY.format(steps), quality[steps]))
        rows.append(Row(VARIETY.format(steps), entropy_of_characters(texts[steps])))
    both, left = (gap_bits(setup, first["absorbing"], held_out, right) for right in (True, False))
    rows += [Row(BOTH, both), Row(LEFT, left), Row(GAIN, left - both)]
    plot(setup, folder, curves, excess, quality, texts, first["absorbing"], held_out)
    return rows


@_cli.costs("text_diffusion.png")
def plot(setup, folder: Path, curves, excess, quality, texts, absorbing, held_out) -> None:
    """Draws bits against updates, the cost of few steps, and samples."""
    fig, axes = figures.figure(2, 3, size=(13, 7))
    labels = {"xlabel": "updates", "ylabel": "bits per character"}
    figures.curves(axes[0, 0], curves, **labels, title="held-out text")
    lines = {"bound": (list(excess), list(excess.values()))}
    labels = {"xlabel": "steps T", "ylabel": "bits above continuous time"}
    figures.curves(axes[0, 1], lines, **labels, title="absorbing: bound")
    axes[0, 1].set_xscale("log", base=2)
    lines = {"samples": (list(quality), list(quality.values()))}
    labels = {"xlabel": "steps per sample", "ylabel": "bits, autoregressive model"}
    figures.curves(axes[0, 2], lines, **labels, title="absorbing: samples")
    axes[0, 2].set_xscale("log", base=2)
    decode = Tokenizer(absorbing.info.tokenizer).decode
    few, many = min(texts), max(texts)
    known, begin = held_out[:3].copy(), (held_out.shape[1] - setup.gap) // 2
    known[:, begin : begin + setup.gap] = -1
    filled = train.sample(absorbing, jax.random.key(2), n=3, known=known)
    marked = [
        decode(row[:begin])
        + "["
        + decode(row[begin : begin + setup.gap])
        + "]"
        + decode(row[begin + setup.gap :])
        for row in filled
    ]
    pages = {f"{many} steps": map(decode, texts[many][:3])}
    pages |= {f"{few} steps": map(decode, texts[few][:3]), "a gap [filled]": marked}
    for ax, (title, shown) in zip(axes[1], pages.items(), strict=True):
        figures.page(ax, "\n---\n".join(shown), title=title, columns=40)
    caption = f"{setup.run.steps:,} updates of {setup.run.batch_size} x {setup.length} characters"
    figures.save(fig, folder / "text_diffusion.png", caption)


if __name__ == "__main__":
    _cli.main("text_diffusion")
