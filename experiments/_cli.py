"""What the scripts share: flags, rows, records. A script is a module with

SCALES      {"smoke": Setup, "cpu": Setup, "paper": Setup}: a frozen dataclass; its fields are the flags
DIFFERENCE  {scale: how this scale differs from the paper's protocol}; "" where it does not
CRITERIA    {quantity: (what must hold, as words; the same as a function of ours)}; a quantity that a run did not
            come to is a row of NOT_REACHED, and fails; one without a row is shown as not measured
INVARIANTS  the same for scale smoke, where a run is too short for the criteria; a failing one is exit code 1
rows(setup, folder) -> list of Row: trains, draws its figures into the folder, measures

`python -m experiments.<name>` runs it at scale cpu; --scale first, other flags override.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.console import Console
from rich.table import Table

from aigc_jax import data, train
from aigc_jax.train import folder as folders
from aigc_jax.train.folder import environment, write_json

NOT_REACHED = "not reached"
ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = ROOT / "results", ROOT / "docs" / "reproduction.md"


class Row(NamedTuple):
    """One line of the results table; numbers in the unit that the quantity names."""

    quantity: str
    ours: float | str | None
    paper: float | str | None = None
    error: float | None = None  # standard error over seeds, or of the estimate (the quantity says which)
    oracle: float | str | None = None  # what exact mathematics says, where it says something


@dataclasses.dataclass(frozen=True)
class Source:
    """The data set of an experiment."""

    name: str = "digits"
    folder: str | None = None  # where its original files lie; else AIGC_DATA, a prepared copy, the network
    tokenizer: str = ""  # of text: characters, bpe:N, a tokenizer.json or a folder with GPT-2's files; "": the script's

    def load(self, split: str, **options) -> data.Data:
        if self.tokenizer:
            options["tokenizer"] = self.tokenizer
        return data.load(self.name, split, folder=self.folder, **options)


@contextlib.contextmanager
def door() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; whatever else goes wrong keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise SystemExit(_error(e, 2)) from e


def _error(e: BaseException, code: int) -> int:
    print(f"error: {e}", file=sys.stderr)
    return code


def verdict(row: Row, criteria: dict) -> str:
    """Whether a row's criterion holds, with its words; empty where it has none."""
    if row.quantity not in criteria:
        return ""
    words, holds = criteria[row.quantity]
    if row.ours is None:
        return f"not measured: {words}"
    if row.ours == NOT_REACHED:
        return f"FAILS: {words}"
    return f"{'holds' if holds(row.ours) else 'FAILS'}: {words}"


def mean_and_error(values) -> tuple[float, float | None]:
    """Mean and standard error over seeds; no error from one seed."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def seeded(run: train.Run, seeds: int) -> list[train.Run]:
    """The same run with `seeds` seeds from run.seed on; of several each has its own folder below run.folder.

    One after another: on two cores ten seeds at once (vmap) cost as much as ten runs.
    """
    if seeds == 1:
        return [run]
    folder = Path(run.folder)
    return [
        dataclasses.replace(run, seed=s, folder=str(folder / f"seed{s}")) for s in range(run.seed, run.seed + seeds)
    ]


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()


def _show(name: str, scale: str, rows: list[Row], verdicts: list[str], difference: str) -> None:
    table = Table(title=f"{name} ({scale}{': ' + difference if difference else ''})", title_justify="left")
    columns = {
        "quantity": [row.quantity for row in rows],
        "paper": [number(row.paper) for row in rows],
        "ours": [number(row.ours) for row in rows],
        "+-": [number(row.error) for row in rows],
        "oracle": [number(row.oracle) for row in rows],
        "verdict": verdicts,
    }
    shown = {column: cells for column, cells in columns.items() if set(cells) - {"-", ""}}
    for column in shown:
        table.add_column(column)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def number(value: Any) -> str:
    """A number for a table: four digits, a whole one all of its own, or a dash."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}"


def main(name: str) -> None:
    """Runs experiments.<name> with the flags of this process."""
    # The script's importable twin, so that a run folder can name what made it.
    script = importlib.import_module(f"experiments.{name}")
    first = argparse.ArgumentParser(add_help=False, prog=f"python -m experiments.{name}")
    first.add_argument("--scale", choices=tuple(script.SCALES), default="cpu")
    first.add_argument("--record", action="store_true")
    choice, flags = first.parse_known_args()
    scales = ",".join(script.SCALES)
    about = f"{script.__doc__}\n--scale {{{scales}}} (default cpu); --record keeps the rows in results/."
    with door():
        setup = tyro.cli(type(script.SCALES[choice.scale]), default=script.SCALES[choice.scale], args=flags,
                         description=about, prog=f"python -m experiments.{name}")  # fmt: skip
    if choice.record:
        commit = recordable(choice.scale, flags)
    if jax.config.jax_compilation_cache_dir is None:  # a second start compiles nothing
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "aigc_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

    with door():
        if not getattr(setup, "run", setup).folder:
            raise ValueError("an experiment needs a folder to write to (--run.folder, or --folder)")
        folder = Path(getattr(setup, "run", setup).folder)
        if choice.record:
            check_began_at(commit, folder)
    begin, continued = time.monotonic(), folder.exists()
    try:
        rows = script.rows(setup, folder)
    except train.Refused as e:
        raise SystemExit(_error(e, 2)) from e
    except (train.NonFinite, OSError) as e:  # SaveFailed, or a figure that could not be written
        raise SystemExit(_error(e, 1)) from e
    criteria = script.INVARIANTS if choice.scale == "smoke" else script.CRITERIA
    source = getattr(setup, "data", Source())
    if ":" in source.name or source.tokenizer:  # they are of named sets: one's own text may well be harder
        criteria = {}
    rows += [Row(quantity, None) for quantity in criteria if quantity not in {row.quantity for row in rows}]
    verdicts = [verdict(row, criteria) for row in rows]
    seconds = round(time.monotonic() - begin, 1)
    # Flags that change what is compared; the record says the data set and the seeds by themselves.
    changed = without(flags, "--run.folder", "--folder", "--data.folder", "--data.name", "--seeds")
    difference = "; but with ".join(words for words in (script.DIFFERENCE[choice.scale], " ".join(changed)) if words)
    _show(name, choice.scale, rows, verdicts, difference)
    result = {
        "name": name,
        "title": script.__doc__.splitlines()[0],
        "command": command(name, choice.scale, flags),
        "scale": choice.scale,
        "difference": difference,
        "data": setup.data.name if hasattr(setup, "data") else None,
        "seeds": getattr(setup, "seeds", 1),
        "seconds": seconds,
        "continued": continued,
        "environment": environment(),
        "rows": [{**row._asdict(), "verdict": said} for row, said in zip(rows, verdicts, strict=True)],
    }  # fmt: skip
    try:
        write_json(folder / "rows.json", result)
    except OSError as e:
        raise SystemExit(_error(e, 1)) from e
    print(f"{seconds} s; figures and rows in {folder}/")
    if choice.record:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{name}.json", {**result, "commit": commit})
        write_table()
        print(f"recorded in results/{name}.json and docs/reproduction.md")
    if choice.scale == "smoke" and any(v.startswith(("FAILS", "not measured")) for v in verdicts):
        raise SystemExit(1)


def without(flags: list[str], *names: str) -> list[str]:
    """The flags but for those named, their values included."""
    kept, keep = [], True
    for flag in flags:
        if flag.startswith("--"):
            keep = flag.split("=")[0] not in names
        if keep:
            kept.append(flag)
    return kept


def command(name: str, scale: str, flags: list[str]) -> str:
    """The command that repeats a run; where it lies is no part of a record."""
    scales = [] if scale == "cpu" else ["--scale", scale]
    return shlex.join(["python", "-m", f"experiments.{name}", *scales, *without(flags, "--run.folder", "--folder")])


def recordable(scale: str, flags: list[str]) -> str:
    """The commit that a record will name; refuses what cannot be repeated from it."""
    with door():
        if scale == "smoke":
            raise ValueError("a smoke run is no result: record scale cpu or paper")
        if any(flag.startswith("--data.folder") or "images:" in flag for flag in flags):
            raise ValueError(
                "a recorded command holds no path to data: use a named set, and AIGC_DATA instead of --data.folder"
            )
        try:
            dirty = _git("status", "--porcelain", "--", ".", ":!results", ":!docs/reproduction.md")
        except (OSError, subprocess.CalledProcessError) as e:
            raise ValueError("--record needs a git checkout: a row names its commit") from e
        if dirty:
            raise ValueError("the tree has uncommitted changes: commit first, so that the row's commit is what ran")
        return _git("rev-parse", "--short=12", "HEAD")


def check_began_at(commit: str, folder: Path) -> None:
    """Refuses to record what an older commit, or changed files, began to train."""
    for path in folder.rglob("run.json"):
        if (began := folders.read(path.parent)["environment"].get("commit")) != commit:
            raise ValueError(
                f"{path.parent} began at commit {began or 'unknown'}, not {commit}: record from a new folder"
            )


def table() -> str:
    """docs/reproduction.md, made from results/*.json."""
    out = [
        "# What was reproduced",
        "",
        "Made by `python -m experiments table` from `results/*.json`; do not edit. Scale *cpu* is the paper's effect",
        "at reduced scale; only scale *paper* follows the published protocol. A failing row stays.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        r = json.loads(path.read_text())
        e = r["environment"]
        out += [
            "",
            f"## {r['name']}: {r['title']}",
            "",
            f"`{r['command']}`",
            "",
            f"Scale {r['scale']}; differs from the paper: {r['difference'] or 'nothing'}. "
            f"{'Data: ' + r['data'] + '. ' if r['data'] else ''}Seeds: {r['seeds']}. "
            f"Commit {r['commit']}; {r['seconds']:g} s{' (continued)' if r['continued'] else ''} "
            f"on {e['device']}, {e['cores']} cores; jax {e['jax']}.",
            "",
            "| quantity | paper | ours | +- | oracle | verdict |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in r["rows"]:
            cells = (
                row["quantity"],
                *map(number, (row["paper"], row["ours"], row["error"], row["oracle"])),
                row["verdict"],
            )
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(out) + "\n"


def write_table() -> None:
    """Writes docs/reproduction.md."""
    TABLE.write_text(table())
