"""Progress of a run: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS = 10.0  # between plain lines
T = TypeVar("T")


def counted(what: str, items: Iterable[T]) -> Iterator[T]:
    """Yields the items, and prints "sampling: 3/10" on stderr every SECONDS."""
    last_line = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last_line > SECONDS and jax.process_index() == 0:
            last_line = time.monotonic()
            with contextlib.suppress(OSError):  # the terminal is gone
                print(f"{what}: {done}/{len(items)}", file=sys.stderr, flush=True)


def _words(values: dict) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _pace(steps: int, seconds: float) -> str:
    """The rate of `steps` updates in so many seconds, in words; empty before the first."""
    if steps < 1 or seconds <= 0:
        return ""
    rate = steps / seconds
    if rate < 1:
        return f"{1 / rate:.1f} s/step  "
    return f"{rate:.{0 if rate >= 10 else 1}f} steps/s  "


class Progress:
    """Shows the rate and the time left of a loop of `total` steps that starts at `start`."""

    def __init__(self, total: int, start: int):
        console = Console(stderr=True)
        self.silent = jax.process_index() != 0
        self.total, self.start, self.begin, self.last_line = total, start, None, time.monotonic()
        self.values: dict = {}
        self.bar = None
        if console.is_terminal and not self.silent:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task("compiling", total=total, completed=start)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            with contextlib.suppress(OSError):  # the terminal was closed
                self.bar.stop()

    def show(self, step: int, values: dict) -> None:
        """Keeps the newest training metrics for the next line."""
        self.values = values

    def note(self, step: int, values: dict) -> None:
        """Prints a validation as a line that stays."""
        self._line(f"step {step}/{self.total}  validation: {_words(values)}")

    def step(self, step: int) -> None:
        """Shows that `step` updates are done."""
        now = time.monotonic()
        if self.begin is None:  # the first call compiled; the rate counts from here
            self.begin, self.start = now, step
        done, seconds = step - self.start, now - self.begin
        pace = _pace(done, seconds)
        loss = _words({name: v for name, v in self.values.items() if name.endswith("loss")})
        if self.bar:
            self.bar.update(self.task, completed=step, description=pace + loss)
        elif now - self.last_line > SECONDS:
            self.last_line = now
            left = f"{seconds / done * (self.total - step):.0f} s left  " if pace else ""
            self._line(f"step {step}/{self.total}  {pace}{left}{loss}".rstrip())

    def _line(self, text: str) -> None:
        if self.silent:
            return
        with contextlib.suppress(OSError):  # the terminal is gone: the training goes on
            if self.bar:
                self.bar.console.print(text, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)
