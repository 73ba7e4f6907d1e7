"""GPT-2's published weights: a Hugging Face folder in, a Hugging Face folder out. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

if TYPE_CHECKING:
    from . import Config

LARGEST = 2**31 - 1
DTYPES = ("F32", "F16", "BF16", "F64")
# What PyTorch puts into names: torch.compile, data parallel, sharding, checkpointed blocks.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}


def _layout(cfg: Config) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """(path in our parameters, name in the file, shape) of every tensor. Their dense kernels are [in, out] as ours."""
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


# ------------------------------------------------------------------------------------------------------------- reading


def _json(path: Path) -> dict:
    """The named values of a JSON file."""
    try:
        if path.stat().st_size > 2**26:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"it holds no named values but a {type(said).__name__}")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e})") from e
    return said


GPT2_END = 50256  # <|endoftext|>


def _number(path: Path, name: str, value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{path} says {name} = {value!r:.60}; it must be a whole number from {least} to {LARGEST}")
    return value


def _ends(folder: Path, said: dict) -> dict:
    """eos and bos, from generation_config.json, or where there is none from config.json, as `transformers` does it."""
    path = folder / "generation_config.json"
    if path.is_file():
        said = _json(path)
    else:  # GPT2Config's own ids hold where config.json names none
        path, own = folder / "config.json", GPT2_END if said["vocab_size"] > GPT2_END else None
        said = {"eos_token_id": own, "bos_token_id": own, **said}
    eos, bos = said.get("eos_token_id"), said.get("bos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    eos = tuple(_number(path, "eos_token_id", token, 0) for token in eos) or None
    return {"eos": eos, "bos": None if bos is None else _number(path, "bos_token_id", bos, 0)}


def _config(folder: Path) -> Config:
    from . import Config

    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder as Hugging Face lays it out")
    said = _json(path)
    if (kind := said.get("model_type")) != "gpt2":
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
    for name, values in known.items():
        if said.get(name, values[0]) not in values:
            raise ValueError(f"{path} says {name} = {said[name]!r:.60}; only {values[0]!r} is built here")
    said.setdefault("n_positions", said.get("n_ctx"))
    fields = {
        "vocab": "vocab_size",
        "context": "n_positions",
        "layers": "n_layer",
        "heads": "n_head",
        "width": "n_embd",
    }
    if missing := [name for name in fields.values() if said.get(name) is None]:
        raise ValueError(f"{path} does not describe a GPT-2: it has no {missing[0]}")
    sizes = {ours: _number(path, theirs, said[theirs], 1) for ours, theirs in fields.items()}
    hidden = 0 if said.get("n_inner") is None else _number(path, "n_inner", said["n_inner"], 0)
    try:
        return Config(**sizes, hidden=hidden, **_ends(folder, said))
    except ValueError as e:
        raise ValueError(f"{path} does not describe a GPT-2 ({e})") from e


def _files(folder: Path) -> list[Path]:
    """model.safetensors, or the pieces that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickled = (
            ", and pytorch_model.bin is a pickle, which is never opened" * (folder / "pytorch_model.bin").is_file()
        )
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
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """float32."""
        from safetensors import safe_open

        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: {self.name} is {self.dtype}, where {', '.join(DTYPES)} are read: convert it"
            )
        try:
            with safe_open(self.file, framework="numpy") as tensors, np.errstate(over="ignore"):
                value = tensors.get_tensor(self.name).astype(np.float32)
        except Exception as e:
            raise ValueError(f"{self.file}: {self.name} cannot be read ({e}): copy or download it again") from e
        if not np.isfinite(value).all():
            raise ValueError(f"{self.file}: {self.name} holds NaN or infinity")
        return value


def _stored(folder: Path) -> dict[str, _Stored]:
    """{name as in `_layout`, or lm_head.weight: the tensor}. What is around the model in its names is taken off."""
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
    bare = [".".join(word for word in tensor.name.split(".") if word not in WRAPPERS) for tensor in every]
    bodies = [name.removesuffix("wpe.weight") for name in bare if f".{name}".endswith(".wpe.weight")] or [""]
    found: dict[str, _Stored] = {}
    for name, tensor in zip(bare, every, strict=True):
        name = "lm_head.weight" if f".{name}".endswith(".lm_head.weight") else name.removeprefix(bodies[0])
        if name in found:
            raise ValueError(f"{tensor.file} holds {found[name].name} and {tensor.name}, two tensors for {name}")
        found[name] = tensor
    return found


def load_gpt2(folder: str | Path) -> tuple[Config, Any]:
    """(Config, params) of a GPT-2 in Hugging Face's layout: config.json and model.safetensors, whole or in pieces.

    Tensors may be F16, BF16, F32 or F64 and become float32. Names may carry what PyTorch puts around a model
    (`module.`, `_orig_mod.`); the embedding may stand under lm_head.weight. The Config holds the folder's eos and bos.

    Raises ValueError or FileNotFoundError, in one line, for another architecture, a file that is cut off, and tensors
    that are missing, of another shape or dtype, or not finite.
    """
    folder = Path(os.path.expanduser(folder))
    cfg = _config(folder)
    stored = _stored(folder)
    head = stored.pop("lm_head.weight", None)
    if head and stored.setdefault("wte.weight", head) is not head:
        if head.shape != stored["wte.weight"].shape or (head.read() != stored["wte.weight"].read()).any():
            raise ValueError(f"{head.file}: {head.name} is not wte.weight; only tied weights are built here")
    names = set()
    for _, name, shape in _layout(cfg):  # all of it, before anything large is read
        if name not in stored:
            raise ValueError(f"{folder} has no tensor {name}")
        if stored[name].shape != shape:
            raise ValueError(f"{folder}: {name} is {stored[name].shape}, config.json asks for {shape}")
        names.add(name)
    # attn.bias and attn.masked_bias are the causal mask.
    rest = [n for n in stored if n not in names and not n.endswith(("attn.bias", "attn.masked_bias"))]
    if rest:
        raise ValueError(f"{folder} holds {repr(min(rest))[1:-1]:.60}, which a GPT-2 of {cfg.layers} layers has not")
    params: dict = {}
    for path, name, _ in _layout(cfg):
        place = params
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = jax.numpy.asarray(stored[name].read())
    return cfg, params


# ------------------------------------------------------------------------------------------------------------- writing


def _tensors(cfg: Config, params: Any) -> dict[str, np.ndarray]:
    """{name in the file: float32}. Refuses parameters that are not the Config's."""
    leaves = {
        tuple(getattr(part, "key", str(part)) for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    }
    found = {}
    for path, name, shape in _layout(cfg):
        leaf = leaves.pop(path, None)
        if np.shape(leaf) != shape:
            is_ = "missing" if leaf is None else np.shape(leaf)
            raise ValueError(f"params do not fit this Config: {'.'.join(path)} is {is_}, not {shape}")
        found["transformer." + name] = np.asarray(leaf, np.float32, order="C")
    if leaves:
        raise ValueError(f"params do not fit this Config: it has no {'.'.join(map(str, min(leaves)))}")
    return found


def _write(folder: Path, files: dict[str, Callable[[Path], Any]]) -> None:
    """All files of a folder or none of them: {name: what writes it to a path}."""
    made, new = not folder.exists(), {name: folder / f".{name}.new" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in new.items():
            files[name](path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for name, path in new.items():
            path.replace(folder / name)
    except Exception as e:  # of a full disk safetensors raises an error of its own
        raise OSError(f"{folder} cannot be written ({getattr(e, 'strerror', None) or e}); nothing was changed") from e
    finally:
        if folder.is_dir():
            for path in new.values():
                path.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def save_gpt2(folder: str | Path, cfg: Config, params: Any) -> None:
    """Writes a folder that `transformers` opens as GPT2LMHeadModel; the tokenizer's files are yours to add.

    eos and bos are the Config's; a GPT-2 of 50,257 tokens that names none has <|endoftext|>. All files are written, or
    none, and those that lie there stay. Raises ValueError where the model is no GPT-2 (other norms, positions,
    activations, untied, no biases) or the parameters are not the Config's, OSError where the disk is full.
    """
    from safetensors.numpy import save_file

    from . import Config

    for name in ("positions", "norm", "activation", "bias", "tied", "mlp"):
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"a GPT-2 has {name} = {getattr(Config, name)!r}, this model {getattr(cfg, name)!r}")
    tensors = _tensors(cfg, params)
    end = cfg.vocab - 1 if cfg.vocab == Config.vocab else None  # <|endoftext|> is GPT-2's last token
    eos = cfg.eos if cfg.eos is not None else () if end is None else (end,)
    bos = cfg.bos if cfg.bos is not None or cfg.eos is not None else end
    ends = {"bos_token_id": bos, "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None}
    said = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": cfg.vocab, "n_positions": cfg.context,
        "n_embd": cfg.width, "n_layer": cfg.layers, "n_head": cfg.heads, "n_inner": cfg.hidden or None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "resid_pdrop": cfg.dropout, "embd_pdrop": cfg.dropout, "attn_pdrop": cfg.dropout, **ends,
    }  # fmt: skip
    _write(
        Path(os.path.expanduser(folder)),
        {
            "model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            "config.json": lambda path: path.write_text(json.dumps(said, indent=1) + "\n"),
            "generation_config.json": lambda path: path.write_text(json.dumps(ends, indent=1) + "\n"),
        },
    )
