"""One loop for every family: `fit` trains, `load` brings a run back, `sample` and `evaluate` use it.

This is the only place that compiles, places arrays on devices, donates and saves. A run is a folder; the same command
again continues it, and ends with the same bits as a run that nothing interrupted.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core import Family, State, labels
from ..data import Data, Info, order
from . import folder as folders
from .checkpoints import Checkpoints, SaveFailed, difference, newest, not_finite, say
from .engine import Engine, Feed, ReadFailed, compiler_options, ratios
from .folder import Refused, metrics
from .progress import Progress, counted
from .record import one_line

__all__ = [
    "NonFinite",
    "ReadFailed",
    "Refused",
    "Result",
    "Run",
    "SaveFailed",
    "evaluate",
    "fit",
    "load",
    "metrics",
    "replay",
    "sample",
]


class NonFinite(FloatingPointError):
    """A loss or gradient that is not finite; the message names the step and the command that repeats it."""


@dataclass(frozen=True)
class Run:
    """One training run: where it lies, how long it is, how often it looks up."""

    folder: str = ""  # everything about the run; "": nothing is kept
    steps: int = 1000  # length of the whole run
    batch_size: int = 128  # examples that one step consumes, over all devices
    seed: int = 0
    eval_every: int = 0  # steps between validations; 0: at the end only
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    log_every: int = 50  # steps between lines of metrics.jsonl
    keep: int = 2  # newest checkpoints kept
    best: str = ""  # a reported validation value; the checkpoint where it was lowest is kept and loaded
    steps_per_call: int = 1  # updates in one compiled call; not for convolutional nets on the CPU
    devices: int = 0  # 0: all
    pmap: bool = False  # jax.pmap in place of jit over a mesh: every device draws its own noise
    init: str = ""  # a run folder whose parameters this run starts from

    def __post_init__(self):
        for field in ("folder", "init"):
            object.__setattr__(self, field, os.path.expanduser(getattr(self, field) or ""))
        lowest = {"steps": 1, "batch_size": 1, "seed": 0, "eval_every": 0, "save_every": 0, "log_every": 1, "keep": 1}
        for field, low in {**lowest, "steps_per_call": 1, "devices": 0}.items():
            if getattr(self, field) < low:
                raise ValueError(f"run.{field} must be at least {low}, got {getattr(self, field)}")
        if self.seed >= 2**32:
            raise ValueError(f"run.seed must be below 2**32, got {self.seed}")


class Result(NamedTuple):
    """A trained model: `vae.decode(result.config, result.state.params, z)`, or `train.sample(result, key, n=64)`."""

    family: Family
    state: State
    config: Any
    info: Info  # of the training data
    folder: Path | None

    def __repr__(self):
        kind, leaves = type(self.config), jax.tree.leaves(self.state.params)
        count = sum(math.prod(np.shape(leaf)) for leaf in leaves)
        gone = isinstance(self.state.step, jax.Array) and self.state.step.is_deleted()
        at = f"step {'?' if gone else self.state.step}, {count:,} parameters"  # ?: the state was given away (donated)
        return f"Result({kind.__module__}.{kind.__qualname__}, {at}, folder {self.folder})"


# ------------------------------------------------------------------------------------------------------------ training


def _check_tokenizer(ours: Info, theirs: Info, folder) -> None:
    if ours.tokenizer != theirs.tokenizer:
        file = f"{folder or 'RUN'}/tokenizer.json"
        raise Refused(f"this text was cut into tokens by another tokenizer than that of training: load it with "
                      f"tokenizer={file!r}")  # fmt: skip


def _door(make, cfg, run: Run, data: Data, valid: Data | None, on_eval, params) -> dict:
    """Refuses what cannot work, before anything compiles or is written; returns the content of run.json."""
    if hasattr(cfg, "check"):
        for info in (data.info, *([valid.info] if valid else [])):
            try:
                cfg.check(info)
            except ValueError as e:
                raise Refused(str(e)) from e
    if run.devices > len(jax.devices()):
        raise Refused(f"run.devices is {run.devices}, this machine has {len(jax.devices())}")
    if run.pmap and jax.process_count() > 1:
        raise Refused("run.pmap is for one process: several train over a mesh")
    if run.pmap and jax.config.jax_disable_jit:
        raise Refused("run.pmap does not work under jax.disable_jit: leave one of them out")
    cuts = {"devices": run.devices or len(jax.devices())}
    cuts |= getattr(cfg, "cuts", {"micro-batches": getattr(cfg, "micro", 1)})
    if run.batch_size % math.prod(cuts.values()):
        words = " x ".join(f"{n} {name}" for name, n in cuts.items())
        raise Refused(f"run.batch_size {run.batch_size} does not divide by {words}")
    if valid is not None and valid.info.examples is None:
        raise Refused("validation needs a finite set: load it with examples=N")
    if valid is not None:
        _check_tokenizer(data.info, valid.info, run.folder)
    if run.best and valid is None and on_eval is None:
        raise Refused(f"run.best is {run.best!r}, but there is no validation set to measure it on")
    if run.best and on_eval is None:
        _check_best(run.best, _reported(make(cfg), valid, run))
    if run.init and Path(run.init).resolve() == Path(run.folder or ".").resolve():
        raise Refused("run.init and run.folder are the same folder")
    if not run.folder:
        return {}
    return folders.describe(make, cfg, run, data.info, valid.info if valid else None, params)


def _reported(family: Family, valid: Data, run: Run) -> list[str]:
    """The names that a validation will report, without computing one."""
    key = jax.random.key(0)
    batch = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, valid.batch(0, 0, run.batch_size)))
    names = list(jax.eval_shape(family.evaluate, jax.eval_shape(family.init, key), batch, key))
    return [*names, *ratios(dict.fromkeys(names, 1.0), valid.info)]


def _check_best(best: str, names) -> None:
    if best not in names:
        raise Refused(f"run.best is {best!r}; reported are {', '.join(names)}")


def _warm_start(family: Family, run: Run, params) -> State | None:
    """The state that a run starts from, if not from its seed; Refused where its parameters do not fit this model."""
    if not run.init and params is None:
        return None
    ours = jax.eval_shape(family.init, jax.random.key(0))
    if params is not None:
        if run.init:
            raise Refused("a run starts from run.init or from params, not from both")
        if words := difference(ours.params, params):
            raise Refused(f"params do not fit this model: {words}")
        if ours.extra is not None or (ours.ema is not None and difference(ours.ema, params)):
            raise Refused("this model carries more than params: start it from a run folder (run.init)")
        # Copies, because a step gives away the arrays it is given.
        own, ema = (
            jax.tree.map(lambda t, x: jax.numpy.array(x, t.dtype, copy=True), ours.params, params) for _ in range(2)
        )
        if leaf := not_finite(State(None, own, None)):
            raise Refused(f"{leaf} holds numbers that are not finite: nothing can be trained from these")
        return State(None, own, None, ema=ema)
    warm = load(run.init).state
    if ours.ema is not None and warm.ema is None:
        raise Refused(f"{run.init} holds no average to start model.ema from: set model.ema to 0")
    kept = ("params", "extra", *(["ema"] if ours.ema is not None else []))
    if words := difference(*({name: getattr(state, name) for name in kept} for state in (ours, warm))):
        raise Refused(f"{run.init} does not fit this model: {words}")
    return warm


def _stopped(step: int, what: str, saves: Checkpoints | None) -> NonFinite:
    stands = saves.stands() if saves else "nothing was saved"
    again = f"; repeat it with: python -m aigc_jax replay {saves.folder.parent} --step {step}" if saves else ""
    return NonFinite(f"step {step}: {what}; {stands}{again}")


def _check_finite(metrics: dict, start: int, count: int, saves: Checkpoints | None) -> None:
    for i in range(count):
        watched = {name: v[i] for name, v in metrics.items() if name.endswith(("loss", "grad_norm"))}
        bad = [name for name, value in watched.items() if not np.isfinite(value)]
        if bad:
            # A loss says more than a norm; of two nets the one that is still finite may be what blew up the other.
            listed = sorted(watched, key=lambda name: (name not in bad, name.endswith("grad_norm")))
            values = ", ".join(f"{name} = {watched[name]:.4g}" for name in listed)
            raise _stopped(start + i + 1, values, saves)


@contextlib.contextmanager
def _signals():
    """SIGTERM, SIGHUP and Ctrl-C ask the loop to save and leave; a second Ctrl-C does what it did before the loop.

    What was ignored before stays ignored, such as SIGHUP under nohup.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield caught  # several processes: JAX's own handler tells them all, see _asked_to_stop
        return

    def ask(number, frame):
        if number == signal.SIGINT and caught:
            signal.signal(number, old[number])
            signal.raise_signal(number)
        caught.append(signal.Signals(number).name)

    asking = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    old = {number: signal.getsignal(number) for number in asking}
    old = {number: handler for number, handler in old.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in old:
            signal.signal(number, ask)
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _asked_to_stop(caught: list[str], step: int) -> bool:
    if jax.process_count() == 1:
        return bool(caught)
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)  # all processes agree on the step


def fit(
    make: Callable,
    cfg,
    run: Run,
    data: Data,
    *,
    valid: Data | None = None,
    on_eval: Callable[[Family, State, int], dict] | None = None,
    params: Any = None,
) -> Result:
    """Trains make(cfg) on `data`, or continues the run that lies in run.folder, and returns it.

    params: what to start from in place of the seed's, such as those of `transformer.load_gpt2`. The checkpoint of step
        0 keeps them, and run.json their sha256: a folder that began with others is refused.

    valid: a finite set, scored every run.eval_every steps and at the end. on_eval(family, state, step) -> {name: value}
        runs there too; its numbers are reported beside the scores (None: nothing to report).

    Raises Refused for what cannot work, before anything compiles; NonFinite where a loss or gradient is not finite;
    SaveFailed where a checkpoint cannot be written, ReadFailed, after saving, where data cannot be read; SystemExit,
    after saving, on SIGTERM, SIGHUP and Ctrl-C.
    """
    record = _door(make, cfg, run, data, valid, on_eval, params)
    if not run.folder:
        engine = Engine(make, cfg, run, data)
        state = _loop(engine, engine.init(_warm_start(engine.family, run, params)), None, None, None, valid, on_eval)
        return Result(engine.family, state, cfg, data.info, None)
    folder, lead = Path(run.folder), jax.process_index() == 0  # the one process that writes, beside Orbax
    saves = Checkpoints(folder, run.keep, folders.whose(record))
    with contextlib.ExitStack() as locked, contextlib.ExitStack() as stack:  # the lock outlasts the last save
        stack.callback(saves.close)
        folders.vacant(folder)
        fresh = not saves.steps()
        warm = _warm_start(make(cfg), run, params) if fresh else None  # refused before anything is written
        if lead:  # before anything is read: another process may be adding to it
            locked.callback(folders.lock(folder).release)
        record = folders.identify(folder, record)
        engine = Engine(make, cfg, run, data)
        last, state = _first(saves, newest, engine.template) or (None, None)
        if last is not None and last > run.steps:
            raise Refused(f"{folder} is at step {last} already, run.steps is {run.steps}")
        if last is None and not fresh:
            warm = _warm_start(engine.family, run, params)
        if lead:
            try:
                folders.write(folder, record, data.info)
                saves.open(last)
            except OSError as e:
                raise Refused(f"run.folder {folder} cannot be written: {e}") from e
        if last is None:
            state = engine.init(warm)
            if warm is not None:
                saves.save(0, state)  # a replay, or a start after a crash, then needs the other folder no more
                last = 0
        try:
            log = folders.Log(folder, last or 0, lead)
        except OSError as e:
            raise SaveFailed(f"{folder} cannot be written: {e}; {saves.stands()}") from e
        stack.callback(log.close)
        if last:
            say(f"{folder}: {'complete' if last == run.steps else 'continuing'} at step {last} of {run.steps}")
        if last != run.steps or _unseen(run, last, [*log.lines, *saves.scores()], valid, on_eval):
            state = _loop(engine, state, last, saves, log, valid, on_eval)
    return Result(engine.family, state, cfg, data.info, folder)


def _first(saves: Checkpoints, order: Callable, template: State) -> tuple | None:
    """(step, state) as `Checkpoints.first` finds it; Refused where it does not fit."""
    try:
        return saves.first(order, template)
    except ValueError as e:
        raise Refused(str(e)) from e


def _unseen(run: Run, step: int, lines: list[dict], valid, on_eval) -> bool:
    """Whether a validation is due after `step` updates and none of the lines reports it."""
    due = step == run.steps or (run.eval_every and step % run.eval_every == 0)
    if not step or not due or (valid is None and on_eval is None):
        return False
    return not any(line["step"] == step and line.get("valid") for line in lines)


def _loop(engine: Engine, state: State, saved: int | None, saves, log, valid, on_eval) -> State:
    """The updates that are left; `saved` is the checkpoint that `state` came from."""
    run, folder, step = engine.run, saves.folder.parent if saves else None, saved or 0
    score = engine.scorer(Feed(valid, engine.mesh)) if valid is not None else None
    scores, best = saves.scores() if saves else [], None  # lines of metrics.jsonl, but kept with the checkpoints
    if saves and run.best:
        ranked = folders.ranked([*log.lines, *scores], run.best, saves.steps())
        best = next((step for step in ranked if saves.intact(step)), None)
    state, pending = engine.enter(state), None

    def fetch():
        # One call late, so that the device never waits for the host.
        nonlocal pending
        if pending is None:
            return
        start, count, metrics = pending
        pending = None
        metrics = {name: np.reshape(v, -1)[:count] for name, v in jax.device_get(metrics).items()}
        _check_finite(metrics, start, count, saves)
        for i in range(count):
            if (start + i + 1) % run.log_every == 0 or start + i + 1 == run.steps:
                values = {name: float(v[i]) for name, v in metrics.items()}
                progress.show(start + i + 1, values)
                write(start + i + 1, "train", values)

    def write(at, kind, values):
        try:
            if log:
                log.write(at, kind, values)
        except OSError as e:  # the disk is full
            saves.wait()  # a save that failed too says so first
            raise SaveFailed(f"step {step}: {folder} cannot be written: {e}; {saves.stands()}") from e

    def save():
        nonlocal saved
        fetch()  # a state is kept only when it, and all that led to it, is finite
        if saved == step:
            return
        seen = engine.view(state)
        if leaf := not_finite(seen):
            raise _stopped(step, f"{leaf} is not finite", saves)
        if saves:
            saves.save(step, seen, best, next((line["valid"] for line in scores if line["step"] == step), None))
            saved = step

    def keep():
        # Before an exception that is not ours leaves the loop. Of several processes the others still train.
        if jax.process_count() == 1:
            save()
            if saves:
                saves.wait()

    def measure(seen):
        try:
            values = score(seen) if score else {}
            if on_eval:
                values |= {name: float(v) for name, v in (on_eval(engine.family, seen, step) or {}).items()}
            return values
        except ReadFailed:
            raise
        except (Exception, SystemExit) as e:
            try:
                keep()
            except SaveFailed as failed:
                raise failed from e
            raise

    def look():
        nonlocal best
        fetch()
        seen = engine.view(state)
        values = measure(seen)
        if not values:
            return
        scores.append({"step": step, "valid": folders.finite(values)})
        if run.best and run.best not in values:
            save()  # what was trained is not lost for a name
            _check_best(run.best, values)
        progress.note(step, values)
        write(step, "valid", values)
        if log:
            if run.best and folders.ranked([*log.lines, *scores], run.best, {best, step})[:1] == [step]:
                best = step
                save()

    with _signals() as caught, Progress(run.steps, step) as progress:
        try:
            if _unseen(run, step, [*(log.lines if log else ()), *scores], valid, on_eval):
                look()  # it failed, or the process was killed, after this checkpoint was saved
            while step < run.steps:
                marks = (run.steps_per_call, *(e - step % e for e in (run.eval_every, run.save_every) if e))
                count = min(run.steps - step, *marks)
                state, metrics = engine.advance(state, step, count)
                fetch()
                pending, step = (step, count, metrics), step + count
                progress.step(step)
                if _unseen(run, step, [], valid, on_eval):
                    look()
                if step == run.steps or (run.save_every and step % run.save_every == 0):
                    save()
                if step < run.steps and _asked_to_stop(caught, step):
                    save()
                    if saves:
                        saves.wait()
                    kept = f"saved in {folder}; the same command continues" if saves else "nothing was saved"
                    raise SystemExit(f"stopped by {caught[0] if caught else 'preemption'} at step {step}: {kept}")
            fetch()
            if saves:
                saves.wait()
        except ReadFailed as e:  # raised before the state is donated: it still stands
            keep()
            stands = saves.stands() if saves else "nothing was saved"
            raise ReadFailed(f"after step {step} the data cannot be read: {e}; {stands}") from e
    if caught:  # asked here, where its own handlers are back: no signal falls between
        raise SystemExit(f"stopped by {caught[0]} at step {step}, the last: {folder or 'nothing was saved'}")
    return engine.view(state)


# ------------------------------------------------------------------------------------------------------ after training


def _family(make: Callable, cfg, folder: Path) -> tuple[Family, State]:
    """The family that a run folder describes, and the shapes of its State; Refused where it cannot be built."""
    with one_line(f"{folder}/run.json does not describe a model that this version can build"):
        family = make(cfg)
        if not isinstance(family, Family):
            raise TypeError(f"{make.__module__}.{make.__qualname__} gives a {type(family).__name__} and no Family")
        return family, jax.eval_shape(family.init, jax.random.key(0))


def load(folder: str | Path, *, at_most: int | None = None, trust: str | Sequence[str] = ()) -> Result:
    """A run as its folder records it: nothing else is needed, no flag is typed again.

    The best checkpoint where run.best was set, else the newest (`at_most`: the newest up to that step). Damaged ones,
    and those that hold NaN or infinity, are passed over. Another process may train in the folder meanwhile. Raises
    Refused in one line for anything that is no run, was edited by hand, or has no intact checkpoint.

    trust: modules of your own that the record may name, such as "mynet"; those below them count too. Without it only
        modules of aigc_jax, the checkout's experiments, and what your program has imported already build a model.
        Nothing that lies inside the run folder is ever imported.
    """
    folder = folders.home(folder)
    make, cfg, run, info, record = folders.rebuild(folder, trust)
    folders.unedited(folder, record)
    family, shapes = _family(make, cfg, folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
    saves = Checkpoints(folder, run.keep, folders.whose(record))

    def best_first(steps):
        ranked = folders.ranked([*metrics(folder), *saves.scores()], run.best, steps)
        named = [(step, "the checkpoint" if i else "the best checkpoint") for i, step in enumerate(ranked)]
        return named + newest([step for step in steps if step not in ranked])

    order = best_first if run.best and at_most is None else partial(newest, at_most=at_most)
    try:
        found = _first(saves, order, template)
    finally:
        saves.close()
    if found is None:
        raise Refused(
            f"{folder} holds no intact checkpoint" + (f" up to step {at_most}" if at_most is not None else "")
        )
    return Result(family, found[1], cfg, info, folder)


def sample(result: Result, key: jax.Array, *, n: int, chunk: int = 256, **options) -> np.ndarray:
    """n samples, made in chunks of equal size (chunk i with fold_in(key, i)); they depend on the chunk.

    Options are those of the family's `sample`; arrays, such as label [n], lead with one entry a sample. One prompt, [T]
    or [1, T], is that of all samples. The classes in turn, which a conditional model draws by default, are counted over
    all n. Raises Refused for anything else.
    """
    if not all(isinstance(count, (int, np.integer)) and count >= 1 for count in (n, chunk)):
        raise Refused(f"n and chunk must be whole numbers and at least 1, got n={n}, chunk={chunk}")
    prompt = options.get("prompt")
    if prompt is not None and (np.ndim(prompt) == 1 or np.shape(prompt)[:1] == (1,)):
        options["prompt"] = np.repeat(np.reshape(prompt, (1, -1)), n, 0)
    each = {name: np.asarray(value) for name, value in options.items() if np.ndim(value)}
    for name, value in each.items():
        if len(value) != n:
            raise Refused(f"{name} must have one entry for each of {n} samples, got {len(value)}")
    takes = inspect.signature(result.family.sample).parameters
    unknown = set(options) - set(takes)
    if unknown and not any(option.kind is option.VAR_KEYWORD for option in takes.values()):
        known = ", ".join(name for name in takes if name not in ("state", "key", "n")) or "no options"
        raise Refused(f"this model's sample takes {known}, not {', '.join(sorted(unknown))}")
    classes = getattr(result.config, "classes", None)  # a family of the user's may count its labels another way
    if "label" in takes and isinstance(classes, int):
        try:
            label = labels(options.get("label"), classes, (n,), in_turn=True)
        except ValueError as e:
            raise Refused(str(e)) from e
        if label is not None:
            options["label"] = each["label"] = np.asarray(label)
    rest = {name: value for name, value in options.items() if name not in each}
    size, told = min(chunk, n), compiler_options(jax.devices()[0])
    draw = jax.jit(partial(result.family.sample, n=size, **rest), compiler_options=told)
    pieces = []
    for i in counted("sampling", range(-(-n // size))):
        rows = np.minimum(np.arange(i * size, (i + 1) * size), n - 1)  # what is drawn beyond n is cut off
        own = {name: value[rows] for name, value in each.items()}
        pieces.append(np.asarray(draw(result.state, jax.random.fold_in(key, i), **own)))
    return np.concatenate(pieces)[:n]


def evaluate(result: Result, data: Data, *, batch_size: int = 500, seed: int = 0) -> dict[str, float]:
    """Means of the family's `evaluate` over every example of a finite set."""
    if data.info.examples is None:
        raise Refused("evaluation needs a finite set: load it with examples=N")
    try:
        if hasattr(result.config, "check"):
            result.config.check(data.info)
        if (classes := getattr(result.config, "classes", 0)) and data.resident and "label" in data.resident[0]:
            labels(data.resident[0]["label"], classes, (data.info.examples,))
    except ValueError as e:
        raise Refused(str(e)) from e
    _check_tokenizer(result.info, data.info, result.folder)
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise Refused(f"batch_size must be a whole number and at least 1, got {batch_size}")
    run = Run(batch_size=min(batch_size, data.info.examples), seed=seed, devices=1)
    engine = Engine(lambda _: result.family, result.config, run, data)
    state = jax.device_put(result.state, engine.mesh.devices.flat[0])
    return engine.scorer(engine.feed)(state)


def replay(
    folder: str | Path, data: Data, *, step: int, trust: str | Sequence[str] = ()
) -> tuple[dict[str, float], dict]:
    """Repeats update number `step` of a run, bit for bit, from the newest checkpoint before it.

    Returns its metrics and facts about it: the norm of the parameters before and after, per top-level module; what
    metrics.jsonl holds of this step (`logged`, or None); the rows of the batch where the set is finite. `data` is the
    training set of the run; another one is refused, another environment is warned of. `trust` as for `load`.
    """
    folder = folders.home(folder)
    make, cfg, run, info, record = folders.rebuild(folder, trust)
    folders.unedited(folder, record)
    _family(make, cfg, folder)
    if data.info.fingerprint != info.fingerprint:
        raise Refused(
            f"{folder} was trained on other data: fingerprint {info.fingerprint}, not {data.info.fingerprint}"
        )
    if not 1 <= step <= run.steps:
        raise Refused(f"the updates of {folder} are numbered 1..{run.steps}, got step {step}")
    if run.pmap and run.devices > len(jax.devices()):
        raise Refused(f"{folder} drew its noise on {run.devices} devices (pmap), this machine has {len(jax.devices())}")
    folders.warn_of_environment(record, folders.environment())
    run = replace(run, devices=min(run.devices, len(jax.devices())))
    saves = Checkpoints(folder, run.keep, folders.whose(record))
    try:
        engine = Engine(make, cfg, run, data)
        found = _first(saves, partial(newest, at_most=step - 1), engine.template)
        if found is None and (run.init or record.get("params")):
            began = f"the parameters of {run.init}" if run.init else "parameters that were given"
            raise Refused(f"{folder} began with {began} and has no intact checkpoint before step {step}")
        at, state = found or (0, engine.init())
    finally:
        saves.close()
    say(f"repeating {folder} from step {at} on")
    state = engine.enter(state)
    while at < step - 1:
        count = min(run.steps_per_call, step - 1 - at)
        state, _ = engine.advance(state, at, count)
        at += count

    def norms(params):
        return {name: float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))))
                for name, tree in params.items()}  # fmt: skip

    before = norms(engine.view(state).params)
    state, values = engine.advance(state, at, 1)
    values = {name: float(np.reshape(v, -1)[0]) for name, v in jax.device_get(values).items()}
    logged = next((line["train"] for line in metrics(folder) if line["step"] == step and "train" in line), None)
    facts = {"norm_before": before, "norm_after": norms(engine.view(state).params), "logged": logged}
    if data.info.examples is not None:
        facts["rows"] = order(data.info.examples, run.seed, step - 1, run.batch_size).tolist()
    return values, facts
