"""A small language model of Python's own standard library, character by character

    python -m experiments.transformer_text      about 3 minutes on 2 cores; downloads nothing
    python -m experiments.transformer_text --data.name text:FILE --data.tokenizer bpe:1000    a text of your own

The source of the standard library's modules: 4.4 million characters, of which every Python has its
own copy. The first nine tenths are trained on, the last are scored, every character once. Rotary
positions, RMSNorm and SwiGLU. Expect a lower loss than the best n-gram, and samples that look like
code from a distance. No paper has numbers for this set.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from aigc_jax import train, transformer
from aigc_jax.core import Optim
from aigc_jax.train import Run
from experiments import _cli, _text
from experiments._cli import Row, Scale, Source

OPTIM = Optim(lr=3e-3, b2=0.99, weight_decay=0.1, clip=1.0, warmup=100, decay=1400, floor=0.1)
MODEL = replace(_text.SHAKESPEARE, vocab=transformer.Config.vocab, width=128, optim=OPTIM)
EVERY = dict(eval_every=250, save_every=500, log_every=50, keep=1, steps_per_call=25)
RUN = Run("runs/transformer_text", 1500, 16, **EVERY)


@dataclass(frozen=True)
class Setup:
    """Flags of transformer_text."""

    model: transformer.Config = MODEL
    run: Run = RUN
    data: Source = Source("python_source")
    length: int = 128  # of crops in training
    valid: str = "validation[:100000]"  # characters that are scored, with at least 64 before each


SMOKE = Setup(
    replace(MODEL, layers=1, width=32, optim=replace(OPTIM, decay=200)),
    replace(RUN, folder="runs/transformer_text-smoke", steps=300, eval_every=100),
    valid="validation[:20000]",
)
DIFFERS = "our own set: no paper has numbers for it"
SCALES = {"smoke": Scale(SMOKE, "a tiny model, 300 updates"), "cpu": Scale(Setup(), DIFFERS)}
NATS = "validation (nats per character, strided)"
BITS = "the same (bits per byte)"
BEST = "best n-gram, n <= 6 (nats per character)"
LEAD = "best n-gram less the model (nats per character)"
CRITERIA = {LEAD: "> 0.2"}
INVARIANTS = {NATS: "< 3.2"}
GRAM = "{}-gram, add-alpha (nats per character)"


def run(setup: Setup, folder: Path) -> list[Row]:
    """Trains, counts n-grams, writes a page of code."""
    defaults = {scale.setup.valid for scale in SCALES.values()}
    split = _text.part(setup.data, setup.valid, "--valid", defaults)
    training, valid = _text.strided(setup.data, setup.length, split)
    prompt = _text.prompt("def ", valid, setup.model.context)
    each = _text.tokens_per_character(valid, folder=setup.data.folder)
    model = replace(setup.model, vocab=training.info.levels)
    result = train.fit(transformer.make, model, setup.run, training, valid=valid)
    last = _text.validations(folder)[-1]
    nats = last["nll_nats_per_token"] * each
    found = _cli.kept()
    found += [Row(NATS, nats), Row(BITS, last["nll_bits_per_byte"])]
    grams = {n: value * each for n, value in _text.ngrams(training, valid, GRAM.format).items()}
    found += [Row(GRAM.format(n), value) for n, value in grams.items()]
    with _cli.costs(BEST, LEAD):
        best = min(grams, key=grams.get)
        found += [Row(BEST, grams[best]), Row(LEAD, grams[best] - nats)]
    text = _text.write_sample(folder, result, prompt, 250, temperature=0.8)
    plot(setup, folder, each, grams, text)
    return found


@_cli.costs("transformer_text.png")
def plot(setup: Setup, folder: Path, each: float, grams: dict, text: str) -> None:
    """Draws the loss beside the best n-gram, and a sample."""
    best, path = min(grams, key=grams.get), folder / "transformer_text.png"
    curves = {"transformer": _text.curve(folder, "nll_nats_per_token", each)}
    model, run, lines = setup.model, setup.run, {f"{best}-gram": grams[best]}
    size = f"{run.batch_size} x {setup.length} {_text.unit(setup.data)}"
    caption = f"Depth {model.layers}, width {model.width}, {run.steps:,} updates of {size}. "
    caption += "The sample is at temperature 0.8."
    _text.plot(path, curves, lines, text, ylabel="nats per character", caption=caption)


if __name__ == "__main__":
    _cli.main("transformer_text")
