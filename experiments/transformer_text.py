"""A small language model of Python's own standard library, character by character

    python -m experiments.transformer_text      about 3 minutes on 2 cores; downloads nothing

The source of the standard library's modules (4.4 million characters, of which every Python has its own copy): the
first nine tenths are trained on, the last are scored, every character once. Rotary positions, RMSNorm and SwiGLU.
Expect it to pass the best n-gram and to write code that looks right from afar. No paper has numbers for this set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from aigc_jax import train, transformer
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _text
from experiments._cli import Row, Source

MODEL = transformer.Config(
    context=256, layers=4, heads=4, width=128, positions="rotary", norm="rms", activation="swiglu",
    bias=False, optim=Optim(lr=3e-3, b2=0.99, weight_decay=0.1, clip=1.0, warmup=100, decay=1400, floor=0.1),
)  # fmt: skip
RUN = Run(
    folder="runs/transformer_text", steps=1500, batch_size=16, eval_every=250, save_every=500, log_every=50, keep=1,
    steps_per_call=25,
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Flags of transformer_text."""

    model: transformer.Config = MODEL
    run: Run = RUN
    data: Source = Source("python_source")
    length: int = 128  # of crops in training
    valid: str = "validation[:100000]"  # characters that are scored, with at least 64 before each


SCALES = {
    "smoke": Setup(
        replace(MODEL, layers=1, width=32, optim=replace(MODEL.optim, decay=200)),
        replace(RUN, folder="runs/transformer_text-smoke", steps=300, eval_every=100), valid="validation[:20000]",
    ),
    "cpu": Setup(),
}  # fmt: skip
DIFFERENCE = {"smoke": "a tiny model, 300 updates", "cpu": "our own set: no paper has numbers for it"}
NATS = "validation (nats per character, strided)"
BITS = "the same (bits per byte)"
BEST = "best n-gram, n <= 6 (nats per character)"
LEAD = "best n-gram less the model (nats per character)"
CRITERIA = {LEAD: ("> .2", lambda ours: ours > 0.2)}
INVARIANTS = {NATS: ("< 3.2", lambda ours: ours < 3.2)}


def rows(setup: Setup, folder: Path) -> list[Row]:
    """Trains, counts n-grams, writes a page of code."""
    with _cli.door():
        training = setup.data.load("train", length=setup.length)
        valid = setup.data.load(setup.valid, length=setup.length, stride=setup.length // 2)
    model = replace(setup.model, vocab=training.info.levels)
    result = train.fit(transformer.make, model, setup.run, training, valid=valid)
    last = [line["valid"] for line in train.metrics(folder) if "valid" in line][-1]
    tokens = [source.resident[0]["text"] for source in (training, valid)]
    found, grams, text = _cli.kept(), {}, ""
    found += [Row(NATS, last["nll_nats_per_token"]), Row(BITS, last["nll_bits_per_byte"])]
    for n in range(1, 7):
        with _cli.costs(gram := f"{n}-gram, add-alpha (nats per character)"):
            grams[n] = _text.ngram_nats(*tokens, n, training.info.levels)
            found.append(Row(gram, grams[n]))
    with _cli.costs(BEST, LEAD):
        best = min(grams, key=grams.get)
        found += [Row(BEST, grams[best]), Row(LEAD, grams[best] - last["nll_nats_per_token"])]
    with _cli.costs("sample.txt"):
        text = _text.written(result, "def ", 250, temperature=0.8)
        (folder / "sample.txt").write_text(text + "\n")
    with _cli.costs("transformer_text.png"):
        _text.draw(
            folder / "transformer_text.png", {"transformer": _text.curve(folder, "nll_nats_per_token")},
            {f"{best}-gram": grams[best]}, text, ylabel="nats per character",
            caption=f"{setup.model.layers} layers of {setup.model.width}, {setup.run.steps} updates of "
            f"{setup.run.batch_size} x {setup.length} characters; sample at temperature .8",
        )  # fmt: skip
    return found


if __name__ == "__main__":
    _cli.main("transformer_text")
