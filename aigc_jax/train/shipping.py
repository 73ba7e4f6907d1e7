"""Small trained models that come with the package: `load("NAME")` opens weights/NAME.safetensors.

The file holds what a model samples and evaluates with: its averaged parameters where there is an
average, and `extra`. Its header holds the record of a run (make, config, data), the command that
trained it, and a sha256 of its content. It holds no state of the optimizer, so it is no run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import State
from ..data import Info
from .config import Result, Run
from .folder import describe
from .record import Refused, build, model_of, one_line
from .weights import header


def _named(tree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _kept(state: State) -> dict:
    """Returns the parts of a State that are stored. An average of all parameters replaces them."""
    parts = {"params": state.params, "extra": state.extra, "ema": state.ema}
    if jax.tree.structure(state.ema) == jax.tree.structure(state.params):
        return {"params": parts.pop("ema"), "extra": state.extra}
    return parts


def _sha256(arrays: dict[str, np.ndarray], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def _halved(name: str, leaf) -> np.ndarray:
    """Returns floats as float16, and other arrays as they are."""
    array = np.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    largest = np.abs(array.astype(np.float32)).max(initial=0)
    if not largest <= np.finfo(np.float16).max:
        raise Refused(f"{name} holds {largest:.3g}, which float16 cannot hold")
    return array.astype(np.float16)


def ship(result: Result, make, file: str | Path, **about: str) -> Path:
    """Writes a trained model as a .safetensors file in float16.

    make: the function that made result.family. about: texts for the header, such as the command and
    the commit of the training.

    Raises Refused where a value is not finite or too large for float16.
    """
    from safetensors.numpy import save

    arrays = {name: _halved(name, leaf) for name, leaf in _named(_kept(result.state)).items()}
    record = describe(make, result.config, Run(str(file)), result.info, None)
    record = {part: record[part] for part in ("make", "config", "data", "environment")}
    record |= {"step": int(result.state.step), "tokenizer": result.info.tokenizer}
    text = json.dumps(record, sort_keys=True)
    content = save(arrays, {**about, "record": text, "sha256": _sha256(arrays, text)})
    file, new = Path(file), Path(f"{file}.new{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    return file


def load_shipped(file: Path) -> Result:
    """Returns the model in a file that `ship` wrote, with float32 parameters.

    Raises Refused for a damaged file, and for one of a model that this version cannot build.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    about = header(file)
    try:
        arrays = load_file(file)
        record = json.loads(about["record"])
        intact = about["sha256"] == _sha256(arrays, about["record"])
    except (OSError, KeyError, ValueError, SafetensorError) as e:
        raise Refused(f"{file} is damaged ({type(e).__name__}: {str(e)[:300]})") from e
    if not intact:
        raise Refused(f"{file} is damaged: its content does not fit its sha256")
    make, cfg = model_of(record, file)
    with one_line(f"{file} does not describe a model that this version can build"):
        info = dataclasses.replace(build(Info, record["data"]), tokenizer=record["tokenizer"])
        family = make(cfg)
        shapes = jax.eval_shape(family.init, jax.random.key(0))
        wanted = _kept(shapes)
        if sorted(_named(wanted)) != sorted(arrays):
            raise ValueError("its arrays have other names than the model's")
        leaves, tree = jax.tree.flatten(wanted)
        found = [arrays[name] for name in _named(wanted)]
        for leaf, array in zip(leaves, found, strict=True):
            if leaf.shape != array.shape:
                raise ValueError(f"shape {array.shape} instead of {leaf.shape}")
        whole = tree.unflatten(
            jnp.asarray(array, leaf.dtype) for leaf, array in zip(leaves, found, strict=True)
        )
    params = whole["params"]
    # A copy, because a buffer under two names cannot be donated.
    ema = whole.get("ema", None if shapes.ema is None else jax.tree.map(jnp.copy, params))
    state = State(jnp.asarray(record["step"], jnp.int32), params, None, whole["extra"], ema)
    return Result(family, state, cfg, info, None)
