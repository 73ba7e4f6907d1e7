"""GPT-2 fine-tuned on a text file of your own

    python -m experiments.finetune --weights FOLDER --data.name text:FILE    about 15 minutes on 2 cores

Downloads nothing: FOLDER holds GPT-2's config.json, model.safetensors and tokenizer, as
experiments.gpt2 says. The first nine tenths of the file are trained on, 20,000 characters of the
rest are scored before and after. The weights of the lowest validation loss are written to
runs/finetune/gpt2, which `transformers` opens, and which --weights takes again. Expect the text's
style within a hundred updates, and a loss that rises again soon after: a file is small.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import train, transformer
from aigc_jax.core import Optim
from aigc_jax.data.text import Tokenizer
from aigc_jax.train import Run
from experiments import _cli, _text
from experiments._cli import DataError, Row, Scale, Source

EVERY = dict(eval_every=20, save_every=50, log_every=5, keep=1)
RUN = Run("runs/finetune", 100, 4, **EVERY, best="nll_nats_per_token")


@dataclass(frozen=True)
class Setup:
    """Flags of finetune."""

    weights: str = ""  # a folder of Hugging Face's; random: a tiny model, for a try
    run: Run = RUN
    optim: Optim = Optim(lr=3e-5, weight_decay=0.1, clip=1.0, warmup=10, decay=90, floor=0.1)
    data: Source = Source("python_source")
    split: str = "train"
    valid: str = "validation[:20000]"
    length: int = 256
    dropout: float = 0.1
    prompt: str = "\n"

    def __post_init__(self):
        if self.data.tokenizer:
            raise ValueError("the weights come with their tokenizer: leave --data.tokenizer out")


SMOKE_RUN = replace(RUN, folder="runs/finetune-smoke", steps=40, eval_every=20)
SMALL = dict(split="train[:50000]", valid="validation[:4000]", length=32)
SMOKE = Setup("random", SMOKE_RUN, Optim(lr=1e-2), **SMALL)
SCALES = {
    "smoke": Scale(SMOKE, "a random model of 12,160 parameters"),
    "cpu": Scale(Setup(), "no paper has numbers for it"),
}
BEFORE = "before: validation (nats per token)"
AFTER = "after: validation, lowest (nats per token)"
GAIN = "before less after (nats per token)"
CRITERIA = {GAIN: "> 0"}
INVARIANTS = CRITERIA


def load(setup: Setup, folder: Path):
    """Returns the model, its parameters, both parts of the text, the tokenizer, the prompt."""
    if not setup.weights:
        files = "GPT-2's config.json, model.safetensors and tokenizer"
        raise DataError(f"finetune needs --weights FOLDER: {files}")
    random = folder.with_name(folder.name + "-random")
    weights = _text.random_gpt2(random) if setup.weights == "random" else setup.weights
    cfg, params = transformer.load_gpt2(weights)
    cfg = replace(cfg, dropout=setup.dropout, optim=setup.optim)
    defaults = {split for s, _ in SCALES.values() for split in (s.split, s.valid)}
    split = _text.part(setup.data, setup.split, "--split", defaults)
    scored = _text.part(setup.data, setup.valid, "--valid", defaults)
    options = {"length": setup.length, "tokenizer": str(weights)}
    training = setup.data.load(split, **options)
    valid = setup.data.load(scored, stride=setup.length, **options)
    cfg.check(training.info)
    tokenizer = Tokenizer(training.info.tokenizer)
    prompt = tokenizer.encode(setup.prompt)
    if not 0 < len(prompt) < cfg.context:
        raise DataError(f"prompt: {len(prompt)} tokens, where 1 to {cfg.context - 1} fit")
    return cfg, params, training, valid, tokenizer, prompt


def run(setup: Setup, folder: Path) -> list[Row]:
    """Scores, trains, scores again, writes the weights and a page."""
    cfg, params, training, valid, tokenizer, prompt = load(setup, folder)
    family = transformer.make(cfg)
    state = jax.jit(partial(family.init, jax.random.key(0)))()._replace(params=params)
    untrained = train.Result(family, state, cfg, training.info, None)
    first = train.evaluate(untrained, valid, batch_size=setup.run.batch_size)
    train.fit(transformer.make, cfg, setup.run, training, valid=valid, params=params)
    found, before = _cli.kept(), first["nll_nats_per_token"]
    lowest = min(values["nll_nats_per_token"] for values in _text.validations(folder))
    found += [
        Row(BEFORE, before),
        Row(AFTER, lowest),
        Row(GAIN, before - lowest),
        Row("before (bits per byte)", first["nll_bits_per_byte"]),
    ]
    best = train.load(setup.run.folder)
    with _cli.costs("gpt2/"):
        transformer.save_gpt2(folder / "gpt2", cfg, best.state.params)
        tokenizer.save(folder / "gpt2" / "tokenizer.json")
    how = {"temperature": 0.8, "top_p": 0.95, "stop": ()}  # no token ends it early
    text = _text.write_sample(folder, best, prompt, 120, **how)
    plot(setup, folder, before, text)
    return found


@_cli.costs("finetune.png")
def plot(setup: Setup, folder: Path, before: float, text: str) -> None:
    """Draws the validation loss from before the first update on, and a sample."""
    steps, values = _text.curve(folder, "nll_nats_per_token")
    curves = {"GPT-2": (np.array([0, *steps]), np.array([before, *values]))}
    size = f"{setup.run.batch_size} x {setup.length} tokens"
    caption = f"Updates of {size}, learning rate {setup.optim.lr:g}."
    _text.plot(folder / "finetune.png", curves, {}, text, ylabel="nats per token", caption=caption)


if __name__ == "__main__":
    _cli.main("finetune")
