"""Reads and writes GPT-2's weights as Hugging Face folders. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .model import Config

LARGEST = 2**31 - 1
END_OF_TEXT = 50256  # GPT-2's token <|endoftext|>
DTYPES = ("F32", "F16", "BF16", "F64")
# What PyTorch puts into names: torch.compile, data parallel, sharding, checkpointed blocks.
WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "_checkpoint_wrapped_module",
}


def _layout(cfg: Config) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """Yields (path in our parameters, name in the file, shape) of every tensor.

    Dense kernels are [in, out] in both.
    """
    D, inner = cfg.width, cfg.inner
    yield ("wte", "embedding"), "wte.weight", (cfg.vocab, D)
    yield ("wpe", "embedding"), "wpe.weight", (cfg.context, D)
    yield ("norm", "scale"), "ln_f.weight", (D,)
    yield ("norm", "bias"), "ln_f.bias", (D,)
    for i in range(cfg.layers):
        for ours, theirs, shape in (("norm_attention", "ln_1", (D,)), ("norm_mlp", "ln_2", (D,))):
            yield (f"blocks_{i}", ours, "scale"), f"h.{i}.{theirs}.weight", shape
            yield (f"blocks_{i}", ours, "bias"), f"h.{i}.{theirs}.bias", shape
        for ours, theirs, shape in (
            ("qkv", "attn.c_attn", (D, 3 * D)),
            ("out", "attn.c_proj", (D, D)),
            ("up", "mlp.c_fc", (D, inner)),
            ("down", "mlp.c_proj", (inner, D)),
        ):
            yield (f"blocks_{i}", ours, "kernel"), f"h.{i}.{theirs}.weight", shape
            yield (f"blocks_{i}", ours, "bias"), f"h.{i}.{theirs}.bias", shape[1:]


# ---------------------------------------------------------------------------------- reading


def _json(path: Path) -> dict:
    """Returns the object that a JSON file holds; ValueError where the file is damaged."""
    try:
        if path.stat().st_size > 2**26:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds no named values but a {type(values).__name__}")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e})") from e
    return values


def _check_number(path: Path, name: str, value: Any, least: int) -> int:
    """Returns value; ValueError unless it is a whole number from `least` to LARGEST."""
    if type(value) is not int or not least <= value <= LARGEST:
        words = f"it must be a whole number from {least} to {LARGEST}"
        raise ValueError(f"{path} says {name} = {value!r:.60}; {words}")
    return value


def _special_tokens(folder: Path, config: dict) -> dict:
    """Returns eos and bos, as `transformers` reads them.

    From generation_config.json; where there is none, from config.json.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        values = _json(path)
    else:  # the defaults of GPT2Config
        path = folder / "config.json"
        default = END_OF_TEXT if config["vocab_size"] > END_OF_TEXT else None
        values = {"eos_token_id": default, "bos_token_id": default, **config}
    eos, bos = values.get("eos_token_id"), values.get("bos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    eos = tuple(_check_number(path, "eos_token_id", token, 0) for token in eos) or None
    bos = None if bos is None else _check_number(path, "bos_token_id", bos, 0)
    return {"eos": eos, "bos": bos}


def _config(folder: Path) -> Config:
    """Returns the Config that config.json describes; ValueError where it is no GPT-2."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: give a folder as Hugging Face lays it out",
        )
    values = _json(path)
    if (kind := values.get("model_type")) != "gpt2":
        raise ValueError(f"{path} describes a {repr(str(kind))[1:-1]:.60}; only gpt2 can be loaded")
    known = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # of half precision; the same mathematics
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for name, allowed in known.items():
        if (value := values.get(name, allowed[0])) not in allowed:
            raise ValueError(
                f"{path} says {name} = {value!r:.60}; only {allowed[0]!r} is built here",
            )
    values.setdefault("n_positions", values.get("n_ctx"))
    fields = {
        "vocab": "vocab_size",
        "context": "n_positions",
        "layers": "n_layer",
        "heads": "n_head",
        "width": "n_embd",
    }
    if missing := [name for name in fields.values() if values.get(name) is None]:
        raise ValueError(f"{path} does not describe a GPT-2: it has no {missing[0]}")
    sizes = {name: _check_number(path, key, values[key], 1) for name, key in fields.items()}
    inner = values.get("n_inner")
    hidden = 0 if inner is None else _check_number(path, "n_inner", inner, 0)
    try:
        return Config(**sizes, hidden=hidden, **_special_tokens(folder, values))
    except ValueError as e:
        raise ValueError(f"{path} does not describe a GPT-2 ({e})") from e


def _files(folder: Path) -> list[Path]:
    """Returns model.safetensors, or the pieces that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickled = ""
        if (folder / "pytorch_model.bin").is_file():
            pickled = ", and pytorch_model.bin is a pickle, which is never opened"
        raise FileNotFoundError(f"{folder} has no model.safetensors{pickled}")
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(piece, str) for piece in places.values()):
        raise ValueError(f"{index} is damaged: its weight_map must name a file for each tensor")
    pieces = sorted(set(places.values()))
    for piece in pieces:
        if piece in ("", ".", "..") or "/" in piece or "\\" in piece or "\0" in piece:
            raise ValueError(f"{index} names {piece!r:.60}: pieces lie in the folder itself")
        if not (folder / piece).is_file():
            raise FileNotFoundError(f"{folder} has no {piece!r:.60}, which {index.name} names")
    return [folder / piece for piece in pieces]


class _Stored(NamedTuple):
    """A tensor in a file, which is not read yet."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Returns the tensor as float32; ValueError where it cannot be read or is not finite."""
        from safetensors import safe_open

        if self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(
                f"{self.file}: {self.name} is {self.dtype}, where {known} are read: convert it",
            )
        try:
            with safe_open(self.file, framework="numpy") as tensors, np.errstate(over="ignore"):
                value = tensors.get_tensor(self.name).astype(np.float32)
        except Exception as e:
            raise ValueError(
                f"{self.file}: {self.name} cannot be read ({e}): copy or download it again",
            ) from e
        if not np.isfinite(value).all():
            raise ValueError(f"{self.file}: {self.name} holds NaN or infinity")
        return value


def _stored(folder: Path) -> dict[str, _Stored]:
    """Returns {name as in `_layout`, or lm_head.weight: tensor}, without prefixes of wrappers."""
    from safetensors import safe_open

    every = []
    for file in _files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    every.append(_Stored(file, name, part.get_dtype(), tuple(part.get_shape())))
        except Exception as e:  # SafetensorError, and others for types that numpy has not
            raise ValueError(f"{file} cannot be read ({e}): copy or download it again") from e

    def unwrapped(name):
        return ".".join(word for word in name.split(".") if word not in WRAPPERS)

    bare = [unwrapped(tensor.name) for tensor in every]
    # What stands before "wpe.weight" stands before all names of the body.
    ends = [name for name in bare if f".{name}".endswith(".wpe.weight")]
    body = ends[0].removesuffix("wpe.weight") if ends else ""
    found: dict[str, _Stored] = {}
    for name, tensor in zip(bare, every, strict=True):
        is_head = f".{name}".endswith(".lm_head.weight")
        name = "lm_head.weight" if is_head else name.removeprefix(body)
        if name in found:
            both = f"{found[name].name} and {tensor.name}"
            raise ValueError(f"{tensor.file} holds {both}, two tensors for {name}")
        found[name] = tensor
    return found


def load_gpt2(folder: str | Path) -> tuple[Config, Any]:
    """Returns (Config, params) of a GPT-2 in the layout of Hugging Face.

    The folder holds config.json and model.safetensors, whole or in pieces. Tensors may be
    F16, BF16, F32 or F64; they become float32. Names may carry the prefixes of PyTorch's
    wrappers (`module.`, `_orig_mod.`). The embedding may be called lm_head.weight. eos and
    bos are those of the folder.

    Raises ValueError or FileNotFoundError, in one line, for another architecture, a
    truncated file, and tensors that are missing, not finite, or of another shape or dtype.
    """
    folder = Path(os.path.expanduser(folder))
    cfg = _config(folder)
    stored = _stored(folder)
    head = stored.pop("lm_head.weight", None)
    if head and (wte := stored.setdefault("wte.weight", head)) is not head:
        if head.shape != wte.shape or (head.read() != wte.read()).any():
            raise ValueError(
                f"{head.file}: {head.name} is not wte.weight; only tied weights are built here",
            )
    names = set()
    for _, name, shape in _layout(cfg):  # all of it, before anything large is read
        if name not in stored:
            raise ValueError(f"{folder} has no tensor {name}")
        if stored[name].shape != shape:
            got = stored[name].shape
            raise ValueError(f"{folder}: {name} is {got}, config.json asks for {shape}")
        names.add(name)
    # attn.bias and attn.masked_bias are the causal mask.
    masks = ("attn.bias", "attn.masked_bias")
    unknown = [name for name in stored if name not in names and not name.endswith(masks)]
    if unknown:
        name = repr(min(unknown))[1:-1]
        raise ValueError(
            f"{folder} holds {name:.60}, which a GPT-2 of {cfg.layers} layers has not",
        )
    params: dict = {}
    for path, name, _ in _layout(cfg):
        place = params
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = jax.numpy.asarray(stored[name].read())
    return cfg, params


# ---------------------------------------------------------------------------------- writing


def _tensors(cfg: Config, params: Any) -> dict[str, np.ndarray]:
    """Returns {name in the file: float32}; ValueError where the parameters are not the Config's."""
    leaves = {
        tuple(getattr(part, "key", str(part)) for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    }
    found = {}
    for path, name, shape in _layout(cfg):
        leaf = leaves.pop(path, None)
        if np.shape(leaf) != shape:
            got = "missing" if leaf is None else np.shape(leaf)
            raise ValueError(
                f"params do not fit this Config: {'.'.join(path)} is {got}, not {shape}",
            )
        found["transformer." + name] = np.asarray(leaf, np.float32, order="C")
    if leaves:
        name = ".".join(map(str, min(leaves)))
        raise ValueError(f"params do not fit this Config: it has no {name}")
    return found


def _write(folder: Path, files: dict[str, Callable[[Path], Any]]) -> None:
    """Writes the files of a folder: {name: function that writes it to a path}.

    All are written under other names first. Only then are they renamed.
    """
    made, new = not folder.exists(), {name: folder / f".{name}.new" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in new.items():
            files[name](path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for name, path in new.items():
            path.replace(folder / name)
    except Exception as e:  # safetensors has an error of its own for a full disk
        why = getattr(e, "strerror", None) or e
        raise OSError(f"{folder} cannot be written ({why}); nothing was changed") from e
    finally:
        if folder.is_dir():
            for path in new.values():
                path.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def save_gpt2(folder: str | Path, cfg: Config, params: Any) -> None:
    """Writes a folder that `transformers` opens as GPT2LMHeadModel. It writes no tokenizer.

    eos and bos are the Config's; a GPT-2 of 50,257 tokens that names none gets
    <|endoftext|>. Other files in the folder stay. No file is replaced before all are written.

    Raises ValueError where the model is no GPT-2 (other norms, positions or activations,
    untied, without biases) or the parameters are not the Config's; OSError where the disk
    is full.
    """
    from safetensors.numpy import save_file

    for name in ("positions", "norm", "activation", "bias", "tied", "mlp"):
        ours, theirs = getattr(cfg, name), getattr(Config, name)
        if ours != theirs:
            raise ValueError(f"a GPT-2 has {name} = {theirs!r}, this model {ours!r}")
    tensors = _tensors(cfg, params)
    end = cfg.vocab - 1 if cfg.vocab == Config.vocab else None  # <|endoftext|> is the last token
    eos = cfg.eos if cfg.eos is not None else () if end is None else (end,)
    bos = cfg.bos if cfg.bos is not None or cfg.eos is not None else end
    ends = {
        "bos_token_id": bos,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
    }
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.vocab,
        "n_positions": cfg.context,
        "n_embd": cfg.width,
        "n_layer": cfg.layers,
        "n_head": cfg.heads,
        "n_inner": cfg.hidden or None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        **ends,
    }

    def write_json(values):
        return lambda path: path.write_text(json.dumps(values, indent=1) + "\n")

    files = {
        "model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        "config.json": write_json(config),
        "generation_config.json": write_json(ends),
    }
    _write(Path(os.path.expanduser(folder)), files)
