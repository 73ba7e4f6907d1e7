"""What almost every script does with data and runs: load a set, train several seeds, read weights and curves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aigc_jax import data, train
from aigc_jax.core import EMA
from experiments._rows import DataError


@dataclasses.dataclass(frozen=True)
class Source:
    """The data set of an experiment."""

    name: str = "digits"
    # Of its original files; default: AIGC_DATA, a prepared copy, the network.
    folder: str | None = None
    size: int | None = None  # of images:FOLDER: pictures are resized and cut to size x size
    # Of text: characters, bpe:N, a tokenizer.json, a GPT-2 folder; "": the script's.
    tokenizer: str = ""

    @property
    def pictures(self) -> bool:
        """Whether these are the user's own pictures."""
        return self.name.startswith(("images:", "pairs:"))

    def load(self, split: str, **options) -> data.Data:
        """Loads a split. Raises DataError where the data are not there or cannot be used."""
        if self.size is not None:
            options["size"] = self.size
        if self.tokenizer:
            options["tokenizer"] = self.tokenizer
        try:
            return data.load(self.name, split, folder=self.folder, **options)
        except (ValueError, OSError) as e:
            raise DataError(str(e)) from e


def arrays(source: data.Data) -> dict[str, np.ndarray]:
    """Returns all arrays of a finite set that is held in memory, by name: `image`, `label` ..."""
    if source.resident is None:
        name = (source.info.source or {}).get("name", "this set")
        words = "take a smaller set, or for synthetic points examples=N"
        raise DataError(f"{name} is not held in memory: {words}")
    return source.resident[0]


def seeded(run: train.Run, seeds: int) -> list[train.Run]:
    """Returns the run with `seeds` seeds, counted from run.seed.

    Of several, each has its own folder below run.folder. They train one after another: on two
    cores, ten seeds at once (vmap) cost as much as ten runs.
    """
    if not 1 <= seeds <= 1000:
        raise ValueError(f"seeds must lie in 1..1000, got {seeds}")
    if seeds == 1:
        return [run]
    folder = Path(run.folder)
    return [
        dataclasses.replace(run, seed=s, folder=str(folder / f"seed{s}"))
        for s in range(run.seed, run.seed + seeds)
    ]


def change(setup, fields: Mapping[str, Any]):
    """Returns a setup with other values of some fields: "run.steps" is the field `steps` of `run`.

    All fields of one dataclass change at once, so that its checks see all new values.
    """
    direct, inner = {}, {}
    for name, value in fields.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            direct[first] = value
    deeper = {first: change(getattr(setup, first), some) for first, some in inner.items()}
    return dataclasses.replace(setup, **direct, **deeper)


def weights(result: train.Result):
    """Returns the parameters that evaluate and sample: the average (EMA) where the config has one."""
    return EMA(result.config.ema).read(result.state)


def history(folder, name: str, kind: str = "valid") -> tuple[np.ndarray, np.ndarray]:
    """Returns (updates, values) of a metric in a run folder's metrics.jsonl.

    kind: "valid" for values of the validations, "train" for those of single updates.
    """
    lines = [line for line in train.metrics(folder) if name in line.get(kind, {})]
    steps, values = ([line["step"] for line in lines], [line[kind][name] for line in lines])
    return np.array(steps), np.array(values, float)


def clock(folder, measure: Callable | None = None) -> Callable:
    """Returns an `on_eval` that reports the minutes of the run, and what `measure` reports.

    The minutes include compiling and validating, and those before a stop up to its last
    measurement. The time that `measure` takes is left out.
    """
    _, before = history(folder, "minutes")
    begin = time.monotonic() - 60 * max(before, default=0.0)
    paused = 0.0

    def on_eval(family, state, step):
        nonlocal paused
        now = time.monotonic()
        found = (measure(family, state, step) if measure else None) or {}
        minutes = np.float32((now - begin - paused) / 60)
        paused += time.monotonic() - now
        return {**found, "minutes": minutes}

    return on_eval


def parameters(result: train.Result) -> int:
    """Returns how many parameters a model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(result.state.params))


def at_least(setup, reason: str = "", *, prefix: str = "", **least) -> None:
    """Raises ValueError for a field of a setup that is below its least value.

    reason: why, in words. prefix: of the flag, for a dataclass within a setup, such as "model.".
    """
    for field, low in least.items():
        if (value := getattr(setup, field)) < low:
            name = f"{prefix}{field}"
            flag = name.replace("_", "-")
            needs = f", {reason}" if reason else ""
            raise ValueError(f"{name} must be at least {low}{needs}, got {value} (--{flag})")
