"""GPT-2's published weights: a Hugging Face folder in, a Hugging Face folder out. Nothing is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from . import Config

# Ours, theirs: a dense kernel of theirs (Conv1D) is [in, out] as ours is.
_BLOCK = {
    ("norm_attention", "scale"): "ln_1.weight",
    ("norm_attention", "bias"): "ln_1.bias",
    ("qkv", "kernel"): "attn.c_attn.weight",
    ("qkv", "bias"): "attn.c_attn.bias",
    ("out", "kernel"): "attn.c_proj.weight",
    ("out", "bias"): "attn.c_proj.bias",
    ("norm_mlp", "scale"): "ln_2.weight",
    ("norm_mlp", "bias"): "ln_2.bias",
    ("up", "kernel"): "mlp.c_fc.weight",
    ("up", "bias"): "mlp.c_fc.bias",
    ("down", "kernel"): "mlp.c_proj.weight",
    ("down", "bias"): "mlp.c_proj.bias",
}


def _names(layers: int) -> dict[tuple[str, ...], str]:
    """{path in our parameters: name in the file}."""
    names = {
        ("wte", "embedding"): "wte.weight",
        ("wpe", "embedding"): "wpe.weight",
        ("norm", "scale"): "ln_f.weight",
        ("norm", "bias"): "ln_f.bias",
    }
    for i in range(layers):
        names |= {(f"blocks_{i}", *path): f"h.{i}.{name}" for path, name in _BLOCK.items()}
    return names


def _config(folder: Path) -> Config:
    from . import Config

    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder as Hugging Face lays it out")
    try:
        said = json.loads(path.read_text())
        kind = said["model_type"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged or describes no model ({type(e).__name__}: {e})") from e
    if kind != "gpt2":
        raise ValueError(f"{path} describes a {kind}; only gpt2 can be loaded")
    known = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # of half precision; the same mathematics
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for name, values in known.items():
        if said.get(name, values[0]) not in values:
            raise ValueError(f"{path} says {name} = {said[name]!r}; only {values[0]!r} is built here")
    try:
        return Config(
            vocab=said["vocab_size"],
            context=said.get("n_positions", said.get("n_ctx")),
            layers=said["n_layer"],
            heads=said["n_head"],
            width=said["n_embd"],
            hidden=said.get("n_inner") or 0,
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} does not describe a GPT-2 ({type(e).__name__}: {e})") from e


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of model.safetensors, or of the pieces that its index names; float32."""
    from safetensors import SafetensorError, safe_open

    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        try:
            pieces = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / Path(piece).name for piece in pieces]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is damaged ({type(e).__name__}: {e})") from e
    else:
        pickled = (
            ", and pytorch_model.bin is a pickle, which is never opened" * (folder / "pytorch_model.bin").is_file()
        )
        raise FileNotFoundError(f"{folder} has no model.safetensors{pickled}")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    found[name.removeprefix("transformer.")] = tensors.get_tensor(name)
        except (SafetensorError, OSError, TypeError) as e:
            raise ValueError(f"{file} cannot be read ({e}): copy or download it again") from e
    return found


def load_gpt2(folder: str | Path) -> tuple[Config, Any]:
    """(Config, params) of a GPT-2 in Hugging Face's layout: config.json and model.safetensors, whole or in pieces.

    Raises ValueError or FileNotFoundError, in one line, for another architecture, a file that is cut off, or tensors
    that are missing or of another shape.
    """
    from . import init

    folder = Path(folder)
    cfg = _config(folder)
    tensors = _tensors(folder)
    shapes = jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))
    names = _names(cfg.layers)

    def take(path, shape):
        name = names[tuple(part.key for part in path)]
        if name not in tensors:
            raise ValueError(f"{folder} has no tensor {name}")
        if tensors[name].shape != shape.shape:
            raise ValueError(f"{folder}: {name} is {tensors[name].shape}, config.json asks for {shape.shape}")
        return jax.numpy.asarray(tensors[name], jax.numpy.float32)

    params = jax.tree_util.tree_map_with_path(take, shapes)
    # attn.bias and attn.masked_bias are the causal mask, lm_head.weight is wte once more.
    rest = [n for n in tensors if n not in names.values() and not n.endswith(("attn.bias", "attn.masked_bias"))]
    if unknown := sorted(set(rest) - {"lm_head.weight"}):
        raise ValueError(f"{folder} holds {unknown[0]}, which a GPT-2 of {cfg.layers} layers has not")
    return cfg, params


def save_gpt2(folder: str | Path, cfg: Config, params: Any) -> None:
    """Writes a folder that `transformers` opens as GPT2LMHeadModel; the tokenizer's files are yours to add.

    Raises ValueError where the model is no GPT-2 (other norms, positions, activations, untied, no biases).
    """
    from safetensors.numpy import save_file

    from . import Config

    for name in ("positions", "norm", "activation", "bias", "tied", "mlp"):
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"a GPT-2 has {name} = {getattr(Config, name)!r}, this model {getattr(cfg, name)!r}")
    folder = Path(folder)
    names = _names(cfg.layers)
    tensors = {
        "transformer." + names[tuple(part.key for part in path)]: np.asarray(leaf, np.float32, order="C")
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    }
    said = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": cfg.vocab, "n_positions": cfg.context,
        "n_embd": cfg.width, "n_layer": cfg.layers, "n_head": cfg.heads, "n_inner": cfg.hidden or None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "resid_pdrop": cfg.dropout, "embd_pdrop": cfg.dropout, "attn_pdrop": cfg.dropout,
    }  # fmt: skip
    end = cfg.vocab - 1 if cfg.vocab == Config.vocab else None  # <|endoftext|> is GPT-2's last token
    said |= {"bos_token_id": end, "eos_token_id": end}
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / ".model.safetensors.new"
    try:
        save_file(tensors, new, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(said, indent=1) + "\n")
        new.replace(folder / "model.safetensors")
    finally:
        new.unlink(missing_ok=True)
