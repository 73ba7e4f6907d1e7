"""Text by diffusion beside an autoregressive model, in the same bits: Austin et al. 2021 (D3PM), Shi et al. 2024 (MD4)

    python -m experiments.text_diffusion    about 55 minutes on 2 cores; Tiny Shakespeare (1 MB)

Downloads Tiny Shakespeare (--data.folder names the folder that holds it). Three models with equally
many updates: autoregressive, absorbing and uniform diffusion. Their nets are equal, but that of the
uniform process has two more layers for the time. For a diffusion model the bits are an upper bound;
for the autoregressive model they are exact. Held-out text is cut into windows. Every character but
a window's first is scored once, and all models see the same window. The papers have text8 with nets
hundreds of times larger: 1.23 bits per character autoregressive, 1.37 absorbing (MD4), 1.61 uniform
(D3PM). Expect 2.28, 3.06 and 3.26 here.

The absorbing model learns more slowly: it has to predict from every part of a text, not only from
what stands before. So its gap to the autoregressive model is measured after a part of the updates
and after four times as many: 0.79 bits, then 0.54, where we asked for 0.35. It trains with flat
weights, whose gradient has less noise than the bound's. The uniform model trains on the bound. So
the two processes are compared once more, with absorbing models that train on the bound. Then the
uniform model is no worse. The cost of a character among k masks shows where its bits go.

Fewer steps per sample make worse texts, as the autoregressive model judges them. A gap is filled
from both sides, which the autoregressive model cannot do: it sees the left side only. Here its bits
for the gap are still fewer.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom

from aigc_jax import data, ddpm, figures, train, transformer
from aigc_jax.core import Optim
from aigc_jax.data.text import Tokenizer
from aigc_jax.ddpm import tokens as token_diffusion
from aigc_jax.ddpm.token_model import token_logits_fn
from aigc_jax.train import Run
from experiments import _cli, _text
from experiments._cli import Row, Scale, Source

STEPS = 3000
# The kernels of a net this narrow need a larger std than GPT-2's 0.02: here 1 / sqrt(width).
NET = {"layers": 3, "heads": 4, "width": 64, "positions": "rotary", "std": 0.125, "ema": 0.99}
OPTIM = Optim(lr=6e-3, b2=0.99, weight_decay=0.03, clip=1.0, warmup=100, decay=STEPS - 100)
AUTOREGRESSIVE = transformer.Config(vocab=65, context=128, **NET, tied=False, optim=OPTIM)
DIFFUSION = ddpm.TokenConfig(vocab=65, context=129, **NET, terms=4, optim=OPTIM)
MODELS = ("autoregressive", "absorbing", "uniform")


@dataclass(frozen=True)
class Setup:
    """Flags of text_diffusion. diffusion.process and diffusion.weighting are set for each arm."""

    autoregressive: transformer.Config = AUTOREGRESSIVE
    diffusion: ddpm.TokenConfig = DIFFUSION
    run: Run = Run("runs/text_diffusion", STEPS, 16, **_text.EVERY)
    data: Source = Source("tiny_shakespeare")
    length: int = 128  # of crops; a model sees one token more
    seeds: int = 3
    longer: int = 4  # times as many updates for one more absorbing model
    steps: tuple[int, ...] = (4, 8, 16, 32, 64, 128)  # T of the bound, and steps of the samples
    samples: int = 64  # texts per number of steps
    gap: int = 16  # characters of a gap, in the middle of a text

    def __post_init__(self):
        _cli.at_least(self, seeds=1, longer=2, samples=1, gap=1, length=4)
        if not self.steps or min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must hold rising numbers from 1 on, got {self.steps}")
        most = min(self.autoregressive.context, self.diffusion.context - 1)
        if self.length > most:
            flags = "--autoregressive.context and --diffusion.context"
            raise ValueError(f"length must be at most {most}, got {self.length}: raise {flags}")
        for flag in ("autoregressive", "diffusion"):
            optim = getattr(self, flag).optim
            end = optim.warmup + (optim.hold or 0) + optim.decay
            if optim.decay and not optim.floor and end < self.run.steps:
                rule = f"the learning rate is 0 after {end} updates, run.steps is {self.run.steps}"
                raise ValueError(
                    f"{rule}: set --{flag}.optim.decay {self.run.steps - optim.warmup}"
                )
        if max(self.steps) > self.length or self.gap > self.length // 2:
            most = f"steps {max(self.steps)} and gap {self.gap}"
            raise ValueError(f"steps must be at most length = {self.length}, gap half; got {most}")
        if _text.unit(self.data) != "characters":
            raise ValueError(f"data.tokenizer must be characters, got {self.data.tokenizer}")


TINY = {"layers": 1, "width": 32, "optim.decay": 0, "ema": 0.9}
SMOKE = {f"{net}.{name}": x for net in ("autoregressive", "diffusion") for name, x in TINY.items()}
SMOKE |= {"run.folder": "runs/text_diffusion-smoke", "run.steps": 100, "run.eval_every": 50}
SMOKE |= {"autoregressive.context": 32, "diffusion.context": 33, "length": 32, "seeds": 1}
SMOKE |= {"steps": (4, 32), "samples": 8, "gap": 4, "data.name": "python_source", "longer": 2}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "tiny nets on Python's source, 100 updates"),
    "cpu": Scale(
        Setup(), "Tiny Shakespeare for text8, nets of 0.16 million parameters, 3,000 updates"
    ),
}
BITS = "{}: held-out text (bits per character; +- s.e. over seeds)"
SIZE = "{}: parameters"
GAP = "absorbing minus autoregressive (bits per character)"
GAP_AT = "absorbing minus autoregressive after {} of the updates (bits per character)"
LONGER = "absorbing, {} times the updates"
GAP_LONGER = "absorbing, {} times the updates, minus autoregressive, same seed (bits per character)"
WEIGHTED = "absorbing, trained on the bound"
WEIGHTS = "absorbing: trained on the bound minus trained with flat weights (bits per character)"
SAME_LOSS = "uniform minus absorbing, both trained on the bound (bits per character)"
COST = "absorbing: a character among {} masks of {} (bits)"
ORDER = "uniform minus absorbing (bits per character)"
IN_STEPS = "absorbing: bound in T = {} steps minus continuous time (bits per character)"
QUALITY = "{}: bits per character under the autoregressive model"
VARIETY = "{}: entropy of a text's characters (bits)"
SAMPLES, HELD_OUT, OWN = "{} steps per sample", "held-out text", "autoregressive samples"
WORSE = "samples in fewest minus in most steps (bits per character, autoregressive model)"
BOTH = "{}: a gap, both sides given (bits per character)"
HALF = "absorbing: a gap, right side hidden (bits per character)"
LEFT = "autoregressive: a gap, left side given (bits per character)"
GAIN = (
    "a gap: autoregressive, left side given, minus absorbing, both sides given (bits per character)"
)
CRITERIA = {
    GAP: "within 0 .. 0.35",
    ORDER: "> 0",
    IN_STEPS.format(32): "within -1e-6 .. 0.05",
    WORSE: "> 0",
    GAIN: "> 0",
}
INVARIANTS = {BITS.format("absorbing"): "< 6"}


def split(setup: Setup) -> tuple[data.Data, data.Data]:
    """Returns crops of the training part, and windows of the held-out one that do not overlap."""
    held_out = "validation[:20000]" if setup.data.name == "python_source" else "validation"
    options = {"length": setup.length}
    return setup.data.load("train", **options), setup.data.load(
        held_out, **options, stride=setup.length
    )


def config(setup: Setup, model: str, info: data.Info):
    """Returns the config of a model, and its make. Raises ValueError where the text does not fit."""
    cfg, make = replace(setup.autoregressive, vocab=info.levels), transformer.make
    if model != "autoregressive":
        weighting = "flat" if model == "absorbing" else "bound"
        cfg = replace(setup.diffusion, vocab=info.levels, process=model, weighting=weighting)
        make = ddpm.make_tokens
    cfg.check(info)
    return cfg, make


# ---------------------------------------------------------------------- the bound against T


def cost_of_masks(result: train.Result, texts: np.ndarray) -> np.ndarray:
    """Returns c [L]: c[k - 1] is the mean cross entropy, nats per masked token, with k masks.

    texts [B, L + 1]: their first token is given. The tokens masked for k are also masked for k + 1.
    """
    cfg, logits_fn = result.config, token_logits_fn(result.config, _cli.weights(result))
    places = jax.random.uniform(jax.random.key(3), (len(texts), texts.shape[1] - 1))
    rank = jnp.argsort(jnp.argsort(places, -1), -1)

    def cost(k):
        masked = jnp.pad(rank < k, ((0, 0), (1, 0)))
        logits = logits_fn(jnp.where(masked, cfg.vocab, texts), jnp.ones(len(texts)))
        nats = token_diffusion.cross_entropy(logits, texts)
        return jnp.where(masked, nats, 0.0).sum() / (k * len(texts))

    return np.asarray(jax.jit(partial(jax.lax.map, cost))(jnp.arange(1, texts.shape[1])), float)


def bound_of_masks(cost: np.ndarray, steps: int | None, schedule: str) -> float:
    """Returns the absorbing bound in nats per text. It depends on c, the costs of k masks, alone.

    In T steps, k of L tokens are masked at t with a binomial probability. A step is weighted by
    (alpha(s) - alpha(t)) / (1 - alpha(t)). The limit of infinitely many steps is the sum of c.
    """
    if steps is None:
        return float(cost.sum())
    t, k = np.arange(1, steps + 1) / steps, np.arange(1, len(cost) + 1)
    b_t, b_s = (
        np.asarray(token_diffusion.one_minus_alpha(schedule, x), float) for x in (t, t - 1 / steps)
    )
    probability = binom.pmf(k[None], len(cost), np.minimum(b_t, 1.0)[:, None])
    return float(((1 - b_s / b_t)[:, None] * probability * k * cost).sum())


# ---------------------------------------------------------------------------- samples and gaps


def entropy_of_characters(texts: np.ndarray) -> float:
    """Returns the mean over texts of the entropy of their characters, bits."""
    found = []
    for text in texts:
        p = np.unique(text, return_counts=True)[1] / len(text)
        found.append(-(p * np.log2(p)).sum())
    return float(np.mean(found))


def judged(judge: train.Result, texts: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Returns bits per character of texts under the autoregressive model; mask: of `evaluate`."""
    batch = {"tokens": texts} if mask is None else {"tokens": texts, "mask": mask}
    found = jax.jit(judge.family.evaluate)(judge.state, batch, jax.random.key(0))
    return float(found["nll_nats"].sum() / found["tokens"].sum()) / log(2)


def gap_of(setup: Setup, texts: np.ndarray) -> np.ndarray:
    """Returns a mask [B, L], 1 for the characters of a gap in the middle."""
    begin = (texts.shape[1] - setup.gap) // 2
    mask = np.zeros(texts.shape, np.float32)
    mask[:, begin : begin + setup.gap] = 1
    return mask


def gap_bits(result: train.Result, texts: np.ndarray, gap: np.ndarray, right: bool) -> float:
    """Returns the bound on a gap, bits per character. right: whether the text after it is given.

    If not, the model sees masks there.
    """
    cfg, hidden = result.config, jnp.asarray(gap.cumsum(-1) * (1 - gap) > 0)
    logits_fn = token_logits_fn(cfg, _cli.weights(result))

    def half_blind(x_t, t):
        return logits_fn(x_t if right else jnp.where(hidden, cfg.vocab, x_t), t)

    bound = partial(ddpm.token_vlb, "absorbing", half_blind, schedule=cfg.schedule, terms=16)
    nats = jax.jit(lambda x, key: bound(x, key, mask=gap))(texts, jax.random.key(0))
    return float(nats.sum() / gap.sum()) / log(2)


# -------------------------------------------------------------------------------------- the run


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains the three models, and measures the diffusion models beside the first."""
    training, valid = split(setup)
    configs = {model: config(setup, model, training.info) for model in MODELS}
    rows, first, bits, curves = _cli.kept(), {}, {}, {}
    for model, (cfg, make) in configs.items():
        runs = _cli.seeded(replace(setup.run, folder=str(folder / model)), setup.seeds)
        results = [train.fit(make, cfg, place, training, valid=valid) for place in runs]
        first[model], name = results[0], "nll_nats_per_token"
        ends = [_text.validations(place.folder)[-1][name] / log(2) for place in runs]
        bits[model], error = _cli.mean_and_error(ends)
        rows.append(Row(BITS.format(model), bits[model], error=error))
        rows.append(Row(SIZE.format(model), _cli.parameters(results[0])))
        curves[model] = _text.curve(runs[0].folder, name, 1 / log(2))
    rows.append(Row(GAP, bits["absorbing"] - bits["autoregressive"]))
    for part, i in (("a quarter", 4), ("half", 2)):
        there = [np.interp(setup.run.steps / i, *curves[m]) for m in MODELS[:2]]
        rows.append(Row(GAP_AT.format(part), float(there[1] - there[0])))
    rows.append(Row(ORDER, bits["uniform"] - bits["absorbing"]))
    absorbing = configs["absorbing"][0]
    curves[WEIGHTED], *found = on_the_bound(setup, folder, absorbing, training, valid)
    rows.append(Row(BITS.format(WEIGHTED), found[0], error=found[1]))
    rows.append(Row(WEIGHTS, found[0] - bits["absorbing"]))
    rows.append(Row(SAME_LOSS, bits["uniform"] - found[0]))
    longer, end = for_longer(setup, folder, absorbing, training, valid)
    gap = end - float(curves["autoregressive"][1][-1])
    rows.append(Row(GAP_LONGER.format(setup.longer), gap))

    held_out = valid.batch(0, 0, min(128, valid.info.examples))["tokens"]
    cost = cost_of_masks(first["absorbing"], held_out)
    bound = partial(bound_of_masks, cost, schedule=setup.diffusion.schedule)
    unit, L = len(cost) * log(2), len(cost)
    rows += [Row(COST.format(k, L), cost[k - 1] / log(2)) for k in (1, L // 4, L // 2, L)]
    excess = {T: (bound(steps=T) - bound(steps=None)) / unit for T in setup.steps}
    rows += [Row(IN_STEPS.format(T), value) for T, value in excess.items()]
    texts, quality = drawn(setup, first), {}
    for name, each in {HELD_OUT: held_out, **texts}.items():
        quality[name] = judged(first["autoregressive"], each)
        rows.append(Row(QUALITY.format(name), quality[name]))
        rows.append(Row(VARIETY.format(name), entropy_of_characters(each)))
    ends = [quality[SAMPLES.format(steps)] for steps in (setup.steps[0], setup.steps[-1])]
    rows.append(Row(WORSE, ends[0] - ends[1]))
    gap = gap_of(setup, held_out)
    both, half = (gap_bits(first["absorbing"], held_out, gap, right) for right in (True, False))
    left = judged(first["autoregressive"], held_out, gap[:, 1:])
    rows += [Row(BOTH.format("absorbing"), both), Row(HALF, half), Row(LEFT, left)]
    rows.append(Row(GAIN, left - both))
    best = gap_bits(longer, held_out, gap, right=True)
    rows.append(Row(BOTH.format(LONGER.format(setup.longer)), best))
    plot(setup, folder, curves, excess, quality, texts, longer, held_out)
    return rows


def on_the_bound(setup: Setup, folder: Path, cfg, training, valid) -> tuple:
    """Trains absorbing models on the bound, with each seed.

    Returns the curve of the first, the mean of their bits, and its standard error.
    """
    place = replace(setup.run, folder=str(folder / "weighted"))
    runs, cfg = _cli.seeded(place, setup.seeds), replace(cfg, weighting="bound")
    for each in runs:
        train.fit(ddpm.make_tokens, cfg, each, training, valid=valid)
    curves = [_text.curve(each.folder, "nll_nats_per_token", 1 / log(2)) for each in runs]
    return curves[0], *_cli.mean_and_error([values[-1] for _, values in curves])


def for_longer(setup: Setup, folder: Path, cfg, training, valid) -> tuple[train.Result, float]:
    """Trains one absorbing model for more updates; returns it and its bits."""
    steps, optim = setup.longer * setup.run.steps, cfg.optim
    cfg = replace(cfg, optim=replace(optim, decay=optim.decay and steps - optim.warmup))
    place = replace(setup.run, folder=str(folder / "longer"), steps=steps)
    result = train.fit(ddpm.make_tokens, cfg, place, training, valid=valid)
    _, values = _text.curve(place.folder, "nll_nats_per_token", 1 / log(2))
    return result, float(values[-1])


def drawn(setup: Setup, first: dict) -> dict[str, np.ndarray]:
    """Returns samples of the absorbing model by number of steps, and of the autoregressive one."""
    draw = partial(train.sample, n=setup.samples, chunk=setup.samples)
    key, absorbing = jax.random.key(1), first["absorbing"]
    draws = partial(draw, absorbing, key, length=setup.length + 1)
    texts = {SAMPLES.format(T): draws(steps=T) for T in setup.steps}
    start = texts[SAMPLES.format(setup.steps[-1])][:, :1]  # a first character for each
    new = draw(first["autoregressive"], key, prompt=start, max_new_tokens=setup.length)
    return {**texts, OWN: np.concatenate([start, new], 1)}


@_cli.costs("text_diffusion.png")
def plot(setup, folder: Path, curves, excess, quality, texts, longer, held_out) -> None:
    """Draws bits against updates, the cost of few steps, and samples. `longer` fills the gap."""
    fig, axes = figures.figure(2, 3, size=(13, 9))
    labels = {"xlabel": "updates", "ylabel": "bits per character"}
    figures.curves(axes[0, 0], curves, **labels, title="held-out text")
    lines = {"bound": (list(excess), list(excess.values()))}
    labels = {"xlabel": "steps T", "ylabel": "bits above continuous time"}
    figures.curves(axes[0, 1], lines, **labels, title="absorbing: bound")
    axes[0, 1].set_xscale("log", base=2)
    by_steps = [quality[SAMPLES.format(steps)] for steps in setup.steps]
    labels = {"xlabel": "steps per sample", "ylabel": "bits, autoregressive model"}
    figures.curves(
        axes[0, 2], {"samples": (setup.steps, by_steps)}, **labels, title="absorbing: samples"
    )
    axes[0, 2].set_xscale("log", base=2)
    figures.level(axes[0, 2], quality[HELD_OUT], HELD_OUT)
    decode = Tokenizer(longer.info.tokenizer).decode
    few, many = (SAMPLES.format(steps) for steps in (setup.steps[0], setup.steps[-1]))
    gap = gap_of(setup, held_out[:3]) > 0
    known = np.where(gap, -1, held_out[:3])
    filled = train.sample(longer, jax.random.key(2), n=3, known=known)
    left, right = np.flatnonzero(gap[0])[[0, -1]] + (0, 1)
    marked = [
        f"{decode(row[:left])}[{decode(row[left:right])}]{decode(row[right:])}" for row in filled
    ]
    pages = {many: map(decode, texts[many][:2]), few: map(decode, texts[few][:2])}
    pages["a gap [filled]"] = marked[:2]
    for ax, (title, shown) in zip(axes[1], pages.items(), strict=True):
        figures.page(ax, "\n---\n".join(shown), title=title, columns=31)
    figures.share_legend(fig)
    caption = (
        f"{setup.run.steps:,} updates of {setup.run.batch_size} x {setup.length} characters; "
        f"the gap: {setup.longer} times as many"
    )
    figures.save(fig, folder / "text_diffusion.png", caption)


if __name__ == "__main__":
    _cli.main("text_diffusion")
