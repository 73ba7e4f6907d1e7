"""The moment at which a model learns to copy: induction heads, Olsson et al. 2022

    python -m experiments.induction_heads               about 10 minutes on 2 cores; downloads nothing

Attention-only models of one and two layers, on sequences of 64 symbols: half of them a random segment again and again,
half text from a Markov chain. An induction head looks from a symbol to what followed it last time (its prefix-matching
score is the weight there) and so predicts a copy. It takes two layers: expect the score of the best head to jump in the
two-layer model, in the moment in which the loss on second copies falls, and to stay near 0 in the one-layer model.
Rotary positions act on queries and keys alone, as the paper's do. With learned ones and a rate of 1e-3 the best head
scored .07 after 5,000 updates, and was only beginning (one run).
"""

from __future__ import annotations

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
MODEL = transformer.Config(
    vocab=SYMBOLS + 1,
    context=128,
    layers=2,
    heads=8,
    width=64,
    mlp=False,
    positions="rotary",
    optim=Optim(lr=4e-3, weight_decay=0.01),
)
RUN = Run(
    folder="runs/induction_heads",
    steps=5000,
    batch_size=64,
    eval_every=50,
    save_every=2500,
    log_every=50,
    keep=1,
    steps_per_call=50,
)


@dataclass(frozen=True)
class Setup:
    """Flags of induction_heads."""

    model: transformer.Config = MODEL
    run: Run = RUN

    def __post_init__(self):
        if self.run.eval_every < 1:
            raise ValueError("run.eval_every must be at least 1: scores are measured there")
        if self.model.layers != 2:
            raise ValueError(
                "model.layers cannot be chosen: models of one and of two layers are compared"
            )
        if self.model.vocab < SYMBOLS + 1 or self.model.context < 4 * SEGMENT + 1:
            raise ValueError(
                f"the model needs a vocab of {SYMBOLS + 1} and a context of {4 * SEGMENT + 1}"
            )


SCALES = {
    "smoke": Scale(
        Setup(run=replace(RUN, folder="runs/induction_heads-smoke", steps=200)), "200 updates"
    ),
    "cpu": Scale(
        Setup(),
        "synthetic sequences of 100 symbols (the paper: text), width 64; the score is the weight on what "
        "followed any earlier copy",
    ),
}
JUMP = "2 layers: share of training in which the best head's prefix-matching score goes from < .1 to > .5 (%)"
TOGETHER = (
    "2 layers: distance of that jump from the fastest fall of the second-copy loss (% of training)"
)
COPY = "2 layers: loss on second copies over that on first ones, at the end"
TWO = "2 layers: prefix-matching score of the best head, at the end"
ONE = "1 layer: largest prefix-matching score of any head, ever"
CRITERIA = {
    JUMP: "<= 20",
    TOGETHER: "<= 10",
    COPY: "< 0.3",
    TWO: "> 0.5",
    ONE: "< 0.2",
}
INVARIANTS = {ONE: CRITERIA[ONE]}


def sequences() -> data.Data:
    """Endless rows: the first half repeat a random segment of 20 to 50 symbols, the others follow a Markov chain."""
    chain = np.random.default_rng(0).dirichlet(np.full(SYMBOLS, 0.1), SYMBOLS).cumsum(-1)

    def draw(rng, size):
        x = np.zeros((size, LENGTH), np.int64)
        half = size // 2
        for row in x[:half]:
            segment = rng.integers(0, SYMBOLS, rng.integers(20, 51))
            row[:] = np.resize(segment, LENGTH)
        at = rng.integers(0, SYMBOLS, size - half)
        for t in range(LENGTH):
            x[half:, t] = at
            at = np.minimum((chain[at] < rng.random(len(at))[:, None]).sum(-1), SYMBOLS - 1)
        return np.concatenate([np.full((size, 1), BEGIN), x], 1)

    source = {"name": "copies and chains", "split": "train"}
    points = data.endless(draw, (LENGTH + 1,), source)
    info = replace(points.info, kind="text", levels=SYMBOLS + 1, source=None)
    return data.Data(info, lambda *at: {"tokens": points.batch(*at)["points"].astype(np.int32)})


def scores(cfg: transformer.Config):
    """An `on_eval`: the best head's prefix-matching score, and the loss on first and second copies of 40 symbols."""
    rng = np.random.default_rng(1)
    begin = np.full((64, 1), BEGIN)
    four = np.concatenate([begin, np.tile(rng.integers(0, SYMBOLS, (64, SEGMENT)), (1, 4))], 1)
    two = np.concatenate([begin, np.tile(rng.integers(0, SYMBOLS, (64, 40)), (1, 2))], 1)
    t, s = np.meshgrid(np.arange(four.shape[1]), np.arange(four.shape[1]), indexing="ij")
    # From a symbol of the second copy on to what followed it in any copy before.
    follows = (t > SEGMENT) & (s <= t) & ((t - s + 1) % SEGMENT == 0) & (s > 1)

    @jax.jit
    def measure(params):
        weights = transformer.attention(cfg, params, jnp.asarray(four, jnp.int32))
        each = (
            (weights * follows[None, None, None]).sum(-1)[..., SEGMENT + 1 :].mean((1, 3))
        )  # [layers, heads]
        nll = transformer.nll(cfg, params, jnp.asarray(two, jnp.int32)).mean(0)
        return each.max(), nll[1:40].mean(), nll[41:].mean()

    def on_eval(family, state, step):
        return dict(
            zip(
                ("prefix_matching", "first_copy_nats", "second_copy_nats"),
                measure(state.params),
                strict=True,
            )
        )

    return on_eval


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains both models, finds the jump, draws scores and losses."""
    training, found, curves = sequences(), _cli.kept(), {}
    for layers in (1, 2):
        cfg = replace(setup.model, layers=layers)
        run = replace(setup.run, folder=str(folder / f"{layers}-layers"))
        train.fit(transformer.make, cfg, run, training, on_eval=scores(cfg))
        lines = [
            (line["step"], line["valid"]) for line in train.metrics(run.folder) if "valid" in line
        ]
        step = np.array([at for at, _ in lines])
        curves[layers] = step, {name: np.array([v[name] for _, v in lines]) for name in lines[0][1]}
    step, one = curves[1]
    found.append(Row(ONE, float(one["prefix_matching"].max())))
    step, two = curves[2]
    score, second = two["prefix_matching"], two["second_copy_nats"]
    found += [Row(TWO, float(score[-1])), Row(COPY, float(second[-1] / two["first_copy_nats"][-1]))]
    jump, together = NOT_REACHED, NOT_REACHED
    if (score > 0.5).any():
        high = int(np.argmax(score > 0.5))
        low = int(np.flatnonzero(score[: high + 1] < 0.1)[-1]) if (score[:high] < 0.1).any() else 0
        middle = (step[low] + step[high]) / 2
        fall = int(np.argmin(np.diff(second)))  # the steepest piece of its curve
        fastest = (step[fall] + step[fall + 1]) / 2
        jump, together = (
            float(100 * x / step[-1]) for x in (step[high] - step[low], abs(fastest - middle))
        )
    found += [Row(JUMP, jump), Row(TOGETHER, together)]
    with _cli.costs("induction_heads.png"):
        fig, (axes,) = figures.figure(1, 2, size=(11, 4.2))
        best = {
            f"{n} layer{'s'[n == 1 :]}": (s, v["prefix_matching"]) for n, (s, v) in curves.items()
        }
        figures.curves(
            axes[0],
            best,
            xlabel="updates",
            ylabel="weight on what followed before",
            title="best head's prefix matching",
        )
        losses = {
            f"{n} layer{'s'[n == 1 :]}, {which} copy": (s, v[f"{which}_copy_nats"])
            for n, (s, v) in curves.items()
            for which in ("first", "second")
        }
        figures.curves(
            axes[1],
            losses,
            xlabel="updates",
            ylabel="nats per symbol",
            title="loss on copies of 40 symbols",
        )
        caption = f"attention only, width {setup.model.width}, {setup.model.heads} heads; {setup.run.batch_size} sequences"
        figures.save(
            fig,
            folder / "induction_heads.png",
            f"{caption} of {LENGTH} symbols an update; one seed",
        )
    return found


if __name__ == "__main__":
    _cli.main("induction_heads")
