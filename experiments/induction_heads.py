"""The moment at which a model learns to copy: induction heads, Olsson et al. 2022

    python -m experiments.induction_heads    about 10 minutes on 2 cores; downloads nothing

Attention-only models of one and two layers read sequences of 64 symbols. Half of these repeat a
random segment, half follow a Markov chain. An induction head attends from a symbol to what followed
it last time, and so predicts a copy; its prefix-matching score is that attention weight. This takes
two layers. Expect the score of the best head to jump in the two-layer model, at the moment when the
loss on second copies falls, and to stay near 0 in the one-layer model. Rotary positions act on
queries and keys alone, as the paper's do. With learned positions and a rate of 1e-3, the best head
scored 0.07 after 5,000 updates and had just begun to rise (one run).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aigc_jax import data, figures, train, transformer
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli
from experiments._cli import NOT_REACHED, Row, Scale

SYMBOLS = 64
BEGIN = SYMBOLS  # the token before every sequence
LENGTH = 100
SEGMENT = 25  # symbols that the prefix-matching score repeats, as in the paper
OPTIM = Optim(lr=4e-3, weight_decay=0.01)
SHAPE = dict(context=128, layers=2, heads=8, width=64)
MODEL = transformer.Config(SYMBOLS + 1, **SHAPE, mlp=False, positions="rotary", optim=OPTIM)
EVERY = dict(eval_every=50, save_every=2500, log_every=50, keep=1, steps_per_call=50)
RUN = Run("runs/induction_heads", 5000, 64, **EVERY)


@dataclass(frozen=True)
class Setup:
    """Flags of induction_heads."""

    model: transformer.Config = MODEL
    run: Run = RUN

    def __post_init__(self):
        if self.run.eval_every < 1:
            raise ValueError("run.eval_every must be at least 1: scores are measured there")
        if self.model.layers != 2:
            raise ValueError("model.layers cannot be chosen: one and two layers are compared")
        least = {"vocab": SYMBOLS + 1, "context": 4 * SEGMENT + 1}
        _cli.at_least(self.model, "which the sequences need", prefix="model.", **least)


SMOKE = Setup(run=replace(RUN, folder="runs/induction_heads-smoke", steps=200))
SCORE = "the score is the weight on what followed any earlier copy"
DIFFERS = f"synthetic sequences of 100 symbols (the paper: text), width 64; {SCORE}"
SCALES = {"smoke": Scale(SMOKE, "200 updates"), "cpu": Scale(Setup(), DIFFERS)}
JUMP = "2 layers: share of training in which the best head's prefix-matching score goes from < .1 to > .5 (%)"
TOGETHER = (
    "2 layers: distance of that jump from the fastest fall of the second-copy loss (% of training)"
)
COPY = "2 layers: loss on second copies over that on first ones, at the end"
TWO = "2 layers: prefix-matching score of the best head, at the end"
ONE = "1 layer: largest prefix-matching score of any head, ever"
CRITERIA = {JUMP: "<= 20", TOGETHER: "<= 10", COPY: "< 0.3", TWO: "> 0.5", ONE: "< 0.2"}
INVARIANTS = {ONE: CRITERIA[ONE]}


def sequences() -> data.Data:
    """Returns endless rows: half repeat a segment of 20 to 50 symbols, half follow a chain."""
    chain = np.random.default_rng(0).dirichlet(np.full(SYMBOLS, 0.1), SYMBOLS).cumsum(-1)

    def draw(rng, size):
        x = np.zeros((size, LENGTH), np.int64)
        half = size // 2
        for row in x[:half]:
            segment = rng.integers(0, SYMBOLS, rng.integers(20, 51))
            row[:] = np.resize(segment, LENGTH)
        symbol = rng.integers(0, SYMBOLS, size - half)
        for t in range(LENGTH):
            x[half:, t] = symbol
            below = (chain[symbol] < rng.random(len(symbol))[:, None]).sum(-1)
            symbol = np.minimum(below, SYMBOLS - 1)
        return np.concatenate([np.full((size, 1), BEGIN), x], 1)

    source = {"name": "copies and chains", "split": "train"}
    points = data.endless(draw, (LENGTH + 1,), source)
    info = replace(points.info, kind="text", levels=SYMBOLS + 1, source=None)
    return data.Data(info, lambda *at: {"tokens": points.batch(*at)["points"].astype(np.int32)})


NAMES = ("prefix_matching", "first_copy_nats", "second_copy_nats")


def scores(cfg: transformer.Config):
    """Returns an `on_eval`: the best head's score, the loss on both copies of 40 symbols."""
    rng = np.random.default_rng(1)
    begin = np.full((64, 1), BEGIN)
    four = np.concatenate([begin, np.tile(rng.integers(0, SYMBOLS, (64, SEGMENT)), (1, 4))], 1)
    two = np.concatenate([begin, np.tile(rng.integers(0, SYMBOLS, (64, 40)), (1, 2))], 1)
    t, s = np.meshgrid(np.arange(four.shape[1]), np.arange(four.shape[1]), indexing="ij")
    # From a symbol, in the second copy or later, to what followed it in any earlier copy.
    follows = (t > SEGMENT) & (s <= t) & ((t - s + 1) % SEGMENT == 0) & (s > 1)

    @jax.jit
    def measure(params):
        weights = transformer.attention(cfg, params, jnp.asarray(four, jnp.int32))
        each = (weights * follows[None, None, None]).sum(-1)[..., SEGMENT + 1 :]
        each = each.mean((1, 3))  # [layers, heads]
        nll = transformer.nll(cfg, params, jnp.asarray(two, jnp.int32)).mean(0)
        return each.max(), nll[1:40].mean(), nll[41:].mean()

    def on_eval(family, state, step):
        return dict(zip(NAMES, measure(state.params), strict=True))

    return on_eval


def jump_of(steps: np.ndarray, score: np.ndarray, second: np.ndarray) -> tuple:
    """Returns how long the score takes from < 0.1 to > 0.5, and how far the steepest fall is.

    Both in percent of the training. The fall is that of `second`, the loss on second copies.
    """
    if not (score > 0.5).any():
        return NOT_REACHED, NOT_REACHED
    high = int(np.argmax(score > 0.5))
    low = int(np.flatnonzero(score[: high + 1] < 0.1)[-1]) if (score[:high] < 0.1).any() else 0
    fall = int(np.argmin(np.diff(second)))
    middle, fastest = (steps[low] + steps[high]) / 2, (steps[fall] + steps[fall + 1]) / 2
    both = (steps[high] - steps[low], abs(fastest - middle))
    return tuple(float(100 * x / steps[-1]) for x in both)


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both models, finds the jump."""
    training, found, curves = sequences(), _cli.kept(), {}
    for layers in (1, 2):
        cfg = replace(setup.model, layers=layers)
        run = replace(setup.run, folder=str(folder / f"{layers}-layers"))
        train.fit(transformer.make, cfg, run, training, on_eval=scores(cfg))
        curves[layers] = {name: _cli.history(run.folder, name) for name in NAMES}
    found.append(Row(ONE, float(curves[1]["prefix_matching"][1].max())))
    steps, score = curves[2]["prefix_matching"]
    first, second = (curves[2][f"{which}_copy_nats"][1] for which in ("first", "second"))
    found += [Row(TWO, float(score[-1])), Row(COPY, float(second[-1] / first[-1]))]
    jump, together = jump_of(steps, score, second)
    found += [Row(JUMP, jump), Row(TOGETHER, together)]
    plot(setup, folder, {f"{n} layer{'s'[n == 1 :]}": each for n, each in curves.items()})
    return found


@_cli.costs("induction_heads.png")
def plot(setup: Setup, folder: Path, curves: dict) -> None:
    """Draws scores and losses."""
    fig, ((scores, losses),) = figures.figure(1, 2)
    best = {model: each["prefix_matching"] for model, each in curves.items()}
    ylabel, title = "weight on what followed before", "prefix-matching score of the best head"
    figures.curves(scores, best, xlabel="updates", ylabel=ylabel, title=title)
    lines = {}
    for model, each in curves.items():
        for which in ("first", "second"):
            lines[f"{model}, {which} copy"] = each[f"{which}_copy_nats"]
    title = "loss on copies of 40 symbols"
    figures.curves(losses, lines, xlabel="updates", ylabel="nats per symbol", title=title)
    nets = f"Attention only, width {setup.model.width}, {setup.model.heads} heads per layer"
    caption = f"{nets}. {setup.run.batch_size} sequences of {LENGTH} symbols per update. One seed."
    figures.save(fig, folder / "induction_heads.png", caption)


if __name__ == "__main__":
    _cli.main("induction_heads")
