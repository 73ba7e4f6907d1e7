"""GPT-2 fine-tuned on a text file of your own

    python -m experiments.finetune --weights FOLDER --data.name text:FILE       about 15 minutes on 2 cores

Downloads nothing: FOLDER holds GPT-2's config.json, model.safetensors and tokenizer, as experiments.gpt2 says. The
first nine tenths of the file are trained on, 20,000 characters of the rest are scored before and after; the weights of
the lowest validation loss are written to runs/finetune/gpt2, which `transformers` opens, and which --weights takes
again. Expect the text's manner within a hundred updates, and a loss that rises again soon after: a file is small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from aigc_jax import train, transformer
from aigc_jax.core import Optim
from aigc_jax.data.text import Tokenizer
from aigc_jax.train import Run

from experiments import _cli, _text, gpt2
from experiments._cli import Row, Scale, Source

RUN = Run(
    folder="runs/finetune",
    steps=100,
    batch_size=4,
    eval_every=20,
    save_every=50,
    log_every=5,
    keep=1,
    best="nll_nats_per_token",
)


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


SCALES = {
    "smoke": Scale(
        Setup(
            weights="random",
            run=replace(RUN, folder="runs/finetune-smoke", steps=40, eval_every=20),
            optim=Optim(lr=1e-2),
            split="train[:50000]",
            valid="validation[:4000]",
            length=32,
        ),
        "a random model of 12,160 parameters",
    ),
    "cpu": Scale(Setup(), "no paper has numbers for it"),
}
BEFORE = "before: validation (nats per token)"
AFTER = "after: validation, lowest (nats per token)"
GAIN = "before less after (nats per token)"
CRITERIA = {GAIN: "> 0"}
INVARIANTS = CRITERIA


def run(setup: Setup, folder: Path) -> list[Row]:
    """Scores, trains, scores, writes the weights and a page."""
    if not setup.weights:
        raise ValueError(
            "finetune needs --weights FOLDER: GPT-2's config.json, model.safetensors and tokenizer"
        )
    random = setup.weights == "random"
    weights = (
        gpt2.random_model(folder.with_name(folder.name + "-random")) if random else setup.weights
    )
    cfg, params = transformer.load_gpt2(weights)
    cfg = replace(cfg, dropout=setup.dropout, optim=setup.optim)
    defaults = {
        split for scale in SCALES.values() for split in (scale.setup.split, scale.setup.valid)
    }
    split = _text.part(setup.data, setup.split, "--split", defaults)
    scored = _text.part(setup.data, setup.valid, "--valid", defaults)
    training = setup.data.load(split, length=setup.length, tokenizer=str(weights))
    valid = setup.data.load(
        scored, length=setup.length, stride=setup.length, tokenizer=str(weights)
    )
    cfg.check(training.info)
    tokenizer = Tokenizer(training.info.tokenizer)
    prompt = tokenizer.encode(setup.prompt)
    if not 0 < len(prompt) < cfg.context:
        raise ValueError(f"prompt: {len(prompt)} tokens, where 1 to {cfg.context - 1} fit")
    family = transformer.make(cfg)
    state = jax.jit(partial(family.init, jax.random.key(0)))()._replace(params=params)
    first = train.evaluate(
        train.Result(family, state, cfg, training.info, None),
        valid,
        batch_size=setup.run.batch_size,
    )
    train.fit(transformer.make, cfg, setup.run, training, valid=valid, params=params)
    found = _cli.kept()
    lowest = min(values["nll_nats_per_token"] for values in _text.validations(folder))
    found += [
        Row(BEFORE, first["nll_nats_per_token"]),
        Row(AFTER, lowest),
        Row(GAIN, first["nll_nats_per_token"] - lowest),
        Row("before (bits per byte)", first["nll_bits_per_byte"]),
    ]
    best = train.load(setup.run.folder)
    with _cli.costs("gpt2/"):
        transformer.save_gpt2(folder / "gpt2", cfg, best.state.params)
        tokenizer.save(folder / "gpt2" / "tokenizer.json")
    text = ""
    with _cli.costs("sample.txt"):
        text = _text.written(
            best, prompt, 120, temperature=0.8, top_p=0.95, stop=()
        )  # whatever ends in it
        (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
    with _cli.costs("finetune.png"):
        step, value = _text.curve(folder, "nll_nats_per_token")
        at, values = np.array([0, *step]), np.array([first["nll_nats_per_token"], *value])
        caption = (
            f"{setup.run.batch_size} x {setup.length} tokens an update, rate {setup.optim.lr:g}"
        )
        _text.draw(
            folder / "finetune.png",
            {"GPT-2": (at, values)},
            {},
            text,
            ylabel="nats per token",
            caption=caption,
        )
    return found


if __name__ == "__main__":
    _cli.main("finetune")
