"""Small GPT-2s whose weights follow from a seed, the same in every version of numpy, and what is asked of them."""

import itertools

import numpy as np

WIDTH, LAYERS, HEADS, CONTEXT = 16, 2, 2, 64


def uniform(seed: int, stream: int, shape: tuple) -> np.ndarray:
    """Numbers in [0, 1) from raw bits, which numpy keeps the same, as it does not its distributions."""
    bits = np.random.Philox(key=[seed, stream]).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)


def tensors(seed: int, vocab: int) -> dict[str, np.ndarray]:
    """{name in a Hugging Face file: float32}; far from the initial values, so that no scale or bias is missed."""
    D = WIDTH
    shapes = {"wte.weight": (vocab, D), "wpe.weight": (CONTEXT, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    block = {
        "ln_1.weight": (D,), "ln_1.bias": (D,), "attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
        "mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,), "mlp.c_proj.weight": (4 * D, D),
        "mlp.c_proj.bias": (D,),
    }  # fmt: skip
    shapes |= {f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    found = {}
    for stream, (name, shape) in enumerate(shapes.items()):
        value = 2 * uniform(seed, stream, shape) - 1
        found[f"transformer.{name}"] = np.float32(value + 1 if "ln_" in name and "weight" in name else 0.6 * value)
    return found


def config(vocab: int, eos) -> dict:
    """Of config.json."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocab, "n_positions": CONTEXT,
        "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": None, "eos_token_id": eos,
    }  # fmt: skip


def prompts(seed: int, vocab: int, lengths: list[int]) -> list[list[int]]:
    """Rows of unequal lengths."""
    return [np.int64(vocab * uniform(seed, 1000 + i, (length,))).tolist() for i, length in enumerate(lengths)]


# What `transformers.generate` is asked, by its own names. eos 0 .. occurs early in some of them, in others never.
GREEDY = [
    {"no_repeat_ngram_size": size, "repetition_penalty": penalty}
    for size, penalty in itertools.product((0, 1, 2, 3, 5), (1.0, 1.3))
]
BEAMS = [
    {"num_beams": 2 + i % 4, "length_penalty": penalty, "early_stopping": early, "no_repeat_ngram_size": size}
    for i, (penalty, early, size) in enumerate(
        itertools.product((0.0, 0.6, 1.0, 2.0, -1.5), (True, False, "never"), (0, 2))
    )
]
