"""Refuses what cannot work, before anything compiles or is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..core import Family, State
from ..data import Data, Info
from . import folder as folders
from .checkpoints import difference, not_finite
from .config import Run
from .engine import global_update, mesh_of, ratios, shardings_of
from .processes import check_connected
from .record import Refused


def check_run(
    make: Callable, cfg, run: Run, data: Data, valid: Data | None, on_eval, params
) -> dict:
    """Returns the content of run.json; raises Refused for a run that cannot work."""
    for info in (data.info, *([valid.info] if valid else [])):
        check_model_takes(cfg, info)
    check_devices(cfg, run)
    check_tensor(make, cfg, run, data)
    check_validation(make, cfg, run, data, valid, on_eval)
    if run.init and run.folder and Path(run.init).resolve() == Path(run.folder).resolve():
        words = f"run.init and run.folder are the same folder, {run.folder}"
        raise Refused(f"{words}: choose a new run.folder")
    if not run.folder:
        return {}
    return folders.describe(make, cfg, run, data.info, valid.info if valid else None, params)


def check_model_takes(cfg, info: Info) -> None:
    """Raises Refused where the config says that it cannot model these data."""
    if hasattr(cfg, "check"):
        try:
            cfg.check(info)
        except ValueError as e:
            raise Refused(str(e)) from e


def check_devices(cfg, run: Run) -> None:
    """Raises Refused where the machine lacks devices, or the batch does not divide among them."""
    check_connected(run)
    here = len(jax.devices())
    if run.devices > here:
        raise Refused(f"run.devices is {run.devices}, this machine has {here}")
    if run.pmap and jax.process_count() > 1:
        raise Refused("run.pmap works in one process only: with several processes leave it off")
    if run.pmap and jax.config.jax_disable_jit:
        raise Refused("run.pmap does not work under jax.disable_jit: leave one of them out")
    devices = run.devices or here
    if devices % run.tensor:
        raise Refused(f"run.tensor is {run.tensor}, which does not divide {devices} devices")
    if run.tensor > 1 and run.pmap:
        raise Refused("run.tensor splits layers, run.pmap copies them: leave one of them out")
    parts = divisors(cfg, devices, run.tensor)
    if run.batch_size % math.prod(parts.values()):
        words = " x ".join(f"{n} {name}" for name, n in parts.items())
        raise Refused(f"run.batch_size {run.batch_size} does not divide by {words}")


def divisors(cfg, devices: int, tensor: int) -> dict[str, int]:
    """Returns the factors, by name, whose product must divide a batch."""
    name = "devices" if tensor == 1 else f"groups of {tensor} devices"
    cuts = getattr(cfg, "cuts", {"micro-batches": getattr(cfg, "micro", 1)})
    return {name: devices // tensor, **cuts}


def check_tensor(make: Callable, cfg, run: Run, data: Data) -> None:
    """Raises Refused where the devices of run.tensor cannot share the layers of this model."""
    if run.tensor == 1:
        return
    family, mesh = make(cfg), mesh_of(jax.devices()[: run.devices or None], run.tensor)
    key = jax.random.key(0)
    state = jax.eval_shape(family.init, key)
    check_shared(shardings_of(family, state, mesh), run.tensor)
    batch = {
        name: jax.ShapeDtypeStruct((run.batch_size, *x.shape[1:]), x.dtype)
        for name, x in data.batch(run.seed, 0, 1).items()  # reads one example
    }
    try:
        jax.eval_shape(global_update(family, mesh), state, batch, key)
    except ValueError as e:
        raise Refused(str(e)) from e


def check_shared(places: State, tensor: int) -> None:
    """Raises Refused where groups of devices would share no leaf of a state."""
    if tensor > 1 and not any("model" in place.spec for place in jax.tree.leaves(places)):
        raise Refused(
            f"run.tensor (the axis model of a mesh) is {tensor}, but this model has no layers to "
            "share: rules split transformer, DiT and U-Net (leave it at 1)"
        )


def check_validation(
    make: Callable, cfg, run: Run, data: Data, valid: Data | None, on_eval
) -> None:
    """Raises Refused where the validation set, or the value that run.best names, cannot serve."""
    if valid is not None:
        if valid.info.examples is None:
            raise Refused(
                "validation needs a finite set, and this one is endless: load text with "
                "stride=LENGTH, synthetic points with examples=N"
            )
        check_tokenizer(data.info, valid.info, run.folder)
    if run.best and valid is None and on_eval is None:
        raise Refused(f"run.best is {run.best!r}, but there is no validation set to measure it on")
    if run.best and on_eval is None:  # what on_eval reports is known only when it has run
        check_best(run.best, reported_names(make(cfg), valid, run))


def check_tokenizer(ours: Info, theirs: Info, folder) -> None:
    """Raises Refused where two texts were split into tokens by different tokenizers.

    Pictures with captions may stand beside pictures without.
    """
    if ours.kind != "text" and not (ours.tokenizer and theirs.tokenizer):
        return
    if ours.tokenizer != theirs.tokenizer:
        file = f"{folder or 'RUN'}/tokenizer.json"
        raise Refused(
            "this text was cut into tokens by another tokenizer than that of training: load it "
            f"with tokenizer={file!r}"
        )


def check_best(best: str, names) -> None:
    """Raises Refused where no validation reports the value that run.best names."""
    if best not in names:
        raise Refused(f"run.best is {best!r}; reported are {', '.join(names)}")


def reported_names(family: Family, valid: Data, run: Run) -> list[str]:
    """The names that a validation will report, found without computing one."""
    key = jax.random.key(0)
    batch = jax.eval_shape(
        lambda: jax.tree.map(jax.numpy.asarray, valid.batch(0, 0, run.batch_size))
    )
    state = jax.eval_shape(family.init, key)
    names = list(jax.eval_shape(family.evaluate, state, batch, key))
    return [*names, *ratios(dict.fromkeys(names, 1.0), valid.info)]


def warm_start(family: Family, run: Run, params: Any, load: Callable) -> State | None:
    """The state that a run starts from in place of its seed's; None: it starts from its seed.

    load: brings back the run that run.init names. Raises Refused where the parameters do not fit.
    """
    if not run.init and params is None:
        return None
    ours = jax.eval_shape(family.init, jax.random.key(0))
    if params is not None:
        if run.init:
            raise Refused("a run starts from run.init or from params, not from both")
        return _from_params(ours, params)
    warm = load(run.init).state
    if ours.ema is not None and warm.ema is None:
        raise Refused(f"{run.init} holds no average to start model.ema from: set model.ema to 0")
    kept = ("params", "extra", *(["ema"] if ours.ema is not None else []))
    trees = ({name: getattr(state, name) for name in kept} for state in (ours, warm))
    if words := difference(*trees):
        raise Refused(f"{run.init} does not fit this model: {words}")
    return warm


def _from_params(ours: State, params: Any) -> State:
    """A state that holds copies of params, because a step donates the arrays that it is given."""
    if words := difference(ours.params, params):
        raise Refused(f"params do not fit this model: {words}")
    if ours.extra is not None or (ours.ema is not None and difference(ours.ema, params)):
        raise Refused("this model carries more than params: start it from a run folder (run.init)")

    def copy(template, x):
        return jax.numpy.array(x, template.dtype, copy=True)

    own, ema = (jax.tree.map(copy, ours.params, params) for _ in range(2))
    if leaf := not_finite(State(None, own, None)):
        raise Refused(
            f"{leaf} holds numbers that are not finite: nothing can be trained from these"
        )
    return State(None, own, None, ema=ema)
