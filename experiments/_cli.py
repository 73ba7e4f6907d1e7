"""The command line that all scripts share: `python -m experiments.NAME --scale SCALE --other.flags ...`

A script is a module with

SCALES      {name: Scale(setup, difference)} for the scales smoke, cpu and, where it has one, paper.
            A setup is a frozen dataclass, whose fields are the flags. The difference from the
            paper's protocol is "" where there is none.
CRITERIA    {quantity: criterion}: what must hold of a row, in words that are parsed (see _criteria)
INVARIANTS  the same for scale smoke, which is too short for the criteria; one that is not met
            gives exit code 1
run(setup, folder) -> list of Row: trains, measures, calls plot
plot(...)   draws the figure into the folder from what was measured

A criterion whose row is missing is shown as not measured. A row of NOT_REACHED does not meet its
criterion. Put each measurement after the training inside `with costs(QUANTITY, ...)`: if it fails,
only these rows are lost. Rows in a list from `kept` are written even if the script fails later.
Data that cannot be used raise DataError: one line and exit code 2.

A script may have more than one set of scales: FIRST = {"family": ("vae", "gan")} makes --family a
flag, its first choice the default, and scales(family) returns the SCALES of a choice.
docs/your_own_experiment.md shows a whole script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aigc_jax.__main__ import quiet_pipe, write_traceback
from aigc_jax.train import Run, connect, processes
from aigc_jax.train.engine import compilation_cache
from aigc_jax.train.folder import environment, write_json
from experiments import _criteria
from experiments._record import (
    RESULTS,
    ROOT,
    TABLE,
    check_began_at,
    command,
    recordable,
    table,
    without,
    write_table,
)
from experiments._rows import (
    NOT_REACHED,
    DataError,
    Row,
    as_json,
    collected,
    costs,
    is_bug,
    kept,
    mean_and_error,
    number,
    plain,
    verdict,
    why,
)
from experiments._runs import (
    Source,
    arrays,
    at_least,
    change,
    clock,
    history,
    parameters,
    seeded,
    weights,
)

__all__ = [
    "NOT_REACHED",
    "RESULTS",
    "ROOT",
    "TABLE",
    "DataError",
    "Row",
    "Scale",
    "Source",
    "arrays",
    "at_least",
    "change",
    "clock",
    "costs",
    "history",
    "kept",
    "main",
    "mean_and_error",
    "number",
    "parameters",
    "seeded",
    "table",
    "verdict",
    "weights",
    "write_table",
]

# The last parts of flags whose values may be paths.
PLACES = (
    "folder",
    "init",
    "weights",
    "name",
    "tokenizer",
    "clip",
    "autoencoder",
    "ship",
)
# Before a training has begun, these errors come from wrong flags. The exit code is then 2.
MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class Scale(NamedTuple):
    """How large an experiment is, and what that changes."""

    setup: Any  # a frozen dataclass; its fields are the flags
    difference: str = ""  # from the paper's protocol


class Asked(NamedTuple):
    """What the flags ask for."""

    setup: Any
    scale: str
    difference: str  # of the scale, from the paper's protocol
    record: bool
    flags: list[str]  # all others, as they were typed


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line: exit code 2 for a user's mistake, 1 for a fault of ours.

    The traceback of a fault is written to a file, which the line names.
    """
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
    return _error(f"{why(e)} (its traceback is in {write_traceback([e])})", 1)


def _show(name: str, scale: str, rows: list[Row], verdicts: list[str], difference: str) -> None:
    title = f"{name} ({scale}{': ' + difference if difference else ''})"
    shown_table = Table(
        title=Text(title), title_justify="left"
    )  # Text: what stands in brackets is no markup
    columns = {
        "quantity": [plain(row.quantity) for row in rows],
        "paper": [number(row.paper) for row in rows],
        "ours": [number(row.ours) for row in rows],
        "+-": [number(row.error) for row in rows],
        "oracle": [number(row.oracle) for row in rows],
        "verdict": [plain(words) for words in verdicts],
    }
    shown = {column: cells for column, cells in columns.items() if set(cells) - {"-", ""}}
    for column in shown:
        shown_table.add_column(column)
    for cells in zip(*shown.values(), strict=True):
        shown_table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else 160).print(shown_table)


def expanded(args: list[str]) -> list[str]:
    """Returns the arguments with ~ expanded in the values of flags that name a file or folder."""
    found, flag = [], ""
    for arg in args:
        flag, joined, value = arg.partition("=") if arg.startswith("--") else (flag, "", arg)
        if arg.startswith("--") and not joined:
            found.append(arg)
            continue
        kind, colon, path = (
            value.rpartition(":")
            if value.startswith(("images:", "pairs:", "text:"))
            else ("", "", value)
        )
        if flag.rpartition(".")[2].lstrip("-") in PLACES and path.startswith("~"):
            value = f"{kind}{colon}{os.path.expanduser(path)}"
        found.append(f"{flag}={value}" if joined else value)
    return found


def parse(name: str, script, args: list[str]) -> Asked:
    """Reads the flags of a script.

    The scale, and before it the script's FIRST choices, decide which setup holds the defaults. So
    they are looked for first. Then all flags are read at once, and --help shows them all. Wrong
    flags end in a box and exit code 2.
    """
    choices = dict(getattr(script, "FIRST", {}))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (*choices, "scale"):
        first.add_argument(f"--{flag}", nargs="?")
    first.add_argument("--record", action="store_true")
    typed, flags = first.parse_known_args(args)
    chosen = {flag: getattr(typed, flag) for flag in choices}
    chosen = {
        flag: value if value in choices[flag] else choices[flag][0]
        for flag, value in chosen.items()
    }
    scales = script.scales(**chosen) if choices else script.SCALES
    scale = typed.scale if typed.scale in scales else "cpu"
    setup = scales[scale].setup
    choices, chosen = {**choices, "scale": tuple(scales)}, {**chosen, "scale": scale}
    record = Annotated[
        tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="keep the rows in results/")
    ]
    all_flags = dataclasses.make_dataclass(
        "Flags",
        [
            *((flag, Literal[options], chosen[flag]) for flag, options in choices.items()),
            ("record", record, False),
            (
                "setup",
                Annotated[type(setup), tyro.conf.arg(name="")],
                dataclasses.field(default=setup),
            ),
        ],
    )
    with one_line_errors():
        read = tyro.cli(
            all_flags, args=args, description=script.__doc__, prog=f"python -m experiments.{name}"
        )
    others = [
        f"--{flag}={value}"
        for flag, value in chosen.items()
        if flag != "scale" and value != choices[flag][0]
    ]
    return Asked(read.setup, scale, scales[scale].difference, read.record, [*others, *flags])


def _begun(folder: Path) -> dict:
    """Returns which runs lie in a folder, and when each was last started: fit writes run.json at
    every start.
    """
    return {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}


def measured(script, setup, folder: Path) -> tuple[list[Row], Exception | None]:
    """Returns the rows of a script, and the exception that ended it early, if one did.

    Before a training has begun, a failure ends the program with one line. The exit code is 2 for
    data that cannot be used, a refused flag or a wrong path, and 1 for anything else.
    """
    before, failed = _begun(folder), None
    with collected() as made:
        try:
            rows = list(script.run(setup, folder))
        except BrokenPipeError:
            raise
        except Exception as e:
            if _begun(folder) == before and not any(made):
                if isinstance(e, DataError):
                    raise SystemExit(_error(e, 2)) from e
                code = 2 if isinstance(e, MISTAKES) else 1
                raise SystemExit(_fault(e) if is_bug(e) else _error(why(e), code)) from e
            rows, failed = [], e
    for some in made:  # the lists of `kept` come before the reasons
        there = {row.quantity for row in rows}
        rows += [row for row in some if row.quantity not in there]
    return rows, failed


@quiet_pipe()
def main(name: str) -> None:
    """Runs experiments.<name> with the flags of this process."""
    # The script runs as `__main__`. Import it by its own name too, because run.json records that.
    script = importlib.import_module(f"experiments.{name}")
    asked = parse(name, script, expanded(sys.argv[1:]))
    setup, scale, flags = asked.setup, asked.scale, asked.flags
    if asked.record:
        with one_line_errors():
            commit = recordable(scale, flags)
    compilation_cache()
    with one_line_errors():
        if isinstance(run := getattr(setup, "run", setup), Run):
            connect(run)
        if not getattr(setup, "run", setup).folder:
            raise ValueError("an experiment needs a folder to write to (--run.folder, or --folder)")
        folder = Path(getattr(setup, "run", setup).folder)
        if asked.record:
            check_began_at(commit, folder)
        criteria = criteria_of(script, asked)
    begin, continued = time.monotonic(), folder.exists()
    try:
        rows, failed = measured(script, setup, folder)
    except KeyboardInterrupt as e:
        raise SystemExit(_error("interrupted", 130)) from e
    if failed is not None:
        processes.failed()
    if jax.process_index():  # of several processes the first one reports
        raise SystemExit(_error(why(failed), 1) if failed else 0)
    there = {row.quantity for row in rows}
    rows += [Row(quantity, None, reason=failed) for quantity in criteria if quantity not in there]
    verdicts = [verdict(row, criteria) for row in rows]
    result = describe(name, script, asked)
    result |= {
        "seconds": round(time.monotonic() - begin, 1),
        "continued": continued,
        "environment": environment(),
        "rows": [as_json(row, words) for row, words in zip(rows, verdicts, strict=True)],
    }
    errors = [row.reason for row in rows if isinstance(row.reason, Exception)] + (
        [failed] if failed else []
    )
    try:
        _leave(folder, result, errors)
    finally:
        _show(name, scale, rows, verdicts, result["difference"])
    print(f"{result['seconds']} s; figures and rows in {folder}/")
    serious = [
        e for e in errors if e is failed or not isinstance(e, ValueError)
    ]  # a row shows its ValueError
    if serious:
        raise SystemExit(_error(why(serious[-1]), 1))
    if asked.record:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{name}.json", {**result, "commit": commit})
        write_table()
        print(f"recorded in results/{name}.json and docs/reproduction.md")
    if scale == "smoke" and any(v.startswith(("not met", "not measured")) for v in verdicts):
        raise SystemExit(1)


def criteria_of(script, asked: Asked) -> dict[str, _criteria.Criterion]:
    """Returns the criteria of a run, parsed. They hold for named sets only: for your own data
    there are none.
    """
    source = getattr(asked.setup, "data", Source())
    if ":" in source.name or source.tokenizer:
        return {}
    criteria = script.INVARIANTS if asked.scale == "smoke" else script.CRITERIA
    for criterion in criteria.values():
        _criteria.parse(criterion)
    return criteria


def describe(name: str, script, asked: Asked) -> dict:
    """Returns what rows.json says of a run before it has any rows."""
    setup = asked.setup
    # Flags that change what is compared; the data set and the seeds have entries of their own.
    changed = without(
        asked.flags,
        "--run.folder",
        "--folder",
        "--data.folder",
        "--data.name",
        "--seeds",
        "--ship",
        "--run.coordinator",
        "--run.processes",
        "--run.process",
    )
    return {
        "name": name,
        "title": script.__doc__.splitlines()[0],
        "command": command(name, asked.scale, asked.flags),
        "scale": asked.scale,
        "difference": "; but with ".join(
            words for words in (asked.difference, " ".join(changed)) if words
        ),
        "data": setup.data.name if hasattr(setup, "data") else None,
        "seeds": getattr(setup, "seeds", 1),
    }


def _leave(folder: Path, result: dict, errors: list[Exception]) -> None:
    """Writes rows.json, and the tracebacks of our own faults into error.txt."""
    bugs = list({id(e): e for e in errors if is_bug(e)}.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "rows.json", result)
        if bugs:
            print(
                f"the traceback is in {write_traceback(bugs, folder / 'error.txt')}",
                file=sys.stderr,
            )
        else:
            (folder / "error.txt").unlink(missing_ok=True)
    except OSError as e:
        raise SystemExit(_error(e, 1)) from e
