"""`python -m aigc_jax sample | info | replay`: what one does with a run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from . import data, figures, train
from .train import folder as folders
from .train.checkpoints import Checkpoints

Folder = tyro.conf.Positional[Path]


def sample(run_folder: Folder, /, *, out: Path, n: int = 64, seed: int = 0, chunk: int = 256) -> None:
    """Draws n samples from a run and writes them as a picture.

    Args:
        run_folder: what a training run wrote.
        out: the picture, a .png file.
        n: how many.
        seed: of the samples; not the run's.
        chunk: how many at once; the samples depend on it.
    """
    if out.suffix.lower() != ".png" or not out.parent.is_dir() or out.is_dir():
        raise train.Refused(f"--out must name a .png file in a folder that exists, got {out}")
    if not 0 <= seed < 2**32:
        raise train.Refused(f"seed must lie in 0..2**32 - 1, got {seed}")
    result = train.load(run_folder)
    samples = train.sample(result, jax.random.split(jax.random.key(seed), 4)[3], n=n, chunk=chunk)
    new = out.with_name(f".{out.name}.new")
    try:
        if result.info.kind == "image":
            figures.save_images(new, samples)
        elif result.info.kind == "points" and samples.shape[1] == 2:
            fig, ((ax,),) = figures.figure(1, 1, size=(5, 5))
            figures.points(ax, samples, title=f"{n} samples")
            figures.save(fig, new, f"{run_folder}, step {int(result.state.step)}", kind="png")
        else:
            raise train.Refused(
                f"{run_folder} makes {result.info.kind} of shape {samples.shape[1:]}: no picture for these"
            )
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    best = folders.read(run_folder)["run"].get("best")
    chosen = f" (lowest {best} of those kept)" if best else ""
    print(f"wrote {n} samples of step {int(result.state.step)}{chosen} to {out}")


def info(run_folder: Folder, /) -> None:
    """Says what a run folder holds: model, data, progress, checkpoints.

    Args:
        run_folder: what a training run wrote.
    """
    record = folders.read(run_folder)
    saves = Checkpoints(run_folder, 1)
    lines = train.metrics(run_folder)
    last = {kind: next((r for r in reversed(lines) if kind in r), None) for kind in ("train", "valid")}
    source = record["data"]["source"] or "arrays"
    print(f"model    {'.'.join(record['make'])}")
    print(f"config   {json.dumps(record['config'])}")
    print(f"data     {json.dumps(source)}, {record['data']['examples'] or 'endless'} examples")
    print(f"run      seed {record['run']['seed']}, batch {record['run']['batch_size']}, {record['run']['steps']} steps")
    print(f"made on  {', '.join(f'{k} {v}' for k, v in record['environment'].items() if v)}")
    for kind, line in last.items():
        if line:
            values = "  ".join(f"{name} {value:.5g}" for name, value in line[kind].items() if value is not None)
            print(f"{kind:8} step {line['step']}: {values}")
    for step in saves.steps():
        print(f"saved    step {step}{'' if saves.intact(step) else '  DAMAGED: it will be passed over'}")
    saves.close()


def replay(
    run_folder: Folder, /, *, step: int, data_folder: Annotated[str | None, tyro.conf.arg(name="data.folder")] = None
) -> None:
    """Repeats one update of a run, bit for bit, and prints its metrics and norms.

    Args:
        run_folder: what a training run wrote.
        step: the number of the update, as messages and metrics.jsonl give it.
        data_folder: where the set's original files lie, if it needs any.
    """
    source = folders.read(run_folder)["data"]["source"]
    if source is None:
        raise train.Refused(
            f"{run_folder} was trained on arrays, which no name brings back: call train.replay(folder, data, step=...)"
        )
    options = {name: value for name, value in source.items() if name not in ("name", "split")}
    training = data.load(source["name"], source["split"], folder=data_folder, **options)
    values, facts = train.replay(run_folder, training, step=step)
    print(f"update {step} of {run_folder}")
    for name, value in values.items():
        print(f"  {name:24} {value!r}{'' if np.isfinite(value) else '   <- not finite'}")
    for module, before in facts["norm_before"].items():
        print(f"  |{module}|".ljust(26), f"{before!r} -> {facts['norm_after'][module]!r}")
    if "rows" in facts:
        print(f"  rows of the set: {' '.join(map(str, facts['rows']))}")


def main() -> None:
    """The command line: one line and exit code 2 for a user's mistake."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"sample": sample, "info": info, "replay": replay}, prog="python -m aigc_jax", description=__doc__
        )
    except (train.Refused, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e


if __name__ == "__main__":
    main()
