"""What the text scripts share: parts of a text, n-grams to compare with, and a figure of curves beside a sample."""

import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import data, figures, train, transformer
from aigc_jax.core import Optim
from aigc_jax.data.prepare import cuts
from aigc_jax.data.text import Tokenizer, sizes
from experiments import _cli
from experiments._cli import DataError, Source

ALPHAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


# A small character model of Shakespeare, with rotary positions, RMSNorm and SwiGLU.
SHAKESPEARE = transformer.Config(
    vocab=65,
    context=256,
    layers=4,
    heads=4,
    width=192,
    positions="rotary",
    norm="rms",
    activation="swiglu",
    bias=False,
    optim=Optim(lr=2e-3, b2=0.99, weight_decay=0.1, clip=1.0, warmup=100, decay=1400, floor=0.05),
)
EVERY = dict(eval_every=250, save_every=1000, log_every=50, keep=1, steps_per_call=10)
SHAKESPEARE_RUN = train.Run(steps=1500, batch_size=16, **EVERY)


def part(source: Source, split: str, flag: str, defaults: Collection[str]) -> str:
    """Returns the split to load: `split`, or all of its part where a default asks for too much.

    Raises DataError, which names the flag, for a slice that a user typed and the text does not
    have.
    """
    if not source.name.startswith(("text:", "python_source", "tiny_shakespeare")):
        raise DataError(
            f"{source.name} is no text: python_source, tiny_shakespeare or text:FILE (--data.name)"
        )
    try:
        there = sizes(source.name, source.folder)
    except (ValueError, OSError) as e:
        raise DataError(str(e)) from e
    try:
        cuts(source.name, split, there, unit="characters")
    except ValueError as e:
        whole = split.partition("[")[0]
        if split not in defaults or not there.get(whole):
            raise DataError(f"{e} ({flag})") from e
        print(
            f"{flag}: {whole} has {there[whole]:,} characters, all of them are taken",
            file=sys.stderr,
        )
        return whole
    return split


def strided(source: Source, length: int, split: str = "validation") -> tuple:
    """Returns crops of the training part, and windows of another that overlap by half."""
    training = source.load("train", length=length)
    return training, source.load(split, length=length, stride=max(1, length // 2))


def unit(source: Source) -> str:
    """Returns the unit in which the script counts a text of this source."""
    return "characters" if source.tokenizer in ("", "char", "characters") else "tokens"


def tokens_per_character(valid: data.Data, folder: str | None = None) -> float:
    """Returns the factor from nats per token to nats per character, which compare between
    tokenizers.

    The characters are those of the text itself; a tokenizer may lose some. folder: where the file
    is, as in data.load.
    """
    tokens, info = _cli.arrays(valid)["text"], valid.info
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
    """Returns {n: nats per token} of n-gram models, n up to `most` and to the number of tokens.

    If one cannot be counted, only its row, `quantity(n)`, is lost.
    """
    texts = [_cli.arrays(source)["text"] for source in (training, valid)]
    found = {}
    for n in range(1, min(most, *map(len, texts)) + 1):
        with _cli.costs(quantity(n)):
            found[n] = ngram_nats(*texts, n, training.info.levels)
    return found


def ngram_nats(training: np.ndarray, valid: np.ndarray, n: int, vocab: int) -> float:
    """Returns nats per token of an n-gram model with add-alpha smoothing.

    alpha is the best on `valid`, to the advantage of the n-gram.
    """
    whole, context = (_counts(training, valid, n, length, vocab) for length in (n, n - 1))
    return float(min(-np.log((whole + a) / (context + a * vocab)).mean() for a in ALPHAS))


def _counts(training: np.ndarray, valid: np.ndarray, n: int, length: int, vocab: int) -> np.ndarray:
    """Returns for each n-gram of `valid` how many of `training` begin with the same `length`
    tokens.
    """
    border, rest = len(training) - n + 1, len(valid) - n + 1
    code, codes = np.zeros(border + rest, np.int64), 1
    for i in range(length):
        if codes * vocab > 2**62:  # too large for 64 bits: use the rank among the codes that occur
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
    """Returns an `on_eval`: the mean loss over random crops, as nanoGPT estimates it."""
    found = [jax.tree.map(jax.numpy.asarray, valid.batch(0, i, size)) for i in range(batches)]

    def on_eval(family, state, step):
        score = jax.jit(family.evaluate)
        values = [score(state, batch, jax.random.key(0)) for batch in found]
        return {"crops_nats": np.mean([v["nll_nats"].sum() / v["tokens"].sum() for v in values])}

    return on_eval


def prompt(wish: str, valid: data.Data, context: int) -> np.ndarray:
    """Returns the tokens of `wish`; where it has none, the beginning of the held-out text."""
    text = _cli.arrays(valid)["text"]
    try:
        tokens = Tokenizer(valid.info.tokenizer).encode(wish)
    except ValueError:
        tokens = text[:0]
    return (tokens if len(tokens) else text[:4])[: max(1, context - 1)]


def written(result: train.Result, prompt: np.ndarray, new: int, seed: int = 0, **sampling) -> str:
    """Returns the prompt and what a run writes after it, at most to the end of its context."""
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


def write_sample(folder: Path, result: train.Result, prompt: np.ndarray, new: int, **how) -> str:
    """Writes sample.txt and returns its text; "" if that fails, which costs only this file."""
    text = ""
    with _cli.costs("sample.txt"):
        text = written(result, prompt, new, **how)
        (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
    return text


def plot(
    path: Path, curves: dict, lines: dict[str, float], text: str, *, ylabel: str, caption: str
) -> None:
    """Draws learning curves with values to compare as lines, and a sample beside them."""
    fig, ((ax, page),) = figures.figure(1, 2)
    figures.curves(ax, curves, xlabel="updates", ylabel=ylabel, title="held-out text")
    draw_lines(ax, lines)
    figures.page(page, text, title="a sample, not chosen", columns=64)
    figures.save(fig, path, caption)


def draw_lines(ax, lines: dict[str, float], at: float = 0.3) -> None:
    """Draws values to compare with as horizontal lines with names, dotted for a paper's.

    By default the names begin left of the middle, where learning curves are far from the lines.
    """
    for name, value in lines.items():
        dash = ":" if "paper" in name else "-"
        figures.level(ax, value, f"{name} {value:.3g}", at=at, dash=dash)


def validations(folder: Path) -> list[dict]:
    """Returns the values of every validation of a run, first to last."""
    found = [line["valid"] for line in train.metrics(folder) if "valid" in line]
    if not found:
        raise train.Refused(f"{folder}/metrics.jsonl holds no validation: choose a new folder")
    return found


def curve(folder: Path, name: str, times: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns (updates, values) of a validation value in a run folder, the values times `times`."""
    steps, values = _cli.history(folder, name)
    return steps, values * times


def random_gpt2(folder: Path) -> str:
    """Writes a small random GPT-2 with a tokenizer, as published, and returns its folder."""
    cfg = transformer.Config(vocab=300, context=48, layers=2, heads=2, width=16)
    transformer.save_gpt2(folder, cfg, jax.jit(partial(transformer.init, cfg))(jax.random.key(0)))
    text = data.load("python_source", "train[:20000]", length=8, tokenizer="bpe:300")
    Tokenizer(text.info.tokenizer).save(folder / "tokenizer.json")
    return str(folder)
