"""What the scripts share: flags, rows, records. A script is a module with

SCALES      {"smoke": Setup, "cpu": Setup, "paper": Setup}: a frozen dataclass; its fields are the flags
DIFFERENCE  {scale: how this scale differs from the paper's protocol}; "" where it does not
CRITERIA    {quantity: (what must hold, as words; the same as a function of ours)}; a quantity that a run did not
            come to is a row of NOT_REACHED, and fails; one without a row is shown as not measured
INVARIANTS  the same for scale smoke, where a run is too short for the criteria; a failing one is exit code 1
rows(setup, folder) -> list of Row: trains, draws its figures into the folder, measures. What may fail after the
            training stands in `with costs(QUANTITY, ...)`, so that it costs these rows and not the run; rows in a list
            from `kept` outlast a failure

A script may have more than one set of scales: FIRST = {"family": ("vae", "gan")} makes --family a flag, its first
choice the default, and scales(family) returns the SCALES of a choice.

`python -m experiments.<name>` runs it at scale cpu; --scale first, other flags override.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import dataclasses
import importlib
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aigc_jax import data, train
from aigc_jax.__main__ import quiet_pipe, write_traceback
from aigc_jax.train import folder as folders
from aigc_jax.train.engine import compilation_cache
from aigc_jax.train.folder import environment, write_json

NOT_REACHED = "not reached"
PLACES = ("folder", "init", "weights", "name", "tokenizer")  # flags, by their last part, whose values may be paths
# What a user can mend in the flags, as long as no training has begun.
MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = ROOT / "results", ROOT / "docs" / "reproduction.md"


class Row(NamedTuple):
    """One line of the results table; numbers in the unit that the quantity names."""

    quantity: str
    ours: float | str | None
    paper: float | str | None = None
    error: float | None = None  # standard error over seeds, or of the estimate (the quantity says which)
    oracle: float | str | None = None  # what exact mathematics says, where it says something
    reason: str | Exception | None = None  # why there is no number of ours


@dataclasses.dataclass(frozen=True)
class Source:
    """The data set of an experiment."""

    name: str = "digits"
    folder: str | None = None  # where its original files lie; else AIGC_DATA, a prepared copy, the network
    size: int | None = None  # of images:FOLDER, its pictures are resized and cut to size x size
    tokenizer: str = ""  # of text: characters, bpe:N, a tokenizer.json or a folder with GPT-2's files; "": the script's

    @property
    def pictures(self) -> bool:
        """Whether these are the user's own pictures."""
        return self.name.startswith("images:")

    def load(self, split: str, **options) -> data.Data:
        if self.size is not None:
            options["size"] = self.size
        if self.tokenizer:
            options["tokenizer"] = self.tokenizer
        return data.load(self.name, split, folder=self.folder, **options)


@contextlib.contextmanager
def door() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; a fault of ours one line and exit code 1, its traceback a file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as e:
        raise SystemExit(_error(e, 2)) from e
    except Exception as e:
        raise SystemExit(_fault(e)) from e


def _error(e: BaseException | str, code: int) -> int:
    print(f"error: {e}", file=sys.stderr)
    return code


def _fault(e: Exception) -> int:
    return _error(f"{_why(e)} (its traceback is in {write_traceback([e])})", 1)


# The lists of rows that the script under `main` has made so far; None outside of main.
_made: contextvars.ContextVar[list[list[Row]] | None] = contextvars.ContextVar("rows", default=None)


def kept() -> list[Row]:
    """A new list for rows; those in it are written to rows.json also where the script fails later."""
    rows: list[Row] = []
    if (made := _made.get()) is not None:
        made.append(rows)
    return rows


@contextlib.contextmanager
def costs(*quantities: str) -> Iterator[None]:
    """What fails inside costs these rows, or these figures, and not the run: each is listed with the reason.

    For what follows the training: measurements, samples, figures; also a decorator of a function that returns nothing.
    What ends a training (NonFinite, SaveFailed, ReadFailed) goes through. Outside of `main` everything does.
    """
    try:
        yield
    except (train.NonFinite, train.SaveFailed, train.ReadFailed, BrokenPipeError):
        raise
    except Exception as e:
        if (made := _made.get()) is None:
            raise
        made.append([Row(quantity, None, reason=e) for quantity in quantities])


def _why(reason: str | BaseException) -> str:
    """One line for a reason; of an exception that nobody meant for the user's eyes its type as well."""
    meant = isinstance(reason, str | ValueError | OSError | train.NonFinite) and str(reason)
    words = str(reason) if meant else f"{type(reason).__name__}: {reason}"
    return " ".join(words.split()) if len(words) <= 500 else " ".join(words[:500].split()) + " ..."


def _is_bug(reason) -> bool:
    return isinstance(reason, BaseException) and not isinstance(reason, ValueError | OSError | train.NonFinite)


def verdict(row: Row, criteria: dict) -> str:
    """Whether a row's criterion holds, with its words, or why the row was not measured; empty where there is none."""
    if row.ours is None and row.reason is not None:
        return f"not measured: {_why(row.reason)}"
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
    if not 1 <= seeds <= 1000:
        raise ValueError(f"seeds must lie in 1..1000, got {seeds}")
    if seeds == 1:
        return [run]
    folder = Path(run.folder)
    return [
        dataclasses.replace(run, seed=s, folder=str(folder / f"seed{s}")) for s in range(run.seed, run.seed + seeds)
    ]


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()


def _show(name: str, scale: str, rows: list[Row], verdicts: list[str], difference: str) -> None:
    title = f"{name} ({scale}{': ' + difference if difference else ''})"
    table = Table(title=Text(title), title_justify="left")  # Text: what stands in brackets is no markup
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
        table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def number(value: Any) -> str:
    """A number for a table: four digits, a whole one all of its own, or a dash."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.4g}"


def expanded(args: list[str]) -> list[str]:
    """The arguments with ~ expanded in the values of flags that name a place."""
    found, flag = [], ""
    for arg in args:
        flag, joined, value = arg.partition("=") if arg.startswith("--") else (flag, "", arg)
        if arg.startswith("--") and not joined:
            found.append(arg)
            continue
        kind, colon, path = value.rpartition(":") if value.startswith(("images:", "text:")) else ("", "", value)
        if flag.rpartition(".")[2].lstrip("-") in PLACES and path.startswith("~"):
            value = f"{kind}{colon}{os.path.expanduser(path)}"
        found.append(f"{flag}={value}" if joined else value)
    return found


def parse(name: str, script, args: list[str]) -> tuple[Any, str, bool, list[str]]:
    """(setup, scale, whether to record, the other flags) as the arguments ask for them.

    The scale, and before it the script's FIRST choices, say which setup holds the defaults, so they are looked for
    first. Then all flags are read at once and --help shows them all. Wrong ones end in a box and exit code 2.
    """
    wanted = dict(getattr(script, "FIRST", {}))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (*wanted, "scale"):
        first.add_argument(f"--{flag}", nargs="?")
    first.add_argument("--record", action="store_true")
    said, flags = first.parse_known_args(args)
    chosen = {flag: getattr(said, flag) for flag in wanted}
    chosen = {flag: value if value in wanted[flag] else wanted[flag][0] for flag, value in chosen.items()}
    scales = script.scales(**chosen) if wanted else script.SCALES
    scale = said.scale if said.scale in scales else "cpu"
    wanted, chosen = {**wanted, "scale": tuple(scales)}, {**chosen, "scale": scale}
    keep = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="keep the rows in results/")]
    whole = dataclasses.make_dataclass(
        "Flags",
        [
            *((flag, Literal[options], chosen[flag]) for flag, options in wanted.items()),
            ("record", keep, False),
            ("setup", Annotated[type(scales[scale]), tyro.conf.arg(name="")], dataclasses.field(default=scales[scale])),
        ],
    )
    with door():
        read = tyro.cli(whole, args=args, description=script.__doc__, prog=f"python -m experiments.{name}")
    others = [f"--{flag}={value}" for flag, value in chosen.items() if flag != "scale" and value != wanted[flag][0]]
    return read.setup, scale, read.record, [*others, *flags]


def _begun(folder: Path) -> dict:
    """Which runs lie in a folder, and when each was last started: fit writes run.json at every start."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}


def measured(script, setup, folder: Path) -> tuple[list[Row], Exception | None]:
    """The rows of a script, and what ended it before its end, if anything did.

    What is refused before a training has begun is one line and exit code 2, and so is a path that is wrong. Anything
    else that goes wrong there is one line and exit code 1.
    """
    before, made, failed = _begun(folder), [], None
    token = _made.set(made)
    try:
        rows = list(script.rows(setup, folder))
    except BrokenPipeError:
        raise
    except Exception as e:
        if not any(made) and _begun(folder) == before:
            raise SystemExit(_fault(e) if _is_bug(e) else _error(_why(e), 2 if isinstance(e, MISTAKES) else 1)) from e
        rows, failed = [], e
    finally:
        _made.reset(token)
    for some in made:  # what was measured stands before the reasons, in the lists of `kept`
        there = {row.quantity for row in rows}
        rows += [row for row in some if row.quantity not in there]
    return rows, failed


@quiet_pipe()
def main(name: str) -> None:
    """Runs experiments.<name> with the flags of this process."""
    # The script's importable twin, so that a run folder can name what made it.
    script = importlib.import_module(f"experiments.{name}")
    setup, scale, record, flags = parse(name, script, expanded(sys.argv[1:]))
    if record:
        commit = recordable(scale, flags)
    compilation_cache()

    with door():
        if not getattr(setup, "run", setup).folder:
            raise ValueError("an experiment needs a folder to write to (--run.folder, or --folder)")
        folder = Path(getattr(setup, "run", setup).folder)
        if record:
            check_began_at(commit, folder)
    begin, continued = time.monotonic(), folder.exists()
    try:
        rows, failed = measured(script, setup, folder)
    except KeyboardInterrupt as e:
        raise SystemExit(_error("interrupted", 130)) from e
    criteria = script.INVARIANTS if scale == "smoke" else script.CRITERIA
    source = getattr(setup, "data", Source())
    if ":" in source.name or source.tokenizer:  # criteria are of named sets: one's own may well be harder
        criteria = {}
    there = {row.quantity for row in rows}
    rows += [Row(quantity, None, reason=failed) for quantity in criteria if quantity not in there]
    verdicts = [verdict(row, criteria) for row in rows]
    seconds = round(time.monotonic() - begin, 1)
    # Flags that change what is compared; the record says the data set and the seeds by themselves.
    changed = without(flags, "--run.folder", "--folder", "--data.folder", "--data.name", "--seeds")
    difference = "; but with ".join(words for words in (script.DIFFERENCE[scale], " ".join(changed)) if words)
    result = {
        "name": name,
        "title": script.__doc__.splitlines()[0],
        "command": command(name, scale, flags),
        "scale": scale,
        "difference": difference,
        "data": setup.data.name if hasattr(setup, "data") else None,
        "seeds": getattr(setup, "seeds", 1),
        "seconds": seconds,
        "continued": continued,
        "environment": environment(),
        "rows": [as_json(row, said) for row, said in zip(rows, verdicts, strict=True)],
    }  # fmt: skip
    errors = [row.reason for row in rows if isinstance(row.reason, Exception)] + ([failed] if failed else [])
    try:
        _leave(folder, result, errors)
    finally:
        _show(name, scale, rows, verdicts, difference)
    print(f"{seconds} s; figures and rows in {folder}/")
    serious = [e for e in errors if e is failed or not isinstance(e, ValueError)]  # a ValueError is said in its row
    if serious:
        raise SystemExit(_error(_why(serious[-1]), 1))
    if record:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{name}.json", {**result, "commit": commit})
        write_table()
        print(f"recorded in results/{name}.json and docs/reproduction.md")
    if scale == "smoke" and any(v.startswith(("FAILS", "not measured")) for v in verdicts):
        raise SystemExit(1)


def _leave(folder: Path, result: dict, errors: list[Exception]) -> None:
    """Writes rows.json, and the tracebacks of what was a fault of ours into error.txt."""
    bugs = list({id(e): e for e in errors if _is_bug(e)}.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "rows.json", result)
        if bugs:
            print(f"the traceback is in {write_traceback(bugs, folder / 'error.txt')}", file=sys.stderr)
        else:
            (folder / "error.txt").unlink(missing_ok=True)
    except OSError as e:
        raise SystemExit(_error(e, 1)) from e


def as_json(row: Row, said: str) -> dict:
    """A row as rows.json keeps it, with its verdict; a reason stands only where there is one."""
    reason = {} if row.reason is None else {"reason": _why(row.reason)}
    values = {name: value for name, value in row._asdict().items() if name != "reason"}
    return {**values, "verdict": said, **reason}


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
        if any(flag.startswith("--data.folder") or "images:" in flag or "text:" in flag for flag in flags):
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
    from . import _report

    return _report.page(RESULTS)


def write_table() -> None:
    """Writes docs/reproduction.md."""
    TABLE.write_text(table())
