"""Greedy text repeats itself, sampled text does not: decoding strategies, Holtzman et al. 2020, table 1

    python -m experiments.decoding                      about 10 minutes on 2 cores; Tiny Shakespeare (1 MB)

Downloads Tiny Shakespeare (--data.folder takes its file). A character model, trained as `shakespeare_char`'s own, goes
on from 40 characters of held-out text for 200 more, by eight strategies; beside them is what Shakespeare wrote.
Measured as in the paper's code: perplexity under the model itself, self-BLEU-4 and Zipf's exponent of words, and the
share of texts that end in a phrase repeated over and over. Expect the paper's order in repetition (greedy 92 %, beam
search 36 %, sampling none) and likelihood (greedy and beam search twice as likely as people and more), but not its
nucleus: to this model, trained on a megabyte, people's held-out text is less likely than what it writes itself
(perplexity 4.3 against 3.6; in the paper 12 against 23), so that pure sampling is the closest to people. Those two rows
fail and stay. The paper's numbers are GPT-2 Large's on web text: absolute values do not compare, and k is scaled to 65
characters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from aigc_jax import figures, train, transformer
from aigc_jax.data.text import Tokenizer
from aigc_jax.train import Run
from aigc_jax.transformer import Sampling

from experiments import _cli, _text, shakespeare_char
from experiments._cli import Row, Scale, Source


@dataclass(frozen=True)
class Setup:
    """Flags of decoding."""

    model: transformer.Config = shakespeare_char.OURS
    run: Run = replace(shakespeare_char.SCALES["cpu"].setup.ours_run, folder="runs/decoding")
    data: Source = Source("tiny_shakespeare")
    length: int = 256  # of crops in training
    texts: int = 100
    prompt: int = 40  # characters
    new: int = 200
    beams: int = 16

    def __post_init__(self):
        if self.texts < 2 or min(self.prompt, self.new, self.beams) < 1:
            raise ValueError("texts must be at least 2, and prompt, new and beams at least 1")
        if self.prompt + self.new > min(self.length, self.model.context):
            raise ValueError(
                f"prompt + new = {self.prompt + self.new} must not exceed the length the model trains on, "
                f"{min(self.length, self.model.context)}"
            )


SMOKE = shakespeare_char.SCALES["smoke"].setup
SCALES = {
    "smoke": Scale(
        Setup(
            SMOKE.ours,
            replace(SMOKE.ours_run, folder="runs/decoding-smoke"),
            Source("python_source"),
            length=64,
            texts=8,
            prompt=10,
            new=40,
            beams=2,
        ),
        "a tiny model on Python's source, 8 texts",
    ),
    "cpu": Scale(
        Setup(),
        "a character model of 1.8 million parameters on Tiny Shakespeare (GPT-2 Large on WebText), 100 texts "
        "(5,000), k = 5 and 20 for 40 and 640; without stochastic beam search and HUSE",
    ),
}
SAMPLERS = {
    "greedy": Sampling(0.0),
    "pure": Sampling(),
    "temperature .9": Sampling(0.9),
    "top-k, small": Sampling(top_k=5),
    "top-k, large": Sampling(top_k=20),
    "top-k, small, t .7": Sampling(0.7, top_k=5),
    "nucleus .95": Sampling(top_p=0.95),
}
# Perplexity, self-BLEU-4, Zipf, repetition (%), of the paper's table 1.
PUBLISHED = {
    "human": (12.38, 0.31, 0.93, 0.28),
    "greedy": (1.50, 0.50, 1.00, 73.66),
    "beam search": (1.48, 0.44, 0.94, 28.94),
    "pure": (22.73, 0.28, 0.93, 0.22),
    "temperature .9": (10.25, 0.35, 0.96, 0.66),
    "top-k, small": (6.88, 0.39, 0.96, 0.78),
    "top-k, large": (13.82, 0.32, 0.96, 0.28),
    "top-k, small, t .7": (3.48, 0.44, 1.00, 8.86),
    "nucleus .95": (13.13, 0.32, 0.95, 0.36),
}
FIRST = "repetition: greedy less beam search (%)"
SECOND = "repetition: beam search less top-k, small, t .7 (%)"
THIRD = "repetition: top-k, small, t .7 less the larger of nucleus and pure (%)"
LIKELY = "perplexity of people over the larger of greedy and beam search"
UNLIKELY = "perplexity: pure less people"
CLOSEST = "closest to people in perplexity, of top-k small, the same at t .7, nucleus, pure"
ALIKE = "self-BLEU-4: greedy less the next largest"
CRITERIA = {
    FIRST: "> 0",
    SECOND: "> 0",
    THIRD: ">= 0",
    LIKELY: "> 1.5",
    UNLIKELY: "> 0",
    CLOSEST: ("nucleus .95", lambda ours: ours == "nucleus .95"),
    ALIKE: "> 0",
}
# What stands between spaces; of Chinese and Japanese, which have none, each character.
WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
MOST = "perplexity of greedy"
INVARIANTS = {MOST: "< 20"}


def repeats(tokens: list[int], longest: int = 90) -> bool:
    """Whether a text ends in a phrase said more than once in a row: of at least 3 tokens, or over 50 times."""
    best = (
        0,
        0,
    )  # how often, and minus how long: of equal counts the shortest phrase, "ababab" being three of "ab"
    for n in range(1, longest + 1):
        phrase, times = tokens[-n:], 1
        while len(tokens) >= n * (times + 1) and tokens[-n * (times + 1) : -n * times] == phrase:
            times += 1
        best = max(best, (times, -n))
    times, n = best
    return times > 1 and (-n >= 3 or times > 50)


def self_bleu(texts: list[list[str]], order: int = 4) -> float:
    """Mean BLEU-4 of each text against all others, uniform weights, counts of 0 as .1 (NLTK's smoothing method 1)."""

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    counts = [[grams(words, n) for words in texts] for n in range(1, order + 1)]
    total = 0.0
    for i, words in enumerate(texts):
        logs = 0.0
        for of in counts:
            most: Counter = Counter()
            for j, other in enumerate(of):
                if j != i:
                    most |= other
            hits = sum(min(count, most[gram]) for gram, count in of[i].items())
            logs += math.log((hits or 0.1) / max(1, sum(of[i].values()))) / order
        lengths = [len(other) for j, other in enumerate(texts) if j != i]
        near = min(lengths, key=lambda length: (abs(length - len(words)), length))
        total += math.exp(logs + min(0.0, 1 - near / max(1, len(words))))
    return total / len(texts)


def zipf(texts: list[list[str]], most: int = 5000) -> float:
    """-slope of log frequency against log rank; 0 where there are fewer than two words."""
    counts = [
        count for _, count in Counter(word for words in texts for word in words).most_common(most)
    ]
    if len(counts) < 2:
        return 0.0
    return -float(np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0])


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, decodes by every strategy, measures each."""
    training = setup.data.load("train", length=setup.length)
    valid = setup.data.load("validation", length=setup.length, stride=max(1, setup.length // 2))
    cfg = replace(setup.model, vocab=training.info.levels)
    if setup.beams > cfg.vocab:
        raise train.Refused(
            f"beams must lie in 1..{cfg.vocab}, the vocabulary, got {setup.beams} (--beams)"
        )
    result = train.fit(transformer.make, cfg, setup.run, training, valid=valid)
    params, tokenizer = result.state.params, Tokenizer(training.info.tokenizer)
    text = valid.resident[0]["text"]
    starts = np.linspace(0, len(text) - setup.prompt - setup.new - 1, setup.texts).astype(int)
    prompts = text[starts[:, None] + np.arange(setup.prompt)]
    said = {"human": text[starts[:, None] + setup.prompt + np.arange(setup.new)]}
    generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=setup.new))
    for i, (name, sampling) in enumerate(SAMPLERS.items()):
        said[name] = np.asarray(generate(params, prompts, jax.random.key(i), sampling=sampling))
    # By log p alone, as Holtzman et al.; no text ends here before the others, so that nothing else changes.
    search = jax.jit(
        partial(
            transformer.beam_search,
            cfg,
            beams=setup.beams,
            max_new_tokens=setup.new,
            length_penalty=0.0,
        )
    )
    at_once = math.gcd(setup.texts, 10)
    pieces = [
        search(params, prompts[i : i + at_once])[0][:, 0] for i in range(0, setup.texts, at_once)
    ]
    said["beam search"] = np.concatenate(pieces)

    @jax.jit
    def nats(new):
        each = transformer.nll(cfg, params, jnp.concatenate([prompts, new], 1))
        return each[:, setup.prompt - 1 :].mean()

    quantities = ("perplexity", "self-BLEU-4 (words)", "Zipf's exponent (words)", "repetition (%)")
    values, found = {}, _cli.kept()
    for name, tokens in said.items():
        words = [WORDS.findall(tokenizer.decode(row)) for row in tokens]
        share = 100 * np.mean([repeats(row) for row in tokens.tolist()])
        values[name] = math.exp(nats(tokens)), self_bleu(words), zipf(words), float(share)
        if name in PUBLISHED:
            each = zip(quantities, values[name], PUBLISHED[name], strict=True)
            found += [Row(f"{name}: {quantity}", value, paper) for quantity, value, paper in each]
    with _cli.costs("texts.txt"):
        (folder / "texts.txt").write_text(
            "".join(
                f"=== {name}\n{tokenizer.decode(prompts[0])}|{tokenizer.decode(tokens[0])}\n\n"
                for name, tokens in said.items()
            ),
            encoding="utf-8",
        )
    measured = {
        name: dict(zip(("ppl", "bleu", "zipf", "rep"), value, strict=True))
        for name, value in values.items()
    }
    human, fair = (
        measured["human"]["ppl"],
        ("top-k, small", "top-k, small, t .7", "nucleus .95", "pure"),
    )
    bleu = {name: v["bleu"] for name, v in measured.items() if name != "human"}

    def rep(name):
        return measured[name]["rep"]

    found += [
        Row(FIRST, rep("greedy") - rep("beam search")),
        Row(SECOND, rep("beam search") - rep("top-k, small, t .7")),
        Row(THIRD, rep("top-k, small, t .7") - max(rep("nucleus .95"), rep("pure"))),
        Row(LIKELY, human / max(measured["greedy"]["ppl"], measured["beam search"]["ppl"])),
        Row(UNLIKELY, measured["pure"]["ppl"] - human),
        Row(CLOSEST, min(fair, key=lambda name: abs(measured[name]["ppl"] - human))),
        Row(ALIKE, bleu.pop("greedy") - max(bleu.values())),
        Row(MOST, measured["greedy"]["ppl"]),
    ]
    plot(
        setup,
        folder,
        measured,
        {name: tokenizer.decode(said[name][0]) for name in ("greedy", "nucleus .95")},
    )
    return found


@_cli.costs("decoding.png")
def plot(setup: Setup, folder: Path, measured: dict, texts: dict[str, str]) -> None:
    """Perplexity against repetition, and two texts."""
    fig, ((ax, page),) = figures.figure(1, 2, size=(11, 4.6))
    for i, (name, value) in enumerate(measured.items()):
        colour = "black" if name == "human" else figures.COLOURS[i % 6]
        ax.scatter(
            value["ppl"], value["rep"], s=28, color=colour, marker="*" if name == "human" else "o"
        )
        ax.annotate(
            name,
            (value["ppl"], value["rep"]),
            xytext=(2, 5),
            textcoords="offset points",
            fontsize=7,
            rotation=45,
        )
    ax.set(
        xlabel="perplexity under the model",
        ylabel="texts that end in repetition (%)",
        title="every strategy",
    )
    figures.page(
        page,
        "\n\n".join(f"[{name}]\n{text}" for name, text in texts.items()),
        title="after one prompt",
        rows=50,
        size=6.5,
    )
    said = f"{setup.data.name}, {setup.texts} texts of {setup.new} {_text.unit(setup.data)} after {setup.prompt}"
    figures.save(fig, folder / "decoding.png", said)


if __name__ == "__main__":
    _cli.main("decoding")
