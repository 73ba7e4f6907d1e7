"""What the text scripts share: parts of a text, n-gram yardsticks, and a picture of curves beside what was written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import numpy as np
from aigc_jax import data, figures, train, transformer
from aigc_jax.data.prepare import cuts
from aigc_jax.data.text import Tokenizer, sizes

from experiments import _cli
from experiments._cli import Source

ALPHAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


def part(source: Source, split: str, flag: str, defaults: Collection[str]) -> str:
    """The split to load: `split`, or all of its part where the text has less and `split` is a script's default.

    Raises ValueError, which names the flag, where someone typed a slice that the text does not have.
    """
    if not source.name.startswith(("text:", "python_source", "tiny_shakespeare")):
        raise ValueError(
            f"{source.name} is no text: python_source, tiny_shakespeare or text:FILE (--data.name)"
        )
    there = sizes(source.name, source.folder)
    try:
        cuts(source.name, split, there, unit="characters")
    except ValueError as e:
        whole = split.partition("[")[0]
        if split not in defaults or not there.get(whole):
            raise ValueError(f"{e} ({flag})") from e
        print(
            f"{flag}: {whole} has {there[whole]:,} characters, all of them are taken",
            file=sys.stderr,
        )
        return whole
    return split


def unit(source: Source) -> str:
    """What a text of this source is counted in."""
    return "characters" if source.tokenizer in ("", "char", "characters") else "tokens"


def tokens_per_character(valid: data.Data, folder: str | None = None) -> float:
    """What turns nats per token into nats per character, which compare between tokenizers.

    The characters are those of the text itself, which a tokenizer may lose. folder: where the file is, as in data.load.
    """
    tokens, info = valid.resident[0]["text"], valid.info
    back = Tokenizer(info.tokenizer).decode(tokens)
    if info.source is None or len(back.encode()) == round(
        info.bytes_per_token * len(tokens)
    ):  # nothing is lost
        return len(tokens) / len(back)
    name, split = info.source["name"], info.source["split"]
    return len(tokens) / sum(
        stop - start for _, start, stop in cuts(name, split, sizes(name, folder))
    )


def ngrams(
    training: data.Data, valid: data.Data, quantity: Callable[[int], str], most: int = 6
) -> dict[int, float]:
    """{n: nats per token} of the n-grams with n up to `most`, and up to the tokens that there are.

    One that cannot be counted costs its row, `quantity(n)`, and no other.
    """
    texts = [source.resident[0]["text"] for source in (training, valid)]
    found = {}
    for n in range(1, min(most, *map(len, texts)) + 1):
        with _cli.costs(quantity(n)):
            found[n] = ngram_nats(*texts, n, training.info.levels)
    return found


def ngram_nats(training: np.ndarray, valid: np.ndarray, n: int, vocab: int) -> float:
    """Nats per token of an n-gram model with add-alpha smoothing; alpha is the best on `valid`, to its advantage."""
    whole, context = (_counts(training, valid, n, length, vocab) for length in (n, n - 1))
    return float(min(-np.log((whole + a) / (context + a * vocab)).mean() for a in ALPHAS))


def _counts(training: np.ndarray, valid: np.ndarray, n: int, length: int, vocab: int) -> np.ndarray:
    """For each n-gram of `valid`, how many of `training` begin with the same `length` tokens."""
    border, rest = len(training) - n + 1, len(valid) - n + 1
    code, codes = np.zeros(border + rest, np.int64), 1
    for i in range(length):
        if (
            codes * vocab > 2**62
        ):  # no longer a number of 64 bits: the rank among those that occur takes its place
            code = np.unique(code, return_inverse=True)[1]
            codes = int(code.max()) + 1
        code *= vocab
        code[:border] += training[i : i + border]
        code[border:] += valid[i : i + rest]
        codes *= vocab
    seen, asked = code[:border], code[border:]
    seen.sort()
    return np.searchsorted(seen, asked, "right") - np.searchsorted(seen, asked, "left")


def crops_nats(valid: data.Data, batches: int, size: int):
    """An `on_eval`: mean loss over random crops, as nanoGPT estimates it."""
    found = [jax.tree.map(jax.numpy.asarray, valid.batch(0, i, size)) for i in range(batches)]

    def on_eval(family, state, step):
        score = jax.jit(family.evaluate)
        values = [score(state, batch, jax.random.key(0)) for batch in found]
        return {"crops_nats": np.mean([v["nll_nats"].sum() / v["tokens"].sum() for v in values])}

    return on_eval


def prompt(wish: str, valid: data.Data, context: int) -> np.ndarray:
    """Tokens to go on from: `wish` where the tokenizer has tokens for it, else how the held-out text begins."""
    text = valid.resident[0]["text"]
    try:
        tokens = Tokenizer(valid.info.tokenizer).encode(wish)
    except ValueError:
        tokens = text[:0]
    return (tokens if len(tokens) else text[:4])[: max(1, context - 1)]


def written(result: train.Result, prompt: np.ndarray, new: int, seed: int = 0, **sampling) -> str:
    """The prompt's tokens and what a run writes after them, at most to the end of its context."""
    tokenizer, new = Tokenizer(result.info.tokenizer), min(new, result.config.context - len(prompt))
    if new < 1:
        return tokenizer.decode(prompt)
    tokens = train.sample(
        result,
        jax.random.key(seed),
        n=1,
        prompt=prompt[None],
        max_new_tokens=new,
        sampling=transformer.Sampling(**sampling),
    )[0]
    return tokenizer.decode([*prompt, *tokens[tokens < tokenizer.size]])


def draw(
    path: Path, curves: dict, lines: dict[str, float], text: str, *, ylabel: str, caption: str
) -> None:
    """Learning curves with yardsticks as lines, and a text beside them."""
    fig, ((ax, page),) = figures.figure(1, 2, size=(11, 4.6))
    figures.curves(ax, curves, xlabel="updates", ylabel=ylabel, title="held-out text")
    for name, value in lines.items():
        ax.axhline(value, color="0.5", linewidth=0.8, linestyle=":" if "paper" in name else "-")
        # Between the curves' start and their end, where most of them lie near their yardsticks.
        ax.annotate(
            f"{name} {value:.3g}",
            (0.4, value),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            va="bottom",
        )
    figures.page(page, text, title="a sample, not chosen")
    figures.save(fig, path, caption)


def validations(folder: Path) -> list[dict]:
    """The values of every validation of a run, first to last."""
    found = [line["valid"] for line in train.metrics(folder) if "valid" in line]
    if not found:
        raise train.Refused(f"{folder}/metrics.jsonl holds no validation: choose a new folder")
    return found


def curve(folder: Path, name: str, times: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a validation value in a run folder, the values multiplied by `times`."""
    lines = [
        (line["step"], line["valid"][name])
        for line in train.metrics(folder)
        if name in line.get("valid", {})
    ]
    steps, values = zip(*lines, strict=True)
    return np.array(steps), np.array(values, float) * times
