"""Checkpoints of one run folder: Orbax writes them, sha256 sums guard them, the last few and the best are kept.

A finished checkpoint is the folder checkpoints/<step>, renamed into place once its sums are written; whatever else lies
there is what a crash left, and is cleared away. Orbax itself restores a flipped bit as wrong weights without a word,
so the sums are checked before it is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp

SUMS = "SHA256SUMS"  # the format of coreutils: `sha256sum -c SHA256SUMS` inside the folder agrees


class SaveFailed(OSError):
    """A checkpoint could not be written; the message names the last one that stands."""


def say(line: str) -> None:
    """One line for the person who watches."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet():
    """Orbax reports through absl, and its lost tasks through asyncio, what our own one-line messages say better."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def nothing(record):  # one filter a use: saves in the background overlap with restores
        return False

    for logger in loggers:
        logger.addFilter(nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)


def difference(here, there) -> str | None:
    """The first leaf in which two trees differ in shape, in words; None where they fit."""
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


def _sums(folder: Path) -> str:
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS):
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n")
    return "".join(lines)


def _durable(path: Path) -> None:
    """The names in a folder survive a power cut only once the folder itself is written."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _hush(told) -> None:
    """After a failed save tensorstore's threads still call an event loop that Orbax closed: noise after our line."""
    if not (isinstance(told.exc_value, RuntimeError) and "Event loop is closed" in str(told.exc_value)):
        sys.__unraisablehook__(told)


class Checkpoints:
    """The checkpoints under `folder`; one save at a time, in the background."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder / "checkpoints", keep
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _hush
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future | None = None
        self._failed = False

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first; not yet checked."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir())

    def save(self, step: int, state, best: int | None = None) -> None:
        """Copies the state to the host and writes it in the background; `best` names a step that is kept besides.

        Raises SaveFailed, here or in `wait`, where this or the save before it could not be written.
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
        self._saving = self._thread.submit(self._finish, step, raw, best)

    def _finish(self, step: int, raw: Path, best: int | None) -> None:
        with quiet():
            try:
                self._orbax.wait_until_finished()
                if jax.process_index() == 0:
                    with open(raw / SUMS, "w") as file:
                        file.write(_sums(raw))
                        file.flush()
                        os.fsync(file.fileno())
                    raw.rename(self.folder / str(step))
                    _durable(self.folder)
                    for old in self.steps()[: -self.keep]:
                        if old not in (0, best):  # 0: a warm start, without which no update could be replayed
                            gone = self.folder / f"saving-{old}-old"  # first out of the numbers, then away
                            (self.folder / str(old)).rename(gone)
                            shutil.rmtree(gone)
            except Exception as e:
                self._fail(step, e)

    def _fail(self, step: int, cause: Exception):
        for name in ("absl", "asyncio"):  # threads and tasks of the failed save, which speak when it is over
            logging.getLogger(name).addFilter(lambda record: False)
        self._failed = True
        with contextlib.suppress(OSError):
            self.clear()
        last = next((s for s in reversed(self.steps()) if s != step and self.intact(s)), None)
        stands = f"the checkpoint of step {last} stands" if last is not None else "there is no earlier one"
        reason = next((part for part in reversed(str(cause).splitlines()) if part.strip()), type(cause).__name__)
        raise SaveFailed(f"step {step} could not be saved in {self.folder}: {reason[:200]}; {stands}") from cause

    def wait(self) -> None:
        """Returns when the save under way is finished; raises SaveFailed if it was not."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits and frees the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with quiet():
                self._orbax.close()
            for _ in range(
                50 if self._failed else 0
            ):  # tensorstore's threads outlive a failed save, and may still write
                with contextlib.suppress(OSError):
                    self.clear()
                if not list(self.folder.glob("saving-*")):
                    break
                time.sleep(0.1)

    def clear(self) -> None:
        """Removes what unfinished saves left."""
        for path in self.folder.glob("saving-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def open(self, last: int | None) -> None:
        """Readies the folder to train on from checkpoint `last`: what lies beyond was passed over, and is set aside.

        Under its number a damaged checkpoint would count among the newest that are kept, in place of a good one.
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
        """Whether the files of a checkpoint are those that were written, no more, no less, bit for bit."""
        folder = self.folder / str(step)
        try:
            return (folder / SUMS).read_text() == _sums(folder)
        except (OSError, UnicodeDecodeError):
            return False

    def newest(self, *, at_most: int | None = None) -> int | None:
        """The newest intact checkpoint; damaged ones are passed over with a line each."""
        for step in reversed(self.steps()):
            if at_most is None or step <= at_most:
                if self.intact(step):
                    return step
                say(f"warning: the checkpoint of step {step} in {self.folder} is damaged; trying the one before")
        return None

    def restore(self, step: int, template):
        """The state of an intact checkpoint, placed as the template says; ValueError where it does not fit."""
        path = (self.folder / str(step)).absolute()
        with quiet():
            if words := difference(template, self._orbax.metadata(path).item_metadata.tree):
                raise ValueError(words)
            return self._orbax.restore(path, template)
