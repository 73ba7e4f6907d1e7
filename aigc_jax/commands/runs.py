"""The commands info, evaluate, export and replay, which take a run folder."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from .. import data, train
from ..train import folder as folders
from ..train import weights
from ..train.checkpoints import Checkpoints
from ..train.log import finite
from .shared import Folder, Trust, load_run, trusted


def info(run_folder: Folder, /) -> None:
    """Prints what a run folder holds: model, data, progress, checkpoints.

    Args:
        run_folder: what a training run wrote, or the name of a model that comes with the package.
    """
    if not run_folder.exists() and str(run_folder) in train.shipped():
        return _shipped_info(str(run_folder))
    record = folders.read(run_folder)
    lines = train.metrics(run_folder)
    last = {
        kind: next((r for r in reversed(lines) if kind in r), None) for kind in ("train", "valid")
    }
    source, run = record["data"]["source"] or "arrays", record["run"]
    if words := folders.edited(run_folder, record):
        print(f"EDITED   {words}")
    print(f"model    {'.'.join(record['make'])}")
    print(f"config   {json.dumps(record['config'])}")
    print(f"data     {json.dumps(source)}, {record['data'].get('examples') or 'endless'} examples")
    print(f"run      seed {run['seed']}, batch {run['batch_size']}, {run['steps']} steps")
    print(f"made on  {', '.join(f'{k} {v}' for k, v in record['environment'].items() if v)}")
    for kind, line in last.items():
        if line:
            values = "  ".join(
                f"{name} {value:.5g}" for name, value in line[kind].items() if value is not None
            )
            print(f"{kind:8} step {line['step']}: {values}")
    saves = Checkpoints(run_folder, 1)
    for step, intact in saves.checked().items():
        print(f"saved    step {step}{'' if intact else '  DAMAGED: it will be passed over'}")
    saves.close()


def _shipped_info(name: str) -> None:
    """Prints what the header of a shipped model holds."""
    file = weights.file_of(name)
    about = weights.header(file)
    record = json.loads(about.pop("record"))
    source = record["data"]["source"] or "arrays"
    print(f"model    {'.'.join(record['make'])}")
    print(f"config   {json.dumps(record['config'])}")
    print(f"data     {json.dumps(source)}, {record['data'].get('examples') or 'endless'} examples")
    print(f"made on  {', '.join(f'{k} {v}' for k, v in record['environment'].items() if v)}")
    print(f"file     {file}, {file.stat().st_size:,} bytes, step {record['step']}")
    for what, text in about.items():
        print(f"{what:8} {text}")


DataFolder = Annotated[str | None, tyro.conf.arg(name="data.folder")]


def load_source(
    run_folder: Path, which: str, folder: str | None, split: str | None = None
) -> data.Data:
    """Loads the set that a run recorded; with `split` another part of it."""
    record = folders.read(run_folder)[which]
    source = record["source"]
    if source is None:
        raise train.Refused(
            f"{run_folder} was made with arrays, which no name brings back: give them to "
            "train.replay, train.evaluate or train.plan"
        )
    if not isinstance(source, dict) or not all(
        isinstance(source.get(name), str) for name in ("name", "split")
    ):
        raise train.Refused(
            f"{run_folder}/run.json is damaged: a data source has a name and a split, not "
            f"{source!r}"
        )
    options = {name: value for name, value in source.items() if name not in ("name", "split")}
    as_windows = split is not None and options.get("stride") == 0
    same = split in (None, source["split"]) and not as_windows
    # The run keeps its tokenizer, wherever the file went since. The default one of pairs is made
    # from the captions in the folder, and that of texts from the text. Both may have changed.
    kept = run_folder / "tokenizer.json"
    own_words = source["name"].startswith("pairs:") and kept.is_file()
    default = options.get("tokenizer", "char") == "char"
    if own_words or not default or ("tokenizer" in options and not same):
        options["tokenizer"] = str(kept)
    try:
        if as_windows:  # random crops have no end; windows score each token once
            options["stride"] = options["length"]
        found = data.load(
            source["name"], source["split"] if split is None else split, folder=folder, **options
        )
    except (AttributeError, KeyError, TypeError, ArithmeticError, MemoryError) as e:
        cause = f"{type(e).__name__}: {e}".splitlines()[0]
        raise train.Refused(
            f"{run_folder}/run.json does not describe a data set that can be loaded: {cause}"
        ) from e
    if same and found.info.fingerprint != record["fingerprint"]:
        raise train.Refused(
            f"{source['name']} {source['split']} is not what {run_folder} was made with: "
            f"its fingerprint is "
            f"{found.info.fingerprint[:8]}, not {record['fingerprint'][:8]}"
        )
    return found


def evaluate(
    run_folder: Folder,
    /,
    *,
    split: str | None = None,
    batch_size: int = 500,
    seed: int = 0,
    data_folder: DataFolder = None,
    trust: Trust = (),
) -> None:
    """Prints the scores of a run on its validation set, or on another part of its data.

    Args:
        run_folder: what a training run wrote.
        split: a part of the training set's source, such as test or "train[90%:]"; by default the
            validation set.
        batch_size: examples at once.
        seed: of the noise.
        data_folder: where the set's original files lie, if it needs any. Or, with --split
            validation, another text, which is scored by the run's own tokenizer.
        trust: as for sample.
    """
    record = folders.read(run_folder)
    if split is None and record["valid"] is None:
        raise train.Refused(
            f"{run_folder} was trained without a validation set: name a part of its data with "
            "--split"
        )
    scored = load_source(run_folder, "valid" if split is None else "data", data_folder, split)
    result = load_run(run_folder, trust)
    values = train.evaluate(result, scored, batch_size=batch_size, seed=seed)
    name, part = (scored.info.source[key] for key in ("name", "split"))
    print(
        f"step {int(result.state.step)} of {run_folder} on {name} {part}, {scored.info.examples} "
        "examples"
    )
    for quantity, value in values.items():
        print(f"  {quantity:24} {value:.6g}")


def export(run_folder: Folder, out: Folder, /, *, trust: Trust = ()) -> None:
    """Writes the weights that sampling uses (the average if there is one) as a .safetensors file.

    Names are paths in the State's `ema`, joined by dots. Without an average they are paths in
    `params`, and in `extra` under that name. The metadata hold make, config and step as text.

    Args:
        run_folder: what a training run wrote.
        out: the file.
        trust: as for sample.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if out.suffix != ".safetensors" or not out.parent.is_dir() or out.is_dir():
        raise train.Refused(f"{out} must be a .safetensors file in a folder that exists")
    result, record = load_run(run_folder, trust), folders.read(run_folder)
    averaged = result.state.ema is not None
    tree = result.state.ema if averaged else result.state.params
    trees = (
        {"": tree}
        if averaged or result.state.extra is None
        else {"": tree, "extra.": result.state.extra}
    )
    tensors: dict[str, np.ndarray] = {}
    for prefix, part in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(part)):
            name = prefix + jax.tree_util.keystr(path, simple=True, separator=".")
            if name in tensors:
                raise train.Refused(
                    f"two arrays of {run_folder} would be named {name}: a module's name holds a dot"
                )
            tensors[name] = np.asarray(leaf, order="C")
    about = {
        "make": ".".join(record["make"]),
        "config": json.dumps(record["config"]),
        "step": str(result.state.step),
    }
    new = out.with_name(f".{out.name}.new")
    try:
        save_file(tensors, new, metadata={**about, "averaged": str(averaged)})
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(out)
    except (OSError, SafetensorError) as e:
        raise train.Refused(f"{out} cannot be written: {e}") from e
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
    numbers = sum(x.size for x in tensors.values())
    print(
        f"wrote {len(tensors)} arrays, {numbers} numbers, of step {int(result.state.step)} to {out}"
    )


def replay(
    run_folder: Folder, /, *, step: int, data_folder: DataFolder = None, trust: Trust = ()
) -> None:
    """Repeats one update of a run, bit for bit, and compares it with metrics.jsonl.

    Args:
        run_folder: what a training run wrote.
        step: the number of the update, as messages and metrics.jsonl give it.
        data_folder: where the set's original files lie, if it needs any.
        trust: as for sample.
    """
    source = load_source(run_folder, "data", data_folder)
    values, facts = train.replay(run_folder, source, step=step, trust=trusted(trust))
    print(f"update {step} of {run_folder}")
    for name, value in values.items():
        print(f"  {name:24} {value!r}{'' if np.isfinite(value) else '   <- not finite'}")
    print(f"  {_agreement(values, facts['logged'])}")
    for module, before in facts["norm_before"].items():
        print(f"  |{module}|".ljust(26), f"{before!r} -> {facts['norm_after'][module]!r}")
    if "rows" in facts:
        print(f"  rows of the set: {' '.join(map(str, facts['rows']))}")


def _agreement(values: dict, logged: dict | None) -> str:
    """Says how a repeated update agrees with what its run logged."""
    if logged is None:
        return "metrics.jsonl holds no line of this step: nothing to compare with"
    ours = finite(values)
    other = [name for name in {**logged, **ours} if ours.get(name) != logged.get(name)]
    if not other:
        return "equal to metrics.jsonl in every bit"
    words = []
    for name in other:
        pair = (logged.get(name), ours.get(name))
        size = (
            f" ({abs(pair[1] - pair[0]):.3g} apart)"
            if all(isinstance(x, float) for x in pair)
            else ""
        )
        words.append(f"{name} was {pair[0]!r} and is {pair[1]!r}{size}")
    return f"NOT as in metrics.jsonl: {'; '.join(words)}"
