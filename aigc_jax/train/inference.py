"""`load`, `sample`, `evaluate` and `replay`: what a trained run is used for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ..core import Family, State, labels
from ..data import Data, order
from . import folder as folders
from .checkpoints import Checkpoints, newest, say
from .checks import check_model_takes, check_tokenizer
from .config import Result, Run
from .engine import Engine, compiler_options
from .log import metrics, ranked
from .progress import counted
from .record import Refused, one_line
from .run_folder import first_checkpoint
from .shipping import load_shipped
from .weights import file_of, shipped


def _family(make: Callable, cfg, folder: Path) -> tuple[Family, State]:
    """(family, shapes of its State) of a run folder; raises Refused if it cannot be built."""
    with one_line(f"{folder}/run.json does not describe a model that this version can build"):
        family = make(cfg)
        if not isinstance(family, Family):
            name, kind = f"{make.__module__}.{make.__qualname__}", type(family).__name__
            raise TypeError(f"{name} gives a {kind} and no Family")
        return family, jax.eval_shape(family.init, jax.random.key(0))


def load(
    folder: str | Path, *, at_most: int | None = None, trust: str | Sequence[str] = ()
) -> Result:
    """Brings back a run as its folder records it; no flag is typed again.

    A name without a folder of this name is a model that comes with the package: see `shipped`.

    Takes the best checkpoint where run.best was set, else the newest. Damaged checkpoints, and
    those that hold NaN or infinity, are passed over. Another process may train in the folder
    meanwhile. Raises Refused, in one line, for a folder that is no run, was edited by hand, or has
    no intact checkpoint.

    at_most: take the newest checkpoint up to this step instead.
    trust: modules of your own that the record may name, such as "mynet", with all modules below
        them. Without it a model is built only by modules of aigc_jax, by the experiments of the
        checkout, and by modules that your program has imported. Nothing that lies inside the run
        folder is ever imported.
    """
    folder = folders.home(folder)
    if not folder.exists() and str(folder) in shipped():
        if at_most is not None:
            raise Refused(f"{folder} comes with the package and has one step: leave out at_most")
        return load_shipped(file_of(str(folder)))
    make, cfg, run, info, record = folders.rebuild(folder, trust)
    folders.unedited(folder, record)
    family, shapes = _family(make, cfg, folder)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes
    )
    checkpoints = Checkpoints(folder, run.keep, folders.whose(record))

    def best_first(steps):
        best = ranked([*metrics(folder), *checkpoints.scores()], run.best, steps)
        names = ["the best checkpoint", *["the checkpoint"] * len(best)]
        rest = newest([step for step in steps if step not in best])
        return [*zip(best, names, strict=False), *rest]

    order = best_first if run.best and at_most is None else partial(newest, at_most=at_most)
    try:
        found = first_checkpoint(checkpoints, order, template)
    finally:
        checkpoints.close()
    if found is None:
        up_to = f" up to step {at_most}" if at_most is not None else ""
        raise Refused(f"{folder} holds no intact checkpoint{up_to}")
    return Result(family, found[1], cfg, info, folder)


def sample(result: Result, key: jax.Array, *, n: int, chunk: int = 256, **options) -> np.ndarray:
    """Returns n samples, made in chunks of equal size; chunk i uses fold_in(key, i).

    The samples depend on `chunk`. Options are those of the family's `sample`. Arrays, such as
    label [n], have one entry per sample. One prompt, [T] or [1, T], serves all samples. So does
    one context, [L, E] or [1, L, E]. Without a label a conditional model takes the classes in
    turn, counted over all n. Raises Refused for anything else.
    """
    if not all(isinstance(count, (int, np.integer)) and count >= 1 for count in (n, chunk)):
        raise Refused(f"n and chunk must be whole numbers and at least 1, got n={n}, chunk={chunk}")
    check_samples(result)
    options, per_sample = _options(result, n, options)
    size = min(chunk, n)
    draw = jax.jit(
        partial(result.family.sample, n=size, **options),
        compiler_options=compiler_options(jax.local_devices()[0]),
    )
    pieces = []
    for i in counted("sampling", range(-(-n // size))):
        rows = np.minimum(np.arange(i * size, (i + 1) * size), n - 1)  # the surplus is cut off
        own = {name: value[rows] for name, value in per_sample.items()}
        pieces.append(np.asarray(draw(result.state, jax.random.fold_in(key, i), **own)))
    return np.concatenate(pieces)[:n]


def check_samples(result: Result) -> None:
    """Raises Refused for a model that draws no samples."""
    if result.family.sample is None:
        kind = type(result.config).__module__.removeprefix("aigc_jax.").split(".")[0]
        raise Refused(f"a {kind} model draws no samples: use its own functions on result.state")


def _options(result: Result, n: int, options: dict) -> tuple[dict, dict]:
    """(options for all samples, arrays with one entry per sample); Refused if they do not fit."""
    for name in ("prompt", "context", "negative"):
        value = options.get(name)
        if value is None:
            continue
        # One row of tokens [T] or one context [L, E] serves all samples.
        single = 1 if np.issubdtype(np.asarray(value).dtype, np.integer) else 2
        value = np.asarray(value)[None] if np.ndim(value) == single else np.asarray(value)
        options[name] = np.repeat(value, n, 0) if len(value) == 1 else value
    per_sample = {name: np.asarray(value) for name, value in options.items() if np.ndim(value)}
    for name, value in per_sample.items():
        if len(value) != n:
            raise Refused(f"{name} must have one entry for each of {n} samples, got {len(value)}")
    takes = inspect.signature(result.family.sample).parameters
    takes_all = any(option.kind is option.VAR_KEYWORD for option in takes.values())
    if (unknown := set(options) - set(takes)) and not takes_all:
        known = ", ".join(name for name in takes if name not in ("state", "key", "n"))
        raise Refused(
            f"this model's sample takes {known or 'no options'}, not {', '.join(sorted(unknown))}"
        )
    classes = getattr(result.config, "classes", None)
    if "label" in takes and isinstance(classes, int):  # else `classes` is a user's own field
        try:
            label = labels(options.get("label"), classes, (n,), in_turn=True)
        except ValueError as e:
            raise Refused(str(e)) from e
        if label is not None:
            options["label"] = per_sample["label"] = np.asarray(label)
    shared = {name: value for name, value in options.items() if name not in per_sample}
    return shared, per_sample


def evaluate(
    result: Result, data: Data, *, batch_size: int = 500, seed: int = 0
) -> dict[str, float]:
    """Returns the means of the family's `evaluate` over every example of a finite set."""
    if data.info.examples is None:
        raise Refused(
            "evaluation needs a finite set, and this one is endless: load text with "
            "stride=LENGTH, synthetic points with examples=N"
        )
    check_model_takes(result.config, data.info)
    classes = getattr(result.config, "classes", 0)
    if classes and isinstance(classes, int) and data.resident and "label" in data.resident[0]:
        try:
            labels(data.resident[0]["label"], classes, (data.info.examples,))
        except ValueError as e:
            raise Refused(str(e)) from e
    check_tokenizer(result.info, data.info, result.folder)
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise Refused(f"batch_size must be a whole number and at least 1, got {batch_size}")
    run = Run(batch_size=min(batch_size, data.info.examples), seed=seed, devices=1)
    here = jax.local_devices()[:1]  # each of several processes evaluates alone
    engine = Engine(lambda _: result.family, result.config, run, data, devices=here)
    state = jax.device_put(result.state, engine.mesh.devices.flat[0])
    return engine.scorer(engine.feed)(state)


def replay(
    folder: str | Path, data: Data, *, step: int, trust: str | Sequence[str] = ()
) -> tuple[dict[str, float], dict]:
    """Repeats update number `step` of a run, bit for bit, from the newest checkpoint before it.

    Returns the metrics of the update and facts about it:
    - the norm of the parameters before and after it, per top-level module
    - what metrics.jsonl holds of it (`logged`, or None)
    - the rows of its batch, where the set is finite

    data: the training set of the run; another one is refused. Of another environment a line warns.
    trust: as for `load`.
    """
    folder = folders.home(folder)
    make, cfg, run, info, record = folders.rebuild(folder, trust)
    folders.unedited(folder, record)
    _family(make, cfg, folder)
    _check_replay(folder, run, info, data, step)
    folders.warn_of_environment(record, folders.environment())
    devices = min(run.devices, len(jax.devices()))
    tensor = math.gcd(run.tensor, devices or len(jax.devices()))
    run = replace(run, devices=devices, tensor=tensor)
    checkpoints = Checkpoints(folder, run.keep, folders.whose(record))
    try:
        engine = Engine(make, cfg, run, data)
        before = partial(newest, at_most=step - 1)
        found = first_checkpoint(checkpoints, before, engine.template)
    finally:
        checkpoints.close()
    if found is None and (run.init or record.get("params")):
        began = f"the parameters of {run.init}" if run.init else "parameters that were given"
        raise Refused(
            f"{folder} began with {began} and has no intact checkpoint before step {step}"
        )
    done, state = found or (0, engine.init())
    say(f"repeating {folder} from step {done} on")
    while done < step - 1:
        count = min(run.steps_per_call, step - 1 - done)
        state, _ = engine.advance(state, done, count)
        done += count
    norm_before = _norms(state.params)
    state, values = engine.advance(state, done, 1)
    values = {name: float(np.reshape(v, -1)[0]) for name, v in jax.device_get(values).items()}
    lines = (line["train"] for line in metrics(folder) if line["step"] == step and "train" in line)
    facts = {
        "norm_before": norm_before,
        "norm_after": _norms(state.params),
        "logged": next(lines, None),
    }
    if data.info.examples is not None:
        which = (run.seed, step - 1, run.batch_size)
        rows = data.resident[1](*which) if data.resident else order(data.info.examples, *which)
        facts["rows"] = rows.tolist()
    return values, facts


def _check_replay(folder: Path, run: Run, info, data: Data, step: int) -> None:
    """Raises Refused where this update cannot be repeated with this set on this machine."""
    ours, theirs = info.fingerprint, data.info.fingerprint
    if theirs != ours:
        raise Refused(f"{folder} was trained on other data: fingerprint {ours}, not {theirs}")
    if not 1 <= step <= run.steps:
        raise Refused(f"the updates of {folder} are numbered 1..{run.steps}, got step {step}")
    here = len(jax.devices())
    if run.pmap and run.devices > here:
        raise Refused(
            f"{folder} drew its noise on {run.devices} devices (pmap), this machine has {here}"
        )


def _norms(params) -> dict[str, float]:
    """The Euclidean norm of the parameters, per top-level module."""
    return {
        name: float(
            np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))
        )
        for name, tree in params.items()
    }
