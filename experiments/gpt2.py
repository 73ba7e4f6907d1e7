"""GPT-2 from its published weights: the nats per token of a text, and a continuation; Radford et al. 2019

    python -m experiments.gpt2 --weights FOLDER    about 2 minutes on 2 cores for 30,000 characters

Downloads nothing: FOLDER holds config.json, model.safetensors and the tokenizer (vocab.json and
merges.txt, or tokenizer.json), as at https://huggingface.co/openai-community/gpt2 (548 MB). Scores
a text file, by default the end of Python's own source. Every token counts once, with at least half
a context before it. Then it continues a prompt. Without weights only the parameter counts of the
four sizes are checked. Papers give perplexity per word, of text that they split in their own way:
compare bits per byte of the same file.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aigc_jax import train, transformer
from aigc_jax.data.text import Tokenizer
from experiments import _cli, _text
from experiments._cli import Row, Scale, Source

# (layers, heads, width, parameters); the paper calls these sizes 117M, 345M, 762M and 1542M.
SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@dataclass(frozen=True)
class Setup:
    """Flags of gpt2."""

    folder: str = "runs/gpt2"
    weights: str = ""  # a folder; "": only the parameter counts; random: a tiny model, for a try
    data: Source = Source("python_source")
    split: str = "validation[:30000]"
    length: int = 1024  # of windows, half of which overlap
    prompt: str = "def fibonacci(n):\n"
    new: int = 60  # tokens after the prompt
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self):
        _cli.at_least(self, new=1, length=2, seed=0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if self.data.tokenizer:
            raise ValueError("the weights come with their tokenizer: leave --data.tokenizer out")
        transformer.Sampling(self.temperature)


SMALL = dict(split="validation[:2000]", length=24, prompt="def ", new=10)
SMOKE = Setup("runs/gpt2-smoke", "random", **SMALL)
SCALES = {
    "smoke": Scale(SMOKE, "a random model of 12,160 parameters, written and read"),
    "cpu": Scale(Setup(), "another text than the paper's"),
}
BITS = "bits per byte"
CRITERIA = {f"{name}: parameters": f"= {size[-1]}" for name, size in SIZES.items()}
INVARIANTS = {**CRITERIA, BITS: "< 20"}


def parameters(layers: int, heads: int, width: int) -> int:
    """Returns how many parameters a GPT-2 of this size has, without making them."""
    cfg = transformer.Config(layers=layers, heads=heads, width=width)
    shapes = jax.eval_shape(partial(transformer.init, cfg), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def load(setup: Setup, weights: str):
    """Returns the model, its parameters, the text, the tokenizer and the prompt's tokens."""
    cfg, params = transformer.load_gpt2(weights)
    length = min(setup.length, cfg.context)
    defaults = {scale.setup.split for scale in SCALES.values()}
    split = _text.part(setup.data, setup.split, "--split", defaults)
    text = setup.data.load(split, length=length, stride=length // 2, tokenizer=str(weights))
    tokenizer = Tokenizer(text.info.tokenizer)
    if tokenizer.size > cfg.vocab:
        sizes = f"the tokenizer has {tokenizer.size} tokens, the model {cfg.vocab}"
        raise ValueError(f"{weights}: {sizes}")
    prompt = tokenizer.encode(setup.prompt)
    if not 0 < len(prompt) <= cfg.context - setup.new:
        asked = f"{len(prompt)} tokens and {setup.new} new ones"
        raise ValueError(f"prompt: {asked} do not fit 1..{cfg.context}")
    return cfg, params, text, tokenizer, prompt


def run(setup: Setup, folder: Path) -> list[Row]:
    """Counts parameters, scores the text, continues the prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = _text.random_gpt2(folder / "random") if setup.weights == "random" else setup.weights
    loaded = load(setup, weights) if weights else None
    found = _cli.kept()
    for name, (*size, paper) in SIZES.items():
        found.append(Row(f"{name}: parameters", parameters(*size), oracle=paper))
    if loaded is None:
        print("no --weights FOLDER: only the parameter counts")
        return found
    cfg, params, text, tokenizer, prompt = loaded
    family = transformer.make(cfg)
    state = jax.eval_shape(family.init, jax.random.key(0))
    state = state._replace(params=params, opt_state=(), step=np.int32(0))
    scores = train.evaluate(train.Result(family, state, cfg, text.info, None), text, batch_size=2)
    nats = scores["nll_nats_per_token"]
    found += [
        Row(f"nats per token, {setup.data.name} {setup.split}", nats),
        Row("perplexity per token", math.exp(nats)),
        Row(BITS, scores["nll_bits_per_byte"]),
    ]
    with _cli.costs("sample.txt"):
        generate = jax.jit(partial(transformer.generate, cfg, max_new_tokens=setup.new))
        how = transformer.Sampling(setup.temperature, top_p=0.95, stop=())  # nothing ends it early
        [tokens] = generate(params, prompt[None], jax.random.key(setup.seed), sampling=how)
        tokens = np.asarray(tokens)
        sample = setup.prompt + tokenizer.decode(tokens[tokens < tokenizer.size])
        (folder / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        print(sample)
    return found


if __name__ == "__main__":
    _cli.main("gpt2")
