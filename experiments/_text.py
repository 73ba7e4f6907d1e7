"""What the text scripts share: n-gram yardsticks, and a picture of curves beside what was written."""

from __future__ import annotations

import textwrap
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, figures, train, transformer
from aigc_jax.data.text import Tokenizer

ALPHAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


def ngram_nats(training: np.ndarray, valid: np.ndarray, n: int, vocab: int) -> float:
    """Nats per token of an n-gram model with add-alpha smoothing; alpha is the best on `valid`, to its advantage."""

    def codes(tokens, length):
        code = np.zeros(len(tokens) - n + 1, np.int64)
        for i in range(length):
            code = code * vocab + tokens[i : i + len(code)]
        return code

    def count(length):
        keys, counts = np.unique(codes(training, length), return_counts=True)
        at = codes(valid, length)
        where = np.minimum(np.searchsorted(keys, at), len(keys) - 1)
        return np.where(keys[where] == at, counts[where], 0)

    if vocab**n > 2**62:
        raise ValueError(f"{n}-grams of {vocab} tokens do not fit 64 bits")
    whole, context = count(n), count(n - 1)  # n - 1 = 0: all share one empty context
    return float(min(-np.log((whole + a) / (context + a * vocab)).mean() for a in ALPHAS))


def crops_nats(valid: data.Data, batches: int, size: int):
    """An `on_eval`: mean loss over random crops, as nanoGPT estimates it."""
    found = [jax.tree.map(jax.numpy.asarray, valid.batch(0, i, size)) for i in range(batches)]

    def on_eval(family, state, step):
        score = jax.jit(family.evaluate)
        values = [score(state, batch, jax.random.key(0)) for batch in found]
        return {"crops_nats": np.mean([v["nll_nats"].sum() / v["tokens"].sum() for v in values])}

    return on_eval


def written(result: train.Result, prompt: str, new: int, seed: int = 0, **sampling) -> str:
    """What a run writes after the prompt."""
    tokenizer = Tokenizer(result.info.tokenizer)
    tokens = train.sample(
        result, jax.random.key(seed), n=1, prompt=tokenizer.encode(prompt)[None],
        max_new_tokens=min(new, result.config.context - len(tokenizer.encode(prompt))),
        sampling=transformer.Sampling(**sampling),
    )  # fmt: skip
    return prompt + tokenizer.decode(tokens[0][tokens[0] < tokenizer.size])


def draw(path: Path, curves: dict, lines: dict[str, float], text: str, *, ylabel: str, caption: str) -> None:
    """Learning curves with yardsticks as lines, and a text beside them."""
    fig, ((ax, page),) = figures.figure(1, 2, size=(11, 4.6))
    figures.curves(ax, curves, xlabel="updates", ylabel=ylabel, title="held-out text")
    for name, value in lines.items():
        ax.axhline(value, color="0.5", linewidth=0.8, linestyle=":" if "paper" in name else "-")
        # Between the curves' start and their end, where most of them lie near their yardsticks.
        ax.annotate(f"{name} {value:.3g}", (0.4, value), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    page.set_axis_off()
    shown = [piece for line in text.splitlines() for piece in (textwrap.wrap(line, 76, drop_whitespace=False) or [""])]
    page.text(0, 1, "\n".join(shown[:30]), family="monospace", fontsize=7, va="top", transform=page.transAxes)
    page.set_title("a sample, not chosen")
    figures.save(fig, path, caption)


def curve(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a validation value in a run folder."""
    lines = [(line["step"], line["valid"][name]) for line in train.metrics(folder) if name in line.get("valid", {})]
    return tuple(np.array(column) for column in zip(*lines, strict=True))
