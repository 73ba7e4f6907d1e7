"""`fit`, and the loop of updates that it runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..core import Family, State
from ..data import Data
from .checkpoints import SaveFailed, not_finite
from .checks import check_best, check_run, warm_start
from .config import NonFinite, Result, Run
from .engine import Engine, Feed, ReadFailed
from .inference import load
from .processes import agreed_to_stop, gathered, together
from .progress import Progress
from .run_folder import NoFolder, RunFolder


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
    """Trains make(cfg) on `data`, or continues the run that lies in run.folder.

    valid: a finite set. It is scored every run.eval_every steps and at the end.
    on_eval: `on_eval(family, state, step) -> {name: value}` runs then too. Its numbers are reported
        beside the scores; None means that there is nothing to report. Copy the state to keep it:
        the next update donates it.
    params: parameters to start from in place of the seed's, such as those of
        `transformer.load_gpt2`. The checkpoint of step 0 keeps them, and run.json their sha256: a
        folder that began with other parameters is refused.

    Raises Refused for what cannot work, before anything compiles; NonFinite where a loss or a
    gradient is not finite; SaveFailed where a checkpoint cannot be written. Raises ReadFailed,
    after saving, where data cannot be read, and SystemExit, after saving, on SIGTERM, SIGHUP and
    Ctrl-C.
    """
    record = check_run(make, cfg, run, data, valid, on_eval, params)
    with together(), RunFolder(run, record, data.info) if run.folder else NoFolder() as kept:
        warm = None
        if not kept.has_checkpoints():  # refused before anything is written
            warm = warm_start(make(cfg), run, params, load)
        kept.lock()
        engine = Engine(make, cfg, run, data)
        state = kept.restore(engine.template)
        if state is None and warm is None:  # no intact checkpoint, or nothing to start from
            warm = warm_start(engine.family, run, params, load)
        kept.write_record()
        if state is None:
            state = engine.init(warm)
            if warm is not None:  # a replay then needs the other folder no more
                kept.save(0, state)
        warm = None  # its optimizer's state is not kept in memory
        kept.open_log()
        state = gathered(Loop(engine, kept, state, valid, on_eval).run())
    return Result(engine.family, state, cfg, data.info, kept.path)


class Loop:
    """The updates of a run that are left, with their log lines, validations and checkpoints."""

    def __init__(self, engine: Engine, kept: RunFolder | NoFolder, state: State, valid, on_eval):
        self.engine, self.kept, self.state = engine, kept, state
        self.step = kept.saved or 0
        self.score = engine.scorer(Feed(valid, engine.mesh)) if valid is not None else None
        self.on_eval = on_eval
        self.pending: tuple | None = None  # (first step, count, metrics) of the call under way

    def run(self) -> State:
        """Trains to the last step and returns the state."""
        if self.step == self.engine.run.steps and not self.validation_missing():
            return self.state
        with asked_to_stop() as signals, Progress(self.engine.run.steps, self.step) as progress:
            self.progress = progress
            try:
                # An earlier process saved this step, and was killed before it validated.
                if self.validation_missing():
                    self.validate()
                self.train(signals)
            except ReadFailed as e:  # raised before the state is donated: it still stands
                self.rescue()
                stands = self.kept.stands()
                raise ReadFailed(
                    f"after step {self.step} the data cannot be read: {e}; {stands}"
                ) from e
        if signals:  # asked here, where the handlers of before are back: no signal is lost
            where = self.kept.path or "nothing was saved"
            raise SystemExit(f"stopped by {signals[0]} at step {self.step}, the last: {where}")
        return self.state

    def train(self, signals: list[str]) -> None:
        """Runs the updates that are left, one compiled call after the other."""
        run = self.engine.run
        while self.step < run.steps:
            first, count = self.step, self.steps_to_next_stop()
            self.state, metrics = self.engine.advance(self.state, first, count)
            self.report()  # the call before, so that the device never waits for the host
            self.pending, self.step = (first, count, metrics), first + count
            self.progress.step(self.step)
            if self.validation_due():
                self.validate()
            if self.step == run.steps or (run.save_every and self.step % run.save_every == 0):
                self.save()
            if self.step < run.steps and stop_now(signals, self.step):
                self.save()
                self.kept.wait()
                agreed_to_stop()
                name = signals[0] if signals else "preemption"
                raise SystemExit(f"stopped by {name} at step {self.step}: {self.kept.stopped()}")
        self.report()
        self.kept.wait()

    def steps_to_next_stop(self) -> int:
        """How many updates the next call runs: it ends where a validation or a save is due."""
        run = self.engine.run
        periods = [every for every in (run.eval_every, run.save_every) if every]
        left = [every - self.step % every for every in periods]
        return min(run.steps - self.step, run.steps_per_call, *left)

    def report(self) -> None:
        """Checks and logs the metrics of the pending call; raises NonFinite."""
        if self.pending is None:
            return
        first, count, metrics = self.pending
        self.pending = None
        metrics = {
            name: np.reshape(values, -1)[:count] for name, values in jax.device_get(metrics).items()
        }
        run = self.engine.run
        for i in range(count):
            self.check_finite(first + i + 1, {name: values[i] for name, values in metrics.items()})
        for i in range(count):
            step = first + i + 1
            if step % run.log_every == 0 or step == run.steps:
                values = {name: float(v[i]) for name, v in metrics.items()}
                self.progress.show(step, values)
                self.kept.log(step, "train", values)

    def check_finite(self, step: int, values: dict) -> None:
        """Raises NonFinite where a loss or a gradient norm of this step is not finite."""
        watched = {n: v for n, v in values.items() if n.endswith(("loss", "grad_norm"))}
        bad = [name for name, value in watched.items() if not np.isfinite(value)]
        if bad:
            # Non-finite values first, then losses before norms. The finite ones are told too: the
            # other net of a GAN may be the cause.
            names = sorted(watched, key=lambda name: (name not in bad, name.endswith("grad_norm")))
            raise self.non_finite(
                step, ", ".join(f"{name} = {watched[name]:.4g}" for name in names)
            )

    def non_finite(self, step: int, what: str) -> NonFinite:
        again = self.kept.replay_command(step)
        return NonFinite(f"step {step}: {what}; {self.kept.stands()}{again}")

    def save(self) -> None:
        """Saves the state, once all that led to it is known to be finite."""
        self.report()
        if self.kept.saved == self.step:
            return
        if leaf := not_finite(self.state):
            raise self.non_finite(self.step, f"{leaf} is not finite")
        self.kept.save(self.step, self.state)

    def rescue(self) -> None:
        """Saves before an error of the data, the validation or on_eval ends `fit`."""
        if jax.process_count() == 1:  # of several processes the others still train
            self.save()
            self.kept.wait()

    def validation_due(self) -> bool:
        run = self.engine.run
        due = self.step == run.steps or (run.eval_every and self.step % run.eval_every == 0)
        return bool(self.step and due and (self.score or self.on_eval))

    def validation_missing(self) -> bool:
        """Whether a validation is due after this step and none has been reported."""
        return self.validation_due() and not self.kept.has_scores(self.step)

    def validate(self) -> None:
        """Scores the state, reports the values, and saves it where it is the best so far."""
        self.report()
        values = self.measure()
        if not values:
            return
        self.kept.add_scores(self.step, values)
        best = self.engine.run.best
        if best and best not in values:
            self.save()  # a wrong name does not lose what was trained
            check_best(best, values)
        self.progress.note(self.step, values)
        self.kept.log(self.step, "valid", values)
        if self.kept.is_best(self.step):
            self.save()

    def measure(self) -> dict:
        """The scores of the validation set and what on_eval reports; saves if either fails."""
        try:
            values = self.score(self.state) if self.score else {}
            if self.on_eval:
                more = self.on_eval(self.engine.family, gathered(self.state), self.step) or {}
                values |= {name: float(v) for name, v in more.items()}
            return values
        except ReadFailed:
            raise
        except (Exception, SystemExit) as e:
            try:
                self.rescue()
            except SaveFailed as failed:
                raise failed from e
            raise


@contextlib.contextmanager
def asked_to_stop():
    """Yields the list to which SIGTERM, SIGHUP and Ctrl-C add their names.

    A second Ctrl-C goes to the handler of before, which usually ends the process at once. Signals
    that were ignored stay ignored, such as SIGHUP under nohup.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield caught  # several processes: JAX's own handler tells them all, see stop_now
        return

    def ask(number, frame):
        if number == signal.SIGINT and caught:
            signal.signal(number, old[number])
            signal.raise_signal(number)
        caught.append(signal.Signals(number).name)

    names = ("SIGTERM", "SIGINT", "SIGHUP")
    asking = [getattr(signal, name) for name in names if hasattr(signal, name)]
    old = {number: signal.getsignal(number) for number in asking}
    old = {n: handler for n, handler in old.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in old:
            signal.signal(number, ask)
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_now(signals: list[str], step: int) -> bool:
    """Whether the loop was asked to stop; of several processes all agree on the step."""
    if jax.process_count() == 1:
        return bool(signals)
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
