"""Checkpoints of one run, written by Orbax and guarded by sha256 sums.

A finished checkpoint is the folder checkpoints/<step>. It is renamed into place once its sums are
written. Anything else there is left from a crash and is removed. Orbax restores a flipped bit as
wrong weights without an error, so the sums are checked first.

Other processes read while one trains. Before the files of a checkpoint are deleted, its folder is
renamed. So a reader whose folder is still the same one at the end has read all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SUMS = "SHA256SUMS"  # the format of coreutils: `sha256sum -c SHA256SUMS` inside the folder agrees
RUN = "run.sha256"  # the identity of its run, see folder.whose
SCORES = "valid.json"  # what the validation at this step reported
LISTINGS = 1000  # how often a reader lists again when the checkpoint that it reads is pruned


class SaveFailed(OSError):
    """A checkpoint could not be written; the message names the last one that stands."""


class _Misfit(ValueError):
    """A checkpoint of another model or another run."""


def say(line: str) -> None:
    """Prints one line on stderr; a closed terminal is no error."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet():
    """Silences absl and asyncio, through which Orbax reports what our own messages say better."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def nothing(record):  # one filter per use: background saves overlap with restores
        return False

    for logger in loggers:
        logger.addFilter(nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)


def difference(here, there) -> str | None:
    """Says which leaf is the first whose shape differs between two trees; None where all agree."""
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.shape)
            for path, x in jax.tree_util.tree_leaves_with_path(t)
        }
        for t in (here, there)
    ]
    for leaf in {**shapes[0], **shapes[1]}:
        ours, theirs = (known.get(leaf, "absent") for known in shapes)
        if ours != theirs:
            return f"{leaf} is {theirs} there, {ours} here"
    return None


def not_finite(state) -> str | None:
    """The path of the first array of a State that holds NaN or infinity; None where there is none.

    Infinity counts only in params and ema: a running minimum in opt_state or extra may start at
    infinity. Computed on the host, because XLA takes half a minute to compile 600 reductions. With
    several processes all get the same answer.
    """
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state._asdict())
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]

    def bad(name, leaf):
        strict = name.split(".")[0] in ("params", "ema")
        parts = (
            np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0
        )
        return any(not np.isfinite(x).all() if strict else np.isnan(x).any() for x in parts)

    first = next((i for i, (name, leaf) in enumerate(found) if bad(name, leaf)), len(found))
    if not all(leaf.is_fully_addressable for _, leaf in found):
        from jax.experimental import multihost_utils

        first = int(multihost_utils.process_allgather(np.int32(first)).min())
    return found[first][0] if first < len(found) else None


def _sums(folder: Path) -> str:
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS):
        lines.append(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        )
    return "".join(lines)


def _durable(path: Path) -> None:
    """Syncs a folder, so that the names in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _hush(told) -> None:
    """An unraisable hook that drops errors of threads that outlive a failed save or restore."""
    late = isinstance(told.exc_value, RuntimeError) and "Event loop is closed" in str(
        told.exc_value
    )
    code = getattr(told.object, "cr_code", None)
    if not late and not (code and "orbax" in code.co_filename):
        sys.__unraisablehook__(told)


def _hush_tasks() -> None:
    """Silences what these threads log when they are collected."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_nothing)


def _nothing(record) -> bool:
    return False


class Checkpoints:
    """The checkpoints under `folder`; one save at a time, in the background.

    run: the sha256 that each checkpoint of this run holds. "": none is written or compared.
    """

    def __init__(self, folder: Path, keep: int, run: str = ""):
        self.folder, self.keep, self.run = folder / "checkpoints", keep, run
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _hush
        import orbax.checkpoint as ocp  # slow to import, and only training and loading need it

        # If the folder is made in the background and cannot be made, threads wait 300 s for it.
        self._orbax = ocp.StandardCheckpointer(
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)
        )
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future | None = None
        self._failed = False

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, oldest first; their sums are not checked."""

        def listing():
            return (
                sorted((p.name, p.is_dir()) for p in os.scandir(self.folder))
                if self.folder.is_dir()
                else []
            )

        # A listing may miss folders that are renamed meanwhile: two equal listings are valid.
        listed = listing()
        while (again := listing()) != listed:
            listed = again
        return sorted(int(name) for name, is_dir in listed if is_dir and name.isdecimal())

    def save(self, step: int, state, best: int | None = None, scores: dict | None = None) -> None:
        """Copies the state to the host and writes it in the background.

        best: a step whose checkpoint is kept too. scores: what a validation at this step reported;
        the checkpoint keeps it. Raises SaveFailed, here or in `wait`, if this save or the one
        before it could not be written.
        """
        self.wait()
        raw = self.folder / f"saving-{step}"
        with quiet():
            try:
                if jax.process_index() == 0:
                    self.clear()
                self._orbax.save(raw.absolute(), state, force=True)
            except Exception as e:  # Orbax and tensorstore raise whatever the file system gave them
                self._fail(step, e)
        self._saving = self._thread.submit(self._finish, step, raw, best, scores)

    def _finish(self, step: int, raw: Path, best: int | None, scores: dict | None) -> None:
        with quiet():
            try:
                self._orbax.wait_until_finished()
                if jax.process_index() == 0:
                    if self.run:
                        (raw / RUN).write_text(self.run + "\n")
                    if scores:
                        (raw / SCORES).write_text(json.dumps(scores))
                    with open(raw / SUMS, "w") as file:
                        file.write(_sums(raw))
                        file.flush()
                        os.fsync(file.fileno())
                    raw.rename(self.folder / str(step))
                    _durable(self.folder)
            except Exception as e:
                self._fail(step, e)
            if jax.process_index() == 0:
                self._prune(best)

    def _prune(self, best: int | None) -> None:
        try:
            for old in self.steps()[: -self.keep]:
                if old not in (
                    0,
                    best,
                ):  # 0: a warm start, without which no update could be replayed
                    gone = self.folder / f"saving-{old}-old"  # first out of the numbers, then away
                    (self.folder / str(old)).rename(gone)
                    shutil.rmtree(gone)
        except OSError as e:  # the new one stands: training goes on
            say(f"warning: old checkpoints in {self.folder} cannot be removed: {e}")

    def _fail(self, step: int, cause: Exception):
        _hush_tasks()
        self._failed = True
        self.clear()
        reason = next(
            (part for part in reversed(str(cause).splitlines()) if part.strip()),
            type(cause).__name__,
        )
        raise SaveFailed(
            f"step {step} could not be saved in {self.folder}: {reason[:200]}; {self._stands()}"
        ) from cause

    def _stands(self) -> str:
        try:
            last = next((step for step in reversed(self.steps()) if self.intact(step)), None)
        except OSError as e:
            return f"what stands there cannot be read ({e})"
        if last is None:
            return "there is no checkpoint"
        return f"the checkpoint of step {last} stands"

    def stands(self) -> str:
        """Says which checkpoint there is to go on from; waits for the save under way."""
        with contextlib.suppress(SaveFailed):
            self.wait()
        return self._stands()

    def wait(self) -> None:
        """Returns when the save under way is finished; raises SaveFailed if it was not."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits for the save under way and frees the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with quiet(), contextlib.suppress(Exception):  # failures have been reported
                self._orbax.close()
            # tensorstore's threads outlive a failed save, and may still write.
            for _ in range(20 if self._failed else 0):
                self.clear()
                if not list(self.folder.glob("saving-*")):
                    break
                time.sleep(0.1)

    def clear(self) -> None:
        """Removes the remains of unfinished saves, as far as possible."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob("saving-*"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def open(self, last: int | None) -> None:
        """Readies the folder to train on from checkpoint `last`, and sets later ones aside.

        Later ones are damaged or not finite. Under their numbers they would count among the newest
        that are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clear()
        for step in self.steps():
            if last is None or step > last:
                aside = self.folder / f"damaged-{step}"
                if aside.exists():
                    shutil.rmtree(aside)
                (self.folder / str(step)).rename(aside)

    def intact(self, step: int) -> bool:
        """Whether a checkpoint has exactly the files that were written, bit for bit."""
        folder = self.folder / str(step)
        try:
            return (folder / SUMS).read_text() == _sums(folder)
        except (OSError, UnicodeDecodeError):
            return False

    def checked(self) -> dict[int, bool]:
        """{step: whether it is intact}, without those that are pruned meanwhile."""
        found, listed = {}, self.steps()
        while new := [step for step in listed if step not in found]:
            found |= {step: self.intact(step) for step in new}
            listed = self.steps()
        return {step: found[step] for step in listed}

    def scores(self) -> list[dict]:
        """The validations that the checkpoints hold, as lines of metrics.jsonl."""
        lines = []
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError, RecursionError):
                values = json.loads((self.folder / str(step) / SCORES).read_text())
                lines += [{"step": step, "valid": values}] if isinstance(values, dict) else []
        return lines

    def first(self, order: Callable[[list[int]], list[tuple[int, str]]], template) -> tuple | None:
        """(step, state) of the first intact and finite checkpoint in a given order; None: no such.

        order: `order(steps)` gives steps with their names. A warning names each one that is passed
            over.

        If a process that trains prunes the checkpoint being read, the folder is listed again.
        Raises ValueError for a checkpoint of another run, or one that does not fit the template.
        """
        passed: set[int] = set()
        for _ in range(LISTINGS):
            left = [step for step in self.steps() if step not in passed]
            for step, name in order(left):
                before = self._identity(step)
                state, wrong = self._read(step, template)
                if before is None or self._identity(step) != before:
                    break  # pruned meanwhile: what was read is void
                if isinstance(wrong, Exception):
                    raise ValueError(
                        f"the checkpoint of step {step} in {self.folder} {wrong}"
                    ) from wrong
                if wrong is None:
                    return step, state
                say(f"warning: {name} of step {step} in {self.folder} {wrong}; trying the next")
                passed.add(step)
            else:
                return None
        raise ValueError(
            f"the checkpoints in {self.folder} are replaced faster than they can be read: try again"
        )

    def _identity(self, step: int) -> tuple[int, int] | None:
        try:
            found = (self.folder / str(step)).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _read(self, step: int, template) -> tuple:
        """(state, None) or (None, what is wrong): words for damage, an exception for a misfit."""
        if not self.intact(step):
            return None, "is damaged"
        try:
            self._check_run(step)
            state = self.restore(step, template)
        except (_Misfit, MemoryError, jax.errors.JaxRuntimeError) as e:  # no damage
            _hush_tasks()
            return None, e
        except Exception as e:  # Orbax raises anything for odd files and vanished ones
            _hush_tasks()
            return None, f"cannot be read ({' '.join(f'{type(e).__name__}: {e}'.split())[:200]})"
        leaf = not_finite(state)
        return state, leaf and f"holds numbers in {leaf} that are not finite"

    def _check_run(self, step: int) -> None:
        path = self.folder / str(step) / RUN  # versions before this one wrote none
        if self.run and path.exists() and path.read_text().strip() != self.run:
            raise _Misfit(
                "is of another run than the run.json beside it: put back the one that belongs to "
                "the other"
            )

    def restore(self, step: int, template):
        """The state of an intact checkpoint, placed like the template; ValueError for a misfit."""
        path = (self.folder / str(step)).absolute()
        with quiet():
            tree = self._orbax.metadata(path).item_metadata.tree
            if not jax.tree.leaves(tree):
                raise OSError("it lists no arrays")
            if words := difference(template, tree):
                raise _Misfit(f"does not fit this version's model: {words}")
            return self._orbax.restore(path, template)


def newest(steps: list[int], at_most: int | None = None) -> list[tuple[int, str]]:
    """An order for `Checkpoints.first`: from the newest down, or from the newest up to a step."""
    return [
        (step, "the checkpoint") for step in reversed(steps) if at_most is None or step <= at_most
    ]
