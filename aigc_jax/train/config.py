"""What a run is (`Run`), what it gives back (`Result`), and how it may fail."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core import Family, State, check_at_least, check_fields
from ..data import Info


class NonFinite(FloatingPointError):
    """A loss or gradient is not finite; the message names the step and how to repeat it."""


@dataclass(frozen=True)
class Run:
    """One training run: its folder, its length, and how often it reports and saves."""

    folder: str = ""  # everything about the run is kept here; "": nothing is kept
    steps: int = 1000  # length of the whole run
    batch_size: int = 128  # examples per step, over all devices
    seed: int = 0
    eval_every: int = 0  # steps between validations; 0: at the end only
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    log_every: int = 50  # steps between lines of metrics.jsonl
    keep: int = 2  # newest checkpoints kept
    best: str = ""  # a validation value, better when low: its lowest checkpoint is kept and loaded
    steps_per_call: int = 1  # updates per compiled call; 1 for convolutional nets on the CPU
    devices: int = 0  # 0: all
    # Devices that share each layer (tensor parallel); their groups divide the batch.
    tensor: int = 1
    coordinator: str = ""  # of several processes: host:port of process 0, or auto (Slurm, TPU pods)
    processes: int = 1  # how many processes train together, each started with the same flags
    process: int = 0  # the number of this one, from 0
    pmap: bool = False  # each device computes its rows with its own noise (jax.shard_map)
    init: str = ""  # a run folder whose parameters this run starts from

    def __post_init__(self):
        for field in ("folder", "init"):
            object.__setattr__(self, field, os.path.expanduser(getattr(self, field) or ""))
        check_fields(self, name="run")
        check_at_least(self, 0, "seed", "eval_every", "save_every", "devices", name="run")
        check_at_least(
            self,
            1,
            "steps",
            "batch_size",
            "log_every",
            "keep",
            "steps_per_call",
            "tensor",
            name="run",
        )
        self._check_processes()
        if self.seed >= 2**32:
            raise ValueError(f"run.seed must be below 2**32, got {self.seed}")

    def _check_processes(self) -> None:
        check_at_least(self, 1, "processes", name="run")
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"run.process must be in 0..{self.processes - 1} (run.processes is "
                f"{self.processes}), got {self.process}"
            )
        if self.processes > 1 and not re.fullmatch(r"auto|.+:\d+", self.coordinator):
            raise ValueError(
                "several processes need run.coordinator, host:port of process 0 or auto, got "
                f"{self.coordinator!r}"
            )


class Result(NamedTuple):
    """A trained model.

    Use it as `train.sample(result, key, n=64)`, or take its parameters into a function of the
    family: `vae.decode(result.config, result.state.params, z)`.
    """

    family: Family
    state: State
    config: Any
    info: Info  # of the training data
    folder: Path | None

    def __repr__(self):
        kind, leaves = type(self.config), jax.tree.leaves(self.state.params)
        count = sum(math.prod(np.shape(leaf)) for leaf in leaves)
        donated = isinstance(self.state.step, jax.Array) and self.state.step.is_deleted()
        size = f"step {'?' if donated else self.state.step}, {count:,} parameters"
        return f"Result({kind.__module__}.{kind.__qualname__}, {size}, folder {self.folder})"
