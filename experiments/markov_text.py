"""Diffusion of tokens on a Markov chain, whose every posterior is known: Austin et al. 2021 (D3PM), Shi et al. 2024 (MD4)

    python -m experiments.markov_text       about 12 minutes on 2 cores; downloads nothing

A text is eight symbols of a Markov chain with three states. Forward and backward messages give the
exact posterior of each symbol, so the bound of the best possible network is known. The absorbing
process pays the sum of the symbols' own entropies in one step, less with more steps, and in
continuous time exactly the entropy. The uniform process comes down to the entropy too. Samples that
reveal one symbol per step have the law of the chain; with fewer steps, symbols of one step ignore
each other. A trained network never beats the entropy. The papers have no such table: the criteria
are ours.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from aigc_jax import data, ddpm, figures, train
from aigc_jax.core import EMA, Optim
from aigc_jax.ddpm import token_model
from aigc_jax.ddpm import tokens as token_diffusion
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import Row, Scale

START = np.array([0.5, 0.3, 0.2])
CHAIN = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.05, 0.7]])
V = len(START)
PROCESSES = ("absorbing", "uniform")


@dataclass(frozen=True)
class Setup:
    """Flags of markov_text. model.process is set to each process in turn."""

    model: ddpm.TokenConfig = ddpm.TokenConfig(
        vocab=V,
        context=8,
        layers=2,
        heads=2,
        width=64,
        terms=16,
        ema=0.999,
        optim=Optim(lr=2e-3, warmup=100, decay=1900),
    )
    run: Run = Run("runs/markov_text", 2000, 256, steps_per_call=50, eval_every=200)
    texts: int = 100_000  # to train on, to evaluate and to sample
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # T of the exact bounds

    def __post_init__(self):
        _cli.at_least(self, texts=1000)
        if not self.steps or min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must hold rising numbers from 1 on, got {self.steps}")
        if not 2 <= self.model.context <= 8:
            raise ValueError(f"model.context must lie in 2..8, got {self.model.context}")


SMOKE = {"model.width": 16, "model.layers": 1, "model.context": 4, "model.optim.decay": 0}
SMOKE |= {"run.folder": "runs/markov_text-smoke", "run.steps": 100, "run.eval_every": 50}
SMOKE |= {"texts": 4000, "steps": (1, 2, 4), "model.ema": 0.9}
SCALES = {
    "smoke": Scale(_cli.change(Setup(), SMOKE), "four symbols, a narrow net, 100 updates"),
    "cpu": Scale(Setup(), "a chain of three symbols instead of text8"),
}
ONE_STEP = "absorbing, exact: bound in one step minus the sum of marginal entropies (nats)"
LIMIT = "{}, exact posterior: bound in continuous time minus the entropy (nats{})"
EXACT = LIMIT.format("absorbing", "")
SAMPLED = {name: LIMIT.format(name, ", sampled; +- s.e. over draws") for name in PROCESSES}
FALLS = "absorbing, exact: smallest fall of the bound from one T to the next (nats)"
LAW = "one symbol per step: p-value of chi-squared against the chain"
FEWER = "samples in {} steps: total variation from the chain (%; oracle: texts of the chain)"
TRAINED = "{}, trained: bound minus entropy (nats)"
CRITERIA = {
    ONE_STEP: "within -1e-9 .. 1e-9",
    EXACT: "within -1e-5 .. 1e-5",
    **{quantity: "within -0.02 .. 0.02" for quantity in SAMPLED.values()},
    FALLS: "> 0",
    LAW: "> 0.001",
    TRAINED.format("absorbing"): "within -0.01 .. 0.1",
    TRAINED.format("uniform"): "within -0.01 .. 0.2",
}
INVARIANTS = {
    ONE_STEP: "within -1e-9 .. 1e-9",
    EXACT: "within -1e-5 .. 1e-5",
    FALLS: "> 0",
    LAW: "> 0.001",
    TRAINED.format("absorbing"): "within -0.02 .. 2",
    TRAINED.format("uniform"): "within -0.02 .. 2",
}


# ------------------------------------------------------------------------------- the chain


def all_texts(L: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all texts [V^L, L] and their probabilities."""
    texts = np.array(list(itertools.product(range(V), repeat=L)))
    p = START[texts[:, 0]] * np.prod(CHAIN[texts[:, :-1], texts[:, 1:]], 1)
    return texts, p


def entropy(p: np.ndarray) -> float:
    """Returns the entropy in nats."""
    return float(-(p * np.log(p)).sum())


def log_posterior(evidence):
    """Returns log P(symbol i | x_t) [B, L, V]; evidence: q(x_t[i] | x_0[i]) [B, L, V]."""
    start, chain = (jnp.asarray(a, evidence.dtype) for a in (START, CHAIN))
    L = evidence.shape[1]
    ahead, behind = [evidence[:, 0] * start[None]], [jnp.ones_like(evidence[:, 0])]
    for i in range(1, L):
        ahead.append(evidence[:, i] * (ahead[-1] @ chain))
        behind.append((evidence[:, L - i] * behind[-1]) @ chain.T)
    joint = jnp.stack(ahead, 1) * jnp.stack(behind[::-1], 1)
    return jnp.log(jnp.maximum(joint, 1e-38)) - jnp.log(joint.sum(-1, keepdims=True))


def exact_logits(process: str, x_t, t):
    """Returns the logits of the best network, [B, L, V]."""
    seen = jax.nn.one_hot(x_t, V, dtype=t.dtype)
    if process == "absorbing":
        return log_posterior(jnp.where((x_t == V)[..., None], 1.0, seen))
    b_t = token_diffusion.one_minus_alpha("linear", t)[:, None, None]
    return log_posterior((1 - b_t) * seen + b_t / V)


def exact_bounds(L: int, steps) -> tuple[list[float], float]:
    """Returns the absorbing bound for each T, and in continuous time, in float64.

    The mean cross entropy of the masked symbols depends on the set of masks alone. The bound weighs
    it by how probable the set is at each t: polynomials in t, which Gauss-Legendre sums exactly.
    """
    texts, p = all_texts(L)
    with jax.enable_x64(True):

        @jax.jit
        def nats(masked):
            x_t = jnp.where(masked[None], V, texts)
            each = token_diffusion.cross_entropy(exact_logits("absorbing", x_t, jnp.ones(1)), texts)
            return (p * jnp.where(masked[None], each, 0.0).sum(-1)).sum()

        sets = np.array(list(itertools.product([False, True], repeat=L)))
        cost, size = np.array([float(nats(masked)) for masked in sets]), sets.sum(-1)

    def mean(t):
        return (t**size * (1 - t) ** (L - size) * cost).sum()

    found = [sum(mean((i + 1) / T) / (i + 1) for i in range(T)) for T in steps]
    x, w = np.polynomial.legendre.leggauss(L)
    limit = sum(w / 2 / t * mean(t) for t, w in zip((x + 1) / 2, w, strict=True))
    return [float(bound) for bound in found], float(limit)


# ----------------------------------------------------------------------------------- the run


def texts_of(setup: Setup, seed: int) -> np.ndarray:
    """Draws texts of the chain, int32 [N, L]."""
    texts, p = all_texts(setup.model.context)
    rows = np.random.default_rng([setup.run.seed, seed]).choice(len(p), setup.texts, p=p)
    return texts[rows].astype(np.int32)


def excess(process: str, logits_fn, texts, key, steps: int | None = None):
    """Returns an estimate of the bound minus -log p of the same texts, mean over texts, nats."""
    _, p = all_texts(texts.shape[1])
    nll = jnp.asarray(-np.log(p), jnp.float32)[texts @ V ** np.arange(texts.shape[1])[::-1]]
    bound = ddpm.token_vlb(process, logits_fn, jnp.asarray(texts), key, steps=steps, terms=4)
    return (bound - nll).mean()


def sampled_bound(process: str, texts, steps: int | None) -> tuple[float, float]:
    """Returns the excess of the best network, and its s.e."""
    each = jax.jit(partial(excess, process, partial(exact_logits, process), texts, steps=steps))
    return _cli.mean_and_error([float(each(k)) for k in jax.random.split(jax.random.key(1), 8)])


def distance(samples: np.ndarray, L: int) -> tuple[float, float]:
    """Returns the total variation from the chain (%) and the p-value of chi-squared."""
    _, p = all_texts(L)
    count = np.bincount(samples @ V ** np.arange(L)[::-1], minlength=len(p))
    few = p * len(samples) < 5  # these texts are counted as one
    bins = [np.append(x[~few], x[few].sum()) for x in (count, p * len(samples))]
    bins = [x[bins[1] > 0] for x in bins]
    return 50 * float(np.abs(count / len(samples) - p).sum()), scipy.stats.chisquare(*bins).pvalue


def sampled(setup: Setup, steps: int) -> np.ndarray:
    """Samples texts with the best network of the absorbing process."""
    options = {"shape": (setup.texts, setup.model.context), "vocab": V, "steps": steps}
    draw = partial(ddpm.sample_tokens, "absorbing", partial(exact_logits, "absorbing"), **options)
    return np.asarray(jax.jit(draw)(jax.random.key(setup.run.seed)))


def trained(setup: Setup, process: str, folder: Path) -> tuple[float, dict]:
    """Trains a network; returns its bound minus the entropy, and the same while training."""
    sets = [data.from_arrays({"tokens": texts_of(setup, i)}, levels=V) for i in (0, 1)]
    cfg = replace(setup.model, process=process)

    @jax.jit
    def found(params, texts):  # of whole texts; `evaluate` takes their first symbol as given
        return excess(process, token_model.token_logits_fn(cfg, params), texts, jax.random.key(2))

    def on_eval(family, state, step):
        return {"excess_nats": found(EMA(cfg.ema).read(state), texts[:10_000])}

    texts = jnp.asarray(_cli.arrays(sets[1])["tokens"])
    place = replace(setup.run, folder=str(folder / process))
    result = train.fit(ddpm.make_tokens, cfg, place, sets[0], valid=sets[1], on_eval=on_eval)
    last = float(found(_cli.weights(result), texts[:50_000]))
    return last, _cli.history(folder / process, "excess_nats")


def run(setup: Setup, folder: Path) -> list[Row]:
    """Takes exact bounds, draws exact samples, and trains a network per process."""
    folder.mkdir(parents=True, exist_ok=True)
    L, rows = setup.model.context, _cli.kept()
    texts, p = all_texts(L)
    marginal = sum(entropy(np.bincount(x, p, V)) for x in texts.T)
    bounds, limit = exact_bounds(L, (1, *setup.steps))
    rows += [Row(ONE_STEP, bounds[0] - marginal), Row(EXACT, limit - entropy(p))]
    rows.append(Row(FALLS, float(-np.diff([*bounds[1:], limit]).max())))
    drawn = texts_of(setup, 2)
    gap = {T: sampled_bound("uniform", drawn, T) for T in (*setup.steps, None)}
    ends = {"absorbing": sampled_bound("absorbing", drawn, None), "uniform": gap[None]}
    rows += [Row(SAMPLED[name], found, error=error) for name, (found, error) in ends.items()]
    curves = {"absorbing": bounds[1:], "uniform": [entropy(p) + gap[T][0] for T in setup.steps]}
    least, _ = distance(drawn, L)
    law = {steps: distance(sampled(setup, steps), L) for steps in (1, 2, 4, 8) if steps <= L}
    rows += [Row(FEWER.format(steps), far, oracle=least) for steps, (far, _) in law.items()]
    rows.append(Row(LAW, distance(sampled(setup, L), L)[1]))
    learning = {}
    for process in PROCESSES:
        excess, learning[process] = trained(setup, process, folder)
        rows.append(Row(TRAINED.format(process), excess))
    plot(setup, folder, curves, entropy(p), law, least, learning)
    return rows


@_cli.costs("markov_text.png")
def plot(setup: Setup, folder: Path, bounds, truth: float, law, least: float, learning) -> None:
    """Draws bounds against T, samples against steps, and the trained networks."""
    fig, [axes] = figures.figure(1, 3, size=(12, 4))
    curves = {name: (setup.steps, values) for name, values in bounds.items()}
    figures.curves(axes[0], curves, xlabel="steps T", ylabel="nats", title="bound, exact posterior")
    axes[0].set_xscale("log", base=2)
    figures.level(axes[0], truth, "entropy")
    far = {"samples": (list(law), [far for far, _ in law.values()])}
    title = "samples, exact posterior"
    figures.curves(axes[1], far, xlabel="steps", ylabel="total variation (%)", title=title)
    figures.level(axes[1], least, "texts of the chain")
    labels = {"xlabel": "updates", "ylabel": "bound minus entropy (nats)"}
    figures.curves(axes[2], learning, **labels, title="trained networks")
    figures.level(axes[2], 0.0, "entropy")
    caption = f"a Markov chain of {V} symbols, length {setup.model.context}; {setup.texts:,} texts"
    figures.save(fig, folder / "markov_text.png", caption)


if __name__ == "__main__":
    _cli.main("markov_text")
