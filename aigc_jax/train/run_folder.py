"""`RunFolder`: the lock, run.json, checkpoints and log of one run. `NoFolder` keeps nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from ..core import State
from ..data import Info
from . import folder as folders
from .checkpoints import Checkpoints, SaveFailed, newest, say
from .config import Run
from .log import Log, finite, ranked
from .record import Refused


def first_checkpoint(checkpoints: Checkpoints, order: Callable, template: State) -> tuple | None:
    """(step, state) as `Checkpoints.first` finds it; raises Refused where it does not fit."""
    try:
        return checkpoints.first(order, template)
    except ValueError as e:
        raise Refused(str(e)) from e


class RunFolder:
    """What a run keeps. As a context it frees the log, the checkpoints and, at last, the lock.

    `fit` calls `has_checkpoints`, `lock`, `restore`, `write_record` and `open_log` in this order.
    After that `save`, `log` and `add_scores` write. A warm start saves step 0 before `open_log`. Of
    several processes only the first one writes, beside Orbax.
    """

    def __init__(self, run: Run, record: dict, info: Info):
        self.run, self.record, self.info = run, record, info
        self.path = Path(run.folder)
        self.writes = jax.process_index() == 0
        self.checkpoints = Checkpoints(self.path, run.keep, folders.whose(record))
        self.saved: int | None = None  # the newest checkpoint of this run
        self.best: int | None = None  # the checkpoint with the lowest run.best
        self.scores: list[dict] = []  # validations, as lines of metrics.jsonl
        self._log: Log | None = None
        self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.ExitStack() as stack:  # from last to first
            if self._lock:
                stack.callback(self._lock.release)
            stack.callback(self.checkpoints.close)
            if self._log:
                stack.callback(self._log.close)

    def has_checkpoints(self) -> bool:
        """Whether the folder holds checkpoints; raises Refused where it holds something else."""
        folders.vacant(self.path)
        return bool(self.checkpoints.steps())

    def lock(self) -> None:
        """Keeps other processes out; raises Refused where another run lies here."""
        if self.writes:  # before anything is read: another process may be adding to it
            self._lock = folders.lock(self.path)
        self.record = folders.identify(self.path, self.record)

    def restore(self, template: State) -> State | None:
        """The state of the newest intact checkpoint; None where there is none."""
        found = first_checkpoint(self.checkpoints, newest, template)
        if found is None:
            return None
        self.saved, state = found
        if self.saved > self.run.steps:
            words = f"{self.path} is at step {self.saved} already, run.steps is {self.run.steps}"
            raise Refused(f"{words}: raise run.steps to at least that, or choose a new folder")
        return state

    def write_record(self) -> None:
        """Writes run.json and readies the checkpoints; raises Refused if it cannot write."""
        if self.writes:
            try:
                folders.write(self.path, self.record, self.info)
                self.checkpoints.open(self.saved)
            except OSError as e:
                raise Refused(f"run.folder {self.path} cannot be written: {e}") from e

    def open_log(self) -> None:
        """Opens metrics.jsonl and the events, and finds what earlier validations reported."""
        try:
            self._log = Log(self.path, self.saved or 0, self.writes)
        except OSError as e:
            raise SaveFailed(f"{self.path} cannot be written: {e}; {self.stands()}") from e
        self.scores = self.checkpoints.scores()
        if self.run.best:
            ranked = self._ranked(self.checkpoints.steps())
            self.best = next((step for step in ranked if self.checkpoints.intact(step)), None)
        if self.saved:
            how = "complete" if self.saved == self.run.steps else "continuing"
            say(f"{self.path}: {how} at step {self.saved} of {self.run.steps}")

    def _ranked(self, among) -> list[int]:
        # The checkpoints hold their scores too: metrics.jsonl may have been emptied.
        return ranked([*self._log.lines, *self.scores], self.run.best, among)

    def has_scores(self, step: int) -> bool:
        """Whether a validation at this step has been reported."""
        lines = [*(self._log.lines if self._log else ()), *self.scores]
        return any(line["step"] == step and line.get("valid") for line in lines)

    def add_scores(self, step: int, values: dict) -> None:
        """Keeps what a validation reported; the next checkpoint of this step holds it."""
        self.scores.append({"step": step, "valid": finite(values)})

    def log(self, step: int, kind: str, values: dict) -> None:
        """Writes a line of metrics.jsonl; raises SaveFailed where the disk is full."""
        try:
            self._log.write(step, kind, values)
        except OSError as e:
            self.wait()  # a save that failed too says so first
            raise SaveFailed(
                f"step {step}: {self.path} cannot be written: {e}; {self.stands()}"
            ) from e

    def is_best(self, step: int) -> bool:
        """Whether this step has the lowest run.best so far; if so, it is the best from now on."""
        if self.run.best and self._ranked({self.best, step})[:1] == [step]:
            self.best = step
            return True
        return False

    def save(self, step: int, state: State) -> None:
        """Writes a checkpoint in the background, with this step's scores."""
        scores = next((line["valid"] for line in self.scores if line["step"] == step), None)
        self.checkpoints.save(step, state, self.best, scores)
        self.saved = step

    def wait(self) -> None:
        """Returns when the checkpoint under way is on disk; raises SaveFailed if it is not."""
        self.checkpoints.wait()

    def stands(self) -> str:
        """Says which checkpoint the next start continues from."""
        return self.checkpoints.stands()

    def stopped(self) -> str:
        """Says what was kept, for the message of a run that was asked to stop."""
        return f"saved in {self.path}; the same command continues"

    def replay_command(self, step: int) -> str:
        """How to repeat one update."""
        return f"; repeat it with: python -m aigc_jax replay {self.path} --step {step}"


class NoFolder:
    """Stands in for a RunFolder where run.folder is empty: begins anew and writes nothing."""

    path, saved = None, None

    def __init__(self):
        self.reported: set[int] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def has_checkpoints(self) -> bool:
        return False

    def lock(self) -> None:
        pass

    def restore(self, template: State) -> None:
        return None

    def write_record(self) -> None:
        pass

    def open_log(self) -> None:
        pass

    def has_scores(self, step: int) -> bool:
        return step in self.reported

    def add_scores(self, step: int, values: dict) -> None:
        self.reported.add(step)

    def log(self, step: int, kind: str, values: dict) -> None:
        pass

    def is_best(self, step: int) -> bool:
        return False

    def save(self, step: int, state: State) -> None:
        pass

    def wait(self) -> None:
        pass

    def stands(self) -> str:
        return "nothing was saved"

    def stopped(self) -> str:
        return "nothing was saved"

    def replay_command(self, step: int) -> str:
        return ""
