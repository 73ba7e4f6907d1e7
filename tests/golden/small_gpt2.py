"""Small GPT-2s whose weights follow from a seed, the same in every version of numpy, and what is asked of them."""

import numpy as np

WIDTH, LAYERS, HEADS, CONTEXT = 16, 2, 2, 64


def uniform(seed: int, stream: int, shape: tuple) -> np.ndarray:
    """Numbers in [0, 1) from raw bits, which numpy keeps the same, as it does not its distributions."""
    bits = np.random.Philox(key=[seed, stream]).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)


def tensors(seed: int, vocab: int) -> dict[str, np.ndarray]:
    """{name in a Hugging Face file: float32}; far from the initial values, so that no scale or bias is missed."""
    D = WIDTH
    shapes = {
        "wte.weight": (vocab, D),
        "wpe.weight": (CONTEXT, D),
        "ln_f.weight": (D,),
        "ln_f.bias": (D,),
    }
    block = {
        "ln_1.weight": (D,),
        "ln_1.bias": (D,),
        "attn.c_attn.weight": (D, 3 * D),
        "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D),
        "attn.c_proj.bias": (D,),
        "ln_2.weight": (D,),
        "ln_2.bias": (D,),
        "mlp.c_fc.weight": (D, 4 * D),
        "mlp.c_fc.bias": (4 * D,),
        "mlp.c_proj.weight": (4 * D, D),
        "mlp.c_proj.bias": (D,),
    }
    shapes |= {f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    found = {}
    for stream, (name, shape) in enumerate(shapes.items()):
        value = 2 * uniform(seed, stream, shape) - 1
        found[f"transformer.{name}"] = np.float32(
            value + 1 if "ln_" in name and "weight" in name else 0.6 * value
        )
    return found


def config(vocab: int, eos) -> dict:
    """Of config.json."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab,
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "bos_token_id": None,
        "eos_token_id": eos,
    }


def prompts(seed: int, vocab: int, lengths: list[int]) -> list[list[int]]:
    """Rows of unequal lengths."""
    return [
        np.int64(vocab * uniform(seed, 1000 + i, (length,))).tolist()
        for i, length in enumerate(lengths)
    ]


# What `transformers.generate` is asked, by its own names: few shapes, because each compiles anew, and many numbers.
SEEDS, VOCAB, LENGTHS = (0, 1, 2), 60, [8, 3, 1]
GREEDY = [
    {"no_repeat_ngram_size": n, "repetition_penalty": p}
    for n, p in ((0, 1.3), (2, 1.0), (2, 1.3), (3, 0.8))
]
BEAMS = [
    {
        "num_beams": beams,
        "early_stopping": early,
        "no_repeat_ngram_size": n,
        "length_penalty": penalty,
    }
    for beams, early, n in (
        (2, True, 2),
        (3, False, 0),
        (4, "never", 2),
        (5, True, 0),
        (3, False, 2),
    )
    for penalty in (0.0, 0.6, 1.0, 2.0, -1.5)
]
DRAWN = {"temperature": 0.7, "top_p": 0.95, "top_k": 60}
SAMPLES = [DRAWN, {**DRAWN, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_p": 0.02}]
SAMPLES_VOCAB = 120
